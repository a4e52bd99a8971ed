"""A sequence of invertible steps whose backward pass recomputes activations by inversion.

Source: Gomez et al. (2017), The reversible residual network, https://arxiv.org/abs/1707.04585.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnf.precision import current_autocast

Direction = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Step(NamedTuple):
    """An invertible step.

    Args:
        module: The transform.
        direction: One of its directions, (value, context) → (value, log-determinant).
        opposite: The other direction.
    """

    module: Any
    direction: Direction
    opposite: Direction

    def apply(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.direction(value, self._context_for(context))

    def apply_detached(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `apply` with gradients enabled, without the graph of the result."""
        with torch.enable_grad():
            value, ladj = self.apply(value, context)
        return value.detach(), ladj.detach()

    def invert(self, value: Tensor, context: Tensor | None) -> Tensor:
        return self.opposite(value, self._context_for(context))[0]

    def _context_for(self, context: Tensor | None) -> Tensor | None:
        """The context, or None for an unconditional part of a conditional flow."""
        return context if self.module.context_dim else None


def recomputed(steps: list[Step], value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Value and log-determinant of all steps; only the last value is stored for backward."""
    modules = nn.ModuleList(step.module for step in steps)
    parameters = [p for p in modules.parameters() if p.requires_grad]
    return _Recomputed.apply(steps, value, context, *parameters)  # pyright: ignore


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, steps: list[Step], value: Tensor, context: Tensor | None, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        total = None
        for step in steps:
            value, ladj = step.apply_detached(value, context)
            total = ladj if total is None else total + ladj
        assert total is not None
        ctx.steps, ctx.parameters, ctx.autocast = steps, parameters, current_autocast(value)
        ctx.save_for_backward(value, context)
        return value, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_ladj: Tensor) -> tuple[Tensor | None, ...]:
        value, context = ctx.saved_tensors
        needs_context = context is not None and ctx.needs_input_grad[2]
        leaf = context.detach().requires_grad_(needs_context) if context is not None else None
        gradients: dict[Tensor, Tensor] = {}
        for step in reversed(ctx.steps):
            with ctx.autocast:
                before = step.invert(value, context).detach().requires_grad_()
                with torch.enable_grad():
                    after = step.apply(before, leaf)
            own = [p for p in step.module.parameters() if p.requires_grad]
            with_context = needs_context and step.module.context_dim
            sources = [before, *own, *([leaf] if with_context else [])]
            pairs = zip(after, (grad, grad_ladj), strict=True)
            # The log-determinant may be constant.
            pairs = [pair for pair in pairs if pair[0].requires_grad]
            outputs, weights = zip(*pairs, strict=True)
            grads = torch.autograd.grad(
                outputs, sources, weights, allow_unused=True, materialize_grads=True
            )
            for source, part in zip(sources[1:], grads[1:], strict=True):
                gradients[source] = gradients[source] + part if source in gradients else part
            grad, value = grads[0], before.detach()
        context_grad = gradients.get(leaf) if leaf is not None else None
        return None, grad, context_grad, *(gradients.get(p) for p in ctx.parameters)
