"""Datasets of Hugging Face train a flow as the arrays in them do."""

import pytest
import torch

import cnf
from cnf.training.stream import IndexedRows

datasets = pytest.importorskip("datasets")

CONFIG = cnf.TrainConfig(steps=4, batch_size=32, progress=False)


@pytest.fixture
def rows(generator):
    x = torch.randn(200, 2, generator=generator)
    return {"x": x, "context": x[:, :1].abs()}


@pytest.fixture
def dataset(rows):
    return datasets.Dataset.from_dict({k: v.tolist() for k, v in rows.items()})


def weights(data, **options):
    torch.manual_seed(0)
    flow = cnf.models.nsf(2, context=1, hidden=(16, 16), layers=2)
    cnf.fit(flow, cnf.MaximumLikelihood(), data, CONFIG, **options)
    return torch.cat([p.flatten() for p in flow.parameters()])


@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_dataset_trains_as_its_rows_do(rows, dataset, kind):
    wanted = weights(cnf.Batch(**rows))
    assert torch.equal(weights(dataset.with_format(kind)), wanted)


def test_rows_are_read_at_once(dataset, monkeypatch):
    asked, read = [], datasets.Dataset.__getitem__
    monkeypatch.setattr(
        datasets.Dataset, "__getitem__", lambda self, key: asked.append(key) or read(self, key)
    )
    assert len(IndexedRows(dataset.with_format("torch"))[torch.arange(150)].x) == 150
    assert asked == [list(range(150))]


def test_streamed_dataset_gives_batches(dataset):
    batches = dataset.to_iterable_dataset().with_format("torch").batch(32)
    assert weights(batches).isfinite().all()


def test_held_out_dataset_is_scored(dataset):
    split = dataset.with_format("torch").train_test_split(0.2)
    weights(split["train"], validation=split["test"])


def test_dataset_of_lists_is_refused_with_what_to_write(dataset):
    with pytest.raises(ValueError, match=r"got a list as x; .*with_format\('torch'\)"):
        weights(dataset)
