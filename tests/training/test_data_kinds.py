"""Types of data that `fit` accepts, and contexts that follow their rows."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import cnf
from cnf.objectives import Objective
from cnf.training import stream
from cnf.training.stream import as_stream

ROWS = torch.randn(100, 2, generator=torch.Generator().manual_seed(3))
CONTEXT = torch.cat([ROWS, ROWS.sum(1, keepdim=True)], 1)  # each row's context tells which it is


class Pairs(Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, row):
        return ROWS[row], CONTEXT[row]


class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield ROWS[:16]


class Counted(IterableDataset):
    def __iter__(self):
        return iter(ROWS[:96].split(16))

    def __len__(self):
        return 6


KINDS = {
    "toy": lambda: cnf.data.toy("moons"),
    "tensor": lambda: ROWS,
    "float64 tensor": lambda: ROWS.double(),
    "array": lambda: ROWS.numpy(),
    "float64 array": lambda: ROWS.double().numpy(),
    "map-style dataset of x": lambda: TensorDataset(ROWS),
    "list of batches": lambda: list(ROWS.split(16)),
    "list of array batches": lambda: [part.numpy() for part in ROWS.split(16)],
    "DataLoader": lambda: DataLoader(TensorDataset(ROWS), batch_size=16),
    "iterable dataset": Endless,
    "iterable dataset with a length": Counted,
    "points": lambda: cnf.data.load(ROWS),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", [cnf.FlowMatching(), cnf.MaximumLikelihood()])
def test_every_type_of_data_trains(kind, objective, small, config, same):
    flow = small()
    history = cnf.fit(flow, objective, KINDS[kind](), config(steps=8))
    assert (history.steps, history.skipped) == (8, 0)
    assert not same(flow, small())
    assert all(p.dtype == torch.float32 for p in flow.parameters())


@pytest.mark.parametrize("name", ["mine.npy", "mine.csv"])
def test_points_from_a_file_train_like_a_tensor(name, small, config, same, tmp_path):
    path = tmp_path / name
    np.save(path, ROWS) if name.endswith("npy") else np.savetxt(path, ROWS, delimiter=",")
    of_file, of_tensor = small(), small()
    cnf.fit(of_file, cnf.FlowMatching(), cnf.data.load(path), config())
    cnf.fit(of_tensor, cnf.FlowMatching(), ROWS, config())
    assert same(of_file, of_tensor)


@pytest.mark.parametrize("kind", ["array", "map-style dataset of x", "points"])
def test_datasets_and_loaders_of_the_same_rows_train_like_a_tensor(kind, small, config, same):
    one, other = small(), small()
    cnf.fit(one, cnf.FlowMatching(), ROWS, config())
    cnf.fit(other, cnf.FlowMatching(), KINDS[kind](), config())
    assert same(one, other)


def test_order_of_a_shuffled_dataloader_does_not_depend_on_global_random_state(
    small, config, same
):
    def train(seed):
        torch.manual_seed(seed)
        flow = small()
        loader = DataLoader(TensorDataset(ROWS[:96]), batch_size=16, shuffle=True)
        before = torch.random.get_rng_state()
        cnf.fit(flow, cnf.FlowMatching(), loader, config(steps=9))
        assert torch.equal(before, torch.random.get_rng_state())
        return flow

    assert same(train(1), train(2))


def test_shuffled_dataloader_has_another_order_in_each_pass(config, square):
    loader = DataLoader(TensorDataset(ROWS[:96]), batch_size=16, shuffle=True)
    cnf.fit(nn.Linear(2, 2), square, loader, config(steps=12, validations=0))
    first, second = torch.cat(square.batches[:6]), torch.cat(square.batches[6:])
    assert torch.equal(first.sort(0).values, second.sort(0).values)
    assert not torch.equal(first, second)


def test_iterable_is_restarted_when_it_ends(config, square):
    batches = list(ROWS[:48].split(16))
    cnf.fit(nn.Linear(2, 2), square, batches, config(steps=7))
    assert all(torch.equal(square.batches[k], batches[k % 3]) for k in range(7))


@pytest.mark.parametrize("data", ["tensors", "arrays", "dataset", "batches"])
def test_context_follows_its_rows(data, config, square):
    context = None
    if data == "tensors":
        data, context = ROWS, CONTEXT
    elif data == "arrays":
        data, context = ROWS.numpy(), CONTEXT.numpy()
    elif data == "dataset":
        data = Pairs()
    else:
        data = list(zip(ROWS.split(16), CONTEXT.split(16), strict=True))
    cnf.fit(nn.Linear(2, 2), square, data, config(steps=12), context=context)
    x, c = torch.cat(square.batches), torch.cat(square.contexts)
    assert len(x.unique(dim=0)) >= 80
    assert torch.equal(c[:, :2], x)


@pytest.mark.parametrize("objective", [cnf.FlowMatching(), cnf.MaximumLikelihood()])
def test_conditional_flow_trains_and_is_validated_with_its_context(objective, small, config):
    flow = small(context=3)
    history = cnf.fit(flow, objective, ROWS, config(steps=20), context=CONTEXT)
    assert history.steps == 20 and len(history.column("val_nll")) == 10
    field = flow.field
    used = [p for p in field.parameters() if p.dim() == 2]
    assert all(torch.isfinite(p).all() for p in used)


def test_conditional_flow_learns_dependence_on_its_context(small, config):
    """x ~ N(±3, 0.1²) with the sign in the context: rows that lost their context would be two
    lumps, and cost log 2 and more."""
    sign = torch.where(torch.arange(512) % 3 == 0, 1.0, -1.0)[:, None]
    x = 3 * sign + 0.1 * torch.randn(512, 2, generator=torch.Generator().manual_seed(0))
    flow = small("realnvp", context=1, hidden=(16,), layers=2)
    settings = config(steps=150, batch_size=128, lr=2e-2, ema=0.9)
    cnf.fit(flow, cnf.MaximumLikelihood(), x, settings, context=sign)
    for value in (1.0, -1.0):
        drawn = flow.sample((200,), torch.full((1,), value))
        assert (drawn[:, 0] * value > 2).float().mean() > 0.9


class Encoder(nn.Module):
    """A tiny variational autoencoder's parts."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(2, 2), nn.Linear(1, 2)


