"""What is scaled: models and objectives, at several numbers of rows for each process."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import cnf

RK4 = cnf.Solver("rk4", steps=8, gradient="backprop")  # as in experiments/gpu


class Case(NamedTuple):
    """What one row of the table trains.

    Attributes:
        flow: Makes the flow.
        objective: What it is trained by.
        data: Makes what it is trained on.
        rows: For each process, and how many steps are timed with so many.
    """

    flow: Callable[[], cnf.Flow]
    objective: cnf.objectives.Objective
    data: Callable[[], Any]
    rows: dict[int, int]


CASES = {
    "U-Net, flow matching": Case(
        lambda: cnf.models.unet((1, 28, 28)), cnf.FlowMatching(),
        lambda: torch.rand(256, 1, 28, 28, generator=torch.Generator().manual_seed(0)),
        {8: 10, 16: 6},
    ),
    "cnf, flow matching": Case(
        lambda: cnf.models.cnf(2), cnf.FlowMatching(), lambda: cnf.data.toy("pinwheel"),
        {512: 800, 1_024: 600, 8_192: 120, 16_384: 60},
    ),
    "cnf, likelihood": Case(
        lambda: cnf.models.cnf(2), cnf.MaximumLikelihood(solver=RK4),
        lambda: cnf.data.toy("pinwheel"), {128: 20, 256: 16, 1_024: 8, 2_048: 5},
    ),
}  # fmt: skip
QUICK = {
    "cnf, flow matching": CASES["cnf, flow matching"]._replace(rows={64: 12, 128: 12}),
    "cnf, likelihood": CASES["cnf, likelihood"]._replace(rows={16: 3, 32: 3}),
}


def train(case: Case, rows: int, steps: int, devices: int = 1) -> float:
    """Train by `fit`, with plain steps.

    Args:
        case: What is trained.
        rows: For each process.
        steps: How many.
        devices: Processes.

    Returns:
        Median time of a step, in seconds, of all but the first fifth.
    """
    torch.manual_seed(0)
    config = cnf.TrainConfig(
        steps=steps, batch_size=rows * devices, devices=devices, device="cpu",
        strategy="ddp" if devices > 1 else "auto", validations=0, compile=False, progress=False,
    )  # fmt: skip
    marks: list[tuple[float, float]] = []
    mark = lambda record: marks.append((record["step"], time.perf_counter()))  # noqa: E731
    cnf.fit(case.flow(), case.objective, case.data(), config, callbacks=[mark])
    marks = marks[len(marks) // 5 :]
    pairs = zip(marks, marks[1:], strict=False)
    spent = [(t - s) / (n - m) for (m, s), (n, t) in pairs]
    return statistics.median(spent) if spent else float("nan")  # but the first process tells
