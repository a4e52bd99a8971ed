"""The estimated log-determinant of steps, against the exact one."""

import contextlib

import pytest
import torch
from torch import nn

import cnf
from cnf.dynamics import Hutchinson, Solver, power_series
from cnf.fields import Adapter
from cnf.flow import Flow
from cnf.metrics import log_prob_with_error
from cnf.transforms import Continuous

F64 = torch.float64


class Turn(nn.Module):
    """v(x) = x Aᵀ + a sin x, which is not linear and turns: its products are no multiples."""

    def __init__(self, a):
        super().__init__()
        self.a = nn.Parameter(a)

    def forward(self, t, x):
        return x @ self.a.T + 0.2 * torch.sin(x)


def flow_of(size, explicit="density", dim=5, method="midpoint"):
    """Two steps; `size` is the spectral norm of the linear part."""
    a = torch.randn(dim, dim, generator=torch.Generator().manual_seed(2), dtype=F64)
    a = size * a / torch.linalg.matrix_norm(a, 2)
    solver = Solver(method, steps=2, discrete=True, explicit=explicit)
    return Flow(None, Continuous(Adapter(Turn(a), dim), solver), event_shape=(dim,)).double()


def points(n=6, dim=5):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0), dtype=F64)


def estimate(flow, x, probes=4000, **options):
    generator = torch.Generator().manual_seed(1)
    return flow.log_prob(x, divergence=Hutchinson(probes, generator=generator, **options))


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("explicit", ["sample", "density"])
def test_it_has_the_exact_one_as_its_mean(explicit, noise):
    flow, x = flow_of(0.9, explicit), points()
    told = log_prob_with_error(
        flow, x, divergence=Hutchinson(4000, noise), confidence=0.9999,
        generator=torch.Generator().manual_seed(1),
    )  # fmt: skip
    exact = flow.log_prob(x)
    assert ((told.value - exact).abs() < told.trace_error).all()
    assert told.trace_error.max() < 0.1 < (exact - flow.base.log_prob(x)).abs().max()


def test_further_terms_make_up_for_those_that_are_left_out(monkeypatch):
    """With two terms always, the mean of the rest is what the series has left."""
    monkeypatch.setattr(power_series, "FIXED_TERMS", 2)
    flow, x = flow_of(0.9), points()
    left = (estimate(flow, x, 20_000) - flow.log_prob(x)).abs().max()
    monkeypatch.setattr(power_series, "CONTINUE", 1e-9)  # no further ones
    assert left < 0.02 < (estimate(flow, x) - flow.log_prob(x)).abs().max()


def test_its_gradient_is_unbiased():
    flow, x = flow_of(0.7), points().requires_grad_()
    of = (flow.transform.field.net.a, x)
    exact = torch.autograd.grad(flow.log_prob(x).sum(), of)
    generator = torch.Generator().manual_seed(1)
    estimator = Hutchinson(200, generator=generator)
    found = [
        torch.autograd.grad(flow.log_prob(x, divergence=estimator).sum(), of) for _ in range(40)
    ]
    for true, each in zip(exact, map(torch.stack, zip(*found, strict=True)), strict=True):
        error = each.std(0) / len(found) ** 0.5
        assert (each.mean(0) - true).abs().le(4 * error).all()
        assert true.abs().max() > 5 * error.max()


class Steep(nn.Module):
    """v(x) = w s sin x, with s = 1 where x₀ < 1, else `slope`."""

    def __init__(self, slope):
        super().__init__()
        self.slope, self.weight = slope, nn.Parameter(torch.tensor(0.1))

    def forward(self, t, x):
        slope = torch.where(x[..., :1] > 1, self.slope, 1.0)
        return slope * self.weight * torch.sin(x)


@pytest.mark.parametrize("slope", [30.0, 1e5, 1e20])
def test_rows_too_far_from_the_identity_are_nan_and_leave_the_others_alone(slope):
    solver = Solver("euler", steps=1, discrete=True, explicit="density")
    flow = Flow(None, Continuous(Adapter(Steep(slope), 2), solver), event_shape=(2,))
    x = torch.tensor([[0.5, 0.1], [3.0, 1.0], [-1.0, 2.0]])
    with pytest.warns(UserWarning, match=r"1 of 3 rows \(1\).*too far from the identity"):
        found = estimate(flow, x, 8)
    assert found.isnan().tolist() == [False, True, False]
    others = [0, 2]
    exact = flow.log_prob(x[others])
    weight = flow.transform.field.net.weight
    ours = torch.autograd.grad(found[others].sum(), weight)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(exact.sum(), weight)[0])


