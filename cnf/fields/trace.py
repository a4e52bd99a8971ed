"""Traces of Jacobians: of any map by autograd, and of a chain of layers in closed form."""

import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C import _functorch as functorch  # pyright: ignore
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from cnf.random import preserved
from cnf.rematerialize import checkpointed

Velocity = Callable[[Tensor], Tensor]

BYTES = 2**28  # working memory of a group of rows and directions, as estimated below
GRAPH_BYTES = 2**31  # the same for a graph, beyond which groups are recomputed in its backward
COPIES = 8  # number of tensors of the largest one's size that exist at once
TOGETHER = 16  # directions for which v(x), which each group computes, costs little

# For each field: whether it is in train mode, and under autocast → see `tangent_size`.
_TANGENTS: WeakKeyDictionary[nn.Module, dict[tuple[bool, bool], float | None]] = (
    WeakKeyDictionary()
)


def has_forward_mode(field: nn.Module, v: Velocity, x: Tensor) -> bool:
    """Whether torch's forward mode supports the map `v`, which calls `field`.

    Fused attention kernels, checkpoints and custom autograd functions without a jvp do not support
    it.
    """
    return tangent_size(field, v, x) is not None


def tangent_size(field: nn.Module, v: Velocity, x: Tensor, event_dims: int = 1) -> float | None:
    """Size of the largest tensor, in numbers, of one row's tangent; None without forward mode.

    One tangent is pushed through each field in train and in eval mode, with and without autocast,
    with and without a graph.
    The size is 0 under `torch.compile` and inside of other transforms, where forward mode is
    assumed to be supported.
    """
    known = _TANGENTS.setdefault(field, {})
    # torch does not cast what some operations' tangents return, which a convolution then refuses.
    key = field.training, torch.is_autocast_enabled(x.device.type)
    if key not in known:
        if torch.compiler.is_compiling() or functorch.peek_interpreter_stack() is not None:
            return 0.0
        at = x.detach().clone()
        try:
            with torch.inference_mode(False), preserved(x.device), _Largest() as largest:
                with torch.no_grad():  # attention may use another kernel here
                    _push(v, at, torch.zeros_like(at).unsqueeze(0))
                with torch.enable_grad():
                    columns = _push(v, at.requires_grad_(), torch.ones_like(at).unsqueeze(0))[1]
                if columns.requires_grad:
                    columns.sum().backward(inputs=[at])
            found = largest.numbers / max(1, math.prod(x.shape[: x.dim() - event_dims]))
        except torch.OutOfMemoryError:
            raise  # says nothing about forward mode
        except (NotImplementedError, RuntimeError):  # the field's own errors recur in the solve
            found = None
        if found is not None and not x.numel():
            return 0.0  # no rows to measure
        known[key] = found
    return known[key]


