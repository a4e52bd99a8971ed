"""A training step on MNIST's shape: pictures a second and memory of four image models."""

from collections.abc import Callable

import torch
from measure import Options, interleaved
from steps import launches
from tables import markdown, number

import cnf
from cnf.training.learner import launch_fabric
from cnf.training.learners import learner_for

SHAPE, BATCHES = (1, 28, 28), (64,)
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
    found: dict = {}
    ways = {"kernel by kernel": False}
    if options.device == "cuda":
        ways["as one graph"] = "auto"
        torch.cuda.reset_peak_memory_stats()
    calls = {way: stepper(name, batch, options, compile) for way, compile in ways.items()}
    for call in calls.values():
        for _ in range(5):
            call()
    found |= launches(calls["kernel by kernel"], options)
    if options.device == "cuda":
        found["peak MB"] = torch.cuda.max_memory_allocated() / 1e6
    found["ms"] = interleaved(calls, options)
    return found


def stepper(name: str, batch: int, options: Options, compile: object) -> Callable[[], None]:
    """A step of `fit` on pixels, draws included."""
    torch.manual_seed(0)
    given, objective = MODELS[name]
    shape = (1, 8, 8) if options.quick else SHAPE
    pixels = torch.randint(0, 256, (batch, *shape), device=options.device).float()
    flow = cnf.models.build(
        name, shape=shape, dequantization="uniform", preprocess="logit", **given
    ).to(options.device)
    config = cnf.TrainConfig(device=options.device, compile=compile)  # pyright: ignore
    goal, rows = objective(), cnf.Batch(pixels)
    learner = learner_for(flow, goal, config, launch_fabric(config, torch.float32))
    learner.initialize(rows, torch.Generator().manual_seed(0))
    generator = torch.Generator(options.device).manual_seed(0)

    def step() -> None:
        learner.step(learner.prepare(rows, generator)[0], 1e-4)

    return step


def table(found: dict[str, dict]) -> str:
    lines = []
    for name, row in found.items():
        ms = {way: summary["median"] for way, summary in row["ms"].items()}
        rate = 1e3 * int(name.split(", ")[1].split()[0]) / min(ms.values())
        lines.append((
            name, number(ms["kernel by kernel"]), number(ms.get("as one graph")), number(rate),
            number(row.get("busy ms")), row.get("kernels", "–"), row.get("waits", "–"),
            number(row.get("peak MB")),
        ))  # fmt: skip
    header = (
        "", "kernel by kernel, ms", "as one graph, ms", "pictures/s", "device busy, ms",
        "kernels", "waits", "peak MB",
    )  # fmt: skip
    return markdown(header, lines)