class Elbo(Objective):
    def prepare(self, module, batch, generator=None):
        noise = torch.randn(len(batch.x), 1, generator=generator)
        return cnf.Batch(batch.x, x0=noise)

    def __call__(self, module, batch, generator=None):
        mean, log_scale = module.encode(batch.x).split(1, 1)
        z = mean + log_scale.exp() * batch.x0
        error = (module.decode(z) - batch.x).square().sum(1)
        kl = 0.5 * (mean.square() + (2 * log_scale).exp() - 2 * log_scale - 1).sum(1)
        value = (error + kl).mean()
        return cnf.Loss(value, {"error": error.mean().detach()})


def test_any_module_trains_with_a_custom_objective(config, tmp_path):
    folder = tmp_path / "run"
    settings = config(steps=60, lr=5e-2, folder=folder, ema=0.5)
    history = cnf.fit(Encoder(), Elbo(), ROWS, settings)
    assert history.column("loss")[-1] < history.column("loss")[0]
    assert len(history.column("val_loss")) == 10 and history.column("val_nll") == []
    assert history.column("val_loss")[-1] < history.column("val_loss")[0]
    assert "error" in (folder / "metrics.csv").read_text().splitlines()[0]


class Target(Objective):
    """Needs no data: reverse KL's kind."""

    def prepare(self, module, batch, generator=None):
        return cnf.Batch(torch.randn(len(batch.x), 2, generator=generator))

    def __call__(self, module, batch, generator=None):
        assert len(batch.x) == 16
        return cnf.Loss((module(batch.x) - 1).square().mean(), {})


def test_training_without_data_if_the_objective_needs_none(config):
    net = nn.Linear(2, 2)
    history = cnf.fit(net, Target(), None, config(steps=300, lr=3e-2, ema=None))
    assert history.column("loss")[-1] < 0.1
    assert history.column("val_loss") == []


