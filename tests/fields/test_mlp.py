"""The MLP field's closed-form divergence against autograd's full Jacobian."""

import math

import pytest
import torch

from cnf.fields import FIELDS, HasDivergence, MLPField
from cnf.nets import ACTIVATIONS

F64 = torch.float64


def autograd_divergence(field, t, x, context=None):
    """The trace of the full Jacobian of each row, differentiable."""
    flat = x.reshape(-1, x.shape[-1])
    t = t.expand(x.shape[:-1]).reshape(-1)
    rows = []
    for k, row in enumerate(flat):
        c = None if context is None else context.reshape(-1, context.shape[-1])[k]
        jacobian = torch.autograd.functional.jacobian(
            lambda y, k=k, c=c: field(t[k], y, c), row, create_graph=True
        )
        rows.append(jacobian.trace())
    return torch.stack(rows).reshape(x.shape[:-1])


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("dim", [1, 2, 5, 8])
@pytest.mark.parametrize("context_dim", [0, 3])
def test_divergence_is_the_trace_of_the_jacobian(depth, dim, context_dim, randomised, generator):
    widths = (7, 4, 9, 5)[:depth]  # unequal, so that a transposed product cannot fit
    field = randomised(MLPField(dim, widths, context_dim))
    x = torch.randn(6, dim, generator=generator, dtype=F64)
    context = torch.randn(6, context_dim, generator=generator, dtype=F64) if context_dim else None
    t = torch.tensor(0.37, dtype=F64)
    v, div = field.with_divergence(t, x, context)
    torch.testing.assert_close(v, field(t, x, context), rtol=1e-12, atol=1e-12)
    expected = autograd_divergence(field, t, x, context)
    torch.testing.assert_close(div, expected, rtol=1e-10, atol=1e-10)
    assert expected.abs().min() > 1e-4


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(6,), (6, 5), (6, 5, 4)])
def test_divergence_for_every_activation(activation, hidden, randomised, generator):
    field = randomised(MLPField(3, hidden, activation=activation, frequencies=0))
    x = torch.randn(5, 3, generator=generator, dtype=F64)
    t = torch.tensor(0.2, dtype=F64)
    expected = autograd_divergence(field, t, x)
    div = field.with_divergence(t, x)[1]
    torch.testing.assert_close(div, expected, rtol=1e-10, atol=1e-10)


def test_one_hidden_layer_has_closed_form():
    # v = w₂ tanh(w₁x + b), so ∇·v = w₁·w₂·(1 - tanh²) summed over the units
    field = MLPField(1, (2,), activation="tanh", frequencies=0).double()
    with torch.no_grad():
        field.first.weight.copy_(torch.tensor([[2.0, 0.0], [-1.0, 0.0]]))  # no part of time
        field.first.bias.copy_(torch.tensor([0.5, 0.0]))
        field.layers[0].weight.copy_(torch.tensor([[3.0, 0.75]]))
    x = torch.tensor([[0.1]], dtype=F64)
    expected = 6 / math.cosh(0.7) ** 2 - 0.75 / math.cosh(0.1) ** 2
    div = field.with_divergence(torch.tensor(0.9, dtype=F64), x)[1]
    assert div.item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("hidden", [(6,), (6, 5), (6, 5, 4)])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)])
@pytest.mark.parametrize("context_dim", [0, 2])
@pytest.mark.parametrize("batched_time", [False, True])
def test_every_batch_shape_gives_the_rows_answers(
    hidden, batch, context_dim, batched_time, randomised, generator
):
    field = randomised(MLPField(2, hidden, context_dim))
    x = torch.randn(*batch, 2, generator=generator, dtype=F64)
    shape = batch if batched_time else ()
    t = torch.rand(shape, generator=generator, dtype=F64)
    context = None
    if context_dim:
        context = torch.randn(*batch, context_dim, generator=generator, dtype=F64)
    v, div = field.with_divergence(t, x, context)
    assert v.shape == x.shape and div.shape == batch and v.dtype == div.dtype == F64
    flat = None if context is None else context.reshape(-1, context_dim)
    for k, row in enumerate(x.reshape(-1, 2)):
        tk = t.expand(batch).reshape(-1)[k]
        vk, dk = field.with_divergence(tk, row, None if flat is None else flat[k])
        torch.testing.assert_close(v.reshape(-1, 2)[k], vk)
        torch.testing.assert_close(div.reshape(-1)[k], dk)


def test_context_broadcasts_over_the_batch(randomised, generator):
    field = randomised(MLPField(2, (6, 5), context_dim=3))
    x = torch.randn(4, 3, 2, generator=generator, dtype=F64)
    context = torch.randn(3, 3, generator=generator, dtype=F64)
    t = torch.tensor(0.6, dtype=F64)
    for each, whole in zip(
        field.with_divergence(t, x, context),
        field.with_divergence(t, x, context.expand(4, 3, 3)),
        strict=True,
    ):
        torch.testing.assert_close(each, whole)


@pytest.mark.parametrize("hidden", [(6,), (6, 5), (6, 5, 4)])
def test_gradient_of_the_divergence_is_autograds(hidden, randomised, generator):
    field = randomised(MLPField(2, hidden, context_dim=2))
    x = torch.randn(4, 2, generator=generator, dtype=F64, requires_grad=True)
    context = torch.randn(4, 2, generator=generator, dtype=F64, requires_grad=True)
    t = torch.rand(4, generator=generator, dtype=F64)
    inputs = [x, context, *field.parameters()]
    weight = torch.randn(4, generator=generator, dtype=F64)

    def gradients(divergence):
        return torch.autograd.grad((weight * divergence).sum(), inputs, allow_unused=True)

    ours = gradients(field.with_divergence(t, x, context)[1])
    reference = gradients(autograd_divergence(field, t, x, context))
    last_bias = len(inputs) - 1  # the one thing that the divergence does not depend on
    for k, (a, b) in enumerate(zip(ours, reference, strict=True)):
        if k == last_bias:
            assert a is None and (b is None or not b.any())
        else:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
            assert b.abs().max() > 1e-4


def test_time_moves_the_field(randomised):
    field = randomised(MLPField(2, (6, 5)))
    x = torch.ones(1, 2, dtype=F64)
    early, late = (field(torch.tensor(t, dtype=F64), x) for t in (0.1, 0.8))
    assert (early - late).abs().max() > 1e-2


def test_zero_last_is_the_identity_flow():
    field = MLPField(3, (8, 8), zero_last=True)
    v, div = field.with_divergence(torch.tensor(0.5), torch.randn(5, 3))
    assert not v.any() and not div.any()


def test_time_shared_by_the_batch_gives_what_a_time_for_each_row_gives(randomised):
    field = randomised(MLPField(3, (6, 5), frequencies=2))
    x, t = torch.randn(4, 3, dtype=F64), torch.tensor(0.3, dtype=F64)
    torch.testing.assert_close(field(t, x), field(t.expand(4), x), rtol=1e-12, atol=1e-12)


def test_it_is_registered_and_has_a_divergence():
    assert FIELDS["mlp"] is MLPField
    assert isinstance(MLPField(2), HasDivergence)


def test_no_hidden_layer_is_refused():
    with pytest.raises(ValueError, match="at least one hidden layer"):
        MLPField(2, ())
    with pytest.raises(ValueError, match="Did you mean 'silu'"):
        MLPField(2, activation="slu")
