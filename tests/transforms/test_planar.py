"""Planar, Sylvester and radial flows: constraints, roots and their gradients."""

import math

import pytest
import torch

from cnf.transforms import Planar, Radial, Sylvester
from cnf.transforms.planar import _above_minus_one
from cnf.transforms.roots import tanh_root

F64 = torch.float64
CASES = {
    "planar": lambda context=0: Planar(3, context),
    "sylvester": lambda context=0: Sylvester(3, 2, context),
    "radial": lambda context=0: Radial(3, context),
}


@pytest.fixture
def large_parameters(generator):
    """A function that makes parameters large enough for the constraints to matter."""

    def make(name, context=0, scale=4.0):
        transform = CASES[name](context).double()
        with torch.no_grad():
            for parameter in transform.parameters():
                draw = torch.randn(parameter.shape, generator=generator, dtype=F64)
                parameter.copy_(scale * draw)
        return transform

    return make


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [0.1, 4.0, 30.0])
def test_round_trip_and_ladj_for_any_parameters(name, scale, large_parameters, generator):
    for _ in range(20):
        transform = large_parameters(name, scale=scale)
        z = 3 * torch.randn(40, 3, generator=generator, dtype=F64)
        x, ladj = transform(z)
        again, inverse = transform.inverse(x)
        off = 1e-10 * (1 + (-ladj).exp().clamp(max=1e5)).unsqueeze(-1)
        assert ((again - z).abs() <= off).all()
        assert torch.isfinite(ladj).all() and torch.isfinite(inverse).all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("context", [0, 2])
def test_gradients_of_both_directions_equal_finite_differences(
    name, context, large_parameters, generator
):
    transform = large_parameters(name, context, scale=1.0)
    condition = torch.randn(2, context, generator=generator, dtype=F64) if context else None
    value = torch.randn(2, 3, generator=generator, dtype=F64, requires_grad=True)
    for apply in (transform.forward, transform.inverse):

        def applied(value, *parameters, apply=apply):
            return apply(value, condition)

        inputs = (value, *transform.parameters())
        assert torch.autograd.gradcheck(applied, inputs)
        assert torch.autograd.gradgradcheck(applied, inputs)


def test_planar_by_hand():
    # w = (1, 0), u = (log(e² - 1) - log(e - 1), 1): wᵀû = softplus(log(e² - 1)) - 1 = 1; b = 0.5
    transform = Planar(2).double()
    with torch.no_grad():
        raw = math.log(math.expm1(2.0)) - math.log(math.expm1(1.0))
        numbers = [raw, 1.0, 1.0, 0.0, 0.5]
        transform.numbers.bias.copy_(torch.tensor(numbers, dtype=F64))
    x, ladj = transform(torch.tensor([0.25, 3.0], dtype=F64))
    tanh = math.tanh(0.75)
    torch.testing.assert_close(x, torch.tensor([0.25 + tanh, 3.0 + tanh], dtype=F64))
    assert ladj.item() == pytest.approx(math.log(2 - tanh**2), rel=1e-12)


def test_radial_by_hand():
    # α = softplus(0) = log 2, β = softplus(1) - log 2
    transform = Radial(2).double()
    with torch.no_grad():
        numbers = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=F64)
        transform.numbers.bias.copy_(numbers)
    alpha, beta = math.log(2), math.log1p(math.e) - math.log(2)
    x, ladj = transform(torch.tensor([1.0, 2.0], dtype=F64))
    torch.testing.assert_close(x, torch.tensor([1.0, 2 + beta * 2 / (alpha + 2)], dtype=F64))
    out, along = 1 + beta / (alpha + 2), 1 + beta * alpha / (alpha + 2) ** 2
    assert ladj.item() == pytest.approx(math.log(out * along), rel=1e-12)


def test_sylvester_of_rank_one_is_planar(generator):
    sylvester, planar = Sylvester(2, 1).double(), Planar(2).double()
    r, s, b = 0.7, -0.4, 0.3
    with torch.no_grad():
        sylvester.vectors.bias.copy_(
            torch.tensor([0.6, 0.8])
        )  # Q: what the mirror makes of (1, 0)
        sylvester.numbers.bias.copy_(torch.tensor([math.atanh(r), math.atanh(s), b]))
        q = torch.tensor([1 - 2 * 0.36, -2 * 0.48], dtype=F64)
        w, along = s * q, r * s
        raw = math.log(math.expm1(1 + along) / math.expm1(1.0))  # wᵀu before the constraint
        planar.numbers.bias.copy_(torch.cat([raw * q / s, w, torch.tensor([b], dtype=F64)]))
    z = torch.randn(5, 2, generator=generator, dtype=F64)
    for one, other in zip(sylvester(z), planar(z), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="expected 1 <= rank <= 2, got 3"):
        Sylvester(2, 3)