class _Largest(TorchDispatchMode):
    """Inside, the size of the largest tensor that any operation returns, in numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else [result]:
            if isinstance(part, Tensor):
                self.numbers = max(self.numbers, part.numel())
        return result


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
    if field is None or tangent_size(field, v, x, event_dims) is not None:
        return _push(v, x, _basis(x, event_dims))
    value, rows = _pull(v, x, _basis(x, event_dims), lambda row, direction: row)
    columns = rows.flatten(-event_dims).transpose(0, -1)
    return value, columns.unflatten(-1, x.shape[x.dim() - event_dims :])


def jacobian_times(
    v: Velocity, x: Tensor, tangents: Tensor, event_dims: int, field: nn.Module
) -> tuple[Tensor, Tensor]:
    """The value v(x) and the products J τ of its Jacobian with tangents.

    Args:
        v: Map from (*batch, *event) to the same shape, with independent rows.
        x: Points, shape (*batch, *event).
        tangents: Shape (n, *batch, *event).
        event_dims: Number of trailing axes that form the event.
        field: The module that v calls.
    """
    if tangent_size(field, v, x, event_dims) is not None:
        return _push(v, x, tangents)
    value, rows = _pull(v, x, _basis(x, event_dims), lambda row, direction: row)
    rows, flat = rows.flatten(-event_dims), tangents.flatten(-event_dims)
    products = torch.einsum("i...j,n...j->n...i", rows, flat)
    return value, products.reshape(tangents.shape)


def _basis(x: Tensor, event_dims: int) -> Tensor:
    event = x.shape[x.dim() - event_dims :]
    return torch.eye(math.prod(event), dtype=x.dtype, device=x.device).reshape(-1, *event)


def _push(v: Velocity, x: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """v(x) and its derivatives in n directions, shapes (n, *event) or (n, *x.shape)."""
    x = x.contiguous()  # torch gives a tangent the strides of x, and cannot write to expanded ones

    def push(direction: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.jvp(v, (x,), (direction.expand_as(x),))  # pyright: ignore

    values, columns = torch.func.vmap(push, randomness="same")(directions)
    return values[0], columns


def _pull(
    v: Velocity, x: Tensor, directions: Tensor, kept: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """v(x) and what is `kept` of each product of a direction and the Jacobian, stacked.

    Args:
        v: The map.
        x: Points, shape (*batch, *event).
        directions: The directions e, shape (n, *event).
        kept: A function of a product eᵀJ, of x's shape, and its direction.
    """
    graph = torch.is_grad_enabled()
    # Only this attention kernel has a second derivative.
    with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        if not graph or not x.requires_grad:
            x = x.clone() if x.is_inference() else x.detach()
            x = x.requires_grad_().view_as(x)  # not a leaf: flop counters do not support those
        value = v(x)

        def product(direction: Tensor) -> Tensor:
            if not value.requires_grad:  # it is constant in x
                return torch.zeros_like(x)
            return torch.autograd.grad(
                value, x, direction.expand_as(x), create_graph=graph, retain_graph=True,
                materialize_grads=True,
            )[0]  # fmt: skip

        # A loop, as vmap over a backward pass rejects custom autograd functions.
        found = torch.stack([kept(product(direction), direction) for direction in directions])
    return (value, found) if graph else (value.detach(), found.detach())


def trace_of_jacobian(
    v: Velocity,
    x: Tensor,
    event_dims: int = 1,
    field: nn.Module | None = None,
    together: int | None = None,
    inputs: Sequence[Tensor | None] = (),
) -> tuple[Tensor, Tensor]:
    """The value v(x) and the exact trace of its Jacobian, shape (*batch,).

    Args:
        v: Map from (*batch, *event) to the same shape, with independent rows.
        x: Points, shape (*batch, *event).
        event_dims: Number of trailing axes that form the event.
        field: The module that v calls, see `jacobian_columns`.
        together: Number of tangents that are computed at once, of which a graph is recomputed in
            its backward pass; all D if None.
        inputs: Tensors other than x and the field's parameters that v depends on; needed for
            their gradients if `together` is given.
    """
    directions = _basis(x, event_dims)
    if field is not None and tangent_size(field, v, x, event_dims) is None:
        value, found = _pull(v, x, directions, lambda row, e: _inner(row, e, event_dims))
        return value, found.sum(0)
    if together is None or together >= len(directions):
        return _trace_in(v, x, directions, 0)
    params = [tensor for tensor in inputs if tensor is not None]
    params += [] if field is None else field.parameters()
    value = trace = None
    for start in range(0, len(directions), together):

        def part(state: tuple[Tensor, ...], start: int = start) -> tuple[Tensor, ...]:
            return _trace_in(v, state[0], directions[start : start + together], start)

        own = checkpointed(part, (x,), params) if torch.is_grad_enabled() else part((x,))
        value = own[0] if value is None else value
        trace = own[1] if trace is None else trace + own[1]
    assert value is not None and trace is not None
    return value, trace


def _trace_in(v: Velocity, x: Tensor, directions: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """v(x) and the part of the trace in basis vectors from index `start` on."""
    value, columns = _push(v, x, directions)
    flat = columns.flatten(1 - directions.dim())
    return value, flat.diagonal(start, dim1=0, dim2=-1).sum(-1)


def _inner(a: Tensor, b: Tensor, event_dims: int) -> Tensor:
    return (a * b).flatten(-event_dims).sum(-1)


def groups_of(v: Velocity, x: Tensor, event_dims: int, field: nn.Module) -> tuple[int, int]:
    """How many rows, and how many tangents of each, a trace computes at once: of `BYTES`.

    All of them in reverse mode, under `torch.compile`, and for a graph of at most `GRAPH_BYTES`.

    Args:
        v: Map from (*batch, *event) to the same shape, with independent rows.
        x: Points, shape (*batch, *event).
        event_dims: Number of trailing axes that form the event.
        field: The module that v calls.
    """
    batch, size = x.shape[: x.dim() - event_dims], math.prod(x.shape[x.dim() - event_dims :])
    rows = math.prod(batch)
    numbers = tangent_size(field, v, x, event_dims)
    if not numbers:
        return rows, size
    each = COPIES * numbers * x.element_size()
    if each * rows * size <= (GRAPH_BYTES if torch.is_grad_enabled() else BYTES):
        return rows, size
    rows = max(1, min(rows, int(BYTES / (each * min(size, TOGETHER)))))
    return rows, max(1, min(size, int(BYTES / (each * rows))))


def seconds_of_trace(v: Velocity, x: Tensor, event_dims: int, field: nn.Module) -> float:
    """How long a trace takes, without gradients: one of its groups is timed.

    Args:
        v: Map from (*batch, *event) to the same shape, with independent rows.
        x: Points, shape (N, *event).
        event_dims: Number of trailing axes that form the event.
        field: The module that v calls.
    """
    with torch.no_grad():
        rows, together = groups_of(v, x, event_dims, field)
        directions = _basis(x, event_dims)[: min(together, TOGETHER)]
        _wait(x.device)
        begun = perf_counter()
        if tangent_size(field, v, x, event_dims) is None:
            _pull(v, x[:rows], directions, lambda row, e: _inner(row, e, event_dims))
        else:
            _trace_in(v, x[:rows], directions, 0)
        _wait(x.device)
    groups = math.ceil(len(x) / rows) * x[0].numel() / len(directions)
    return groups * (perf_counter() - begun)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
