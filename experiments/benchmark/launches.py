"""Kernels that a training step launches, and how often the host waits for the device in it.

Counted on a device that is not there (`tests/pretended.py`), so that no GPU is needed: a kernel is
an operation that PyTorch dispatches to a device and that is no view; a wait is a copy between the
device and the host, or the read of a number. A step is that of `cnf.fit` kernel by kernel, with
draws, clipping, Adam and average of the weights; "in a graph" is what a CUDA graph of it holds.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from measure import Options
from tables import markdown

import cnf
from cnf.training.capture import CapturedLearner
from cnf.training.learner import Learner
from cnf.transforms.continuous import solvers_in

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from pretended import DEVICE, capturing, launch_fabric, pretended_device  # noqa: E402

ROWS, PICTURES = 256, 16
RK4 = cnf.Solver("rk4", steps=8, gradient="backprop")
CASES: dict[str, Callable[[], tuple[cnf.Flow, cnf.objectives.Objective]]] = {
    "cnf, flow matching": lambda: (cnf.models.cnf(2), cnf.FlowMatching()),
    "cnf, likelihood, rk4 × 8": lambda: (cnf.models.cnf(2), cnf.MaximumLikelihood(solver=RK4)),
    "cnf, likelihood, dopri5": lambda: (cnf.models.cnf(2), cnf.MaximumLikelihood()),
    "ffjord, likelihood, dopri5": lambda: (cnf.models.ffjord(2), cnf.MaximumLikelihood()),
    "nsf, likelihood": lambda: (cnf.models.nsf(2), cnf.MaximumLikelihood()),
    "realnvp, likelihood": lambda: (cnf.models.realnvp(2), cnf.MaximumLikelihood()),
    "maf, likelihood": lambda: (cnf.models.maf(2), cnf.MaximumLikelihood()),
    "unet, flow matching": lambda: (cnf.models.unet((1, 28, 28)), cnf.FlowMatching()),
}


def run(options: Options) -> dict:
    """The counts of each case, the same on every machine and with any options."""
    with pretended_device() as device:
        return {name: counted(build, device) for name, build in CASES.items()}


def counted(build: Callable, device) -> dict:
    """Counts of the second step, in which nothing is allocated or checked for the first time."""

    def count(call: Callable) -> tuple[object, dict]:
        device.forget()
        result = call()
        return result, {"kernels": device.kernels.total(), "waits": len(device.waits)}

    learner, prepare = ready(Learner, build)
    learner.step(prepare(), 1e-4)
    rows, draws = count(prepare)
    loss, forward = count(lambda: learner.objective(learner.module, rows))
    learner.module.zero_grad()
    _, backward = count(loss.value.backward)
    _, step = count(lambda: learner.step(rows, 1e-4))
    found = {"draws": draws, "forward": forward, "backward": backward, "step": step}
    if can_be_captured(learner):
        alone, prepare = ready(CapturedLearner, build)
        alone._update(prepare())
        rows = prepare()
        with capturing():
            _, found["graph"] = count(lambda: alone._update(rows))
    return found


def ready(kind: type[Learner], build: Callable) -> tuple[Learner, Callable]:
    """A learner, and a function that draws what a step needs."""
    torch.manual_seed(0)
    flow, objective = build()
    config = cnf.TrainConfig(device=DEVICE.type, progress=False)
    learner = kind(flow.to(DEVICE), objective, config, launch_fabric(config, torch.float32))
    rows = ROWS if len(flow.event_shape) == 1 else PICTURES
    batch = cnf.Batch(torch.randn(rows, *flow.event_shape).to(DEVICE))
    learner.initialize(batch, torch.Generator())
    learner.begin(objective.begin(flow, lambda n: batch, torch.Generator()))
    generator = torch.Generator(DEVICE).manual_seed(0)
    return learner, lambda: learner.prepare(batch, generator)[0]


def can_be_captured(learner: Learner) -> bool:
    """Whether a step reads no value, as far as `fit` knows."""
    objective, flow = learner.objective, learner.module
    if not objective.solves:
        return objective.capturable
    solvers = solvers_in(objective.as_trained(flow).transform)
    return objective.capturable and all(solver.fixed for solver in solvers)


def table(found: dict) -> str:
    header = (
        "kernels", "draws", "forward", "backward", "update", "together", "waits",
        "in a graph", "waits in it",
    )  # fmt: skip
    lines = []
    for name, row in found.items():
        parts = ("draws", "forward", "backward", "step")
        draws, forward, backward, step = (row[part]["kernels"] for part in parts)
        counts = [draws, forward, backward, step - forward - backward, draws + step]
        counts.append(row["draws"]["waits"] + row["step"]["waits"])
        cells = [f"{count:,}" for count in (*counts, *row.get("graph", {}).values())]
        lines.append((name, *cells, *["–"] * (len(header) - 1 - len(cells))))
    return markdown(header, lines) + (
        f"\n\nBatch {ROWS} of D = 2, {PICTURES} pictures of 1 × 28 × 28, float32, seed 0."
    )


if __name__ == "__main__":  # alone: without the other questions' peers
    torch.set_num_threads(1)
    print(table(run(Options(threads=1))))
