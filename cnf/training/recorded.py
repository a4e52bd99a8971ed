"""When a recorded step is out of date: what it depends on beside the values of tensors."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from cnf.errors import warn
from cnf.objectives.batch import Prepared, tensors_of
from cnf.random import preserved

COMPARED = (
    10,
    20,
    40,
    80,
    160,
    320,
    640,
)  # steps whose recorded loss is compared with a plain one
EVERY = 1_000  # and every so many steps
AGREEMENT = 1e-3, 1e-3  # of the two, relative and absolute


class Conditions:
    """Shapes of rows, modes, frozen weights and memory: with others a record is of another step.

    Numbers of Python's that the module computes with are conditions too, which cannot be seen;
    `agrees` finds that they have changed.

    Args:
        loss: A module that gives the `Loss` of prepared rows.
        rows: Rows for which its step is recorded.
        draws_alike: Whether the record draws as the module does, from torch's generators.
    """

    def __init__(self, loss: nn.Module, rows: Prepared, draws_alike: bool = False) -> None:
        self._draws_alike = draws_alike
        self._loss, self._modules = loss, list(loss.modules())
        self._tensors = [*loss.parameters(), *loss.buffers()]
        self._recorded = self._with(rows)
        self._steps = 0

    def hold(self, rows: Prepared) -> bool:
        """Whether the record is of rows like these, and of the module as it is.

        Args:
            rows: Rows; a gradient of their own does not fit.
        """
        return self._with(rows) == self._recorded

    def _with(self, rows: Prepared) -> tuple[Any, ...]:
        return (
            [(x.shape, x.dtype, x.requires_grad) for x in tensors_of(rows)],
            [(value.requires_grad, value.data_ptr()) for value in self._tensors],
            [module.training for module in self._modules],
        )

    def plain_loss_if_due(self, rows: Prepared) -> Tensor | None:
        """The loss without the record, shape (), in steps that are compared; buffers stay.

        None in others, and where the loss draws numbers that a record draws otherwise.

        Args:
            rows: The rows of the step to come.
        """
        self._steps += 1
        if self._steps not in COMPARED and self._steps % EVERY:
            return None
        with preserved(self._tensors[0].device):  # the draws of the step to come stay its own
            loss = self._plain_loss(rows)
            if self._draws_alike or torch.equal(loss, self._plain_loss(rows)):
                return loss
        return None

    def _plain_loss(self, rows: Prepared) -> Tensor:
        copies = {name: buffer.clone() for name, buffer in self._loss.named_buffers()}
        return functional_call(self._loss, copies, (rows,)).value.detach()


def agrees(recorded: Tensor, plain: Tensor) -> bool:
    """Whether two losses are the same up to rounding; if not, warn that the record is wrong.

    Args:
        recorded: The record's, shape ().
        plain: The module's own, shape ().
    """
    if torch.allclose(recorded, plain.to(recorded), *AGREEMENT, equal_nan=True):
        return True
    warn(
        f"fit: the loss of these rows is {plain.item():.4g}, and {recorded.item():.4g} as it was "
        "compiled: a number that it computes with has probably changed since, as a callback may "
        "set one. Steps before this one were wrong, and those from here on are not compiled; keep "
        "such a number as a tensor (register_buffer), or take compile=False"
    )
    return False
