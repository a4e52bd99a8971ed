"""Preparation of an objective before training: a coupling is fitted to the data."""

import pytest
import torch
import yaml

import cnf
from cnf.objectives import OBJECTIVES, Batch, FlowMatching, MaximumLikelihood
from cnf.training.history import History
from cnf.training.progress import ProgressBar
from cnf.training.stream import NoData, as_stream

FEW = {"name": "semidiscrete", "steps": 5}


class RecordingFlowMatching(FlowMatching):
    """Remembers the rows that it trains on."""

    batches: list[Batch] = []

    def __call__(self, module, batch, generator=None):
        if torch.is_grad_enabled():
            RecordingFlowMatching.batches.append(batch)
        return super().__call__(module, batch, generator)


def test_pairs_follow_the_plan_of_the_training_rows(small, config, points):
    RecordingFlowMatching.batches.clear()
    flow = small()
    history = cnf.fit(flow, RecordingFlowMatching(coupling=FEW), points, config(validations=0))
    assert history.steps == 6 and history.preparing > 0 and history.pairing > 0
    assert history.preparing + history.pairing < history.seconds
    rows = torch.cat([batch.x1 for batch in RecordingFlowMatching.batches])
    inside = flow.inside(points)[0]
    assert len(rows) == 6 * 16 and all((inside == row).all(1).any() for row in rows)
    # a plan keeps near to near: far less than the distance of independent pairs
    pairs = [
        (batch.x1 - batch.x0).square().sum(1).mean() for batch in RecordingFlowMatching.batches
    ]
    mixed = [
        (batch.x1.roll(1, 0) - batch.x0).square().sum(1).mean()
        for batch in RecordingFlowMatching.batches
    ]
    assert sum(pairs) < 0.5 * sum(mixed)


def test_validation_rows_are_not_permuted_by_the_coupling(small, config, points):
    source = cnf.distributions.Empirical(points[:50])
    flow = cnf.Flow(source, small().transform)
    held_out = points[:20] + 100
    settings = config(validations=2)
    history = cnf.fit(flow, FlowMatching(coupling=FEW), points, settings, validation=held_out)
    assert min(history.column("val_loss")) > 50 * max(history.column("loss"))


def test_resuming_keeps_the_seconds_of_preparation_and_pairing(small, config, points, tmp_path):
    def run(**more):
        settings = config(validations=0, folder=tmp_path / "run", **more)
        return cnf.fit(small(), FlowMatching(coupling=FEW), points, settings)

    first, again = run(), run(resume=True)  # nothing is left to do
    assert 0 < first.preparing + first.pairing < first.seconds
    seconds = again.preparing, again.pairing, again.seconds
    assert seconds == (first.preparing, first.pairing, first.seconds)


def test_state_without_seconds_of_preparation_and_pairing_resumes():
    history = History()
    history.restore({"records": [{"step": 1.0}]})
    assert (len(history.records), history.preparing, history.pairing) == (1, 0.0, 0.0)


def test_run_saves_the_given_coupling_and_resumes_with_it(small, config, points, same, tmp_path):
    def run(**more):
        flow = small()
        settings = config(validations=0, folder=tmp_path / "run", **more)
        cnf.fit(flow, FlowMatching(coupling=FEW), points, settings)
        return flow

    first = run()
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    again = OBJECTIVES.build({"name": written["objective"], **written["objective_options"]})
    assert again == FlowMatching(coupling=FEW)
    assert same(first, run(resume=True))


def test_rows_left_out_by_the_coupling_are_reported(small, config, points):
    with pytest.warns(UserWarning, match="pairs with 60 of the 100 rows"):
        coupling = FEW | {"rows": 60}
        cnf.fit(small(), FlowMatching(coupling=coupling), points, config(validations=0))


