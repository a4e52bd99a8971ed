"""Adam and the running average of weights that lie side by side in one tensor."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class FlatAdam:
    """One fused operation for all parameters, in place of one optimizer step for each.

    torch.optim.Adam gathers its tensors anew at each step: 60 μs for 8 parameters and 250 for the
    56 of an nsf, where the arithmetic takes 9 and 40. Here the parameters, their moments and
    averages become views of one tensor each; they stay the same objects, also in the optimizer's
    state.

    Args:
        adam: A `torch.optim.Adam` or `AdamW` of one group, whose state is taken over and kept up
            to date.
        parameters: Parameters of it, of one dtype, on a CPU.
        averages: Their averages, or none.

    Raises:
        RuntimeError: A parameter is not contiguous, of another dtype than the first, or has taken
            another number of steps.
    """

    def __init__(
        self,
        adam: torch.optim.Adam,
        parameters: Sequence[nn.Parameter],
        averages: Sequence[nn.Parameter],
    ) -> None:
        for part in parameters:
            if not part.is_contiguous() or part.dtype != parameters[0].dtype:
                raise RuntimeError("parameters are not contiguous, or of several dtypes")
        self._group = adam.param_groups[0]
        decoupled = isinstance(adam, torch.optim.AdamW)
        self._update: Any = torch._fused_adamw_ if decoupled else torch._fused_adam_  # pyright: ignore
        self._parts = [*parameters, *averages]
        self.weights, self.averages = _side_by_side(parameters), _side_by_side(averages)
        states = [adam.state[parameter] for parameter in parameters]
        for state, parameter in zip(states, parameters, strict=True):
            if not state:  # as Adam has it before its first step
                state["step"] = torch.zeros((), dtype=torch.float32)  # as Adam has it
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        self._steps = [state["step"] for state in states]
        if not self.in_step:
            raise RuntimeError("Adam has taken more steps with some parameters than with others")
        self._first = _side_by_side([state["exp_avg"] for state in states])
        self._second = _side_by_side([state["exp_avg_sq"] for state in states])
        self._memory = [part.data_ptr() for part in self._parts]

    @property
    def in_step(self) -> bool:
        """Whether all parameters have taken as many steps, as one operation for all assumes."""
        return bool((torch.stack(self._steps) == self._steps[0]).all())

    @property
    def in_place(self) -> bool:
        """Whether each parameter still is the view that it became."""
        return all(
            part.data_ptr() == before
            for part, before in zip(self._parts, self._memory, strict=True)
        )

    def step(self, gradient: Tensor) -> None:
        """Take a step.

        Args:
            gradient: That of all parameters, side by side, shape (P,).
        """
        group = self._group
        torch._foreach_add_(self._steps, 1)  # pyright: ignore
        self._update(
            [self.weights], [gradient], [self._first], [self._second], [], self._steps[:1],
            lr=group["lr"], beta1=group["betas"][0], beta2=group["betas"][1],
            weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False, maximize=False,
        )  # fmt: skip

    def average(self, decay: float) -> None:
        """Move the averages to the weights, by 1 - decay."""
        self.averages.lerp_(self.weights, 1 - decay)

    def release(self) -> None:
        """Give each parameter a memory of its own."""
        for part in self._parts:
            part.data = part.data.clone()


def _side_by_side(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor of all numbers, of which the tensors become views."""
    if not tensors:
        return torch.empty(0)
    whole = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    parts = whole.split([tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.data = part.view(tensor.shape)
    return whole
