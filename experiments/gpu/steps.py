"""A training step as `cnf.fit` takes it, by rows: time, kernels, waits, and what a graph saves.

Each row of the table is one model under one objective at one batch size. "fit" is the learner's
step with its draws; "replayed" is forward, backward, clipping and Adam captured as one CUDA graph,
on rows that were prepared once: what a step costs when Python does not launch its kernels.
"""

from collections.abc import Callable

import torch
from measure import Options, interleaved
from tables import markdown, number
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import cnf
from cnf.training.learner import Learner, launch_fabric

ROWS = (1_024, 65_536, 256, 8_192, 262_144)  # the most telling first
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
    return {
        f"{name}, {n:,} rows": lambda name=name, n=n: measured(CASES[name], n, options)
        for n in rows
        for name in CASES
    }


def measured(build: Callable, rows: int, options: Options) -> dict:
    torch.manual_seed(0)
    flow, objective = build()
    flow.to(options.device)
    config = cnf.TrainConfig(device=options.device)
    learner = Learner(flow, objective, config, launch_fabric(config, torch.float32))
    x = torch.randn(rows, 2, device=options.device)
    generator = torch.Generator().manual_seed(0)
    prepared, _ = learner.prepare(cnf.Batch(x), generator)

    def fit() -> None:
        learner.step(*learner.prepare(cnf.Batch(x), generator)[:1], 1e-4)

    calls = {"fit": fit, "without draws": lambda: learner.step(prepared, 1e-4)}
    for call in calls.values():
        call()
    found: dict = {"gigaflop": gigaflop(calls["without draws"]), **launches(fit, options)}
    if options.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        fit()
        found["peak MB"] = torch.cuda.max_memory_allocated() / 1e6
        try:
            calls["replayed"] = replayed(flow, objective, prepared)
        except Exception as error:  # a solver that looks at its numbers
            found["not captured"] = str(error).splitlines()[0][:200]
            torch.cuda.synchronize()
    found["ms"] = interleaved(calls, options)
    return found


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
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
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


def replayed(flow: nn.Module, objective: cnf.objectives.Objective, rows: object) -> Callable:
    """The replay of one captured step on these rows."""
    parameters = list(objective.parameters(flow))
    optimizer = torch.optim.Adam(parameters, lr=1e-4, capturable=True, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        objective(flow, rows).value.backward()
        nn.utils.clip_grad_norm_(parameters, 10.0, foreach=True)
        optimizer.step()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def table(found: dict[str, dict]) -> str:
    lines = []
    for name, row in found.items():
        ms = {call: summary["median"] for call, summary in row["ms"].items()}
        lines.append((
            name, number(ms["fit"]), number(ms["without draws"]),
            number(ms.get("replayed")), number(row.get("busy ms")), row.get("kernels", "–"),
            row.get("waits", "–"), number(row["gigaflop"]), number(row.get("peak MB")),
        ))  # fmt: skip
    header = (
        "", "fit, ms", "without draws", "replayed", "device busy", "kernels", "waits", "GFLOP",
        "peak MB",
    )  # fmt: skip
    return markdown(header, lines)
