"""NaN and infinity affect only the result of their own row."""

import math

import pytest
import torch
from torch import nn

import cnf
from cnf import Flow, Hutchinson, Solver, SolverError
from cnf.fields import Adapter, MLPField
from cnf.metrics.error_bars import log_prob_with_error
from cnf.models import MODELS
from cnf.transforms import Compose, Continuous, Coupling, Standardize

F64 = torch.float64
NAN, INF = math.nan, math.inf
FINITE, BAD = [0, 4, 5], {1: NAN, 2: -INF, 3: NAN, 6: -INF}  # row → its log-density


@pytest.fixture
def points(generator):
    x = torch.randn(7, 2, generator=generator, dtype=F64)
    x[1, 0], x[2, 1], x[6, 0] = NAN, INF, -INF
    x[3, 0], x[3, 1] = NAN, INF
    return x


@pytest.fixture
def contexts(generator):
    return torch.randn(7, 3, generator=generator, dtype=F64)


def assert_rule(value, alone):
    """The finite rows as they are alone (matrix products round by the number of rows)."""
    torch.testing.assert_close(value[FINITE], alone, rtol=1e-12, atol=1e-12)
    for row, expected in BAD.items():
        torch.testing.assert_close(value[row].item(), expected, equal_nan=True)


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_log_prob_of_nan_is_nan_and_at_infinity_minus_infinity(
    name, context, small_flow, points, contexts
):
    flow = small_flow(name, context, solver=Solver(rtol=1e-5, atol=1e-5), gain=0.5)
    c = contexts if context else None
    found = flow.log_prob(points, c)
    alone = flow.log_prob(points[FINITE], contexts[FINITE] if context else None)
    assert_rule(found, alone)
    weights = list(flow.parameters())
    expected = torch.autograd.grad(alone.sum(), weights)
    for actual, right in zip(
        torch.autograd.grad(found[FINITE].sum(), weights), expected, strict=True
    ):
        torch.testing.assert_close(actual, right, rtol=1e-9, atol=1e-9)
    many = points.expand(2, 7, 2).reshape(2, 7, 1, 2)
    assert_rule(flow.log_prob(many, None if c is None else c[:, None])[1, :, 0], alone)
    for row, value in BAD.items():
        single = flow.log_prob(points[row], contexts[row] if context else None)
        torch.testing.assert_close(single.item(), value, equal_nan=True)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("name", ["cnf", "otflow", "nsf", "planar"])
def test_non_finite_context_gives_nan_in_its_row_only(name, bad, small_flow, generator, contexts):
    flow = small_flow(name, 3, solver=Solver(rtol=1e-5, atol=1e-5) if name == "cnf" else None)
    x, broken = torch.randn(7, 2, generator=generator, dtype=F64), contexts.clone()
    broken[2, 1] = bad
    rest = [0, 1, 3, 4, 5, 6]
    for found, alone in (
        (flow.log_prob(x, broken), flow.log_prob(x[rest], contexts[rest])),
        (flow.encode(x, broken), flow.encode(x[rest], contexts[rest])),
        (flow.decode(x, broken), flow.decode(x[rest], contexts[rest])),
    ):
        assert found[2].isnan().all()
        torch.testing.assert_close(found[rest], alone, rtol=1e-12, atol=1e-12)
    drawn, log_prob = flow.sample_and_log_prob((2,), broken)
    assert drawn[:, 2].isnan().all() and log_prob[:, 2].isnan().all()
    assert drawn[:, rest].isfinite().all() and log_prob[:, rest].isfinite().all()


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_nan_affects_only_its_row_of_encode_and_decode(name, small_flow, points):
    flow = small_flow(name, solver=Solver(rtol=1e-5, atol=1e-5))
    for way in (flow.encode, flow.decode):
        found = way(points)
        assert found[list(BAD)].isnan().all()
        torch.testing.assert_close(found[FINITE], way(points[FINITE]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "solver", [Solver(), Solver("rk4", steps=4), Solver(norm="rows")], ids=str
)
def test_nan_affects_only_its_row_of_trajectory_and_integrals(solver, small_flow, points):
    flow = small_flow("cnf", solver=solver)
    path = flow.trajectory(points, [0.0, 0.5, 1.0])
    assert path.shape == (3, 7, 2) and path[:, list(BAD)].isnan().all()
    alone = flow.trajectory(points[FINITE], [0.0, 0.5, 1.0])
    torch.testing.assert_close(path[:, FINITE], alone, rtol=1e-12, atol=1e-12)

    probe = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=F64)[:, None].expand(2, 7, 2)
    speed = [lambda point: point.v.square().sum(-1)]
    every, few = (Hutchinson(probe=part) for part in (probe, probe[:, :3]))
    found, solved = flow.log_prob_and_integral(points, divergence=every, integrands=speed)
    alone, _ = flow.log_prob_and_integral(points[FINITE], divergence=few, integrands=speed)
    assert_rule(found, alone)
    assert_rule(
        flow.log_prob(points, divergence=every), flow.log_prob(points[FINITE], divergence=few)
    )
    bad = [solved.value, solved.ladj, *solved.integrals, solved.estimates.T]
    assert all(part[list(BAD)].isnan().all() for part in bad)
    assert all(part[FINITE].isfinite().all() for part in bad)


