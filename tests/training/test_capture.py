"""Steps that a device takes alone: what they do to the weights, and their capture as a graph."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import cnf
from cnf.dynamics import ode
from cnf.objectives import Joint, Objective
from cnf.training.capture import BAD_STEPS, CapturedLearner
from cnf.training.learner import Learner, launch_fabric
from cnf.training.learners import why_not_captured

needs_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
RK4 = cnf.Solver("rk4", steps=3)


def learner_of(kind, objective=None, **settings):
    torch.manual_seed(0)
    flow = cnf.models.realnvp(2, hidden=(8,), layers=2).double()
    config = cnf.TrainConfig(device="cpu", progress=False, **settings)
    fabric = launch_fabric(config, torch.float64)
    return kind(flow, objective or cnf.MaximumLikelihood(), config, fabric)


def take_steps(learner, step, bad=()):
    x = torch.randn(32, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for k in range(8):
        rows = cnf.Batch(x * torch.nan if k in bad else x + k)
        step(learner, learner.prepare(rows, torch.Generator().manual_seed(k))[0])


def alone(learner, rows):
    """A step of which the host reads nothing, as it is captured."""
    learner._rate.fill_(1e-2)
    learner._update(rows)


@pytest.mark.parametrize("ema", [0.999, 0.3, None])
@pytest.mark.parametrize("bad", [(), (0, 3, 4)])
def test_a_step_alone_moves_weights_and_average_as_a_watched_one(bad, ema):
    watched, unwatched = (learner_of(kind, ema=ema) for kind in (Learner, CapturedLearner))
    take_steps(watched, lambda learner, rows: learner.step(rows, 1e-2), bad)
    take_steps(unwatched, alone, bad)
    wanted, found = watched.state(), unwatched.state()
    assert found["skipped"] == wanted["skipped"] == len(bad)
    for part in ("module", "kept"):
        for name, value in wanted[part].items():
            # the rate of the device's optimizer is a number of float32
            torch.testing.assert_close(found[part][name], value, rtol=1e-6, atol=1e-7)


def test_a_run_whose_steps_are_all_bad_ends_at_the_next_look():
    learner = learner_of(CapturedLearner)
    rows = cnf.Batch(torch.full((4, 2), torch.nan, dtype=torch.float64))
    prepared, _ = learner.prepare(rows, torch.Generator())
    for _ in range(BAD_STEPS):
        loss = learner._update(prepared)
    with pytest.raises(cnf.DivergedError, match=f"NaN or infinite in {BAD_STEPS} steps in a row"):
        learner._look(loss)


def test_counts_go_on_from_a_checkpoint():
    first, second = (learner_of(CapturedLearner) for _ in range(2))
    take_steps(first, alone, bad=(2,))
    second.restore(first.state())
    take_steps(second, alone)
    state = second.state()
    assert (state["skipped"], state["steps"]) == (1, 8 + 7)


def test_steps_go_on_from_a_checkpoint_at_the_rate_that_they_are_given():
    first, second = (learner_of(CapturedLearner) for _ in range(2))
    take_steps(first, alone)
    second.restore(copy.deepcopy(first.state()))
    take_steps(first, alone)
    take_steps(second, alone)
    for name, value in first.state()["module"].items():
        torch.testing.assert_close(second.state()["module"][name], value)


def test_replays_are_counted_as_evaluations():
    with ode.record() as stats:
        ode.count(12)
    assert (stats.forward, stats.solves) == (12, 1)


ADAPTIVE, ADJOINT = cnf.Solver(), cnf.Solver("rk4", steps=2, gradient="adjoint")


class Annealed(Objective):
    """Its weight changes with Python's count of its calls, which a replay would not see."""

    def __init__(self):
        self.calls = 0

    def __call__(self, module, batch, generator=None):
        self.calls += 1
        return cnf.Loss(-module.log_prob(batch.x).mean() / self.calls, {})


HINDRANCES = {
    "an objective of one's own": (Annealed(), "Annealed, of which capturable is False"),
    "flow matching": (cnf.FlowMatching(), None),
    "fixed steps": (cnf.MaximumLikelihood(solver=RK4), None),
    "an adaptive solver": (
        cnf.MaximumLikelihood(solver=ADAPTIVE),
        "dopri5, which reads its errors",
    ),
    "a term's": (Joint((cnf.FlowMatching(), cnf.MaximumLikelihood(solver=ADAPTIVE))), "dopri5"),
    "steps to be inverted": (
        cnf.MaximumLikelihood(solver=replace(RK4, discrete=True)),
        "whose steps are inverted by iteration",
    ),
    "steps of two dimensions": (
        cnf.MaximumLikelihood(solver=replace(RK4, discrete=True, explicit="density")),
        None,
    ),
    "memory to be saved": (
        cnf.MaximumLikelihood(solver=ADJOINT),
        "whose gradient is not backprop",
    ),
}