def test_root_and_its_derivatives_have_closed_form():
    # u = ±log 2 has tanh u = ±3/5, so that s = u + 2 tanh u; du/ds = 1/(1 + k sech² u) = 25/57
    u = torch.tensor([math.log(2), -math.log(2), 0.0], dtype=F64)
    s, k = (u + 2 * u.tanh()).requires_grad_(), torch.tensor(2.0, dtype=F64, requires_grad=True)
    found = tanh_root(s, k)
    torch.testing.assert_close(found, u, rtol=1e-15, atol=1e-15)
    slope, bend = torch.autograd.grad(found.sum(), (s, k))
    torch.testing.assert_close(slope, torch.tensor([25 / 57, 25 / 57, 1 / 3], dtype=F64))
    assert bend.abs() < 1e-15  # ∂u/∂k is odd in u
    _, tangent = torch.func.jvp(tanh_root, (s.detach(), k.detach()), (torch.ones_like(s), k * 0))
    torch.testing.assert_close(tangent, slope, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("k", ["folded", -0.999, -0.9, -0.5, 0.0, 1e-8, 0.5, 5.0, 50.0, 1e3, 1e6])
def test_root_is_found_in_a_fixed_number_of_steps(k, dtype):
    eps = torch.finfo(dtype).eps
    k = -1 + 8 * eps if k == "folded" else k
    near = abs(k) * (1 + torch.cat([-torch.logspace(-7, -1, 100), torch.logspace(-7, -1, 100)]))
    s = torch.cat([torch.zeros(1), torch.logspace(-30, 6, 1_000), near]).to(dtype)
    for value in (s, -s):
        u = tanh_root(value, torch.full_like(s, k))
        pull = k * torch.tanh(u)
        assert ((u + pull - value).abs() <= 2 * eps * (u.abs() + pull.abs() + s)).all()
        assert (u * value >= 0).all()


@pytest.mark.parametrize("name", CASES)
def test_small_parameters_give_nearly_the_identity(name, large_parameters, generator):
    z = torch.randn(100, 3, generator=generator, dtype=F64)
    x, ladj = large_parameters(name, scale=1e-3)(z)
    assert (x - z).abs().max() < 0.01 and ladj.abs().max() < 0.01


FOLDED = {  # the layers at the ends of their constraints: w'u, R S and beta at -1, -1 and -alpha
    "planar": (Planar(1), [-30.0, 1.0, 0.0]),
    "sylvester": (Sylvester(1, 1), [20.0, -20.0, 0.0]),
    "radial": (Radial(1), [0.0, 3.0, -40.0]),
}


@pytest.mark.parametrize("name", FOLDED)
def test_results_are_finite_in_float32_at_the_boundary_of_the_constraint(name):
    transform, numbers = FOLDED[name]
    with torch.no_grad():
        transform.numbers.bias.copy_(torch.tensor(numbers))
    value = torch.linspace(-2, 2, 41).unsqueeze(-1).requires_grad_()
    for apply in (transform.forward, transform.inverse):
        y, ladj = apply(value)
        assert torch.isfinite(y).all() and torch.isfinite(ladj).all()
        inputs = [value, *transform.parameters()]
        grads = torch.autograd.grad(y.sum() + ladj.sum(), inputs, allow_unused=True)
        assert all(grad is None or torch.isfinite(grad).all() for grad in grads)


def test_planar_with_small_w_agrees_in_float32_and_float64(generator):
    transform, z = Planar(2), torch.randn(20, 2, generator=generator)
    with torch.no_grad():
        transform.numbers.bias.copy_(torch.tensor([0.3, -0.2, 1e-5, 2e-5, 0.7]))
    moved = transform(z)[0] - z
    expected = transform.double()(z.double())[0] - z
    torch.testing.assert_close(moved.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("x", [-40.0, -3.0, -1e-9, 0.0, 1e-9, 0.999, 1.0, 5.0, 700.0, 1e5])
def test_planars_constraint_is_a_shifted_softplus(x):
    given = torch.tensor(x, dtype=F64, requires_grad=True)
    found = _above_minus_one(given)
    expected = torch.nn.functional.softplus(given + math.log(math.expm1(1))) - 1
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.grad(found, given)[0].isfinite()


@pytest.mark.parametrize("name", CASES)
def test_autocast_has_no_effect(name, large_parameters, generator):
    transform = large_parameters(name, context=2, scale=1.0).float()
    z, context = (torch.randn(20, size, generator=generator) for size in (3, 2))
    with torch.autocast("cpu", torch.bfloat16):
        found = transform(z, context), transform.inverse(z, context)
    torch.testing.assert_close(found, (transform(z, context), transform.inverse(z, context)))


@pytest.mark.parametrize("kind", [Planar, lambda *sizes: Sylvester(24, 8, sizes[1]), Radial])
def test_first_map_is_as_near_the_identity_with_many_features_as_with_one(kind):
    moved = []
    for size in (1, 256):
        torch.manual_seed(0)
        z, context = torch.randn(500, 24), torch.randn(500, size)
        maps = [kind(24, size) for _ in range(20)]
        shifts = torch.stack([layer(z, context)[0] - z for layer in maps])
        moved.append(shifts.square().mean().sqrt().item())
    assert moved[1] == pytest.approx(moved[0], rel=0.3)
