"""Convolutional fields: shapes, conditioning, and traces in closed form."""

import pytest
import torch
import torch.nn.functional as F

from cnf.dynamics.divergence import Hutchinson, vector_jacobian_products
from cnf.fields import (
    FIELDS,
    ConvField,
    EndTime,
    HasDivergence,
    NullContext,
    Preconditioned,
    exact_divergence,
)
from cnf.fields.concat import MODULATIONS
from cnf.fields.wrappers import Piece
from cnf.nets import ACTIVATIONS

F64 = torch.float64


def wrapped(field):
    inner = Piece(EndTime(field, 1.3), 1, 3)
    return Preconditioned(NullContext(inner) if field.context_dim else inner)


STRIDES = [None, (1, 1, 1), (2, 1, -2), (-2, 1, 2), (2, -2, 1), (1, 2, -2)]


@pytest.fixture
def build(randomized):
    return lambda *args, **options: randomized(ConvField(*args, **options))


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (0,)])
@pytest.mark.parametrize("context_dim", [0, 2])
def test_velocity_has_the_images_shape_for_all_strides(strides, batch, context_dim, build, points):
    field = build((2, 4, 6), (3, 5), context_dim, strides=strides)
    t, x, context = points(field, batch, own_time=True)
    v = field(t, x, context)
    assert v.shape == x.shape == (*batch, 2, 4, 6) and v.dtype == F64
    rows = zip(t.flatten(), x.reshape(-1, 2, 4, 6), v.reshape(-1, 2, 4, 6), strict=True)
    contexts = None if context is None else context.reshape(-1, 2)
    for k, (time, row, alone) in enumerate(rows):
        own = field(time, row, None if contexts is None else contexts[k])
        torch.testing.assert_close(own, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", MODULATIONS)
@pytest.mark.parametrize("strides", [None, (2, -2)])
def test_divergence_is_the_trace_of_the_jacobian(
    layer, strides, build, points, autograd_divergence
):
    context_dim = 0 if layer == "ignore" else 2
    field = build((1, 4, 2), (3,), context_dim, layer=layer, strides=strides)
    given = points(field, own_time=True)
    v, div = exact_divergence(field, *given)
    torch.testing.assert_close(v, field(*given), rtol=1e-12, atol=1e-12)
    expected = autograd_divergence(field, *given)
    torch.testing.assert_close(div, expected, rtol=1e-10, atol=1e-10)
    assert expected.abs().min() > 1e-3


def test_one_layer_has_closed_form(build, points):
    # A pixel sees itself through the kernels' centers: ∇·v = H·W·Σ_c s_c(t, c) K_cc
    field = build((2, 3, 5), (), context_dim=2)
    t, x, context = points(field, own_time=True)
    scale = torch.sigmoid(field.modulations[0].scale(torch.cat([t[:, None], context], -1)))
    center = field.layers[0].weight[:, :, 1, 1].diagonal()
    expected = 15 * (scale * center).sum(-1)
    div = exact_divergence(field, t, x, context)[1]
    torch.testing.assert_close(div, expected, rtol=1e-11, atol=1e-11)
    assert expected.abs().min() > 1e-2


@pytest.mark.parametrize("layer", MODULATIONS)
@pytest.mark.parametrize("activation", ["tanh", "softplus"])
def test_field_equals_its_formula(layer, activation, build, points):
    context_dim = 0 if layer == "ignore" else 2
    field = build((2, 4, 4), (3, 5), context_dim, activation, layer=layer, strides=(2, 1, -2))
    t, x, context = points(field, own_time=True)
    u = t[:, None] if context is None else torch.cat([t[:, None], context], -1)
    first, second, third = field.layers
    h = x
    for k, convolve in enumerate((
        lambda h: F.conv2d(h, first.weight, first.bias, stride=2, padding=1),
        lambda h: F.conv2d(h, second.weight, second.bias, padding=1),
        lambda h: F.conv_transpose2d(h, third.weight, third.bias, stride=2, padding=1),
    )):  # fmt: skip
        h = ACTIVATIONS[activation].function(h) if k else h
        if layer == "concat":  # one more channel for each entry of u
            planes = u[:, :, None, None].expand(-1, -1, *h.shape[2:])
            h = torch.cat([planes, h], 1)
        h, modulation = convolve(h), field.modulations[k]
        if "squash" in layer:
            h = h * torch.sigmoid(modulation.scale(u)).reshape(*h.shape[:2], 1, 1)
        if layer == "concatsquash":
            h = h + modulation.shift(u).reshape(*h.shape[:2], 1, 1)
    torch.testing.assert_close(field(t, x, context), h, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", ["concat", "squash", "concatsquash"])
def test_velocity_depends_on_context_and_time(layer, build, points):
    field = build((1, 4, 4), (3,), 2, layer=layer, frequencies=1)
    t, x, context = points(field)
    v = field(t, x, context)
    assert (field(t + 0.3, x, context) - v).abs().amax((1, 2, 3)).min() > 1e-3
    assert (field(t, x, -context) - v).abs().amax((1, 2, 3)).min() > 1e-3
    shared = field(t, x, context[0])
    torch.testing.assert_close(shared[0], v[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shared, field(t, x, context[0].expand(4, 2)))


def test_field_is_translation_equivariant(build):
    # Away from the border a shifted image has the shifted velocity.
    field = build((1, 12, 12), (3,))
    x = torch.zeros(1, 12, 12, dtype=F64)
    x[0, 5, 5] = 1.0
    t = torch.tensor(0.4, dtype=F64)
    inner = slice(3, 9)
    moved = field(t, x.roll(1, -1)).roll(-1, -1)
    torch.testing.assert_close(moved[:, inner, inner], field(t, x)[:, inner, inner])


@pytest.mark.parametrize("layer", MODULATIONS)
def test_zero_last_is_the_identity_flow(layer):
    field = ConvField((2, 4, 4), (3,), layer=layer, zero_last=True)
    x = torch.randn(5, 2, 4, 4)
    v, div = exact_divergence(field, torch.tensor(0.5), x)
    assert not v.any() and not div.any()
    (field(torch.tensor(0.5), x) - 1).square().sum().backward()
    assert field.layers[-1].weight.grad.abs().max() > 0


@pytest.mark.parametrize("layer", MODULATIONS)
@pytest.mark.parametrize("strides", [None, (2, 1, -2)])
@pytest.mark.parametrize("own_time", [False, True])
@pytest.mark.parametrize("wrap", [lambda field: field, wrapped], ids=["plain", "wrapped"])
def test_products_of_tangents_are_those_of_autograd(
    layer, strides, own_time, wrap, randomized, points, generator
):
    context_dim = 0 if layer == "ignore" else 2
    field = wrap(ConvField((2, 4, 2), (3, 5), context_dim, layer=layer, strides=strides))
    t, x, context = points(randomized(field), (3,), own_time)
    tangents = torch.randn(2, *x.shape, generator=generator, dtype=F64)
    v, products = field.with_tangents(t, x, context, tangents)
    torch.testing.assert_close(v, field(t, x, context), rtol=1e-12, atol=1e-12)
    for tangent, product in zip(tangents, products, strict=True):
        _, expected = torch.func.jvp(lambda y: field(t, y, context), (x,), (tangent,))
        torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-12)
        assert expected.abs().max() > 1e-2


def test_hutchinsons_estimate_is_that_of_vector_jacobian_products(build, points, generator):
    field = build((2, 4, 4), (3, 5), 2, layer="concat")
    t, x, context = points(field, (3,))
    x = x.requires_grad_()
    probe = torch.randn(2, *x.shape, generator=generator, dtype=F64)
    leaves = [x, *field.parameters()]

    def gradients(v, estimates):
        return torch.autograd.grad(v.square().sum() + estimates.square().sum(), leaves)

    rates = Hutchinson(probe=probe).rates(field, t, x, context, probe)
    v, products = vector_jacobian_products(lambda y: field(t, y, context), x, probe)
    expected = (products * probe).flatten(2).sum(-1).T
    torch.testing.assert_close(rates.divergence, expected, rtol=1e-10, atol=1e-10)
    ours, theirs = gradients(rates.velocity, rates.divergence), gradients(v, expected)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_conv_field_is_registered_without_closed_form_divergence():
    assert FIELDS["conv"] is ConvField
    assert not isinstance(ConvField((1, 4, 4)), HasDivergence)


def test_error_for_exact_divergence_of_large_images_names_the_estimator():
    field = ConvField((1, 36, 36), (2,))
    with pytest.raises(ValueError, match=r"ConvField takes 1296 .*Hutchinson\(probes=8\)"):
        exact_divergence(field, torch.tensor(0.5), torch.zeros(1, 1, 36, 36))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shape": (3, 8)}, r"expected a shape \(C, H, W\), got \(3, 8\)"),
        ({"strides": (2, -2)}, r"expected 3 strides .* got \(2, -2\)"),
        ({"strides": (2, 1, 1)}, r"as many 2 as -2, got \(2, 1, 1\)"),
        ({"strides": (1, 3, 1)}, "expected stride to be one of 1, 2, -2, got 3"),
        ({"shape": (1, 7, 8), "strides": (2, 1, -2)}, "divisible by 2 .* got 7 × 8"),
        ({"layer": "ignore", "context_dim": 2}, "'ignore' takes no context"),
        ({"layer": "hyper"}, "unknown modulation 'hyper'; known: concat"),
        ({"activation": "slu"}, "Did you mean 'silu'"),
        ({"hidden": (4, 0)}, "every width >= 1"),
    ],
)
def test_invalid_settings_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ConvField(**{"shape": (1, 8, 8), "hidden": (4, 4), **arguments})
