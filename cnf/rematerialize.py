"""Backprop through a segment of a solve that is recomputed in the backward pass."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cnf.precision import current_autocast

Tensors = tuple[Tensor, ...]


def checkpointed(
    run: Callable[[Tensors], Tensors], state: Tensors, params: Sequence[Tensor]
) -> Tensors:
    """Compute run(state), whose graph is built in the backward pass.

    It has derivatives of any order. The hooks of `torch.utils.checkpoint` would also apply to the
    vector-Jacobian products of Hutchinson's estimate inside of `run`, and recompute the segment
    for each of them.

    Args:
        run: Deterministic function from the state to the state at the end of the segment.
        state: The state at the start of the segment.
        params: All tensors other than the state that need a gradient.
    """
    return _Segment.apply(run, len(state), *state, *params)  # pyright: ignore


class _Segment(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[Tensors], Tensors], parts: int, *tensors: Tensor) -> Any:
        ctx.run, ctx.parts = run, parts
        ctx.autocast = current_autocast(tensors[0])
        ctx.save_for_backward(*tensors)
        return run(tensors[:parts])

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        run, parts, autocast = ctx.run, ctx.parts, ctx.autocast
        state, params = ctx.saved_tensors[:parts], ctx.saved_tensors[parts:]
        needed = ctx.needs_input_grad[2:]

        def pull(given: Tensors) -> Tensors:
            graph = torch.is_grad_enabled()
            start = given[:parts]
            with torch.enable_grad(), autocast:
                if not graph:
                    start = tuple(part.detach().requires_grad_() for part in start)
                end = run(start)
            ends = [k for k, part in enumerate(end) if part.requires_grad]
            asked = [x for x, need in zip((*start, *params), needed, strict=True) if need]
            return torch.autograd.grad(
                [end[k] for k in ends], asked, [given[parts + k] for k in ends],
                create_graph=graph, materialize_grads=True,
            )  # fmt: skip

        # Recomputed as well, which gives the second derivative.
        found = iter(checkpointed(pull, (*state, *cotangents), params))
        return (None, None, *(next(found) if need else None for need in needed))
