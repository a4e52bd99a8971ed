"""Traces of Jacobians by forward mode, and of chains of layers in closed form."""

import pytest
import torch
from torch import nn

from cnf.fields import Adapter, MLPField, exact_divergence, trace
from cnf.fields.base import EXACT_LIMIT
from cnf.fields.trace import gated_product, jacobian_columns, trace_of_chain, trace_of_jacobian

F64 = torch.float64
MATRIX = torch.tensor([[1.0, 2.0, 0.5], [-3.0, 0.25, 1.0], [0.0, 7.0, -4.0]], dtype=F64)
BATCHES = [(), (4,), (2, 3), (0,)]


class Timeless(nn.Module):
    """A map of batches as the network of a field that accepts single rows."""

    def __init__(self, v):
        super().__init__()
        self.v = v

    def forward(self, t, x):
        return self.v(x.unsqueeze(0)).squeeze(0)


@pytest.fixture
def net(randomized):
    """A smooth map from R³ to R³."""
    return randomized(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)))


@pytest.fixture
def conv(randomized):
    """A smooth map of images of shape (2, 3, 2)."""
    first, last = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
    return randomized(nn.Sequential(first, nn.Tanh(), last))


@pytest.fixture
def rows_trace(autograd_divergence):
    """The trace of each row's Jacobian, by plain autograd."""

    def trace(v, x, event_dims=1):
        field = Adapter(Timeless(v), x.shape[x.dim() - event_dims :])
        return autograd_divergence(field, torch.zeros((), dtype=x.dtype), x)

    return trace


@pytest.mark.parametrize("batch", BATCHES)
def test_jacobian_columns_of_a_linear_map_are_those_of_its_matrix(batch, generator):
    x = torch.randn(*batch, 3, generator=generator, dtype=F64)
    v, columns = jacobian_columns(lambda y: y @ MATRIX.T, x)
    torch.testing.assert_close(v, x @ MATRIX.T)
    assert columns.shape == (3, *batch, 3)
    for k in range(3):
        torch.testing.assert_close(columns[k], MATRIX[:, k].expand_as(x))


def test_jacobian_columns_of_images_equal_autograds(conv, generator):
    x = torch.randn(2, 2, 3, 2, generator=generator, dtype=F64)
    _, columns = jacobian_columns(conv, x, event_dims=3)
    for row, own in zip(x, columns.unbind(1), strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda y: conv(y.unsqueeze(0)).squeeze(0), row
        )
        torch.testing.assert_close(own.reshape(12, 12), jacobian.reshape(12, 12).T)


@pytest.mark.parametrize("batch", BATCHES)
def test_trace_of_a_linear_map_is_its_trace(batch, generator):
    x = torch.randn(*batch, 3, generator=generator, dtype=F64)
    v, div = trace_of_jacobian(lambda y: y @ MATRIX.T, x)
    torch.testing.assert_close(v, x @ MATRIX.T)
    torch.testing.assert_close(div, torch.full(batch, 1 + 0.25 - 4.0, dtype=F64))


def test_trace_equals_autograds_for_vectors(net, rows_trace, generator):
    x = torch.randn(2, 5, 3, generator=generator, dtype=F64)
    v, div = trace_of_jacobian(net, x)
    torch.testing.assert_close(v, net(x))
    torch.testing.assert_close(div, rows_trace(net, x), rtol=1e-12, atol=1e-12)
    assert div.abs().min() > 1e-3 and div.dtype == F64


@pytest.mark.parametrize("known", [False, True])
def test_trace_of_rows_that_share_memory_equals_that_of_copies(known, conv, generator):
    x = torch.randn(1, 2, 3, 2, generator=generator, dtype=F64)
    if known:
        trace_of_jacobian(conv, x, 3, conv)
    found = trace_of_jacobian(conv, x.expand(4, -1, -1, -1), 3, conv)
    torch.testing.assert_close(found, trace_of_jacobian(conv, x.repeat(4, 1, 1, 1), 3, conv))
    assert list(trace._TANGENTS[conv]) == [(True, False)]
    assert trace._TANGENTS[conv][True, False] is not None  # forward mode


