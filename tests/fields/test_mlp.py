"""The MLP field's closed-form divergence against autograd's full Jacobian."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnf.fields import FIELDS, LAYERS, HasDivergence, MLPField
from cnf.nets import ACTIVATIONS

F64 = torch.float64
WIDTHS = (7, 4, 9, 5)  # unequal, so that a transposed product cannot fit
KINDS = ["input", *LAYERS]


@pytest.fixture
def build(randomized):
    return lambda *args, **options: randomized(MLPField(*args, **options))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [1, 2, 5, 8])
@pytest.mark.parametrize("context_dim", [0, 3])
def test_divergence_is_the_trace_of_the_jacobian(
    depth, dim, context_dim, build, assert_divergence
):
    assert_divergence(build(dim, WIDTHS[:depth], context_dim))


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("own_time", [False, True])
def test_divergence_is_correct_for_every_type_of_layer(
    layer, depth, context_dim, own_time, build, assert_divergence
):
    context_dim = 0 if layer == "ignore" else context_dim
    assert_divergence(
        build(3, WIDTHS[:depth], context_dim, layer=layer), batch=(2, 3), own_time=own_time
    )


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("options", [{"fourier": 3}, {"skip": True}, {"fourier": 1, "skip": True}])
def test_divergence_is_correct_with_fourier_features_and_skip(
    layer, depth, options, build, assert_divergence
):
    context_dim = 0 if layer == "ignore" else 2
    field = build(3, WIDTHS[:depth], context_dim, layer=layer, frequencies=0, **options)
    assert_divergence(field, own_time=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(6,), (6, 5), (6, 5, 4)])
def test_divergence_is_correct_for_every_activation(activation, hidden, build, assert_divergence):
    assert_divergence(build(3, hidden, activation=activation, frequencies=0))


def test_one_hidden_layer_has_closed_form():
    # v = w₂ tanh(w₁x + b), so ∇·v = w₁·w₂·(1 - tanh²) summed over the units
    field = MLPField(1, (2,), activation="tanh", frequencies=0).double()
    first, last = field.layers
    with torch.no_grad():
        first.linear.weight.copy_(torch.tensor([[2.0], [-1.0]]))
        first.linear.bias.copy_(torch.tensor([0.5, 0.0]))
        first.modulation.shift.weight.zero_()  # no part of time
        last.weight.copy_(torch.tensor([[3.0, 0.75]]))
    x = torch.tensor([[0.1]], dtype=F64)
    expected = 6 / math.cosh(0.7) ** 2 - 0.75 / math.cosh(0.1) ** 2
    div = field.with_divergence(torch.tensor(0.9, dtype=F64), x)[1]
    assert div.item() == pytest.approx(expected, rel=1e-12)


def test_fourier_features_have_closed_form():
    # v = 5 tanh(2x + 3 sin(7x) + 4 cos(7x)) + 6x
    field = MLPField(1, (1,), activation="tanh", layer="ignore", fourier=1, skip=True).double()
    first, last = field.layers
    with torch.no_grad():
        field.waves.fill_(7.0)
        field.skip.fill_(6.0)
        first.weight.copy_(torch.tensor([[2.0, 3.0, 4.0]]))
        last.weight.fill_(5.0)
        for layer in (first, last):
            layer.bias.zero_()
    x = 0.3
    a = 2 * x + 3 * math.sin(7 * x) + 4 * math.cos(7 * x)
    slope = 2 + 21 * math.cos(7 * x) - 28 * math.sin(7 * x)
    v, div = field.with_divergence(torch.tensor(0.9, dtype=F64), torch.tensor([x], dtype=F64))
    assert v.item() == pytest.approx(5 * math.tanh(a) + 6 * x, rel=1e-12)
    assert div.item() == pytest.approx(5 * slope / math.cosh(a) ** 2 + 6, rel=1e-12)


def test_field_with_input_layer_equals_an_mlp_of_point_time_and_context(build, points):
    field = build(3, (6, 5), 2)
    t, x, context = points(field, own_time=True)
    first, *rest = field.layers
    h = torch.cat([x, field.condition.time(t), context], -1)
    weight = torch.cat([first.linear.weight, first.modulation.shift.weight], -1)
    h = F.linear(h, weight, first.linear.bias)
    for layer in rest:
        h = F.linear(F.silu(h), layer.weight, layer.bias)
    torch.testing.assert_close(field(t, x, context), h, rtol=1e-12, atol=1e-12)
    assert sum(p.numel() for p in nn.ModuleList(rest).parameters()) == 5 * 6 + 5 + 3 * 5 + 3


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_has_the_given_type(layer, build, points):
    field = build(3, (6, 5), layer=layer)
    t, x, _ = points(field, own_time=True)
    u, h = field.condition(t, x), x
    for k, part in enumerate(field.layers):
        h = part.affine(u)(h if k == 0 else F.silu(h))
    torch.testing.assert_close(field(t, x), h, rtol=1e-12, atol=1e-12)
    assert [type(part) for part in field.layers] == [type(LAYERS[layer](1, 1, 1))] * 3


@pytest.mark.parametrize("hidden", [(6,), (6, 5), (6, 5, 4)])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("own_time", [False, True])
def test_result_of_a_row_does_not_depend_on_batch_shape(
    hidden, batch, context_dim, own_time, build, points
):
    field = build(2, hidden, context_dim)
    t, x, context = points(field, batch, own_time)
    v, div = field.with_divergence(t, x, context)
    assert v.shape == x.shape and div.shape == batch and v.dtype == div.dtype == F64
    flat = None if context is None else context.reshape(-1, context_dim)
    for k, row in enumerate(x.reshape(-1, 2)):
        tk = t.expand(batch).reshape(-1)[k]
        alone = field.with_divergence(tk, row, None if flat is None else flat[k])
        torch.testing.assert_close(alone, (v.reshape(-1, 2)[k], div.reshape(-1)[k]))


@pytest.mark.parametrize("hidden", [(6,), (6, 5), (6, 5, 4), (6, 5, 4, 3)])
def test_gradients_of_the_divergence_equal_autograds(hidden, build, assert_gradients):
    assert_gradients(build(2, hidden, context_dim=2))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("hidden", [(5,), (5, 4, 3)])
def test_gradients_of_the_divergence_are_correct_for_every_type_of_layer(
    layer, hidden, build, assert_gradients
):
    timeless = layer == "ignore"
    field = build(2, hidden, 0 if timeless else 2, layer=layer, fourier=1, skip=True)
    assert_gradients(field, timeless)


def test_velocity_depends_on_time(build):
    field = build(2, (6, 5))
    x = torch.ones(1, 2, dtype=F64)
    early, late = (field(torch.tensor(t, dtype=F64), x) for t in (0.1, 0.8))
    assert (early - late).abs().max() > 1e-2


@pytest.mark.parametrize("layer", KINDS)
def test_zero_last_starts_at_the_identity_flow_and_has_gradients(layer):
    field = MLPField(3, (8, 8), layer=layer, fourier=2, skip=True, zero_last=True)
    t, x = torch.tensor(0.5), torch.randn(5, 3)
    v, div = field.with_divergence(t, x)
    assert not v.any() and not div.any()
    (v - 1).square().sum().backward()
    assert max(parameter.grad.abs().max() for parameter in field.layers[-1].parameters()) > 0
    assert field.skip.grad.abs().max() > 0


@pytest.mark.parametrize("dim", [2, 5])
def test_fourier_scale_is_the_rms_angular_frequency(dim):
    waves = MLPField(dim, fourier=5_000, fourier_scale=3.0).waves
    assert waves.shape == (5_000, dim) and waves.requires_grad
    rms = waves.square().sum(-1).mean().sqrt().item()
    assert rms == pytest.approx(3.0, rel=0.03)  # 4σ
    assert waves.mean(0).abs().max() < 0.15  # 4σ


def test_mlp_field_is_registered_with_closed_form_divergence():
    assert FIELDS["mlp"] is MLPField
    assert isinstance(MLPField(2), HasDivergence)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden": ()}, "at least one hidden layer"),
        ({"hidden": (8, 0)}, "every width >= 1"),
        ({"activation": "slu"}, "Did you mean 'silu'"),
        ({"layer": "concatsqush"}, "expected layer to be one of 'input', .* got 'concatsqush'"),
        ({"layer": "ignore", "context_dim": 2}, "'ignore' takes no context"),
        ({"fourier": -1}, "expected fourier >= 0, got -1"),
        ({"frequencies": -1}, "expected frequencies >= 0, got -1"),
    ],
)
def test_invalid_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MLPField(2, **options)
