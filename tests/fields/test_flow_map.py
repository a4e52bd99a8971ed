"""Flow maps against a linear ODE, whose average velocities have a closed form."""

import copy
import math

import pytest
import torch

import cnf
from cnf.dynamics import Solver
from cnf.fields import FlowMap, MLPField, NullContext, VectorField
from cnf.flow import Flow
from cnf.transforms import Continuous

RATE = 0.8


class Growth(VectorField):
    """u = (exp(a l) - 1)/l x over a length l, the last column of the context: of dx/dt = a x."""

    def __init__(self, dim=2, context_dim=1):
        super().__init__((dim,), context_dim)

    def forward(self, t, x, context=None):
        length = context[..., -1:]
        short = length.abs() < 1e-9
        safe = torch.where(short, 1.0, length)
        return torch.where(short, RATE, torch.expm1(RATE * safe) / safe) * x


def points(n=5, dim=2):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("explicit", ["sample", "density"])
@pytest.mark.parametrize("steps", [1, 3])
def test_steps_of_the_exact_map_are_the_solution_in_any_number(steps, explicit):
    solver = Solver("flow-map", steps=steps, explicit=explicit)
    ode = Continuous(FlowMap(Growth()), solver).double()
    z = points()
    x, ladj = ode(z)
    torch.testing.assert_close(x, math.exp(RATE) * z)
    torch.testing.assert_close(ladj, torch.full((5,), 2 * RATE, dtype=torch.float64))
    back, ladj = ode.inverse(x)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(ladj, torch.full((5,), -2 * RATE, dtype=torch.float64))


def test_at_no_length_it_is_the_velocity_that_an_ode_solver_integrates():
    ode = Continuous(FlowMap(Growth()), Solver("dopri5", rtol=1e-9, atol=1e-9)).double()
    z = points()
    x, ladj = ode(z)
    torch.testing.assert_close(x, math.exp(RATE) * z)
    torch.testing.assert_close(ladj, torch.full((5,), 2 * RATE, dtype=torch.float64))


def test_a_trajectory_takes_shorter_steps_of_the_map():
    flow = Flow(None, Continuous(FlowMap(Growth()), Solver("flow-map", steps=1)), event_shape=(2,))
    z, times = points(), (0.0, 0.25, 0.5, 1.0)
    path = flow.double().trajectory(z, times)
    expected = torch.stack([math.exp(RATE * t) * z for t in times])
    torch.testing.assert_close(path, expected)


def test_each_row_may_stop_at_its_own_time():
    field, x = FlowMap(Growth()), points()
    stop = torch.linspace(0, 1, 5, dtype=torch.float64)
    start = torch.full_like(stop, 0.5)
    found = x + (stop - start)[:, None] * field.until(stop)(start, x)
    torch.testing.assert_close(found, torch.exp(RATE * (stop - start))[:, None] * x)


def test_a_wrapper_passes_times_on_and_keeps_its_context():
    field = NullContext(FlowMap(MLPField(2, (8,), context_dim=4))).double()
    torch.nn.init.normal_(field.null)
    x, start = points(), torch.tensor(0.25, dtype=torch.float64)
    assert field.context_dim == 3
    null, own = field.null.detach(), torch.ones(5, 3, dtype=torch.float64)
    length = torch.full((5, 1), 0.5, dtype=torch.float64)
    inner = field.field.field
    for context, given in ((None, null.expand(5, 3)), (own, own)):
        expected = inner(start, x, torch.cat([given, length], -1))
        torch.testing.assert_close(field.until(0.75)(start, x, context), expected)
    assert field.until(0.75) is field.until(0.75)  # compiled code belongs to a field


def test_a_copy_has_views_of_its_own_weights():
    field = FlowMap(MLPField(2, (8,), context_dim=1)).double()
    x, start = points(), torch.tensor(0.0, dtype=torch.float64)
    before = field.until(1.0)(start, x)
    other = copy.deepcopy(field)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not other.until(1.0)(start, x).any()
    torch.testing.assert_close(field.until(1.0)(start, x), before)


def test_what_is_no_flow_map_is_refused_in_words():
    with pytest.raises(ValueError, match="FlowMap: expected a field that takes the length"):
        FlowMap(MLPField(2, (8,)))
    flow = cnf.models.cnf(2, hidden=(8,)).with_solver(Solver("flow-map", steps=2))
    with pytest.raises(TypeError, match=r"average velocities.*flow_map=True"):
        flow.sample(3)
    with pytest.raises(ValueError, match="one layer of a flow map, got layers=2"):
        cnf.models.cnf(2, layers=2, flow_map=True)
    blocks = cnf.models.ffjord(2, hidden=(8,)).with_solver(Solver("flow-map", steps=2))
    with pytest.raises(TypeError, match="average velocities"):
        blocks.sample(3)


def test_the_model_samples_and_scores_by_its_map():
    flow = cnf.models.cnf(2, hidden=(16,), flow_map=True, context=1, null_context=True).double()
    context = torch.ones(20, 1, dtype=torch.float64)
    x, log_p = flow.sample_and_log_prob((), context)
    with cnf.dynamics.record() as stats:
        flow.sample((), context)
    assert flow.transform.solver == Solver("flow-map", steps=4) and stats.forward == 4
    torch.testing.assert_close(flow.log_prob(x, context), log_p)


def test_a_saved_flow_map_is_loaded_with_its_solver(tmp_path):
    flow = cnf.models.cnf(2, hidden=(16,), flow_map=True).double()
    cnf.save(flow, tmp_path / "flow")
    loaded, x = cnf.load(tmp_path / "flow"), points()
    assert loaded.transform.solver == flow.transform.solver
    torch.testing.assert_close(loaded.log_prob(x), flow.log_prob(x), rtol=0, atol=0)