@pytest.mark.parametrize("case", HINDRANCES)
def test_solvers_that_a_graph_cannot_hold_are_known_beforehand(case, small):
    objective, words = HINDRANCES[case]
    for device, processes in (("cuda", 1), ("cuda", 2), ("cpu", 1)):
        fabric = SimpleNamespace(device=torch.device(device), world_size=processes)
        found = why_not_captured(small(), objective, fabric)
        if (device, processes) != ("cuda", 1):
            assert found in ("2 processes", "the device cpu")
        else:
            assert found is None if words is None else words in found


class Wrong(Objective):
    """Its loss is read by the host in the middle of a step."""

    capturable = True

    def prepare(self, module, batch, generator=None):
        return batch

    def __call__(self, module, batch, generator=None):
        value = -module.log_prob(batch.x).mean()
        return cnf.Loss(value * (1 if value.item() else 2), {})


CASES = {
    "flow matching": ("cnf", lambda: cnf.FlowMatching()),
    "likelihood": ("cnf", lambda: cnf.MaximumLikelihood(solver=RK4)),
    "hutchinson": ("cnf", lambda: cnf.MaximumLikelihood("hutchinson", solver=RK4)),
    "penalties": ("rnode", lambda: cnf.MaximumLikelihood(solver=RK4)),
    "joint": ("cnf", lambda: Joint((cnf.FlowMatching(), cnf.MaximumLikelihood(solver=RK4)))),
    **{
        name: (name, lambda: cnf.MaximumLikelihood())
        for name in ("nice", "realnvp", "nsf", "nsf-ar", "maf", "made", "glow", "sylvester")
    },
}  # fmt: skip


class TestOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("case", CASES)
    def test_a_captured_run_is_the_run_kernel_by_kernel(self, case, config):
        name, objective = CASES[case]
        data, trained = torch.randn(200, 2).double(), []
        for compile in (False, True):
            torch.manual_seed(0)
            flow = cnf.models.build(
                name, dim=2, **({"hidden": (8, 8)} if name != "sylvester" else {})
            )
            flow.double()
            settings = config(device="cuda", steps=20, compile=compile, validations=0)
            history = cnf.fit(flow, objective(), data, settings)
            assert (history.steps, history.skipped) == (20, 0)
            trained.append(
                (list(flow.parameters()), history.column("loss"), history.column("nfe"))
            )
        (one, losses, nfe), (other, captured_losses, captured_nfe) = trained
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
        assert captured_losses == pytest.approx(losses, rel=1e-5)
        assert captured_nfe == nfe

    def test_an_adaptive_solver_runs_kernel_by_kernel(self, config, points):
        flow = cnf.models.cnf(2, hidden=(8, 8))
        history = cnf.fit(flow, "maximum-likelihood", points, config(device="cuda"))
        assert history.steps == 6
        torch.rand(3, device="cuda")  # torch's generator is as it was

    def test_what_cannot_be_captured_is_told_and_trained(self, config, points):
        with pytest.warns(UserWarning, match="capture failed: .*operation not permitted"):
            history = cnf.fit(cnf.models.realnvp(2), Wrong(), points, config(device="cuda"))
        assert history.steps == 6
        torch.rand(3, device="cuda")

    def test_dropout_draws_anew_in_each_replay(self, config, points):
        torch.manual_seed(0)
        flow, masks = cnf.models.realnvp(2, hidden=(8,)), []

        class Seen(Objective):
            capturable = True

            def prepare(self, module, batch, generator=None):
                return batch

            def __call__(self, module, batch, generator=None):
                noise = nn.functional.dropout(torch.ones(16, device="cuda"), 0.5)
                weights = sum(p.square().sum() for p in module.parameters())
                return cnf.Loss(weights + noise.sum(), {"noise": noise.sum()})

        settings = config(device="cuda", steps=40, compile=True, validations=0)
        cnf.fit(flow, Seen(), points, settings, callbacks=[lambda r: masks.append(r["noise"])])
        assert len(set(masks[10:])) > 3

    def test_batches_of_another_size_are_taken_too(self, config, points):
        batches = [points[:16], points[16:32], points[:16], points[16:32], points[:16], points[:9]]
        flow = cnf.models.realnvp(2, hidden=(8,))
        settings = config(device="cuda", steps=12, compile=True)
        assert cnf.fit(flow, "maximum-likelihood", batches, settings).steps == 12
