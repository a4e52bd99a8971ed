"""Traces of Jacobians: of any map by autograd, of a chain of gated layers in closed form."""

import math
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch as functorch  # pyright: ignore
from torch.nn.attention import SDPBackend, sdpa_kernel

from cnf.random import preserved

Velocity = Callable[[Tensor], Tensor]


_FORWARD: WeakKeyDictionary[nn.Module, dict[bool, bool]] = WeakKeyDictionary()  # by training


def has_forward_mode(field: nn.Module, v: Velocity, x: Tensor) -> bool:
    """Whether torch can push tangents through `v`, which `field` computes in.

    Tried once for each field and mode (train or eval), without a graph and with one: attention's
    kernels, custom autograd functions without a jvp and checkpoints cannot.
    """
    known = _FORWARD.setdefault(field, {})
    if field.training not in known:
        if torch.compiler.is_compiling() or functorch.peek_interpreter_stack() is not None:
            return True
        at = x.clone() if x.is_inference() else x.detach()
        try:
            with torch.inference_mode(False), preserved(x.device):
                with torch.no_grad():  # attention may take another kernel here
                    _pushed(v, at, 1)
                with torch.enable_grad():
                    columns = _pushed(v, at.requires_grad_(), 1)[1]
                if columns.requires_grad:
                    columns.sum().backward(inputs=[at])
            known[field.training] = True
        except torch.OutOfMemoryError:
            raise  # no sign of a missing forward mode
        except (NotImplementedError, RuntimeError):  # the field's own error recurs in the solve
            known[field.training] = False
    return known[field.training]


def jacobian_columns(
    v: Velocity, x: Tensor, event_dims: int = 1, field: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """v(x) and J e_i for every i, by D tangents in one batched forward-mode pass.

    Args:
        v: Map from (*batch, *event) to the same shape, rows independent.
        x: Points, shape (*batch, *event).
        event_dims: How many trailing axes form the event.
        field: What computes v; where torch has no forward mode for it, D products in reverse mode
            give the same.

    Returns:
        v(x), of x's shape, and the columns ∂v/∂x_i, shape (D, *batch, *event).
    """
    if field is None or has_forward_mode(field, v, x):
        return _pushed(v, x, event_dims)
    return _pulled(v, x, event_dims)


def _directions(x: Tensor, event_dims: int) -> Tensor:
    event = x.shape[x.dim() - event_dims :]
    return torch.eye(math.prod(event), dtype=x.dtype, device=x.device).reshape(-1, *event)


def _pushed(v: Velocity, x: Tensor, event_dims: int) -> tuple[Tensor, Tensor]:
    def push(direction: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(v, (x,), (direction.expand_as(x),))  # pyright: ignore

    values, columns = torch.func.vmap(push, randomness="same")(_directions(x, event_dims))
    return values[0], columns


def _pulled(v: Velocity, x: Tensor, event_dims: int) -> tuple[Tensor, Tensor]:
    graph = torch.is_grad_enabled()
    # The other kernels of attention have no second derivative.
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        if not graph or not x.requires_grad:
            x = x.clone() if x.is_inference() else x.detach()
            x = x.requires_grad_().view_as(x)  # no leaf: flop counters refuse gradients of those
        value = v(x)
        rows = [torch.zeros_like(x) for _ in _directions(x, event_dims)]
        if value.requires_grad:  # else constant in x
            rows = [  # a loop: vmap over a backward pass refuses custom autograd functions
                torch.autograd.grad(
                    value, x, direction.expand_as(x), create_graph=graph, retain_graph=True,
                    materialize_grads=True,
                )[0]
                for direction in _directions(x, event_dims)
            ]  # fmt: skip
    columns = torch.stack(rows).flatten(-event_dims).transpose(0, -1)
    columns = columns.unflatten(-1, x.shape[x.dim() - event_dims :])
    return (value, columns) if graph else (value.detach(), columns.detach())


def trace_of_jacobian(
    v: Velocity, x: Tensor, event_dims: int = 1, field: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """v(x) and the exact trace of its Jacobian, shape (*batch,); arguments as above."""
    value, columns = jacobian_columns(v, x, event_dims, field)
    return value, columns.flatten(-event_dims).diagonal(dim1=0, dim2=-1).sum(-1)


def gated_product(left: Tensor, gate: Tensor, right: Tensor) -> Tensor:
    """The product left · diag(gate) · right for each row's gate, by one with shared matrices.

    Args:
        left: Shape (J, K).
        gate: Shape (*batch, K).
        right: Shape (K, D).

    Returns:
        The transposed products, shape (*batch, D, J).
    """
    few = not torch.compiler.is_compiling() and gate[..., 0].numel() < left.shape[0]
    if few:  # forming the shared product costs more; what is exported takes any number of rows
        return F.linear(right.T * gate.unsqueeze(-2), left)
    both = right.T.unsqueeze(1) * left  # (D, J, K), shared by the batch
    return F.linear(gate, both.flatten(0, 1)).unflatten(-1, both.shape[:2])


def trace_of_chain(
    weights: Sequence[Tensor], gates: Sequence[Tensor], scale: Tensor | None = None
) -> Tensor:
    r"""Trace of diag(s) W_L diag(g_{L-1}) W_{L-1} … diag(g_1) W_1 for each row's gates.

    With one gate it is a product of (batch × K) with a vector, with two
    :math:`g_2^\top (W_2 \circ (W_1 W_3)^\top)\, g_1`: one product of batch × width², whatever D
    is. With more, tangents from the right and cotangents from the left meet at a gate between
    them: D products of batch × width² for each further layer.

    Args:
        weights: W_1 … W_L, shapes (K_l, K_{l-1}) with K_0 = K_L = D; with a batch before them
            where they differ between rows.
        gates: g_1 … g_{L-1}, shapes (*batch, K_l).
        scale: s, shape (*batch, D); None for ones.

    Returns:
        Shape (*batch,).
    """
    if any(weight.dim() > 2 for weight in weights):
        return _trace_by_tangents(weights, gates, scale)
    first, *middle, last = weights
    if len(gates) == 1:
        diagonal = last.T * first
        if scale is None:
            return gates[0] @ diagonal.sum(-1)
        return ((gates[0] @ diagonal) * scale).sum(-1)
    if len(gates) == 2 and scale is None:
        return (F.linear(gates[0], middle[0] * (first @ last).T) * gates[1]).sum(-1)
    tangents = gated_product(middle[0], gates[0], first)  # (*batch, D, K_2)
    for gate, weight in zip(gates[1:-2], middle[1:-1], strict=True):
        tangents = F.linear(tangents * gate.unsqueeze(-2), weight)
    if len(gates) == 2:
        cotangents, gate = last, gates[1]
    else:
        cotangents, gate = gated_product(middle[-1].T, gates[-1], last.T), gates[-2]
    products = tangents * cotangents
    if scale is not None:
        products = products * scale.unsqueeze(-1)
    return (products.sum(-2) * gate).sum(-1)


def _trace_by_tangents(
    weights: Sequence[Tensor], gates: Sequence[Tensor], scale: Tensor | None
) -> Tensor:
    first, *middle, last = weights
    tangents = first.mT
    for gate, weight in zip(gates[:-1], middle, strict=True):
        tangents = (tangents * gate.unsqueeze(-2)) @ weight.mT
    diagonal = (tangents * gates[-1].unsqueeze(-2) * last).sum(-1)
    return (diagonal if scale is None else diagonal * scale).sum(-1)
