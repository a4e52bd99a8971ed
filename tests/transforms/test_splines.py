"""Rational-quadratic splines: formula, bin edges, tails and precision in float32."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnf.transforms import Autoregressive, CircularSpline, Coupling, Inverted, RationalQuadratic

F64 = torch.float64


def random_spline(bins, count, generator, scale=1.0, dtype=F64, bound=5.0):
    spline = RationalQuadratic(bins, bound)
    raw = scale * torch.randn(spline.size, count, generator=generator, dtype=dtype)
    return spline, spline.parametrize(raw)


def spline_of_the_paper(z, widths, heights, slopes, bound):
    """Equations (4) and (5) of Durkan et al. (2019), one number at a time."""
    zk, xk = (np.concatenate([[0.0], np.cumsum(v)]) - bound for v in (widths, heights))
    k = min(int(np.searchsorted(zk, z, side="right")) - 1, len(widths) - 1)
    s = heights[k] / widths[k]
    xi = (z - zk[k]) / widths[k]
    below = s + (slopes[k + 1] + slopes[k] - 2 * s) * xi * (1 - xi)
    x = xk[k] + heights[k] * (s * xi**2 + slopes[k] * xi * (1 - xi)) / below
    above = slopes[k + 1] * xi**2 + 2 * s * xi * (1 - xi) + slopes[k] * (1 - xi) ** 2
    return x, math.log(s**2 * above / below**2)


@pytest.mark.parametrize("bins", [1, 2, 8])
def test_spline_equals_the_formula_of_the_paper(bins, generator):
    z = torch.linspace(-2.99, 2.99, 23, dtype=F64)
    spline, parameters = random_spline(bins, len(z), generator, bound=3.0)
    x, log_slope = spline.forward(z, *parameters)
    for k in range(len(z)):
        (widths, heights), slopes = (p[..., k].numpy() for p in parameters)
        expected = spline_of_the_paper(z[k].item(), widths, heights, slopes, 3.0)
        assert (x[k].item(), log_slope[k].item()) == pytest.approx(expected, rel=1e-10)
    assert bins == 1 or log_slope.abs().max() > 0.1  # with one bin and slopes of 1: the identity


def test_one_bin_by_hand():
    # from (-1, -1) to (1, 1) with slopes 1 at both ends: s = 1 and the spline is the identity;
    # with slopes 4 and 1: ξ = ½ gives x = -1 + 2 (¼ + 4·¼)/(1 + 3·¼) = 3/7
    spline = RationalQuadratic(1, bound=1.0)
    z = torch.zeros(1, dtype=F64)
    x, log_slope = spline.forward(
        z, torch.full((2, 1, 1), 2.0, dtype=F64), torch.tensor([[4.0], [1.0]], dtype=F64)
    )
    assert x.item() == pytest.approx(3 / 7, rel=1e-14)
    assert log_slope.item() == pytest.approx(math.log((1 / 4 + 1 / 2 + 1) / 1.75**2), rel=1e-14)


def test_zero_parameters_give_the_identity():
    spline = RationalQuadratic(7)
    z = torch.linspace(-9, 9, 50, dtype=F64)
    x, log_slope = spline.forward(z, *spline.parametrize(torch.zeros(spline.size, 50, dtype=F64)))
    torch.testing.assert_close(x, z, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_slope, torch.zeros_like(z), rtol=0, atol=1e-12)


def test_widths_and_heights_sum_to_the_interval_and_respect_the_minimum(generator):
    spline, ((widths, heights), slopes) = random_spline(6, 40, generator, scale=30.0)
    for sizes in (widths, heights):
        torch.testing.assert_close(sizes.sum(0), torch.full((40,), 10.0, dtype=F64))
        assert sizes.min() >= 0.01 - 1e-12
    assert slopes.min() >= 1e-3 and (slopes[0] == 1).all() and (slopes[-1] == 1).all()
    with pytest.raises(ValueError, match="spline: expected bins >= 1"):
        RationalQuadratic(0)


@given(
    bins=st.integers(1, 64),
    scale=st.sampled_from([1e-6, 0.3, 3.0, 10.0]),
    seed=st.integers(0, 2**20),
    bound=st.sampled_from([1e-2, 1.0, 50.0]),
)
@settings(max_examples=60, deadline=None)
def test_round_trip_and_slope(bins, scale, seed, bound):
    generator = torch.Generator().manual_seed(seed)
    spline, parameters = random_spline(bins, 20, generator, scale, bound=bound)
    z = (2.4 * torch.rand(20, generator=generator, dtype=F64) - 1.2) * bound
    z = z.requires_grad_()
    x, log_slope = spline.forward(z, *parameters)
    (slope,) = torch.autograd.grad(x.sum(), z)
    torch.testing.assert_close(slope.log(), log_slope, rtol=1e-6, atol=1e-6)
    again, inverse = spline.inverse(x, *parameters)
    # One way multiplies a rounding error by the slope, the other divides by it.
    off = 1e-12 * bound * (1 + (-log_slope).exp())
    assert ((again - z).abs() <= off).all()
    torch.testing.assert_close(inverse, -log_slope, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("bins", [1, 8, 64])
@pytest.mark.parametrize("scale", [0.0, 3.0, 100.0])
def test_values_and_gradients_are_finite_in_float32(direction, bins, scale, generator):
    sizes = torch.logspace(-30, 30, 121)
    edges = torch.tensor([0.0, 5.0, 4.9999995, 5.0000005, 3.4e38])
    value = torch.cat([sizes, edges])
    value = torch.cat([value, -value])
    spline = RationalQuadratic(bins)
    raw = (scale * torch.randn(spline.size, len(value), generator=generator)).requires_grad_()
    parameters = spline.parametrize(raw)
    sides = parameters[0].cumsum(1).flatten(0, 1) - 5  # at the knots, too
    for values in (value, *sides.detach()):
        values = values.clone().requires_grad_()
        y, ladj = getattr(spline, direction)(values, *parameters)
        outside = values.abs() >= 5
        assert y.dtype == ladj.dtype == torch.float32
        assert torch.isfinite(y).all() and torch.isfinite(ladj).all()
        assert torch.equal(y[outside], values[outside]) and (ladj[outside] == 0).all()
        grads = torch.autograd.grad(
            ladj.sum() + (y / 1e30).sum(), (values, raw), retain_graph=True
        )
        assert all(torch.isfinite(grad).all() for grad in grads)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_gradients_equal_finite_differences(direction, generator):
    spline = RationalQuadratic(4)
    raw = torch.randn(spline.size, 6, generator=generator, dtype=F64, requires_grad=True)
    value = torch.linspace(-6, 6, 6, dtype=F64).requires_grad_()

    def applied(value, raw):
        return getattr(spline, direction)(value, *spline.parametrize(raw))

    assert torch.autograd.gradcheck(applied, (value, raw))
    assert torch.autograd.gradgradcheck(applied, (value, raw))


def test_inverted_exchanges_the_directions(generator):
    spline, parameters = random_spline(5, 9, generator)
    z = torch.linspace(-4, 4, 9, dtype=F64)
    other = Inverted(spline)
    assert other.size == spline.size
    for one, two in (("forward", "inverse"), ("inverse", "forward")):
        for a, b in zip(
            getattr(other, one)(z, *parameters), getattr(spline, two)(z, *parameters), strict=True
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
def test_circular_spline_is_smooth_at_the_seam_and_periodic(direction, generator):
    spline = CircularSpline(6, bound=2.0)
    raw = torch.randn(spline.size, 1, generator=generator, dtype=F64)
    parameters = [p.expand(*p.shape[:-1], 4) for p in spline.parametrize(raw)]
    turn = parameters[0] if direction == "forward" else 0.0
    seam = 2.0 - turn + torch.tensor([-1e-9, 1e-9, 4 - 1e-9, -4 + 1e-9], dtype=F64)
    y, log_slope = getattr(spline, direction)(seam, *parameters)
    torch.testing.assert_close(log_slope, log_slope[:1].expand(4), rtol=0, atol=1e-6)
    apart = torch.remainder(y[1:] - y[:1] + 2, 4) - 2  # on the circle
    assert (apart.abs() < 1e-6).all() and (y.abs() <= 2).all() and log_slope.abs().min() > 1e-3


def test_circular_spline_is_a_bijection_of_the_circle(generator):
    spline = CircularSpline(5)
    raw = torch.randn(spline.size, 1, generator=generator, dtype=F64)
    z = torch.linspace(-math.pi, math.pi, 4001, dtype=F64)[:-1]
    parameters = [p.expand(*p.shape[:-1], 4000) for p in spline.parametrize(raw)]
    x, log_slope = spline.forward(z, *parameters)
    assert (log_slope.exp().mean() - 1).abs() < 1e-4  # the slope's mean over the circle
    again, back = spline.inverse(x, *parameters)
    off = torch.remainder(again - z + math.pi, 2 * math.pi) - math.pi
    assert off.abs().max() < 1e-10
    torch.testing.assert_close(back, -log_slope, rtol=0, atol=1e-8)


@pytest.mark.parametrize("scheme", [Coupling, Autoregressive])
def test_layers_of_angles_are_periodic(scheme, randomized, generator):
    layer = randomized(scheme(3, transformer=CircularSpline(4), hidden=(9,), period=2 * math.pi))
    z = torch.randn(5, 3, generator=generator, dtype=F64)
    x, ladj = layer(z)
    turned, same = layer(z + 2 * math.pi)
    torch.testing.assert_close(turned.sin(), x.sin())
    torch.testing.assert_close(turned.cos(), x.cos())
    torch.testing.assert_close(same, ladj)
    again, _ = layer.inverse(x)
    torch.testing.assert_close(again, z, rtol=0, atol=1e-9)
    assert ladj.abs().min() > 1e-3


@pytest.mark.parametrize("scale", [1.0, 5.0])
def test_error_of_the_root_in_float32_is_bounded_by_the_slope(scale, generator):
    spline = RationalQuadratic(8)
    raw = scale * torch.randn(spline.size, 1, generator=generator, dtype=F64)
    parameters = [p.expand(*p.shape[:-1], 20_001) for p in spline.parametrize(raw)]
    z = torch.linspace(-4.999, 4.999, 20_001, dtype=F64)
    x, log_slope = spline.forward(z, *parameters)
    found, _ = spline.inverse(x.float(), *(p.float() for p in parameters))
    error = (found - z).abs() * log_slope.exp().clamp(max=1)  # what is steep in x loses digits
    assert error.max() < 3e-6


@pytest.mark.parametrize("bins", [8, 64])
def test_results_in_float32_are_on_the_circle_despite_rounding(bins, generator):
    spline = CircularSpline(bins, 1.0)
    raw = 3 * torch.randn(spline.size, 20_000, generator=generator)
    turn, *rest = spline.parametrize(raw)
    last = torch.full((20_000,), 1 - 2**-23)  # of what is not wrapped to the circle's other end
    x, _ = spline.forward(last, torch.zeros_like(turn), *rest)
    assert x.abs().max() <= 1
