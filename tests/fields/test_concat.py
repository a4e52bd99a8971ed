"""Layers conditioned on time and context, against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnf.fields.concat import LAYERS, MODULATIONS, BlendLinear, HyperLinear, Modulation

F64 = torch.float64
INPUTS, OUTPUTS, FEATURES = 4, 3, 5


@pytest.fixture
def build(randomized):
    return lambda kind, features=FEATURES: randomized(LAYERS[kind](INPUTS, OUTPUTS, features))


@pytest.fixture
def draw(generator):
    return lambda *shape: torch.randn(shape, generator=generator, dtype=F64)


def ignore(layer, h, u):
    return F.linear(h, layer.weight, layer.bias)


def concat(layer, h, u):
    weight = torch.cat([layer.linear.weight, layer.modulation.shift.weight], -1)
    return F.linear(torch.cat([h, u.expand(*h.shape[:-1], -1)], -1), weight, layer.linear.bias)


def squash(layer, h, u):
    gate = layer.modulation.scale
    return layer.linear(h) * torch.sigmoid(u @ gate.weight.T + gate.bias)


def concatsquash(layer, h, u):
    """FFJORD's ConcatSquashLinear: layer(x) * sigmoid(hyper_gate(t)) + hyper_bias(t)."""
    gate = torch.sigmoid(layer.modulation.scale(u))
    return layer.linear(h) * gate + layer.modulation.shift(u)


def hyper(layer, h, u):
    parameters = layer.hyper(u)
    weight, bias = parameters[..., : INPUTS * OUTPUTS], parameters[..., INPUTS * OUTPUTS :]
    return torch.einsum("...oi,...i->...o", weight.unflatten(-1, (OUTPUTS, INPUTS)), h) + bias


def blend(layer, h, u):
    t = u[..., :1]
    return (1 - t) * layer.start(h) + t * layer.end(h) + u[..., 1:] @ layer.shift.weight.T


FORMULAS = {
    "ignore": ignore,
    "concat": concat,
    "squash": squash,
    "concatsquash": concatsquash,
    "hyper": hyper,
    "blend": blend,
}


def test_every_layer_type_is_tested():
    assert set(FORMULAS) == set(LAYERS)
    assert set(MODULATIONS) == set(LAYERS) - {"hyper", "blend"}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("batch", [(), (6,), (2, 3), (0,)])