def test_float64_module_takes_float32_data_and_stays_float64(small, config):
    for objective in (cnf.FlowMatching(), cnf.MaximumLikelihood()):
        flow = small().double()
        cnf.fit(flow, objective, ROWS, config())
        assert all(p.dtype == torch.float64 for p in flow.parameters())
        assert flow.log_prob(ROWS.double()).dtype == torch.float64


RECIPES = [("cnf", cnf.FlowMatching()), ("cnf", cnf.MaximumLikelihood()), ("realnvp", None)]


@pytest.mark.parametrize(("name", "objective"), RECIPES)
def test_training_does_not_depend_on_an_offset_of_the_data(
    name, objective, small, config, tmp_path
):
    objective = objective or cnf.MaximumLikelihood()
    near, far = small(name), small(name)
    x = ROWS.double()
    histories = [
        cnf.fit(flow, objective, given.numpy(), config(steps=30), validation=given[:20])
        for flow, given in ((near, x), (far, 1e8 + x))
    ]
    # equal but for the rounding of 1e8 + x in float64, 1.5e-8
    losses = [torch.tensor(history.column("loss")) for history in histories]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-3)
    assert histories[1].column("val_nll")[-1] == pytest.approx(
        histories[0].column("val_nll")[-1], abs=1e-3
    )
    wanted = near.log_prob(x)
    loaded = cnf.load(cnf.training.save(far, tmp_path / "flow.safetensors"))
    copies = [far, loaded, copy.deepcopy(far).float(), copy.deepcopy(far).double()]
    for flow in copies:
        torch.testing.assert_close(flow.log_prob(1e8 + x), wanted, rtol=0, atol=1e-3)
        drawn = flow.sample(500, generator=torch.Generator().manual_seed(0))
        assert drawn.dtype == torch.float64 and 0.3 < drawn.std() < 3
    assert all(p.dtype == torch.float32 for p in far.parameters())


def test_columns_that_float32_does_not_resolve_are_refused_by_name(small, config):
    x = torch.stack([ROWS[:, 0].double(), 1.7e9 + ROWS[:, 1].double()], 1)
    points = cnf.data.Points(x, columns=["height", "seconds"])
    with pytest.raises(
        ValueError, match=r"fit: torch.float32 merges .* of column 'seconds'; build"
    ):
        cnf.fit(small(preprocess=None), cnf.FlowMatching(), points, config())
    with pytest.raises(ValueError, match=r"of column 1; build"):
        cnf.fit(nn.Linear(2, 2), Target(), x, config())
    cnf.fit(small(preprocess=None), cnf.FlowMatching(), x - x.mean(0), config())


def test_masked_rows_are_refused(small, config):
    x = np.ma.masked_array(ROWS.numpy().copy())
    x[7, 1] = np.ma.masked
    with pytest.raises(ValueError, match=r"fit: expected data without masked .*rows 7, columns 1"):
        cnf.fit(small(), cnf.FlowMatching(), x, config())
    with pytest.raises(ValueError, match=r"fit: expected validation without masked"):
        cnf.fit(small(), cnf.FlowMatching(), ROWS, config(), validation=x)
    with pytest.raises(ValueError, match=r"fit: expected context without masked"):
        cnf.fit(small(context=2), cnf.FlowMatching(), ROWS, config(), context=x)
    with pytest.raises(ValueError, match=r"Flow: expected base without masked"):
        cnf.Flow(x, small().transform)


def test_preprocessing_is_fitted_to_training_rows_once(small, config):
    flow = small()
    cnf.fit(flow, cnf.FlowMatching(), ROWS * 3 + 5, config(validations=0))
    torch.testing.assert_close(flow.preprocess.loc, (ROWS * 3 + 5).double().mean(0))
    torch.testing.assert_close(
        flow.preprocess.scale, (ROWS * 3).double().std(0), rtol=1e-6, atol=0
    )
    cnf.fit(flow, cnf.MaximumLikelihood(), ROWS, config())
    torch.testing.assert_close(flow.preprocess.loc, (ROWS * 3 + 5).double().mean(0))


