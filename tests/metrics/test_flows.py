import math
from types import SimpleNamespace

import pytest
import torch
from torch import Generator
from torch.distributions import Independent, Normal

import cnf
from cnf.dynamics.solver import Solver
from cnf.fields.base import VectorField
from cnf.flow import Flow
from cnf.metrics.estimate import Estimate
from cnf.metrics.flows import (
    gap,
    log_prob_chunked,
    nfe,
    nll,
    normalized_path_energy,
    path_energy,
    round_trip_error,
    straightness,
)
from cnf.transforms import Continuous, Standardize

# torch itself calls its deprecated torch.jit.script in the first forward-mode derivative
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")

TIGHT = Solver("dopri5", rtol=1e-9, atol=1e-9)


def seeded(seed=0):
    return Generator().manual_seed(seed)


def normal(n, dim=2, seed=0):
    return torch.randn(n, dim, generator=seeded(seed), dtype=torch.float64)


class Growth(VectorField):
    """x' = a x + c, with c a constant or the context."""

    def __init__(self, rate, drift=(0.0, 0.0), context_dim=0):
        super().__init__((2,), context_dim)
        self.rate, self.drift = rate, torch.tensor(drift, dtype=torch.float64)

    def forward(self, t, x, context=None):
        return self.rate * x + (self.drift if context is None else context)


def continuous_flow(rate, solver=TIGHT, preprocess=None, **options):
    """z ~ N(0, I) in two dimensions, carried along a `Growth`."""
    transform = Continuous(Growth(rate, **options), solver)
    return Flow(None, transform, preprocess, event_shape=(2,)).double()


def discrete_flow():
    return Flow(None, doubling(), event_shape=(2,)).double()


def doubling():
    transform = Standardize((2,))
    transform.scale.fill_(2.0)
    return transform


def gaussian(mean, sd, dim=2):
    full = torch.full((dim,), 1.0, dtype=torch.float64)
    return Independent(Normal(mean * full, sd * full), 1)


# --- likelihood ---


def test_nll_is_the_cross_entropy():
    x = normal(20_000)
    estimate = nll(gaussian(1.0, 2.0), x)
    # E[−log q] for p = N(0, I), q = N(1, 4I) in two dimensions
    expected = 2 * (0.5 * math.log(2 * math.pi) + math.log(2) + (1 + 1) / (2 * 4))
    assert estimate.value == pytest.approx(expected, abs=4 * estimate.error)
    assert 0 < estimate.error < 0.01


def test_gap_is_the_kl_divergence_and_quieter_than_the_nll():
    x = normal(20_000)
    p, q = gaussian(0.0, 1.0), gaussian(0.1, 1.1)
    estimate = gap(q, p, x)
    kl = 2 * (math.log(1.1) + (1 + 0.1**2) / (2 * 1.1**2) - 0.5)
    assert estimate.value == pytest.approx(kl, abs=4 * estimate.error)
    assert estimate.error < 0.3 * nll(q, x).error


@pytest.mark.parametrize("metric", [nll, lambda flow, x: gap(flow, gaussian(0.0, 1.0), x)])
@pytest.mark.parametrize(("bad", "expected"), [(math.nan, math.nan), (-math.inf, math.inf)])
def test_no_point_is_dropped_however_bad(metric, bad, expected):
    def log_prob(x):
        return torch.where(x[:, 0] == x[3, 0], bad, gaussian(0.0, 1.0).log_prob(x))

    estimate = metric(SimpleNamespace(log_prob=log_prob), normal(50))
    assert estimate.value == pytest.approx(expected, nan_ok=True)
    assert math.isnan(estimate.error)


def test_errors_are_standard_errors_of_the_mean():
    values = normal(400, 1).flatten()
    estimate = Estimate.of(values)
    assert estimate.value == pytest.approx(values.mean().item())
    assert estimate.error == pytest.approx(values.std().item() / 20)


@pytest.mark.parametrize("shape", [(10, 2), (2,), (1, 2)])
def test_chunks_carry_their_own_context(shape):
    def log_prob(x, context):
        assert len(x) <= 4
        return gaussian(0.0, 1.0).log_prob(x - context)

    flow, x, context = SimpleNamespace(log_prob=log_prob), normal(10), normal(10, seed=1)
    context = context[: shape[0]] if len(shape) == 2 else context[0]
    expected = gaussian(0.0, 1.0).log_prob(x - context)
    torch.testing.assert_close(log_prob_chunked(flow, x, context, chunk=4), expected)
    assert nll(flow, x, context, chunk=4).value == pytest.approx(-expected.mean().item())


