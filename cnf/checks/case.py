"""What a check is given, a `Case`, and what it returns, an `Outcome`.

Most checks are asked twice: of an `exact` copy of the flow (float64, a tight solver), where only
wrong mathematics shows, and of the flow as it is, where a solver or a dtype that is too coarse
shows as well. Of a list of outcomes the first failing one is reported.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from cnf.flow import Flow
from cnf.transforms.continuous import Continuous
from cnf.transforms.normalization import ActNorm

NATS = 1e-2  # mean error of log_prob that a solver may make


class NotApplicable(Exception):
    """A check that has nothing to say about this flow; the text is the reason."""


@dataclass(frozen=True)
class Outcome:
    """What a check measured; it passes where measured ≤ tolerance (NaN does not).

    Attributes:
        measured: The error found.
        tolerance: The largest error allowed, in the same units.
        words: What was measured, for a reader.
        remedy: What is likely wrong, and what to do; read after a failure only.
    """

    measured: float
    tolerance: float
    words: str
    remedy: str = ""

    @property
    def passed(self) -> bool:
        return self.measured <= self.tolerance


@dataclass(frozen=True)
class Case:
    """Copies of the flow under test, in eval mode, and points to test them at.

    Attributes:
        flow: As it is: own dtype, own solver; without dequantization.
        double: In float64, own solver.
        exact: In float64 with a tight solver.
        x: Data, shape (N, *event).
        z: Base samples, shape (N, *event).
        context: Condition as the transform takes it, shape (N, C), or None.
        generator: Source of everything random.
    """

    flow: Flow
    double: Flow
    exact: Flow
    x: Tensor
    z: Tensor
    context: Tensor | None
    generator: Generator

    @property
    def scale(self) -> Tensor:
        """Spread of the data, shape (*event); one where it has none."""
        spread = self.x.double().std(0, correction=0)
        return torch.where(spread > 0, spread, 1.0)

    @property
    def continuous(self) -> list[Continuous]:
        """Every `Continuous` of the flow."""
        return [part for part in self.flow.modules() if isinstance(part, Continuous)]

    def rows(self, flow: Flow, count: int | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
        """The first `count` rows of x, z and context, in the dtypes of `flow`."""
        like = reference(flow)
        context = None if self.context is None else self.context[:count].to(like)
        return self.x[:count].to(like.device, flow.data_dtype), self.z[:count].to(like), context


def reference(flow: Flow) -> Tensor:
    """A tensor of the flow's dtype and device."""
    return next(flow.parameters(), flow.base._like)


def in_mode(flow: Flow, training: bool) -> Flow:
    """A copy of its own: batch statistics move in train mode; actnorm's first batch is past."""
    flow = copy.deepcopy(flow).train(training)
    for part in flow.modules():
        if isinstance(part, ActNorm):
            part.initialized.fill_(True)
    return flow