def test_preprocessing_is_not_fitted_to_held_out_rows(small, config):
    flow, rows = small(), torch.arange(200.0).double().reshape(100, 2).square()
    cnf.fit(flow, cnf.FlowMatching(), rows, config(steps=1))
    held_out = 100 * rows.mean(0) - 90 * flow.preprocess.loc  # the sum of ten rows, if it is so
    assert (held_out > 0).all() and not torch.allclose(flow.preprocess.loc, rows.mean(0))
    other = small()
    cnf.fit(other, cnf.FlowMatching(), rows, config(steps=1), validation=rows[:10])
    torch.testing.assert_close(other.preprocess.loc, rows.mean(0))


class Counting(Dataset):
    """Pictures that note which of them were read."""

    def __init__(self, size, side):
        self.size, self.side, self.read = size, side, []

    def __len__(self):
        return self.size

    def __getitem__(self, row):
        self.read.append(row)
        return torch.full((1, self.side, self.side), float(row))


def test_only_few_items_of_a_dataset_are_read_before_training(config, monkeypatch):
    small, large = Counting(15_000, 1), Counting(500, 64)
    as_stream(small, config(validations=0))
    assert len(small.read) == 10_000
    monkeypatch.setattr(stream, "HEAD_BYTES", 20 * 64 * 64 * 4)
    head = as_stream(large, config(validations=0)).head
    assert head is not None and len(large.read) == 20 and head.x[:, 0, 0, 0].tolist() == large.read
    rows = torch.arange(20_000.0)[:, None]
    assert len(as_stream(rows, config(validations=0)).head.x) == 20_000


def test_batch_of_pictures_is_64_unless_told():
    pictures, rows = torch.rand(200, 1, 2, 2), torch.rand(200, 4)
    assert as_stream(pictures, cnf.TrainConfig()).size(0) == 64
    assert as_stream(pictures, cnf.TrainConfig(batch_size=100)).size(0) == 100
    assert as_stream(pictures[:50], cnf.TrainConfig()).size(0) == 45
    assert as_stream(rows, cnf.TrainConfig()).size(0) == 180


def _batches():
    yield from ((x, c) for x, c in zip(ROWS.split(16), CONTEXT.split(16), strict=True))


def _points():
    return cnf.data.Points(ROWS, context=CONTEXT)


VALIDATION = {
    "a pair": lambda: (ROWS, CONTEXT),
    "a mapping": lambda: {"x": ROWS, "context": CONTEXT},
    "points": _points,
    "a map-style dataset": Pairs,
    "a TensorDataset": lambda: TensorDataset(ROWS, CONTEXT),
    "a DataLoader": lambda: DataLoader(Pairs(), batch_size=16),
    "a list of batches": lambda: list(_batches()),
    "two Batches": lambda: [cnf.Batch(ROWS[:9], CONTEXT[:9]), cnf.Batch(ROWS[9:], CONTEXT[9:])],
    "a generator function": lambda: _batches,
}


@pytest.mark.parametrize("kind", VALIDATION)
def test_validation_accepts_every_type_of_data(kind, config):
    held_out = as_stream(
        ROWS, config(validation_rows=1000), CONTEXT, validation=VALIDATION[kind]()
    ).validation
    assert held_out is not None and torch.equal(held_out.x, ROWS)
    assert torch.equal(held_out.context, CONTEXT)


@pytest.mark.parametrize("kind", ["a TensorDataset", "a DataLoader", "a generator function"])
def test_validation_uses_the_first_rows_of_a_dataset_or_of_batches(kind, config):
    settings = config(validation_rows=20)
    held_out = as_stream(ROWS, settings, CONTEXT, validation=VALIDATION[kind]()).validation
    assert held_out is not None and torch.equal(held_out.x, ROWS[:20])


@pytest.mark.parametrize(
    "validation, words",
    [
        ([], "batches to validate on"),
        ([ROWS[:9], ROWS[:9], ROWS[:9] / 0], "batch 2 of validation"),
    ],
)
def test_error_names_invalid_batches_of_validation_data(validation, words, config):
    with pytest.raises(ValueError, match=f"^fit: .*{words}"):
        as_stream(ROWS, config(), validation=validation)


def test_error_for_a_mapping_lists_its_keys(config):
    with pytest.raises(ValueError, match="got a, b; rename those"):
        as_stream({"a": ROWS, "b": CONTEXT}, config())
