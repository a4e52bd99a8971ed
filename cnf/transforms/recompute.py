"""A stack of invertible steps whose backward pass recomputes the activations by inversion.

Source: Gomez et al. (2017), The reversible residual network, https://arxiv.org/abs/1707.04585.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cnf.precision import current_autocast

Direction = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Step(NamedTuple):
    """One invertible step.

    Args:
        module: The transform.
        direction: One of its directions, value and context → value and log-determinant.
        opposite: The other direction.
    """

    module: Any
    direction: Direction
    opposite: Direction

    def apply(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        return self.direction(value, self._own(context))

    def alone(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        """As `apply`, computed as with gradients, but keeping no graph."""
        with torch.enable_grad():
            value, ladj = self.apply(value, context)
        return value.detach(), ladj.detach()

    def undo(self, value: Tensor, context: Tensor | None) -> Tensor:
        return self.opposite(value, self._own(context))[0]

    def _own(self, context: Tensor | None) -> Tensor | None:
        """Unconditional parts of a conditional flow are not shown the context."""
        return context if self.module.context_dim else None


def recomputed(steps: list[Step], value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
    """Value and total log-determinant after all steps; only the last value is kept."""
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
            value, ladj = step.alone(value, context)
            total = ladj if total is None else total + ladj
        assert total is not None
        ctx.steps, ctx.parameters, ctx.autocast = steps, parameters, current_autocast(value)
        ctx.save_for_backward(value, context)
        return value, total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_ladj: Tensor) -> tuple[Tensor | None, ...]:
        value, context = ctx.saved_tensors
        wanted = context is not None and ctx.needs_input_grad[2]
        leaf = context.detach().requires_grad_(wanted) if context is not None else None
        found: dict[Tensor, Tensor] = {}
        for step in reversed(ctx.steps):
            with ctx.autocast:
                before = step.undo(value, context).detach().requires_grad_()
                with torch.enable_grad():
                    after = step.apply(before, leaf)
            own = [p for p in step.module.parameters() if p.requires_grad]
            sources = [before, *own, *([leaf] if wanted and step.module.context_dim else [])]
            pairs = zip(after, (grad, grad_ladj), strict=True)
            pairs = [pair for pair in pairs if pair[0].requires_grad]  # a log|det| may be constant
            outputs, weights = zip(*pairs, strict=True)
            grads = torch.autograd.grad(
                outputs, sources, weights, allow_unused=True, materialize_grads=True
            )
            for source, part in zip(sources[1:], grads[1:], strict=True):
                found[source] = found[source] + part if source in found else part
            grad, value = grads[0], before.detach()
        of_context = found.get(leaf) if leaf is not None else None
        return None, grad, of_context, *(found.get(p) for p in ctx.parameters)