@pytest.mark.parametrize("shared", [False, True])
def test_layer_equals_its_formula(kind, batch, shared, build, draw):
    layer, h = build(kind), draw(*batch, INPUTS)
    u = draw(*(() if shared else batch), FEATURES)
    out = layer.affine(u)(h)
    assert out.shape == (*batch, OUTPUTS) and out.dtype == F64
    torch.testing.assert_close(out, FORMULAS[kind](layer, h, u), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("shared", [False, True])
def test_weight_and_scale_give_the_jacobian(kind, shared, build, draw):
    layer, h = build(kind), draw(6, INPUTS)
    u = draw(*(() if shared else (6,)), FEATURES)
    affine = layer.affine(u)
    weight = affine.weight.expand(6, OUTPUTS, INPUTS)
    if affine.scale is not None:
        weight = affine.scale.unsqueeze(-1) * weight
    for k in range(6):
        own = layer.affine(u if shared else u[k])
        jacobian = torch.autograd.functional.jacobian(own, h[k])
        torch.testing.assert_close(weight[k], jacobian, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_shared_condition_gives_one_matrix_for_all_rows(kind, build, draw):
    affine = build(kind).affine(draw(FEATURES))
    assert affine.weight.shape == (OUTPUTS, INPUTS) and affine.bias.shape == (OUTPUTS,)
    assert affine.scale is None


@pytest.mark.parametrize("kind", LAYERS)
def test_every_parameter_and_the_condition_get_a_gradient(kind, build, draw):
    layer, u = build(kind), draw(6, FEATURES).requires_grad_(kind != "ignore")
    layer.affine(u)(draw(6, INPUTS)).square().sum().backward()
    leaves = [*layer.parameters(), *([u] if u.requires_grad else [])]
    assert all(leaf.grad.abs().max() > 1e-3 for leaf in leaves)


def test_concat_equals_a_linear_layer_of_input_and_condition(build, draw):
    layer, h, u = build("concat"), draw(6, INPUTS), draw(6, FEATURES)
    joined = nn.Linear(INPUTS + FEATURES, OUTPUTS).double()
    with torch.no_grad():
        joined.weight[:, :INPUTS] = layer.linear.weight
        joined.weight[:, INPUTS:] = layer.modulation.shift.weight
        joined.bias.copy_(layer.linear.bias)
    torch.testing.assert_close(layer.affine(u)(h), joined(torch.cat([h, u], -1)))


def test_concatsquash_has_closed_form():
    layer = LAYERS["concatsquash"](1, 1, 1).double()
    values = {
        "linear.weight": 2.0,
        "linear.bias": 1.0,
        "modulation.scale.weight": 3.0,
        "modulation.scale.bias": -1.0,
        "modulation.shift.weight": 0.5,
    }
    assert {name for name, _ in layer.named_parameters()} == set(values)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.fill_(values[name])
    out = layer.affine(torch.tensor([0.4], dtype=F64))(torch.tensor([5.0], dtype=F64))
    assert out.item() == pytest.approx(11 / (1 + math.exp(-0.2)) + 0.2, rel=1e-12)


@pytest.mark.parametrize("kind", MODULATIONS)
@pytest.mark.parametrize("batch", [(), (4,)])
def test_modulations_have_scale_and_shift_as_named(kind, batch, randomized, draw):
    modulation = randomized(MODULATIONS[kind](FEATURES, OUTPUTS))
    assert isinstance(modulation, Modulation)
    scale, shift = modulation(draw(*batch, FEATURES))
    assert (scale is not None) == ("squash" in kind) and (shift is not None) == ("concat" in kind)
    if scale is not None:
        assert scale.shape == (*batch, OUTPUTS) and ((scale > 0) & (scale < 1)).all()
    assert shift is None or shift.shape == (*batch, OUTPUTS)


def test_hyper_is_initialized_like_a_linear_layer_with_random_weights():
    layer = HyperLinear(INPUTS, OUTPUTS, FEATURES)
    affine = layer.affine(torch.zeros(FEATURES))
    bound = INPUTS**-0.5  # of nn.Linear's first weights
    for part in (affine.weight, affine.bias):
        assert part.abs().max() <= bound and part.std() > bound / 10
    moved = layer.affine(torch.ones(FEATURES))
    assert (moved.weight - affine.weight).abs().max() > 1e-2


@pytest.mark.parametrize("features", [1, FEATURES])
def test_blend_interpolates_its_layers_from_time_0_to_1(features, build, draw):
    layer, h = build("blend", features), draw(6, INPUTS)
    expected = {0.0: layer.start(h), 1.0: layer.end(h)}
    expected[0.5] = (layer.start(h) + layer.end(h)) / 2
    expected[2.0] = 2 * layer.end(h) - layer.start(h)  # an end time may lie beyond 1
    for t, out in expected.items():
        u = torch.zeros(features, dtype=F64)
        u[0] = t
        torch.testing.assert_close(layer.affine(u)(h), out, rtol=1e-12, atol=1e-12)


def test_blend_without_further_features_has_no_shift():
    assert BlendLinear(INPUTS, OUTPUTS, 1).shift is None
    assert BlendLinear(INPUTS, OUTPUTS, 2).shift.weight.shape == (OUTPUTS, 1)


def test_error_for_unknown_layer_proposes_a_name():
    with pytest.raises(ValueError, match="unknown layer 'concatsqush'.* mean 'concatsquash'"):
        LAYERS["concatsqush"]
    with pytest.raises(ValueError, match="unknown modulation 'hyper'; known: concat"):
        MODULATIONS["hyper"]
