"""Defaults for training the named models by likelihood, and STEER's random end time."""

import math
from dataclasses import replace

import pytest
import torch

from cnf import Batch, Flow, FlowMatching, Hutchinson, MaximumLikelihood, Solver
from cnf.dynamics import REGULARIZERS, record
from cnf.fields import VectorField
from cnf.models import build
from cnf.objectives import OBJECTIVES, LikelihoodRows
from cnf.transforms import Compose, Continuous
from cnf.transforms.continuous import Recipe

F64 = torch.float64
RECIPES = {
    "cnf": Recipe(solver=Solver()),
    "ffjord": Recipe("hutchinson"),
    "rnode": Recipe("hutchinson", {"kinetic": 0.01, "jacobian": 0.01}, Solver("rk4", steps=4)),
    "otflow": Recipe("exact", {"kinetic": 0.005, "hjb": 0.05}, Solver("rk4", steps=8), 0.1),
}


@pytest.fixture
def x(generator):
    return torch.randn(6, 2, generator=generator, dtype=F64) * 1.5 + 0.5


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", RECIPES)
def test_every_model_has_the_recipe_of_its_paper(name):
    assert build(name, dim=2).transform.recipe == RECIPES[name]


def test_recipes_follow_the_options():
    flow = build("rnode", dim=2, layers=3, kinetic=0.0, jacobian=0.2)
    assert flow.transform.recipe.penalties == {"jacobian": 0.2}
    assert flow.transform.recipe.solver.steps == 12  # four for each block
    assert build("otflow", dim=2, transport=0.3, hjb=0).transform.recipe.penalties == {
        "kinetic": 0.15
    }


@pytest.mark.parametrize("name", RECIPES)
def test_loss_without_arguments_follows_the_recipe(name, small_flow, x):
    flow, objective = small_flow(name), MaximumLikelihood()
    recipe = flow.transform.recipe
    batch = objective.prepare(flow, Batch(x), seeded())
    divergence = "exact"
    if recipe.divergence == "hutchinson":
        assert batch.probe.shape == (6, 1, 2)
        divergence = Hutchinson(probe=batch.probe.movedim(1, 0))
    solver = recipe.solver or flow.transform.solver
    log_prob, solved = flow.with_solver(solver).log_prob_and_integral(
        x, divergence=divergence, integrands=[REGULARIZERS[key] for key in recipe.penalties]
    )
    expected = -log_prob.mean()
    for weight, integral in zip(recipe.penalties.values(), solved.integrals, strict=True):
        expected = expected + weight * integral.mean()
    with record() as stats:
        loss = objective(flow, batch)
    torch.testing.assert_close(loss.value, expected, rtol=0, atol=1e-7)  # solver rtol 1e-9
    assert set(loss.metrics) == {"nll", *recipe.penalties}
    assert stats.forward == (solver.evaluations or stats.forward) > 0
    assert recipe == Recipe() or (loss.value + flow.log_prob(x).mean()).abs() > 1e-6


@pytest.mark.parametrize("name", ["ffjord", "rnode", "otflow"])
def test_arguments_override_the_recipe(name, small_flow, x):
    flow, solver = small_flow(name), Solver("midpoint", steps=3)
    objective = MaximumLikelihood("exact", {}, solver)
    with record() as stats:
        loss = objective(flow, Batch(x), seeded())
    torch.testing.assert_close(loss.value, -flow.with_solver(solver).log_prob(x).mean())
    assert stats.forward == 6 and set(loss.metrics) == {"nll"}
    assert objective.prepare(flow, Batch(x)).probe is None


def test_each_argument_overrides_only_its_own_setting(small_flow, x):
    flow = small_flow("rnode")
    only = MaximumLikelihood(penalties={"kinetic": 0.5})(flow, Batch(x), seeded())
    assert set(only.metrics) == {"nll", "kinetic"}
    probes = MaximumLikelihood(Hutchinson(3)).prepare(flow, Batch(x), seeded())
    assert probes.probe.shape == (6, 3, 2)
    with record() as stats:
        MaximumLikelihood(solver={"method": "euler", "steps": 5})(flow, Batch(x), seeded())
    assert stats.forward == 5


@pytest.mark.parametrize("name", ["ffjord", "rnode", "otflow"])
def test_flow_matching_and_evaluation_ignore_the_recipe(name, small_flow, x):
    flow = small_flow(name)
    with record() as stats:
        batch = FlowMatching().prepare(flow, Batch(x), seeded())
        loss = FlowMatching()(flow, batch)
    assert stats.solves == 0 and not hasattr(batch, "probe") and set(loss.metrics) == {"fm"}
    torch.testing.assert_close(flow.log_prob(x), flow.log_prob(x, divergence="exact"))


def test_with_solver_changes_only_the_solver_of_the_recipe(x):
    flow = build("rnode", dim=2).double()
    coarse = flow.with_solver(Solver("euler", steps=5))
    assert coarse.transform.recipe == replace(flow.transform.recipe, solver=None)
    with record() as stats:
        MaximumLikelihood()(coarse, Batch(x), seeded())
    assert stats.forward == 5
    assert flow.transform.recipe.solver == RECIPES["rnode"].solver


def test_cnf_is_evaluated_with_tighter_tolerances_than_trained_by_default():
    told = {"method": "rk4", "steps": 8}
    flow, other = build("cnf", dim=2).transform, build("cnf", dim=2, solver=told).transform
    assert (flow.solver.rtol, flow.recipe.solver.rtol) == (1e-6, 1e-5)
    assert other.solver == Solver(**told) and other.recipe == Recipe()


