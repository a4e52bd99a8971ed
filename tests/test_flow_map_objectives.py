"""Objectives of flow maps, against a linear ODE whose average velocities have a closed form."""

import pytest
import torch

import cnf
from cnf.dynamics import Solver
from cnf.fields import FlowMap
from cnf.flow import Flow
from cnf.matching.paths import PathSample
from cnf.objectives import MeanFlow, SelfDistillation, Shortcut
from cnf.transforms import Continuous
from tests.fields.test_flow_map import RATE, Growth, points

OBJECTIVES = [MeanFlow, SelfDistillation, Shortcut]


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_true_average_velocity_is_its_own_target(objective):
    """Of dx/dt = a x it is (exp(a l) - 1)/l x, forwards, backwards and at no length."""
    x, field = points(), FlowMap(Growth())
    t = torch.tensor([0.1, 0.9, 0.5, 0.0, 1.0], dtype=torch.float64)
    s = torch.tensor([0.7, 0.2, 0.5, 1.0, 0.0], dtype=torch.float64)
    target = objective()._target(field, PathSample(t, x, RATE * x), s, None)
    length = s - t
    factor = torch.where(length == 0, RATE, torch.expm1(RATE * length) / length)
    torch.testing.assert_close(target, factor[:, None] * x)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_wrong_average_velocity_is_not(objective):
    x, field = points(), FlowMap(Growth())
    t = torch.full((5,), 0.1, dtype=torch.float64)
    wrong = objective()._target(field, PathSample(t, x, 2 * RATE * x), t, None)
    torch.testing.assert_close(wrong, 2 * RATE * x)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_where_no_time_passes_the_loss_is_that_of_flow_matching(objective):
    flow = cnf.models.cnf(2, hidden=(16,), flow_map=True).double()
    batch = cnf.Batch(points(64))
    rows = objective(instant=1 - 1e-12).prepare(flow, batch, torch.Generator().manual_seed(3))
    assert (rows.s == rows.t).all()
    loss = objective()(flow, rows)
    same = cnf.FlowMatching().prepare(flow, batch, torch.Generator().manual_seed(3))
    torch.testing.assert_close(loss.value, cnf.FlowMatching()(flow, same).value)
    torch.testing.assert_close(loss.metrics["fm"], loss.metrics["map"])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_of_rows_are_weighted_by_their_errors(objective):
    flow = cnf.models.cnf(2, hidden=(16,), flow_map=True).double()
    rows = objective().prepare(flow, cnf.Batch(points(64)), torch.Generator().manual_seed(3))
    plain = objective().per_row(flow, rows)
    weighted = objective(power=1.0).per_row(flow, rows)
    torch.testing.assert_close(weighted, plain / (plain + 1e-3))
    torch.testing.assert_close(objective(power=1.0)(flow, rows).value, weighted.mean())
    share = (rows.s == rows.t).double().mean()
    assert 0.3 < share < 0.7 and not (rows.s < rows.t).all() and (rows.s < rows.t).any()


@pytest.mark.parametrize(
    ("objective", "steps"), [(SelfDistillation, 1), (MeanFlow, 4), (Shortcut, 4)]
)
def test_few_steps_make_a_normal_distribution(objective, steps):
    """From N(0, 1) to N(2, 1/2²), which preprocessing does not do for it."""
    flow = cnf.models.cnf(1, hidden=(32, 32), flow_map=True, preprocess=None)
    data = 2 + 0.5 * torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    config = cnf.TrainConfig(
        steps=500, batch_size=256, ema=0.98, progress=False, validations=0, device="cpu"
    )
    torch.manual_seed(0)
    cnf.fit(flow, objective(), data, config)
    few = flow.with_solver(Solver("flow-map", steps=steps))
    x = few.sample(4000, generator=torch.Generator().manual_seed(1))
    assert abs(x.mean() - 2) < 0.1 and abs(x.std() - 0.5) < 0.12, (x.mean(), x.std())


def test_it_is_trained_by_a_context_and_guided():
    flow = cnf.models.cnf(2, hidden=(16,), context=1, null_context=True, flow_map=True)
    x, context = points(64).float(), torch.ones(64, 1)
    config = cnf.TrainConfig(steps=2, progress=False, validations=0, device="cpu")
    cnf.fit(flow, MeanFlow(), x, config, context=context)
    guided = cnf.sampling.guided(flow, 2.0)
    assert guided.sample((), context).isfinite().all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_what_is_no_flow_map_is_refused_in_words(objective):
    config = cnf.TrainConfig(steps=2, progress=False, validations=0, device="cpu")
    with pytest.raises(TypeError, match="average velocities"):
        cnf.fit(cnf.models.cnf(2, hidden=(8,)), objective(), points().float(), config)
    with pytest.raises(TypeError, match="vector field"):
        cnf.fit(cnf.models.nsf(2), objective(), points().float(), config)
    with pytest.raises(ValueError, match="0 < instant < 1"):
        objective(instant=0.0)
    with pytest.raises(ValueError, match="power"):
        objective(power=-1.0)


def test_a_flow_map_is_trained_by_the_likelihood_of_its_steps():
    flow = Flow(
        None, Continuous(FlowMap(cnf.fields.MLPField(2, (8,), context_dim=1))), event_shape=(2,)
    )
    solver = Solver("flow-map", steps=1, explicit="density")
    config = cnf.TrainConfig(steps=2, progress=False, validations=0, device="cpu")
    cnf.fit(flow, cnf.MaximumLikelihood(solver=solver), points(64).float(), config)
    assert flow.transform.solver == solver and flow.log_prob(points().float()).isfinite().all()


def test_held_out_rows_of_a_map_are_scored_by_its_loss():
    """Its steps may fold while it learns, so that its NLL would be NaN."""
    flow = cnf.models.cnf(2, hidden=(8,), flow_map=True)
    config = cnf.TrainConfig(steps=4, validations=2, progress=False, device="cpu")
    records = cnf.fit(flow, SelfDistillation(), points(100).float(), config).records
    assert "val_loss" in records[-1] and "val_nll" not in records[-1]