def test_batch_of_pairs_is_not_coupled_again(small, config, points):
    data = Batch(points, x0=torch.zeros(100, 2))
    history = cnf.fit(small(), FlowMatching(coupling=FEW), data, config())
    assert history.preparing < 0.1 and history.steps == 6


@pytest.mark.parametrize(
    ("objective", "found"), [(FlowMatching(), "_path"), (MaximumLikelihood(), "as_trained")]
)
def test_objective_is_resolved_once_per_fit_and_each_batch_prepared_once(
    objective, found, small, config, points, monkeypatch
):
    calls = []

    def spied(name):
        inner = getattr(type(objective), name)

        def spy(self, *args):
            calls.append(name)
            return inner(self, *args)

        monkeypatch.setattr(type(objective), name, spy)

    spied(found)
    spied("prepare")
    cnf.fit(small(), objective, points, config(validations=0))
    assert calls.count("prepare") == 6
    assert calls[: calls.index("prepare")].count(found) <= 2  # also for what will be compiled
    last = len(calls) - 1 - calls[::-1].index("prepare")
    assert found not in calls[calls.index("prepare") : last]


@pytest.mark.parametrize("kind", ["array", "dataset", "batches", "density"])
def test_every_type_of_stream_yields_rows(kind, config, points):
    data = {
        "array": points,
        "dataset": torch.utils.data.TensorDataset(points),
        "batches": [Batch(part) for part in points.split(30)],
        "density": cnf.data.toy("moons"),
    }[kind]
    stream = as_stream(data, config(validations=0))
    rows = stream.rows(100)
    assert rows.x.shape == (100, 2) and torch.equal(rows.x, stream.rows(100).x)
    if kind != "density":
        assert torch.equal(rows.x.sort(0).values, points.sort(0).values)
    if kind == "batches":  # the second of which is cut
        assert torch.equal(stream.rows(50).x, rows.x[:50])
    assert NoData(config()).rows(5) is None


def test_coupling_is_not_fitted_to_held_out_rows(config, points):
    stream = as_stream(points, config(validations=1))
    both = torch.cat([stream.rows(100).x, stream.validation.x])
    assert len(stream.validation.x) == 10
    assert torch.equal(both.sort(0).values, points.sort(0).values)


def test_seconds_of_fitting_a_coupling_count_in_the_budget(small, config, points):
    coupling = FEW | {"steps": 200}
    history = cnf.fit(small(), FlowMatching(coupling=coupling), points, config(seconds=0.05))
    assert history.steps <= 60 and history.seconds >= history.preparing > 0.05


def test_progress_bar_shows_the_share_of_pairing():
    with ProgressBar(True, "title") as bar:
        with bar.doing("preparing"):
            assert bar._bar.tasks[0].description == "preparing title"
        assert bar._bar.tasks[0].description == "title"
        for share, nfe, text in ((0.8, 0, "pairing 80%"), (0.1, 0, "NFE 0"), (0.8, 7, "NFE 7")):
            bar.update(0.5, 3, 1.0, nfe, share)
            assert bar._bar.tasks[0].fields["cost"] == text


def test_composed_preprocessing_is_fitted_part_by_part_in_float64(config):
    x = 1e8 + torch.randn(400, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    parts = [cnf.transforms.Standardize((2,)), cnf.transforms.Standardize((2,))]
    flow = cnf.Flow(
        None,
        cnf.models.build("realnvp", dim=2).transform,
        preprocess=cnf.transforms.Compose(parts),
        event_shape=(2,),
    )
    cnf.fit(flow, "maximum-likelihood", x, config(steps=1, validations=0))
    torch.testing.assert_close(parts[1].loc, x.mean(0), rtol=1e-9, atol=0)
    torch.testing.assert_close(parts[0].scale, torch.ones(2).double(), rtol=1e-3, atol=0)
    assert flow.sample(3).dtype == torch.float64
    with pytest.warns(UserWarning, match=r"float32 merges values of x in columns \[0, 1\]"):
        flow.log_prob(x[:3].float())
