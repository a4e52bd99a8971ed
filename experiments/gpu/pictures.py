"""A training step on MNIST's shape: pictures a second and memory of six image models."""

from collections.abc import Callable

import torch
from measure import Options, interleaved
from steps import launches
from tables import markdown, number

import cnf
from cnf.training.learner import Learner, launch_fabric

SHAPE, BATCHES = (1, 28, 28), (64, 256)
RK4 = cnf.Solver("rk4", steps=4)
HUTCHINSON = {"divergence": "hutchinson"}
MODELS: dict[str, tuple[dict, Callable[[], cnf.objectives.Objective]]] = {
    "unet": ({}, cnf.FlowMatching),
    "ffjord": ({"solver": RK4}, lambda: cnf.MaximumLikelihood(**HUTCHINSON)),
    "rnode": ({"solver": RK4}, lambda: cnf.MaximumLikelihood(**HUTCHINSON)),
    "glow": ({"hidden": (128, 128), "layers": 8}, cnf.MaximumLikelihood),
}


def questions(options: Options) -> dict[str, Callable[[], dict]]:
    batches = (4,) if options.quick else BATCHES
    return {
        f"{name}, {batch} pictures": lambda name=name, batch=batch: measured(name, batch, options)
        for batch in batches
        for name in MODELS
    }


def measured(name: str, batch: int, options: Options) -> dict:
    torch.manual_seed(0)
    given, objective = MODELS[name]
    shape = (1, 8, 8) if options.quick else SHAPE
    pixels = torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, device=options.device)
    flow = cnf.models.build(
        name, shape=shape, dequantization="uniform", preprocess="logit", **given
    ).to(options.device)
    config = cnf.TrainConfig(device=options.device)
    learner = Learner(flow, objective(), config, launch_fabric(config, torch.float32))
    generator, rows = torch.Generator().manual_seed(0), cnf.Batch(pixels.float())
    learner.initialize(rows, generator)

    def step() -> None:
        learner.step(learner.prepare(rows, generator)[0], 1e-4)

    found: dict = {}
    step()
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        found["peak MB"] = torch.cuda.max_memory_allocated() / 1e6
    found |= launches(step, options)
    found["ms"] = interleaved({"fit": step}, options)["fit"]
    found["pictures/s"] = 1e3 * batch / found["ms"]["median"]
    return found


def table(found: dict[str, dict]) -> str:
    lines = [
        (
            name, number(row["ms"]["median"]), number(row["pictures/s"]),
            number(row.get("busy ms")), row.get("kernels", "–"), row.get("waits", "–"),
            number(row.get("peak MB")),
        )
        for name, row in found.items()
    ]  # fmt: skip
    header = ("", "fit, ms", "pictures/s", "device busy, ms", "kernels", "waits", "peak MB")
    return markdown(header, lines)
