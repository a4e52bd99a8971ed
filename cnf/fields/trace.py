"""Traces of Jacobians: of any map by autograd, and of a chain of layers in closed form."""

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


# For each field: train mode or not → whether it has a forward mode.
_FORWARD_MODE: WeakKeyDictionary[nn.Module, dict[bool, bool]] = WeakKeyDictionary()


def has_forward_mode(field: nn.Module, v: Velocity, x: Tensor) -> bool:
    """Whether torch's forward mode supports the map `v`, which calls `field`.

    It is tried once for each field in train and in eval mode, with and without a graph. Fused
    attention kernels, checkpoints and custom autograd functions without a jvp do not support it.
    """
    known = _FORWARD_MODE.setdefault(field, {})
    if field.training not in known:
        if torch.compiler.is_compiling() or functorch.peek_interpreter_stack() is not None:
            return True
        at = x.clone() if x.is_inference() else x.detach()
        try:
            with torch.inference_mode(False), preserved(x.device):
                with torch.no_grad():  # attention may use another kernel here
                    _columns_by_forward_mode(v, at, 1)
                with torch.enable_grad():
                    columns = _columns_by_forward_mode(v, at.requires_grad_(), 1)[1]
                if columns.requires_grad:
                    columns.sum().backward(inputs=[at])
            known[field.training] = True
        except torch.OutOfMemoryError:
            raise  # says nothing about forward mode
        except (NotImplementedError, RuntimeError):  # the field's own errors recur in the solve
            known[field.training] = False
    return known[field.training]


def jacobian_columns(
    v: Velocity, x: Tensor, event_dims: int = 1, field: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """The value v(x) and the columns J e_i of its Jacobian.

    They take D tangents in one batched pass of forward mode, or D vector-Jacobian products in
    reverse mode if torch has no forward mode for the field.

    Args:
        v: Map from (*batch, *event) to the same shape, with independent rows.
        x: Points, shape (*batch, *event).
        event_dims: Number of trailing axes that form the event.
        field: The module that v calls; forward mode is assumed to be supported if None.

    Returns:
        v(x), of x's shape, and the columns ∂v/∂x_i, shape (D, *batch, *event).
    """
    if field is None or has_forward_mode(field, v, x):
        return _columns_by_forward_mode(v, x, event_dims)
    return _columns_by_reverse_mode(v, x, event_dims)


def _basis(x: Tensor, event_dims: int) -> Tensor:
    event = x.shape[x.dim() - event_dims :]
    return torch.eye(math.prod(event), dtype=x.dtype, device=x.device).reshape(-1, *event)


def _columns_by_forward_mode(v: Velocity, x: Tensor, event_dims: int) -> tuple[Tensor, Tensor]:
    def push(direction: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(v, (x,), (direction.expand_as(x),))  # pyright: ignore

    values, columns = torch.func.vmap(push, randomness="same")(_basis(x, event_dims))
    return values[0], columns


def _columns_by_reverse_mode(v: Velocity, x: Tensor, event_dims: int) -> tuple[Tensor, Tensor]:
    graph = torch.is_grad_enabled()
    # Only this attention kernel has a second derivative.
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        if not graph or not x.requires_grad:
            x = x.clone() if x.is_inference() else x.detach()
            x = x.requires_grad_().view_as(x)  # not a leaf: flop counters do not support those
        value = v(x)
        rows = [torch.zeros_like(x) for _ in _basis(x, event_dims)]
        if value.requires_grad:  # otherwise it is constant in x
            rows = [  # a loop, as vmap over a backward pass rejects custom autograd functions
                torch.autograd.grad(
                    value, x, direction.expand_as(x), create_graph=graph, retain_graph=True,
                    materialize_grads=True,
                )[0]
                for direction in _basis(x, event_dims)
            ]  # fmt: skip
    columns = torch.stack(rows).flatten(-event_dims).transpose(0, -1)
    columns = columns.unflatten(-1, x.shape[x.dim() - event_dims :])
    return (value, columns) if graph else (value.detach(), columns.detach())


def trace_of_jacobian(
    v: Velocity, x: Tensor, event_dims: int = 1, field: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """The value v(x) and the exact trace of its Jacobian, shape (*batch,).

    Args:
        v: Map from (*batch, *event) to the same shape, with independent rows.
        x: Points, shape (*batch, *event).
        event_dims: Number of trailing axes that form the event.
        field: The module that v calls, see `jacobian_columns`.
    """
    value, columns = jacobian_columns(v, x, event_dims, field)
    return value, columns.flatten(-event_dims).diagonal(dim1=0, dim2=-1).sum(-1)


def gated_product(left: Tensor, gate: Tensor, right: Tensor) -> Tensor:
    """The products left · diag(gate) · right for the gate of each row.

    For many rows they are one matrix product of the gates with a tensor that all rows share.

    Args:
        left: Left matrix, shape (J, K).
        gate: Gates, shape (*batch, K).
        right: Right matrix, shape (K, D).

    Returns:
        The transposed products, shape (*batch, D, J).
    """
    few = not torch.compiler.is_compiling() and gate[..., 0].numel() < left.shape[0]
    if few:  # the shared tensor costs more; exports have any
        return F.linear(right.T * gate.unsqueeze(-2), left)
    both = right.T.unsqueeze(1) * left  # (D, J, K), shared by all rows
    return F.linear(gate, both.flatten(0, 1)).unflatten(-1, both.shape[:2])


def trace_of_chain(
    weights: Sequence[Tensor], gates: Sequence[Tensor], scale: Tensor | None = None
) -> Tensor:
    r"""Trace of diag(s) W_L diag(g_{L-1}) W_{L-1} … diag(g_1) W_1 for the gates of each row.

    With one gate it is a matrix-vector product of the gates, and with two gates
    :math:`g_2^\top (W_2 \circ (W_1 W_3)^\top)\, g_1`, which costs batch × width² operations for
    any D. With more gates, tangents from the right and cotangents from the left are combined at a
    gate between them, which costs D × batch × width² operations for each further layer.

    Args:
        weights: The matrices W_1 … W_L, shapes (K_l, K_{l-1}) with K_0 = K_L = D, preceded by the
            batch shape if they differ between rows.
        gates: The gates g_1 … g_{L-1}, shapes (*batch, K_l).
        scale: The scale s, shape (*batch, D); ones if None.

    Returns:
        The traces, shape (*batch,).
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