def test_log_prob_chunked_takes_no_gradient():
    mean = torch.zeros(2, requires_grad=True)
    flow = Independent(Normal(mean, 1.0), 1)
    assert not log_prob_chunked(flow, torch.zeros(3, 2)).requires_grad


def test_gap_of_a_flow_counts_its_jacobian():
    x = normal(5)
    p, q = gaussian(0.0, 1.0), gaussian(0.0, math.exp(0.8))  # what the flow makes of N(0, I)
    expected = (p.log_prob(x) - q.log_prob(x)).mean().item()
    assert gap(continuous_flow(0.8), p, x).value == pytest.approx(expected, rel=1e-6)
    assert gap(discrete_flow(), gaussian(0.0, 2.0), x).value == pytest.approx(0, abs=1e-12)


# --- paths ---


@pytest.mark.parametrize("rate", [0.8, -1.3])
def test_path_energy_of_a_linear_field_has_closed_form(rate):
    starts = normal(500)
    # ∫ |a e^{at} x0|² dt
    energies = rate**2 * starts.square().sum(-1) * math.expm1(2 * rate) / (2 * rate)
    estimate = path_energy(continuous_flow(rate), 500, seeded())
    assert estimate == pytest.approx(Estimate.of(energies), rel=1e-6)  # solver rtol 1e-9


def test_path_energy_sees_the_context():
    context = normal(50, seed=1)
    estimate = path_energy(continuous_flow(0.0, context_dim=2), 50, seeded(), context)
    assert estimate.value == pytest.approx(context.square().sum(-1).mean().item())


def test_path_energy_of_a_translation_is_w2_squared_so_npe_is_zero():
    x0 = normal(200)
    flow = continuous_flow(0.0, drift=(3.0, -4.0))
    assert path_energy(flow, 10).value == pytest.approx(25.0)
    assert normalized_path_energy(flow, x0, flow.decode(x0)).value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("scale", [0.5, 3.0])
def test_npe_is_relative_to_w2_squared_and_positive_either_way(scale):
    x0 = normal(200)
    flow = continuous_flow(0.8)
    x1 = x0 * (1 + scale * math.expm1(0.8))  # optimum: a scaling moves x to scale·(e^a − 1)·x more
    second = x0.square().sum(-1)
    energy = Estimate.of(0.8**2 * second * math.expm1(1.6) / 1.6)
    optimum = (scale * math.expm1(0.8)) ** 2 * second.mean().item()
    computed = normalized_path_energy(flow, x0, x1)
    assert computed.value == pytest.approx(abs(energy.value - optimum) / optimum, rel=1e-6)
    assert computed.error == pytest.approx(energy.error / optimum, rel=1e-6)


def test_npe_is_measured_in_the_space_of_the_field():
    x0, options = normal(200), {"rate": 0.0, "drift": (3.0, -4.0)}
    flow = continuous_flow(**options, preprocess=doubling())
    x1 = flow.decode(x0)
    torch.testing.assert_close(x1, 2 * continuous_flow(**options).decode(x0))
    assert normalized_path_energy(flow, x0, x1).value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("metric", [path_energy, straightness])
def test_paths_of_a_conditional_flow_need_the_context(metric):
    with pytest.raises(ValueError, match=f"{metric.__name__}: expected a context"):
        metric(continuous_flow(0.0, context_dim=2), 5)


def test_npe_without_a_distance_to_normalize_by_is_refused():
    x = normal(20)
    with pytest.raises(ValueError, match="W2 = 0"):
        normalized_path_energy(continuous_flow(0.8), x, x)


@pytest.mark.parametrize("rate", [0.8, -1.3])
def test_straightness_of_a_linear_field_has_closed_form(rate):
    starts = normal(500)
    # ∫ |(e^a − 1) x0 − a e^{at} x0|² dt = (a (e^{2a} − 1)/2 − (e^a − 1)²) |x0|²
    factor = rate * math.expm1(2 * rate) / 2 - math.expm1(rate) ** 2
    expected = Estimate.of(factor * starts.square().sum(-1))
    estimate = straightness(continuous_flow(rate), 500, seeded())
    assert factor > 0.05
    assert estimate == pytest.approx(expected, rel=1e-3)  # trapezoid rule, 100 steps


def test_straightness_error_falls_as_the_square_of_the_steps():
    flow, factor = continuous_flow(0.8), 0.8 * math.expm1(1.6) / 2 - math.expm1(0.8) ** 2
    exact = factor * normal(20).square().sum(-1).mean().item()
    coarse, fine = (straightness(flow, 20, seeded(), steps=s).value - exact for s in (10, 20))
    assert coarse / fine == pytest.approx(4, rel=0.05)


