"""Reference divergences and random points for the tests of fields."""

import math

import pytest
import torch

from cnf.fields import exact_divergence

F64 = torch.float64


@pytest.fixture
def autograd_divergence():
    """(field, t, x, context) → the trace of the full Jacobian of each row, differentiable."""

    def divergence(field, t, x, context=None):
        event = field.event_shape
        batch, size = x.shape[: x.dim() - len(event)], math.prod(event)
        times, rows = t.expand(batch).reshape(-1), x.reshape(-1, *event)
        if context is not None:
            context = context.expand(*batch, -1).reshape(len(rows), -1)
        traces = []
        for k, row in enumerate(rows):
            c = None if context is None else context[k]
            jacobian = torch.autograd.functional.jacobian(
                lambda y, k=k, c=c: field(times[k], y, c), row, create_graph=True
            )
            traces.append(jacobian.reshape(size, size).trace())
        return torch.stack(traces).reshape(batch) if traces else x.new_zeros(batch)

    return divergence


@pytest.fixture
def points(generator):
    """(field, batch, own_time) → t, x and, where the field has one, a context, in float64; t is
    shared or spread over (0, 1)."""

    def draw(field, batch=(4,), own_time=False):
        count = math.prod(batch)
        t = torch.tensor(0.37, dtype=F64)
        if own_time:
            t = ((torch.arange(count, dtype=F64) + 0.4) / max(count, 1)).reshape(batch)
        x = torch.randn(*batch, *field.event_shape, generator=generator, dtype=F64)
        if not field.context_dim:
            return t, x, None
        return t, x, torch.randn(*batch, field.context_dim, generator=generator, dtype=F64)

    return draw


@pytest.fixture
def assert_divergence(autograd_divergence, points):
    """(field, batch, own_time): v is the forward's and div autograd's, and div is not zero."""

    def check(field, batch=(6,), own_time=False):
        t, x, context = points(field, batch, own_time)
        v, div = field.with_divergence(t, x, context)
        torch.testing.assert_close(v, field(t, x, context), rtol=1e-12, atol=1e-12)
        expected = autograd_divergence(field, t, x, context)
        torch.testing.assert_close(div, expected, rtol=1e-10, atol=1e-12)
        assert div.dtype == F64 and expected.abs().max() > 1e-4

    return check


@pytest.fixture
def assert_gradients(autograd_divergence, points, generator):
    """(field, timeless): the gradient of ∇·v to t, x, context and every parameter is that of
    autograd's own divergence, and v and ∇·v together depend on each of them."""

    def check(field, timeless=False):
        t, x, context = points(field, own_time=True)
        leaves = [tensor.requires_grad_() for tensor in (t, x, context) if tensor is not None]
        leaves += field.parameters()
        weight = torch.randn(4, generator=generator, dtype=F64)

        def gradients(scalars):
            total = (weight * scalars).sum()
            options = {"allow_unused": True, "materialize_grads": True}
            return torch.autograd.grad(total, leaves, retain_graph=True, **options)

        v, div = exact_divergence(field, t, x, context)
        ours, reference = gradients(div), gradients(autograd_divergence(field, t, x, context))
        torch.testing.assert_close(ours, reference, rtol=1e-9, atol=1e-10)
        both = zip(ours, gradients(v.flatten(1).square().sum(-1)), strict=True)
        reached = [max(a.abs().max(), b.abs().max()).item() > 1e-5 for a, b in both]
        assert reached == [not timeless] + [True] * (len(leaves) - 1)
        assert sum(a.abs().max() > 1e-5 for a in ours) >= len(ours) // 2

    return check
