"""The residual field: its trace against autograd, and its formula."""

import math

import pytest
import torch

from cnf.fields import FIELDS, HasDivergence, ResidualField
from cnf.nets import ACTIVATIONS

F64 = torch.float64
WIDTHS = (6, 4, 9, 5)  # unequal, so that a transposed product cannot fit


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [1, 2, 5, 8])
@pytest.mark.parametrize("context_dim", [0, 3])
@pytest.mark.parametrize("own_time", [False, True])
def test_divergence_is_the_trace_of_the_jacobian(
    depth, dim, context_dim, own_time, randomized, assert_divergence
):
    field = randomized(ResidualField(dim, WIDTHS[:depth], context_dim))
    assert_divergence(field, own_time=own_time)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_divergence_is_correct_for_every_activation(activation, randomized, assert_divergence):
    field = ResidualField(3, WIDTHS[:3], activation=activation, frequencies=0)
    assert_divergence(randomized(field), batch=(2, 3))


@pytest.mark.parametrize("frequencies", [0, 2])
def test_field_equals_its_formula(frequencies, randomized, points):
    field = randomized(ResidualField(3, (6, 4), 2, "tanh", frequencies))
    t, x, context = points(field, own_time=True)
    angle = t[:, None] * field.condition.time.multiples
    u = torch.cat([t[:, None], angle.sin(), angle.cos(), context], -1)
    h = field.first(x)
    for inward, outward in zip(field.inward, field.outward, strict=True):
        joined = torch.cat([inward.linear.weight, inward.modulation.shift.weight], -1)
        a = torch.cat([h, u], -1) @ joined.T + inward.linear.bias
        h = h + a.tanh() @ outward.weight.T
    torch.testing.assert_close(field(t, x, context), field.last(h), rtol=1e-12, atol=1e-12)


def test_one_block_of_one_unit_has_closed_form():
    # h = 2x + 0.5, v = 3(h + 4 tanh(0.25 h - 1 + 5t)), so v' = 6(1 + sech²(…))
    field = ResidualField(1, (1,), activation="tanh", frequencies=0).double()
    values = {
        "first.weight": 2.0,
        "first.bias": 0.5,
        "inward.0.linear.weight": 0.25,
        "inward.0.linear.bias": -1.0,
        "inward.0.modulation.shift.weight": 5.0,
        "outward.0.weight": 4.0,
        "last.weight": 3.0,
        "last.bias": 7.0,
    }
    assert {name for name, _ in field.named_parameters()} == set(values)
    with torch.no_grad():
        for name, parameter in field.named_parameters():
            parameter.fill_(values[name])
    t, x = torch.tensor(0.2, dtype=F64), torch.tensor([[0.75]], dtype=F64)
    v, div = field.with_divergence(t, x)
    assert v.item() == pytest.approx(3 * (2 + 4 * math.tanh(0.5)) + 7, rel=1e-12)
    assert div.item() == pytest.approx(6 * (1 + 1 / math.cosh(0.5) ** 2), rel=1e-12)


def test_field_is_linear_if_blocks_are_zero(randomized, points):
    field = randomized(ResidualField(3, (6, 4)))
    for outward in field.outward:
        torch.nn.init.zeros_(outward.weight)
    t, x, _ = points(field)
    expected = (field.last.weight @ field.first.weight).trace()
    div = field.with_divergence(t, x)[1]
    torch.testing.assert_close(div, expected.expand(4), rtol=1e-12, atol=1e-12)
    assert expected.abs() > 1e-2


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_gradients_of_the_divergence_equal_autograds(depth, randomized, assert_gradients):
    assert_gradients(randomized(ResidualField(2, WIDTHS[:depth], context_dim=2)))


def test_zero_last_is_the_identity_flow():
    field = ResidualField(3, (8, 8), zero_last=True)
    v, div = field.with_divergence(torch.tensor(0.5), torch.randn(5, 3))
    assert not v.any() and not div.any()
    assert field(torch.tensor(0.5), torch.randn(5, 3)).sub(1).square().sum().requires_grad


def test_residual_field_is_registered_with_closed_form_divergence():
    assert FIELDS["residual"] is ResidualField
    assert isinstance(ResidualField(2), HasDivergence)


@pytest.mark.parametrize("hidden", [(), (8, 0)])
def test_numbers_of_blocks_and_widths_below_one_are_refused(hidden):
    with pytest.raises(ValueError, match=r"at least one block and every width >= 1, got hidden="):
        ResidualField(2, hidden)


def test_error_for_unknown_activation_proposes_a_name():
    with pytest.raises(ValueError, match="Did you mean 'silu'"):
        ResidualField(2, activation="slu")
