"""The cost model: what a step takes on one process, and what an all-reduce adds.

    step = launches · launch + flops / rate + moved / bandwidth + all-reduce
    all-reduce over P = latency · log2 P + 2 (P - 1) / P · gradient / link

Constants of this machine are fitted to the measured medians, by least squares of relative errors
without negative constants; those of an H100 are published ones.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from costs import Cost
from scipy.optimize import nnls


class Machine(NamedTuple):
    """Seconds per launch, flop and byte of a process.

    Attributes:
        launch: Seconds of an operation, whatever it computes.
        flop: Seconds per flop.
        byte: Seconds per byte that an operation reads or writes.
    """

    launch: float
    flop: float
    byte: float

    def step(self, cost: Cost) -> float:
        """Seconds of a step without an all-reduce."""
        return self.launch * cost.launches + self.flop * cost.flops + self.byte * cost.moved


class Link(NamedTuple):
    """What joins processes.

    Attributes:
        latency: Seconds of a step's all-reduces for each doubling of the processes.
        byte: Seconds per byte that a process sends.
    """

    latency: float
    byte: float

    def all_reduce(self, gradient: float, processes: int) -> float:
        """Seconds of the all-reduces of a step."""
        sent = 2 * (processes - 1) / processes * gradient
        return self.latency * math.log2(processes) + self.byte * sent


def fitted_machine(costs: Sequence[Cost], seconds: Sequence[float]) -> Machine:
    """The machine that explains the seconds of these steps best."""
    return Machine(*_fitted([cost[:3] for cost in costs], seconds, seconds))


def fitted_link(costs: Sequence[Cost], seconds: Sequence[float], without: Sequence[float]) -> Link:
    """The link of two processes that explains best what they take longer.

    Args:
        costs: Of the steps.
        seconds: Of two processes.
        without: Of a process that computes as much beside a copy of itself, and waits for nobody.
    """
    more = [a - b for a, b in zip(seconds, without, strict=True)]
    return Link(*_fitted([(1.0, cost.gradient) for cost in costs], more, seconds))


def _fitted(
    columns: Sequence[Sequence[float]], target: Sequence[float], scale: Sequence[float]
) -> list[float]:
    """Constants, not below zero, of the least squares of errors in parts of `scale`."""
    matrix = np.asarray(columns) / np.asarray(scale)[:, None]
    size = matrix.max(0)  # columns differ by ten orders of magnitude
    return (nnls(matrix / size, np.asarray(target) / np.asarray(scale))[0] / size).tolist()


def errors(predicted: Sequence[float], seconds: Sequence[float]) -> list[float]:
    """Relative errors of predictions."""
    return [p / s - 1 for p, s in zip(predicted, seconds, strict=True)]
