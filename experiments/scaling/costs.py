"""What a step costs, counted: operations launched, flops, bytes moved, bytes of its gradient."""

from typing import Any, NamedTuple

from cases import Case, train
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode


class Cost(NamedTuple):
    """Of one step on one process.

    Attributes:
        launches: Operations that compute; on a GPU each is a kernel, or several.
        flops: Of matrix products and convolutions.
        moved: Bytes that the operations read and write, each for itself.
        gradient: Bytes of the weights' gradient.
    """

    launches: float
    flops: float
    moved: float
    gradient: float


class _Traffic(TorchDispatchMode):
    """Counts operations that are no views, and the bytes of their arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.moved = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.launches += 1
            self.moved += sum(_size(leaf) for leaf in tree_leaves((args, kwargs, found)))
        return found


def _size(leaf: object) -> int:
    """Bytes of a tensor's memory; one that is expanded takes no more than it was made of."""
    if not isinstance(leaf, Tensor):
        return 0
    return min(leaf.numel() * leaf.element_size(), leaf.untyped_storage().nbytes())


def counted(case: Case, rows: int) -> Cost:
    """The cost of a step: a training of three steps less one of two."""
    three, two = (_of_training(case, rows, steps) for steps in (3, 2))
    gradient = sum(4 * p.numel() for p in case.objective.parameters(case.flow()))
    return Cost(*(a - b for a, b in zip(three, two, strict=True)), gradient)


def _of_training(case: Case, rows: int, steps: int) -> tuple[int, int, int]:
    with _Traffic() as traffic, FlopCounterMode(display=False) as counter:
        train(case, rows, steps)
    return traffic.launches, counter.get_total_flops(), traffic.moved


def at(rows: float, costs: dict[int, Cost]) -> Cost:
    """The cost at other numbers of rows, on the line through the least and the most counted."""
    low, high = min(costs), max(costs)
    part = (rows - low) / (high - low)
    return Cost(*(a + part * (b - a) for a, b in zip(costs[low], costs[high], strict=True)))
