"""Pairs of a flow as data: reflow, and distillation to one step."""

import copy
import importlib
import math

import pytest
import torch

import cnf
from cnf import Batch, Flow, FlowMatching, Solver
from cnf.fields import MLPField, Predicts
from cnf.objectives import Objective
from cnf.training.reflow import distill, pairs, reflow
from cnf.transforms import Continuous

module = importlib.import_module("cnf.training.reflow")  # whose name its function has taken
F64 = torch.float64
ONE = Solver("euler", steps=1)
OWN = Solver("midpoint", steps=10)


class RecordingFlowMatching(Objective):
    """Flow matching that remembers its prepared batches."""

    def __init__(self, inner=None):
        self.inner, self.batches = inner or FlowMatching(), []

    def prepare(self, module, batch, generator=None):
        self.batches.append(self.inner.prepare(module, batch, generator))
        return self.batches[-1]

    def __call__(self, module, batch, generator=None):
        return self.inner(module, batch, generator)

    def parameters(self, module):
        return self.inner.parameters(module)

    def joined(self, name):
        return torch.cat([getattr(batch, name) for batch in self.batches])


@pytest.fixture
def trained(config):
    """A flow that has learned two moons, roughly, by paths that are not straight."""
    torch.manual_seed(0)
    flow = cnf.models.build("cnf", dim=2, hidden=(32, 32), solver=OWN)
    settings = config(steps=300, batch_size=256, lr=1e-2, ema=0.98, validations=0)
    cnf.fit(flow, FlowMatching(), cnf.data.toy("moons"), settings)
    return flow


def miss(flow, teacher):
    """RMS distance of one Euler step from the teacher's samples, of the same base samples."""
    z = torch.randn(1000, 2, generator=torch.Generator().manual_seed(9))
    apart = flow.with_solver(ONE).decode(z) - teacher.decode(z)
    return apart.square().sum(1).mean().sqrt().item()


def test_reflow_straightens_and_distilled_flow_samples_in_one_step(trained, config):
    teacher = copy.deepcopy(trained)
    settings = config(steps=300, batch_size=256, lr=4e-3, ema=0.98, validations=0)
    first = miss(trained, teacher)
    reflow(trained, settings, n=4096)
    after = miss(trained, trained)
    assert after < 0.25 * first
    straight = copy.deepcopy(trained)
    # the same law: samples of the new flow are as far from the old one's as two draws are
    z = torch.randn(500, 2, generator=torch.Generator().manual_seed(1))
    own = (straight.decode(z) - teacher.decode(z)).square().sum(1).mean().sqrt().item()
    assert own < 0.1 * first
    history = distill(trained, settings, n=4096)
    assert history.column("val_nll") == []  # the distilled flow's ODE means nothing
    assert miss(trained, straight) < 0.4 * after
    assert all(p.isfinite().all() for p in trained.parameters())


def test_reflow_far_from_zero_has_float64_precision(config, generator):
    x = 1e8 + torch.randn(500, 2, generator=generator, dtype=F64) * torch.tensor([1.0, 3.0])
    flow = cnf.models.build("cnf", dim=2, hidden=(16,), solver=OWN)
    settings = config(steps=60, batch_size=128, lr=1e-2, ema=0.9)
    cnf.fit(flow, FlowMatching(), x, settings)
    batch = pairs(flow, 500)
    assert (batch.x.dtype, batch.x0.dtype) == (F64, torch.float32)
    assert len(batch.x[:, 0].unique()) == 500  # float32 has steps of 8 there
    reflow(flow, settings, n=500)
    drawn = flow.sample(2000, generator=generator)
    torch.testing.assert_close(drawn.mean(0) - 1e8, x.mean(0) - 1e8, atol=0.5, rtol=0)
    torch.testing.assert_close(drawn.std(0), x.std(0), atol=0, rtol=0.25)


# Pairs