@pytest.mark.parametrize("name", ["cnf", "nsf"])
def test_nan_affects_only_its_row_of_error_bars(name, small_flow, points):
    flow = small_flow(name, solver=Solver("rk4", steps=4))
    estimate, alone = log_prob_with_error(flow, points), log_prob_with_error(flow, points[FINITE])
    assert_rule(estimate.value, alone.value)
    torch.testing.assert_close(
        estimate.solver_error[FINITE], alone.solver_error, rtol=1e-12, atol=1e-12
    )
    assert estimate.solver_error[[1, 3]].isnan().all()
    assert (estimate.solver_error[[2, 6]] == 0).all()  # -inf is exact


def test_nan_affects_only_its_row_with_layers_around_a_solve(randomized, points):
    parts = [Coupling(2, hidden=(8,)), Continuous(MLPField(2, (8,), frequencies=1)), Coupling(2)]
    flow = randomized(Flow(None, Compose(parts), event_shape=(2,)), gain=0.6)
    found, alone = flow.log_prob(points), flow.log_prob(points[FINITE])
    assert_rule(found, alone)
    weights = list(flow.parameters())
    for actual, right in zip(
        torch.autograd.grad(found[FINITE].sum(), weights),
        torch.autograd.grad(alone.sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(actual, right, rtol=1e-9, atol=1e-9)


def test_nan_affects_only_its_own_image(randomized, generator):
    flow = randomized(cnf.models.build("glow", shape=(1, 4, 4), hidden=(8, 8)), gain=0.3)
    x = torch.randn(4, 1, 4, 4, generator=generator, dtype=F64)
    broken = x.clone()
    broken[1, 0, 2, 3], broken[2, 0, 0, 0] = NAN, INF
    found = flow.log_prob(broken)
    torch.testing.assert_close(found[[0, 3]], flow.log_prob(x[[0, 3]]))
    assert found[1].isnan() and found[2] == -INF


def test_far_points_that_overflow_in_preprocessing_have_no_density():
    outer = Standardize((2,))
    outer.fit(1e-3 * torch.randn(50, 2))
    flow = Flow(None, Continuous(MLPField(2, (8,))), outer, event_shape=(2,))
    x = torch.tensor([[1e-3, 0.0], [3e38, 0.0]])
    found = flow.log_prob(x)
    assert found[0] == flow.log_prob(x[:1])[0] and found[1] == -INF


class Net(nn.Module):
    """Dequantization with weights of its own."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def encode(self, x, generator=None):
        return x + 0.5 + 0.1 * torch.tanh(self.scale * x), self.scale * x.sum(-1)

    def decode(self, y):
        return y.floor()


def test_dequantization_gets_no_nan():
    flow = Flow(None, Compose([Coupling(2)]), None, Net(), event_shape=(2,))
    x = torch.tensor([[1.0, 2.0], [NAN, 0.0], [0.0, INF]])
    found = flow.log_prob(x)
    torch.testing.assert_close(found[:1], flow.log_prob(x[:1]))
    assert found[1].isnan() and found[2] == -INF
    found[0].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in flow.parameters())
    assert flow.decode(x)[1].isnan().all()


def test_nan_in_an_optional_context_means_missing(small_flow, generator):
    flow = small_flow("cnf", 3, null_context=True)
    x = torch.randn(2, 2, generator=generator, dtype=F64)
    found = flow.log_prob(x, torch.full((2, 3), NAN, dtype=F64))
    torch.testing.assert_close(found, flow.log_prob(x), rtol=0, atol=1e-7)  # solver rtol 1e-9
    assert flow.log_prob(x, torch.full((2, 3), INF, dtype=F64)).isnan().all()


@pytest.mark.parametrize("solver", [Solver(), Solver("rk4", steps=4)], ids=str)
def test_error_names_a_field_that_produces_nan(solver, points):

    class Root(nn.Module):
        def forward(self, t, x):
            return x.sqrt()

    flow = Flow(None, Continuous(Adapter(Root(), (2,)), solver), event_shape=(2,)).double()
    with pytest.raises(SolverError, match="the field returned NaN or infinity"):
        flow.encode(points)


def test_given_probes_stay_with_their_rows(small_flow, generator):
    flow = small_flow("cnf")
    x = torch.randn(6, 2, generator=generator, dtype=torch.float64)
    probe = torch.randn(1, 6, 2, generator=generator, dtype=torch.float64)
    x[2] = torch.nan
    sound = [0, 1, 3, 4, 5]
    found = flow.log_prob(x, divergence=cnf.Hutchinson(probe=probe))
    expected = flow.log_prob(x[sound], divergence=cnf.Hutchinson(probe=probe[:, sound]))
    torch.testing.assert_close(found[sound], expected, rtol=1e-9, atol=1e-9)