def test_straightness_is_path_energy_less_the_squared_displacement():
    flow = continuous_flow(0.8, drift=(1.0, 2.0))
    starts = normal(100)
    moved = (flow.decode(starts) - starts).square().sum(-1).mean().item()
    expected = path_energy(flow, 100, seeded()).value - moved  # since ∫v dt = x1 − x0
    assert straightness(flow, 100, seeded()).value == pytest.approx(expected, rel=1e-3)


def test_straight_paths_have_straightness_zero():
    context = normal(50, seed=1)
    estimate = straightness(continuous_flow(0.0, context_dim=2), 50, seeded(), context)
    assert estimate.value == pytest.approx(0, abs=1e-20)


@pytest.mark.parametrize(
    "call",
    [path_energy, straightness, lambda flow: normalized_path_energy(flow, normal(5), normal(5))],
)
def test_paths_of_a_discrete_flow_are_a_type_error(call):
    with pytest.raises(TypeError, match="expected a flow whose transform is a Continuous"):
        call(discrete_flow())


# --- cost and invertibility ---


def test_nfe_counts_the_evaluations_of_sampling_and_of_scoring():
    flow = continuous_flow(0.8, Solver("rk4", steps=5))
    assert nfe(flow, 10) == (20, 20)


def test_nfe_of_a_discrete_flow_is_zero():
    assert nfe(discrete_flow(), 10) == (0, 0)


def test_round_trip_error_is_the_largest_deviation():
    x = normal(30)
    error = torch.zeros_like(x)
    error[4, 0], error[17, 1] = 0.01, -0.25
    flow = SimpleNamespace(encode=lambda x, c: 3 * x, decode=lambda z, c: z / 3 + error)
    assert round_trip_error(flow, x) == pytest.approx(0.25)
    assert round_trip_error(flow, x, scale=torch.tensor([0.01, 5.0])) == pytest.approx(1.0)
    error[20, 0] = math.nan
    assert math.isnan(round_trip_error(flow, x))


def test_round_trip_of_a_solved_flow_is_within_its_tolerance():
    assert round_trip_error(continuous_flow(0.8), normal(30)) < 1e-7


@pytest.mark.parametrize("measure", [nll, gap, round_trip_error])
def test_bad_data_is_refused(measure):
    x = torch.full((3, 2), math.nan)
    arguments = (gaussian(0.0, 1.0), x) if measure is gap else (x,)
    with pytest.raises(ValueError, match="expected x to be finite"):
        measure(discrete_flow(), *arguments)


def test_empty_data_is_refused():
    with pytest.raises(ValueError, match="at least one point"):
        nll(discrete_flow(), torch.zeros(0, 2))


@pytest.mark.parametrize("measure", [nll, log_prob_chunked, round_trip_error])
def test_a_single_point_is_refused(measure):
    with pytest.raises(ValueError, match=r"got \(2,\); of a single point give x\[None\]"):
        measure(discrete_flow(), torch.zeros(2))


def test_starts_of_paths_are_points_of_the_flow():
    with pytest.raises(ValueError, match=r"normalized_path_energy: .*\(\*, 2\), got \(8, 3\)"):
        normalized_path_energy(continuous_flow(0.8), torch.zeros(8, 3), torch.ones(8, 2))


def test_contexts_are_arrays_too():
    flow = cnf.models.realnvp(2, layers=1, hidden=(4,), context=1)
    x, context = torch.zeros(9, 2), torch.linspace(0, 1, 9)[:, None]
    assert nll(flow, x, context.numpy()) == nll(flow, x, context)  # pyright: ignore


def test_error_of_a_weighted_mean_is_that_of_its_rows_shares(generator):
    """√Σ s²(x - mean)²: of equal weights the plain one with N instead of N - 1 under the root."""
    draws = torch.randn(50, generator=generator, dtype=torch.float64)
    equal = Estimate.of(draws, torch.full((50,), 3.0))
    assert equal.value == pytest.approx(draws.mean().item())
    assert equal.error == pytest.approx(draws.std(correction=0).item() / 50**0.5)
    two = Estimate.of(torch.tensor([0.0, 4.0]), torch.tensor([3.0, 1.0]))
    assert two.value == pytest.approx(1) and two.error == pytest.approx((9 / 8) ** 0.5)


def test_arrays_are_scored_as_tensors_and_swapped_arguments_are_named():
    flow = cnf.models.realnvp(2, layers=2, hidden=(4,))
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    assert cnf.metrics.nll(flow, x.numpy()) == cnf.metrics.nll(flow, x)
    assert cnf.metrics.wasserstein2(x.numpy(), x.numpy() + 1) > 1
    with pytest.raises(ValueError, match="nll: expected x to be an array of numbers, got a Flow"):
        cnf.metrics.nll(x, flow)
