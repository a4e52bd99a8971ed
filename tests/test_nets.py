"""Small networks."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cnf.nets import ACTIVATIONS, MLP, Condition, ResidualConvNet, TimeFeatures, zero_

POINTS = torch.tensor([-30.0, -2.1, -0.7, -1e-3, 1e-3, 0.4, 1.9, 30.0], dtype=torch.float64)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_with_derivative_gives_the_function_and_its_derivative(name):
    a = POINTS.clone().requires_grad_()
    value, derivative = ACTIVATIONS[name].with_derivative(a)
    expected = ACTIVATIONS[name].function(a)
    (slope,) = torch.autograd.grad(expected.sum(), a)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(derivative, slope, rtol=1e-12, atol=1e-12)
    assert derivative.dtype == torch.float64 and derivative[4] > 0.1


@pytest.mark.parametrize("name", [name for name in ACTIVATIONS if name != "relu"])
def test_derivative_is_differentiable(name):
    a = POINTS.clone().requires_grad_()
    (slope,) = torch.autograd.grad(ACTIVATIONS[name].function(a).sum(), a, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), a)
    (ours,) = torch.autograd.grad(ACTIVATIONS[name].with_derivative(a)[1].sum(), a)
    torch.testing.assert_close(ours, second, rtol=1e-12, atol=1e-12)
    assert second.abs().max() > 0.1


def test_silu_has_closed_form():
    value, derivative = ACTIVATIONS["silu"].with_derivative(torch.tensor(1.0).double())
    gate = 1 / (1 + math.exp(-1))
    assert value.item() == pytest.approx(gate)
    assert derivative.item() == pytest.approx(gate + gate * (1 - gate))


def test_time_features_are_t_then_sines_then_cosines():
    t = torch.tensor(0.3, dtype=torch.float64)
    expected = [0.3] + [f(k * math.pi * 0.3) for f in (math.sin, math.cos) for k in (1, 2, 3)]
    features = TimeFeatures(3).double()(t)
    assert features.tolist() == pytest.approx(expected, abs=1e-6)  # π held in float32


@pytest.mark.parametrize("frequencies", [0, 1, 4])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_time_features_have_their_size(frequencies, batch):
    features = TimeFeatures(frequencies)
    assert features(torch.rand(batch)).shape == (*batch, features.size)


def test_negative_frequencies_are_refused():
    with pytest.raises(ValueError, match="frequencies >= 0, got -1"):
        TimeFeatures(-1)


@pytest.mark.parametrize("hidden", [(), (5,), (7, 6)])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)])
def test_mlp_shape_and_dtype(hidden, batch):
    mlp = MLP(3, 2, hidden).double()
    y = mlp(torch.randn(*batch, 3, dtype=torch.float64))
    assert y.shape == (*batch, 2) and y.dtype == torch.float64


def test_mlp_is_the_sequence_of_its_layers(randomized, generator):
    mlp = randomized(MLP(3, 2, (5, 4), "tanh"))
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    first, second, last = mlp.layers
    torch.testing.assert_close(mlp(x), last(second(first(x).tanh()).tanh()))


def test_zero_last_starts_at_zero_and_learns():
    mlp = MLP(3, 2, (5,), zero_last=True)
    x = torch.ones(4, 3)
    assert (mlp(x) == 0).all()
    (mlp(x) - 1).square().sum().backward()
    assert mlp.layers[-1].weight.grad.abs().max() > 0


def test_zero_sets_weight_and_bias():
    layer = nn.Linear(2, 2)
    zero_(layer)
    assert not any(parameter.any() for parameter in layer.parameters())


def test_invalid_width_and_activation_are_refused():
    with pytest.raises(ValueError, match="MLP: expected every width >= 1"):
        MLP(2, 2, (8, 0))
    with pytest.raises(ValueError, match=r"ResidualConvNet: .* width >= 1, got \(2, 0, 3\)"):
        ResidualConvNet(2, 3, (0,))
    with pytest.raises(ValueError, match="Did you mean 'tanh'"):
        MLP(2, 2, activation="tahn")


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("own_time", [False, True])
def test_condition_is_time_then_context_and_one_vector_without_context(batch, own_time, generator):
    x = torch.randn(*batch, 5, generator=generator, dtype=torch.float64)
    context = torch.randn(*batch, 2, generator=generator, dtype=torch.float64)
    t = torch.rand(batch if own_time else (), generator=generator)
    alone, joined = Condition(3).double(), Condition(3, 2).double()
    u, v = alone(t, x), joined(t, x, context)
    assert u.shape == (*t.shape, 7) and v.shape == (*batch, 9) and u.dtype == v.dtype == x.dtype
    assert (alone.size, joined.size) == (7, 9)
    assert torch.equal(u, alone.time(t.double())) and torch.equal(v[..., 7:], context)
    assert torch.equal(v[..., :7], u.expand(*batch, 7))
    assert torch.equal(joined(t, x, context.new_ones(2))[..., 7:], torch.ones_like(context))


def test_residual_net_adds_each_block_and_is_zero_at_the_start(randomized, generator):
    net = ResidualConvNet(2, 3, (4, 4), "tanh")
    x = torch.randn(2, 2, 5, 3, generator=generator, dtype=torch.float64)
    assert not net(x.float()).any()
    weights = [
        (layer.weight, layer.bias)
        for layer in randomized(net).modules()
        if hasattr(layer, "weight")
    ]
    (first, *inner, last), h = weights, x

    def convolved(h, weight, bias, padding=1):
        return F.conv2d(h, weight, bias, padding=padding)

    h = convolved(h, *first)
    for one, two in (inner[:2], inner[2:]):
        h = h + convolved(convolved(h.tanh(), *one).tanh(), *two)
    torch.testing.assert_close(net(x), convolved(h.tanh(), *last, padding=0))