@pytest.mark.parametrize("rows", [3, 0])
def test_trace_equals_autograds_for_images(rows, conv, rows_trace, generator):
    x = torch.randn(rows, 2, 3, 2, generator=generator, dtype=F64)
    v, div = trace_of_jacobian(conv, x, event_dims=3)
    assert v.shape == x.shape and div.shape == (rows,)
    torch.testing.assert_close(div, rows_trace(conv, x, 3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("grad", [True, False])
def test_gradient_of_the_exact_trace_equals_autograds(grad, net, rows_trace, generator):
    x = torch.randn(5, 3, generator=generator, dtype=F64, requires_grad=True)
    inputs = [x, *list(net.parameters())[:-1]]
    with torch.set_grad_enabled(grad):
        div = trace_of_jacobian(net, x)[1]
    assert div.requires_grad == grad
    if grad:
        ours = torch.autograd.grad(div.sum(), inputs)
        reference = torch.autograd.grad(rows_trace(net, x).sum(), inputs)
        torch.testing.assert_close(ours, reference)


def test_trace_works_in_inference_mode(net, generator):
    x = torch.randn(5, 3, generator=generator, dtype=F64)
    expected = trace_of_jacobian(net, x)[1]
    with torch.inference_mode():
        torch.testing.assert_close(trace_of_jacobian(net, x.clone())[1], expected)


@pytest.mark.parametrize("batch", BATCHES)
def test_gated_product_is_the_transposed_product(batch, generator):
    left, right = (torch.randn(s, generator=generator, dtype=F64) for s in ((4, 5), (5, 3)))
    gate = torch.randn(*batch, 5, generator=generator, dtype=F64)
    expected = torch.einsum("jk,...k,kd->...dj", left, gate, right)
    product = gated_product(left, gate, right)
    assert product.shape == (*batch, 3, 4)
    torch.testing.assert_close(product, expected, rtol=1e-12, atol=1e-12)


def chain(gates, batch, per_row, scaled, generator):
    """Random weights (for each row in the layers `per_row`), gates and a scale."""
    widths = [3, 5, 4, 7, 2, 6][: gates + 1]

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=F64)

    pairs = zip([*widths[1:], 3], widths, strict=True)
    weights = [draw(*(batch if k in per_row else ()), o, i) for k, (o, i) in enumerate(pairs)]
    scale = draw(*batch, 3) if scaled else None
    return weights, [draw(*batch, width) for width in widths[1:]], scale


def explicit_trace(weights, gates, scale):
    product = weights[0]
    for weight, gate in zip(weights[1:], gates, strict=True):
        product = weight @ torch.diag_embed(gate) @ product
    product = product if scale is None else torch.diag_embed(scale) @ product
    return product.diagonal(dim1=-2, dim2=-1).sum(-1)


@pytest.mark.parametrize("gates", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("per_row", [(), (0,), (1,), range(6)], ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_trace_of_chain_is_the_trace_of_the_product(gates, batch, per_row, scaled, generator):
    weights, gates, scale = chain(gates, batch, per_row, scaled, generator)
    div = trace_of_chain(weights, gates, scale)
    expected = explicit_trace(weights, gates, scale)
    assert div.shape == batch and expected.all()
    torch.testing.assert_close(div, expected, rtol=1e-10, atol=1e-10)


def test_trace_of_chain_of_two_matrices_has_closed_form():
    # [5 6; 7 8] · diag(10, 100) · [1 2; 3 4] = [1850 …; … 3340]
    first = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=F64)
    last = torch.tensor([[5.0, 6.0], [7.0, 8.0]], dtype=F64)
    gate, scale = torch.tensor([10.0, 100.0], dtype=F64), torch.tensor([2.0, -1.0], dtype=F64)
    assert trace_of_chain([first, last], [gate]).item() == 1850 + 3340
    assert trace_of_chain([first, last], [gate], scale).item() == 2 * 1850 - 3340


@pytest.mark.parametrize("gates", [1, 2, 3, 4])
@pytest.mark.parametrize("per_row", [(), range(6)], ids=["shared", "own"])
@pytest.mark.parametrize("scaled", [False, True])
def test_trace_of_chain_has_numerical_gradients(gates, per_row, scaled, generator):
    weights, gates, scale = chain(gates, (2,), per_row, scaled, generator)
    split = len(weights)
    tensors = [*weights, *gates, *([scale] if scaled else [])]
    assert torch.autograd.gradcheck(
        lambda *given: trace_of_chain(
            given[:split], given[split : 2 * split - 1], given[-1] if scaled else None
        ),
        [tensor.requires_grad_() for tensor in tensors],
        fast_mode=True,
    )


def test_exact_divergence_uses_the_closed_form_and_agrees_with_autograd(
    randomized, points, monkeypatch
):
    closed = randomized(MLPField(3, (6, 5)))
    t, x, _ = points(closed)
    expected = closed.with_divergence(t, x)
    without = exact_divergence(Adapter(closed, (3,)), t, x)
    torch.testing.assert_close(without, expected, rtol=1e-12, atol=1e-12)
    monkeypatch.setattr(closed, "with_divergence", lambda *given: ("own", given), raising=False)
    assert exact_divergence(closed, t, x) == ("own", (t, x, None))


def test_error_for_infeasible_exact_divergence_names_the_estimator():
    x = torch.zeros(2, 1, 40, 40)
    with pytest.raises(ValueError) as caught:
        exact_divergence(Adapter(nn.Identity(), (1, 40, 40)), torch.tensor(0.5), x)
    for part in ("Adapter", "1600", str(EXACT_LIMIT), "divergence=Hutchinson(probes=8)"):
        assert part in str(caught.value)
    within = Adapter(Timeless(lambda y: 2 * y), (1, 32, 32))
    _, div = exact_divergence(within, torch.tensor(0.5), torch.zeros(1, 1, 32, 32))
    assert EXACT_LIMIT == 1024 and div.tolist() == [2048.0]
