"""A training step as `cnf.fit` takes it, by rows: time, kernels, waits, and what a graph saves.

Each row of the table is one model under one objective at one batch size, with draws, clipping,
Adam and the average of the weights: once launched kernel by kernel, once replayed as a CUDA graph.
"Device busy" is the sum of the kernels' times, which no way of launching them can go below.
"""

from collections.abc import Callable

import torch
from measure import Options, interleaved
from tables import markdown, number
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import cnf
from cnf.training.learner import launch_fabric
from cnf.training.learners import learner_for

ROWS = (1_024, 65_536)
ALL_ROWS = (256, 8_192, 262_144)  # of the first case
RK4 = cnf.Solver("rk4", steps=8, gradient="backprop")
CASES: dict[str, Callable[[], tuple[cnf.Flow, cnf.objectives.Objective]]] = {
    "cnf, flow matching": lambda: (cnf.models.cnf(2), cnf.FlowMatching()),
    "cnf, likelihood, rk4 × 8": lambda: (cnf.models.cnf(2), cnf.MaximumLikelihood(solver=RK4)),
    "ffjord, likelihood, dopri5": lambda: (cnf.models.ffjord(2), cnf.MaximumLikelihood()),
    "nsf, likelihood": lambda: (cnf.models.nsf(2), cnf.MaximumLikelihood()),
    "realnvp, likelihood": lambda: (cnf.models.realnvp(2), cnf.MaximumLikelihood()),
    "maf, likelihood": lambda: (cnf.models.maf(2), cnf.MaximumLikelihood()),
}
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def questions(options: Options) -> dict[str, Callable[[], dict]]:
    """A measurement for each batch size and case."""
    rows = (64,) if options.quick else ROWS
    pairs = [(name, n) for n in rows for name in CASES]
    if not options.quick:
        pairs += [(next(iter(CASES)), n) for n in ALL_ROWS]
    return {
        f"{name}, {n:,} rows": lambda name=name, n=n: measured(CASES[name], n, options)
        for name, n in pairs
    }


def measured(build: Callable, rows: int, options: Options) -> dict:
    x = torch.randn(rows, 2, device=options.device)
    eager = stepper(build, x, options, compile=False)
    found: dict = {"gigaflop": gigaflop(eager), **launches(eager, options)}
    calls = {"kernel by kernel": eager}
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        eager()
        found["peak MB"] = torch.cuda.max_memory_allocated() / 1e6
        calls["as one graph"] = stepper(build, x, options, compile="auto")
        for _ in range(5):
            calls["as one graph"]()
        found["graph launches"] = launches(calls["as one graph"], options)
    found["ms"] = interleaved(calls, options)
    return found


def stepper(build: Callable, x: torch.Tensor, options: Options, compile: object) -> Callable:
    """A step of `fit` on these rows, draws included."""
    torch.manual_seed(0)
    flow, objective = build()
    config = cnf.TrainConfig(device=options.device, compile=compile)  # pyright: ignore
    fabric = launch_fabric(config, torch.float32)
    learner = learner_for(flow.to(options.device), objective, config, fabric)
    learner.begin(objective.begin(flow, lambda n: cnf.Batch(x[:n]), torch.Generator()))
    generator = torch.Generator(options.device).manual_seed(0)

    def step() -> None:
        learner.step(learner.prepare(cnf.Batch(x), generator)[0], 1e-4)

    step()
    return step


def gigaflop(step: Callable[[], object]) -> float | None:
    """Of its matrix products; None where gradients inside of it cannot be counted."""
    try:
        with FlopCounterMode(display=False) as counter:
            step()
    except RuntimeError:
        return None
    return counter.get_total_flops() / 1e9


def launches(step: Callable[[], object], options: Options) -> dict:
    """Kernels that a step launches, and how often the CPU waits for the device in it."""
    if options.device != "cuda":
        return {}
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:  # the CPU's events take minutes
        step()
        torch.cuda.synchronize()
    events = profiler.key_averages()
    count = {event.key: event.count for event in events}
    kernels = sum(event.count for event in events if str(event.device_type).endswith("CUDA"))
    busy = sum(
        event.self_device_time_total for event in events if "CUDA" in str(event.device_type)
    )
    return {
        "kernels": kernels,
        "waits": sum(count.get(name, 0) for name in WAITS) - 1,  # less ours
        "busy ms": busy / 1e3,
    }


def table(found: dict[str, dict]) -> str:
    lines = []
    for name, row in found.items():
        ms = {call: summary["median"] for call, summary in row["ms"].items()}
        eager, graph = ms["kernel by kernel"], ms.get("as one graph")
        share = row["busy ms"] / graph if graph and "busy ms" in row else None
        lines.append((
            name, number(eager), number(graph), number(row.get("busy ms")),
            "–" if share is None else f"{100 * share:.0f} %", row.get("kernels", "–"),
            row.get("waits", "–"), row.get("graph launches", {}).get("waits", "–"),
            number(row["gigaflop"]), number(row.get("peak MB")),
        ))  # fmt: skip
    header = (
        "", "kernel by kernel, ms", "as one graph, ms", "device busy, ms", "busy", "kernels",
        "waits", "waits of a graph", "GFLOP", "peak MB",
    )  # fmt: skip
    return markdown(header, lines)
