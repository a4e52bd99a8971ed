"""The field with divisive normalization: its formula, its tangents, and what scales do to it."""

import math

import pytest
import torch
import torch.nn.functional as F

from cnf.fields import FIELDS, DivisiveField, HasTangents, exact_divergence

F64 = torch.float64


@pytest.fixture
def build(randomized):
    return lambda *args, **options: randomized(DivisiveField(*args, **options))


@pytest.mark.parametrize("layer", ["input", "ignore"])
@pytest.mark.parametrize("hidden", [(5,), (5, 4)])
@pytest.mark.parametrize("filters", [None, 3, 8])
@pytest.mark.parametrize("own_time", [False, True])
def test_products_of_tangents_are_those_of_autograd(
    layer, hidden, filters, own_time, build, points, generator
):
    context_dim = 0 if layer == "ignore" else 2
    field = build(3, hidden, context_dim, filters, layer=layer)
    t, x, context = points(field, (2, 3), own_time)
    tangents = torch.randn(2, *x.shape, generator=generator, dtype=F64)
    assert isinstance(field, HasTangents)
    v, products = field.with_tangents(t, x, context, tangents)
    torch.testing.assert_close(v, field(t, x, context), rtol=1e-12, atol=1e-12)
    for tangent, product in zip(tangents, products, strict=True):
        _, expected = torch.func.jvp(lambda y: field(t, y, context), (x,), (tangent,))
        torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-12)
        assert expected.abs().max() > 1e-2


def test_field_equals_its_formula(build, points):
    field = build(3, (5,), 2, filters=4, floor=0.7, activation="tanh", frequencies=0)
    t, x, context = points(field, own_time=True)
    A, H = field.filters, F.softplus(field.pools)
    a = torch.einsum("fd,nd->nf", A, x)
    s = 0.7 + torch.einsum("fk,nk->nf", H, a**2)
    first, last = field.layers
    u = torch.cat([t[:, None], context], -1)
    inputs = torch.cat([a / s.sqrt(), s.log()], -1)
    h = (first.linear(inputs) + u @ first.modulation.shift.weight.T).tanh()
    gain, shift = (h @ last.weight.T + last.bias).split(4, -1)
    expected = torch.einsum("nf,fd->nd", gain * a + shift * s.sqrt(), A)
    torch.testing.assert_close(field(t, x, context), expected, rtol=1e-12, atol=1e-12)


def test_constant_gain_has_closed_form():
    # g = 0.25 and w = 2 everywhere, A = 3, H = 5, ε = 7: v = 3(0.75x + 2 √(7 + 45x²)),
    # so v' = 9/4 + 270x / √(7 + 45x²)
    field = DivisiveField(1, (2,), pools=torch.tensor([[5.0]]), floor=7.0, zero_last=True).double()
    with torch.no_grad():
        field.filters.fill_(3.0)
        field.pools.fill_(math.log(math.expm1(5.0)))
        field.layers[-1].bias.copy_(torch.tensor([0.25, 2.0]))
    t, x = torch.tensor(0.2, dtype=F64), torch.tensor([[0.5]], dtype=F64)
    v, div = exact_divergence(field, t, x)
    root = math.sqrt(7 + 45 / 4)
    assert v.item() == pytest.approx(3 * (0.375 + 2 * root), rel=1e-12)
    assert div.item() == pytest.approx(9 / 4 + 135 / root, rel=1e-12)


def test_velocity_scales_with_x_if_the_network_sees_no_energies(build, points):
    field = build(3, (5, 4), filters=5, floor=1e-9)
    with torch.no_grad():
        field.layers[0].linear.weight[:, 5:] = 0  # of the logarithms
    t, x, _ = points(field)
    v = field(t, x)
    torch.testing.assert_close(field(t, 1000 * x), 1000 * v, rtol=1e-6, atol=1e-6)
    assert v.abs().max() > 1e-2


def test_initial_pools_are_those_given_and_filters_are_orthonormal_by_groups():
    pools = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) + 0.01
    pools[0, 1] = 200.0  # whose exponential overflows in float32
    field = DivisiveField(3, (4,), filters=8, pools=pools)
    torch.testing.assert_close(F.softplus(field.pools.detach()), pools)
    torch.testing.assert_close(field.filters[:3].detach(), torch.eye(3))
    for rows in field.filters.detach()[3:].split(3):
        torch.testing.assert_close(rows @ rows.T, torch.eye(len(rows)), atol=1e-6, rtol=0)


def test_field_without_time_ignores_it(build, points):
    field = build(3, (5,), layer="ignore")
    t, x, _ = points(field)
    assert torch.equal(field(t, x), field(t + 0.5, x))


def test_zero_last_is_the_identity_flow():
    field = DivisiveField(3, (8, 8), zero_last=True)
    v, div = exact_divergence(field, torch.tensor(0.5), torch.randn(5, 3))
    assert not v.any() and not div.any()
    assert field(torch.tensor(0.5), torch.randn(5, 3)).sub(1).square().sum().requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": ()}, r"at least one hidden layer, got hidden=\(\)"),
        ({"filters": 2}, r"expected filters >= 3, got 2"),
        ({"floor": 0.0}, r"floor > 0, got 0"),
        ({"layer": "hyper"}, r"expected layer to be one of"),
        ({"layer": "ignore", "context_dim": 2}, r"takes no context; take 'input'"),
        ({"pools": torch.ones(2, 3)}, r"pools of shape \(3, 3\), at least 0, got \(2, 3\)"),
        ({"pools": -torch.eye(3)}, r"pools of shape .* with a minimum of -1"),
        ({"activation": "slu"}, r"Did you mean 'silu'"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DivisiveField(3, **options)


def test_divisive_field_is_registered():
    assert FIELDS["divisive"] is DivisiveField
