"""Training steps beside those of zuko and of a bare network, interleaved in one process.

`make bench` (with the extra `bench` for zuko). Prints a table and writes results.json beside this
file. Ratios are what counts; absolute times are this machine's.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

import cnf
from cnf.training.describe import machine

HERE = Path(__file__).parent
BATCH = 512


def interleaved(calls: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median milliseconds of each call, taken in turn so that drift of the machine hits all."""
    times = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def likelihood_step(dim: int, gradient: str) -> Callable[[], None]:
    solver = cnf.Solver("dopri5", rtol=1e-5, atol=1e-5, gradient=gradient)
    flow = cnf.models.build("cnf", dim=dim, hidden=(128, 128), frequencies=3, solver=solver)
    return step_of(flow, lambda x: cnf.MaximumLikelihood()(flow, cnf.Batch(x)).value, dim, BATCH)


def zuko_step(dim: int) -> Callable[[], None]:
    import zuko

    flow = zuko.flows.CNF(dim, hidden_features=(128, 128), activation=torch.nn.SiLU)
    return step_of(flow, lambda x: -flow().log_prob(x).mean(), dim, BATCH)


def matching_step(dim: int, batch: int) -> Callable[[], None]:
    flow = cnf.models.build("cnf", dim=dim, hidden=(64, 64, 64), frequencies=0)
    generator = torch.Generator()
    return step_of(
        flow, lambda x: cnf.FlowMatching()(flow, cnf.Batch(x), generator).value, dim, batch
    )


def bare_step(dim: int, batch: int) -> Callable[[], None]:
    sizes = [dim + 1, 64, 64, 64, dim]
    layers = []
    for i, o in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [torch.nn.Linear(i, o), torch.nn.SiLU()]
    net = torch.nn.Sequential(*layers[:-1])
    target = torch.randn(batch, dim)
    inputs = torch.randn(batch, dim + 1)
    return step_of(net, lambda x: (net(inputs) - target).square().mean(), dim, batch)


def step_of(
    module: torch.nn.Module, loss: Callable[[torch.Tensor], torch.Tensor], dim: int, batch: int
) -> Callable[[], None]:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4, fused=True)
    x = torch.randn(batch, dim)

    def step() -> None:
        value = loss(x)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def import_seconds(statement: str, repeats: int = 5) -> float:
    def once() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", statement], check=True)
        return time.perf_counter() - start

    return statistics.median(once() for _ in range(repeats))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2, help="torch threads")
    parser.add_argument("--repeats", type=int, default=15, help="interleaved repeats")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = {}
    for dim in (2, 8):
        torch.manual_seed(0)
        calls = {g: likelihood_step(dim, g) for g in ("backprop", "adjoint")}
        calls["zuko"] = zuko_step(dim)
        table[f"likelihood step, D={dim}"] = interleaved(calls, options.repeats)
    calls = {"cnf": matching_step(2, 1024), "bare network": bare_step(2, 1024)}
    table["flow-matching step, batch 1024"] = interleaved(calls, 20 * options.repeats)
    base = "import torch, torchdiffeq"
    seconds = {
        "torch, torchdiffeq": import_seconds(base),
        "and cnf": import_seconds(base + ", cnf"),
    }
    table["import"] = {name: 1e3 * value for name, value in seconds.items()}
    for title, times in table.items():
        print(title, ", ".join(f"{name} {ms:.2f} ms" for name, ms in times.items()))
    facts = {"machine": machine(), "threads": options.threads, "milliseconds": table}
    (HERE / "results.json").write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