def linear(a, explicit="density"):
    """One Euler step of which A = ±a."""
    solver = Solver("euler", steps=1, discrete=True, explicit=explicit)
    field = Adapter(Turn(a), len(a))
    field.net.forward = lambda t, x: x @ a.T
    return Flow(None, Continuous(field, solver), event_shape=(len(a),)).double()


@pytest.mark.parametrize("value, refused", [(0.8, False), (0.9, True), (1.5, True), (-2.0, True)])
def test_the_verdict_is_of_the_row_and_not_of_its_probes(value, refused):
    """The probe (1, -1) is in the kernel of A, and sees no growth."""
    flow, x = linear(-value / 2 * torch.ones(2, 2, dtype=F64)), torch.zeros(200, 2, dtype=F64)
    with pytest.warns(UserWarning) if refused else contextlib.nullcontext():
        found = estimate(flow, x, 1)
    assert found.isnan().all() if refused else found.isfinite().all()


def test_one_large_eigenvalue_among_many_is_seen():
    spread = torch.full((300,), 0.5, dtype=F64)
    spread[7] = 1.05
    with pytest.warns(UserWarning, match="50 of 50 rows"):
        estimate(linear(-spread.diag()), torch.zeros(50, 300, dtype=F64), 1)


def test_powers_that_grow_at_first_are_refused():
    """A shift by 3 has the spectral radius 0, and estimates of any size."""
    with pytest.warns(UserWarning, match="6 of 6 rows"):
        estimate(linear(-3 * torch.ones(29, dtype=F64).diag(1)), torch.zeros(6, 30, dtype=F64), 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_numbers_of_terms_are_finite_and_the_same_in_every_dtype(dtype):
    probe = torch.ones(1, 2**20, 1, dtype=dtype)
    series = power_series.PowerSeries(probe, torch.Generator().manual_seed(12))
    terms = series._numbers_of_terms(probe[0])
    assert terms.isfinite().all() and terms.min() == power_series.FIXED_TERMS
    for more in (1, 3):
        share = (terms >= terms.min() + more).double().mean()
        assert share == pytest.approx(power_series.CONTINUE**more, abs=0.003)


def test_a_row_that_is_nan_and_no_rows_stay_alone():
    flow, x = flow_of(0.5), points()
    x[2] = torch.nan
    assert estimate(flow, x, 3).isnan().tolist() == [False, False, True, False, False, False]
    assert estimate(flow, x[:0], 3).shape == (0,)


def test_a_field_without_motion_has_no_log_determinant():
    flow, x = flow_of(0.0), points()
    flow.transform.field.net.forward = lambda t, x: torch.zeros_like(x)
    torch.testing.assert_close(estimate(flow, x, 2), flow.base.log_prob(x))


@pytest.mark.parametrize("flow_map", [False, True])
def test_any_shape_of_a_batch_is_estimated_the_same_by_one_generator(flow_map):
    torch.manual_seed(0)
    solver = Solver("flow-map" if flow_map else "rk4", steps=3, discrete=True)
    flow = cnf.models.cnf(4, hidden=(8,), flow_map=flow_map).double().with_solver(solver)
    with torch.no_grad():
        for weight in flow.parameters():
            weight.add_(0.03)
    x = points(4, 4).reshape(2, 2, 4)
    first, again = (estimate(flow, x, 2) for _ in range(2))
    assert first.shape == (2, 2) and torch.equal(first, again)
    torch.testing.assert_close(estimate(flow, x, 4000), flow.log_prob(x), rtol=0, atol=0.05)


def test_error_bars_do_not_take_the_terms_for_the_solvers_error():
    a = 0.8 * torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))[0]
    flow, x = linear(-a.double()).float(), points().float()
    flow.transform.field.net.forward = lambda t, x: x @ -a.to(x).T
    first, again = (
        log_prob_with_error(
            flow, x, divergence=Hutchinson(8, generator=torch.Generator().manual_seed(5))
        )
        for _ in range(2)
    )
    assert first.solver_error.max() < 1e-4 < first.trace_error.min()
    assert torch.equal(first.value, again.value)


def test_exact_error_bars_draw_nothing():
    state = torch.get_rng_state()
    log_prob_with_error(flow_of(0.5), points())
    assert torch.equal(state, torch.get_rng_state())


def test_other_estimates_are_refused():
    for divergence in ("hutch++", "learned"):
        with pytest.raises(ValueError, match="'exact' or 'hutchinson'"):
            flow_of(0.5).log_prob(points(), divergence=divergence)
    with pytest.raises(ValueError, match="'exact'"):
        cnf.MaximumLikelihood(divergence="hutchinson")(flow_of(0.5), cnf.Batch(points()))