class Linear(VectorField):
    matrix = torch.tensor([[0.3, -1.2], [0.9, 0.5]], dtype=F64)

    def __init__(self):
        super().__init__((2,))

    def forward(self, t, x, context=None):
        return x @ self.matrix.T


def stopped(x, t):
    """-log p of the linear flow that starts at t: z = e^{-A(1-t)} x."""
    z = x @ torch.matrix_exp(-Linear.matrix * (1 - t)).T
    ladj = -(1 - t) * Linear.matrix.trace()
    return z.square().sum(-1) / 2 + math.log(2 * math.pi) - ladj


@pytest.fixture
def linear():
    solver = Solver(rtol=1e-9, atol=1e-9)
    return Flow(None, Continuous(Linear(), solver), event_shape=(2,)).double()


def test_steer_stops_each_solve_at_one_random_time_for_all_rows(linear, x):
    objective, stops = MaximumLikelihood(steer=0.3), []
    for seed in range(200):
        batch = objective.prepare(linear, Batch(x), seeded(seed))
        assert batch.stop.shape == (6,) and (batch.stop == batch.stop[0]).all()
        stops.append(batch.stop[0].item())
    assert min(stops) >= 0 and max(stops) <= 0.3
    assert max(stops) > 0.29 and min(stops) < 0.01  # uniform: missed once in 10³
    assert sum(stops) / 200 == pytest.approx(0.15, abs=0.02)  # four standard errors, 0.006 each
    again = objective.prepare(linear, Batch(x), seeded(7))
    assert again.stop[0].item() == stops[7]


@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_loss_with_steer_is_that_of_the_flow_stopped_at_its_end_time(divergence, linear, x):
    objective = MaximumLikelihood(divergence, steer=0.8)
    batch = objective.prepare(linear, Batch(x), seeded(2))
    t = batch.stop[0].item()
    expected = stopped(x, t)
    if divergence == "hutchinson":
        forms = torch.einsum("nki,ij,nkj->n", batch.probe, Linear.matrix, batch.probe)
        expected = expected + (1 - t) * (forms - Linear.matrix.trace())
    loss = objective(linear, batch)
    torch.testing.assert_close(loss.value, expected.mean(), rtol=0, atol=1e-6)
    assert t > 0.05 and torch.equal(loss.value, objective(linear, Batch(x), seeded(2)).value)
    weighted = objective(linear, Batch(x, weight=torch.arange(6.0).double()), seeded(2)).value
    torch.testing.assert_close(weighted, (torch.arange(6) * expected).sum() / 15)


def test_loss_with_steer_adds_penalties_up_to_its_end_time(linear, x):
    batch = LikelihoodRows(x, stop=torch.full((6,), 0.25, dtype=F64))
    loss = MaximumLikelihood(penalties={"jacobian": 2.0})(linear, batch)
    norm = 0.75 * Linear.matrix.square().sum()
    torch.testing.assert_close(loss.metrics["jacobian"], norm)
    torch.testing.assert_close(loss.value, stopped(x, 0.25).mean() + 2 * norm)


def test_no_time_is_drawn_without_steer(small_flow, x):
    flow = small_flow("cnf")
    assert MaximumLikelihood().prepare(flow, Batch(x), seeded()).stop is None


def test_steer_requires_a_continuous_flow_and_a_valid_range(small_flow, x):
    with pytest.raises(TypeError, match="steer=.*expected a flow whose transform holds a Cont"):
        MaximumLikelihood(steer=0.5)(small_flow("realnvp"), Batch(x), seeded())
    for steer in (-0.1, 1.0, math.nan):
        with pytest.raises(ValueError, match="0 <= steer < 1"):
            MaximumLikelihood(steer=steer)


def test_settings_may_come_from_a_config_file():
    objective = OBJECTIVES.build({
        "name": "maximum-likelihood", "penalties": {"kinetic": 0.1}, "steer": 0.2,
        "divergence": {"name": "hutchinson", "probes": 2, "sketch": 1},
        "solver": {"method": "rk4", "steps": 4},
    })  # fmt: skip
    assert objective == MaximumLikelihood(
        Hutchinson(2, sketch=1), {"kinetic": 0.1}, Solver("rk4", steps=4), 0.2
    )
    assert (
        OBJECTIVES.build({"name": "maximum-likelihood", "divergence": None}) == MaximumLikelihood()
    )


@pytest.mark.parametrize("name", ["rnode", "otflow"])
def test_given_solver_is_used_in_training(name, small_flow, x):
    flow = build(name, dim=2, solver=Solver("midpoint", steps=3))
    with record() as stats:
        MaximumLikelihood("exact")(flow, Batch(x.float()), seeded())
    assert stats.forward == 6


def test_recipe_applies_inside_a_compose(small_flow, x):
    inner = small_flow("ffjord").transform
    flow = Flow(None, Compose([inner]), event_shape=(2,))
    assert MaximumLikelihood().prepare(flow, Batch(x), seeded()).probe.shape == (6, 1, 2)
    penalized = Flow(None, Compose([small_flow("rnode").transform]), event_shape=(2,))
    loss = MaximumLikelihood()(penalized, Batch(x), seeded())
    assert loss.metrics.keys() == {"nll", "kinetic", "jacobian"}


@pytest.mark.parametrize("name", ["realnvp", "maf"])
def test_estimator_has_no_effect_on_a_flow_without_an_ode(name):
    flow = build(name, dim=2, layers=2, hidden=(4,))
    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0))
    losses = [
        MaximumLikelihood(divergence)(flow, Batch(x), seeded(0)).value
        for divergence in (None, "hutchinson")
    ]
    assert torch.equal(*losses)