def test_pairs_are_base_samples_and_their_images_under_the_flow(small_flow):
    flow = small_flow("cnf", solver=OWN)  # its preprocessing shifts and scales
    batch = pairs(flow, 50, seed=3)
    assert set(batch.map(len).__dict__.values()) == {50, None} and batch.context is None
    torch.testing.assert_close(batch.x, flow.decode(batch.x0), rtol=0, atol=1e-12)
    assert batch.x.shape == batch.x0.shape == (50, 2) and batch.x.dtype == F64
    assert not batch.x.requires_grad and not batch.x0.requires_grad
    moved = (batch.x - flow.preprocess(batch.x0)[0]).abs().max()
    assert moved > 0.1 and (flow.preprocess.loc != 0).all()
    assert abs(batch.x0.mean().item()) < 4 / math.sqrt(100)


def test_pairs_with_the_same_seed_are_equal(small_flow):
    flow = small_flow("rnode", solver=OWN)
    before = torch.get_rng_state()
    first, again, other = (pairs(flow, 20, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.x0, again.x0) and torch.equal(first.x, again.x)
    assert not torch.equal(first.x0, other.x0)
    assert torch.equal(torch.get_rng_state(), before)


def test_pairs_use_the_solver_of_the_flow(small_flow):
    flow = small_flow("rnode", solver=OWN)
    tight = flow.with_solver(Solver(rtol=1e-9, atol=1e-9))
    assert torch.equal(pairs(flow, 5).x0, pairs(tight, 5).x0)
    torch.testing.assert_close(pairs(tight, 5).x, tight.decode(pairs(tight, 5).x0))
    assert (pairs(flow, 5).x - pairs(tight, 5).x).abs().max() > 1e-7


@pytest.mark.parametrize("n", [6, 7, 8, 20])
def test_pairs_are_computed_in_chunks_with_their_contexts(n, small_flow, monkeypatch, generator):
    flow = small_flow("rnode", context=3, solver=OWN)
    context = torch.randn(n, 3, generator=generator, dtype=F64)
    monkeypatch.setattr(module, "CHUNK", 7)
    batch = pairs(flow, n, context)
    assert torch.equal(batch.context, context) and len(batch.x) == len(batch.x0) == n
    torch.testing.assert_close(batch.x, flow.decode(batch.x0, context), rtol=0, atol=1e-12)
    assert (batch.x - flow.decode(batch.x0, context.flip(0))).abs().max() > 1e-2
    assert len(batch.x0.unique(dim=0)) == n


@pytest.mark.parametrize("shape", [(8, 3), (3,), (1, 3)], ids=str)
def test_wrong_number_of_contexts_is_refused(shape, small_flow):
    flow = small_flow("rnode", context=3, solver=OWN)
    with pytest.raises(ValueError, match="context"):
        pairs(flow, 5, torch.zeros(shape, dtype=F64))


@pytest.mark.parametrize(
    "given",
    [
        lambda c: c.numpy(),
        lambda c: c.tolist(),
        lambda c: pytest.importorskip("pandas").DataFrame(c.numpy()),
        lambda c: c.numpy()[:, 0],
        lambda c: (4 * c).round().int().numpy(),
    ],
    ids=["array", "lists", "table", "vector", "integers"],
)
def test_contexts_may_have_any_type_that_fit_accepts(given, small_flow, generator):
    flow = small_flow("rnode", context=1, solver=OWN)
    context = torch.randn(5, 1, generator=generator, dtype=F64)
    found = given(context)
    meant = (4 * context).round() if getattr(found, "dtype", None) == "int32" else context
    batch = pairs(flow, 5, found)
    assert torch.equal(batch.context, meant)
    assert torch.equal(batch.x, pairs(flow, 5, meant).x)


def test_error_for_text_labels_as_contexts_says_how_to_encode_them(small_flow):
    flow = small_flow("rnode", context=2, solver=OWN)
    with pytest.raises(ValueError, match="pairs: expected context of shape .*one_hot"):
        pairs(flow, 5, [0, 1, 0, 1, 1])
    with pytest.raises(ValueError, match="pairs: expected context to be an array of numbers"):
        pairs(flow, 5, ["cat", "dog", "cat", "dog", "cat"])
    with pytest.raises(ValueError, match="pairs: expected context to be finite"):
        pairs(flow, 5, torch.full((5, 2), torch.nan))


def test_pairs_do_not_change_the_mode_of_the_flow(small_flow):
    flow = small_flow("rnode", solver=OWN).train()
    pairs(flow, 5)
    assert flow.training


# A Batch as data


def test_fit_trains_on_given_pairs_without_separating_them(small, config, points):
    partner = 3 * points + torch.tensor([1.0, -2.0])
    objective, flow = RecordingFlowMatching(), small()
    cnf.fit(flow, objective, Batch(points, x0=partner), config(steps=18, validations=0))
    x1, x0 = objective.joined("x1"), objective.joined("x0")
    x = x1 * flow.preprocess.scale + flow.preprocess.loc
    torch.testing.assert_close(x0, 3 * x.float() + torch.tensor([1.0, -2.0]))
    assert len(x1) == 18 * 16 and len(x1.unique(dim=0)) == 100
    assert not torch.allclose(x[:96].float(), points[:96])  # shuffled
    times = objective.joined("t")
    assert len(times.unique()) > 280


def test_all_parts_of_a_batch_are_permuted_together(small, config, points):
    mark = torch.arange(100.0) / 8
    data = Batch(
        torch.stack([mark, mark.square()], 1), mark[:, None] + 0.5, x0=mark[:, None].repeat(1, 2),
        weight=mark + 1,
    )  # fmt: skip
    objective = RecordingFlowMatching(FlowMatching(path="bridge"))
    flow = small(context=1)
    cnf.fit(flow, objective, data, config(steps=12, validations=0))
    row = objective.joined("x0")[:, 0]
    assert len(row.unique()) > 90
    x = flow.outside(objective.joined("x1"))[0]
    torch.testing.assert_close(x, torch.stack([row, row.square()], 1))
    inner = flow.inner_context("test", row[:, None] + 0.5, None)
    assert torch.equal(objective.joined("context"), inner)
    assert torch.equal(objective.joined("weight"), row + 1)


def test_coupling_does_not_change_given_pairs(small_flow, generator):
    flow = small_flow("cnf")
    x, x0 = (torch.randn(8, 2, generator=generator, dtype=F64) for _ in range(2))
    batch = FlowMatching(coupling="minibatch-ot").prepare(flow, Batch(x, x0=x0), generator)
    assert torch.equal(batch.x1, flow.inside(x)[0]) and torch.equal(batch.x0, x0)
    assert batch.weight is None


def test_batch_with_only_x_trains_like_a_tensor(small, config, points, same):
    one, other = small(), small()
    cnf.fit(one, FlowMatching(), points, config())
    cnf.fit(other, FlowMatching(), Batch(points), config())
    assert same(one, other)


def test_conditional_pairs_are_trained_with_their_contexts(small, config, points):
    flow, objective = small(context=2), RecordingFlowMatching()
    context = points.flip(1)
    data = pairs(flow, 100, context)
    cnf.fit(flow, objective, data, config(steps=12))
    x1, seen = flow.inside(data.x)[0], flow.inner_context("test", context, None)
    for x, c in zip(objective.joined("x1"), objective.joined("context"), strict=True):
        row = (x1 == x).all(1).nonzero()[0, 0]
        assert torch.equal(c, seen[row])
    assert len(reflow(small(context=2), config(), n=100, context=context)) == 1
    assert distill(small(context=2), config(), n=100, context=context).steps == 6


@pytest.mark.parametrize("name", ["context", "x0", "weight"])
def test_parts_of_a_batch_with_unequal_lengths_are_refused_by_name(name, small, config, points):
    part = torch.zeros(99) if name == "weight" else torch.zeros(99, 2)
    with pytest.raises(ValueError, match=f"Batch: expected {name} of .*100.*99"):
        cnf.fit(small(), FlowMatching(), Batch(points, **{name: part}), config())


@pytest.mark.parametrize("name", ["x", "x0", "context"])
def test_nan_in_a_batch_is_refused_by_name(name, small, config, points):
    parts = {"x": points.clone(), "x0": points.clone(), "context": points.clone()}
    parts[name][3] = math.nan
    with pytest.raises(ValueError, match=f"expected {name} to be finite, .*rows 3"):
        cnf.fit(small(context=2), FlowMatching(), Batch(**parts), config(validations=0))


def test_context_argument_with_a_batch_is_not_ignored(small, config, points):
    # the flow has no place for a context, and would say so if it were shown one
    with pytest.raises(ValueError, match="context"):
        cnf.fit(small(), FlowMatching(), Batch(points), config(), context=points)


# Rounds


def test_each_round_of_reflow_has_new_pairs_and_its_own_seed(small, config):
    flow, objective = small(), RecordingFlowMatching()
    flow.preprocess.loc.fill_(2.0)
    flow.preprocess.fitted.fill_(True)
    histories = reflow(flow, config(seed=5, validations=0), rounds=2, n=64, objective=objective)
    assert len(histories) == 2 and all(history.steps == 6 for history in histories)
    starts = [torch.cat([b.x0 for b in objective.batches[6 * k : 6 * k + 6]]) for k in range(2)]
    for k, start in enumerate(starts):
        drawn = pairs(small(), 64, seed=5 + k).x0
        assert all((row == drawn).all(1).any() for row in start)
    assert flow.preprocess.loc.tolist() == [2.0, 2.0]  # pairs are no reason to standardize anew


def test_reflow_is_validated_on_held_out_pairs_or_given_rows(small, config, points):
    histories = [
        reflow(small(), config(), n=64, validation=validation)[0].column("val_nll")
        for validation in (None, points)
    ]
    assert histories[0] and histories[1] and histories[0] != histories[1]
    scores = distill(small(), config(), n=64, validation=points).column("val_nll")
    assert scores and distill(small(), config(), n=64).column("val_nll") == []


def test_distillation_trains_at_time_zero_only(small, config, monkeypatch):
    objectives = []

    def fit(flow, objective, data, settings, **more):
        objectives.append((objective, data))
        return cnf.training.loop.History()

    monkeypatch.setattr(module, "fit", fit)
    flow = small().double()
    distill(flow, config(), n=32)
    objective, data = objectives[0]
    batch = objective.prepare(flow, data, torch.Generator().manual_seed(0))
    assert (batch.t == 0).all() and torch.equal(batch.x0, data.x0)
    # one Euler step from x0 is what is compared with x1
    x1 = (data.x - flow.preprocess.loc) / flow.preprocess.scale
    moved = data.x0 + flow.field(torch.zeros(32, dtype=F64), data.x0)
    expected = (moved - x1).square().sum(1).mean()
    torch.testing.assert_close(objective(flow, batch).value, expected)


def test_all_rounds_of_reflow_with_a_folder_finish(small, config, tmp_path):
    assert len(reflow(small(), config(folder=tmp_path / "run"), rounds=2, n=64)) == 2


def test_distilled_flow_of_stacked_blocks_samples_in_one_step(small, config):
    flow = small(layers=2)
    try:
        distill(flow, config(), n=64)
    except (TypeError, ValueError):
        return  # to refuse it would do
    with cnf.dynamics.record() as stats:
        flow.with_solver(ONE).sample(4)
    assert stats.forward == 1


def test_network_that_predicts_noise_is_distilled_or_refused(config, generator):
    field = Predicts(MLPField(2, (32, 32)), "noise")
    flow = Flow(None, Continuous(field, OWN), event_shape=(2,))
    x = torch.tensor([2.0, -1.0]) + 0.3 * torch.randn(1000, 2, generator=generator)
    settings = config(steps=300, batch_size=256, lr=1e-2, ema=0.98, validations=0)
    cnf.fit(flow, FlowMatching(), x, settings)
    teacher = copy.deepcopy(flow)
    try:
        distill(flow, settings, n=1000)
    except (TypeError, ValueError):
        return
    assert miss(flow, teacher) < 0.2


def test_reflow_of_a_discrete_flow_is_refused(small, config):
    for call in (reflow, distill):
        with pytest.raises(
            TypeError, match="FlowMatching: expected a flow whose transform is a C"
        ):
            call(small("realnvp"), config(), n=64)
