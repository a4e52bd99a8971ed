"""What 10,000 samples and log-densities of few steps take beside a spline flow.

`python experiments/few_steps/times.py` times the flows of pinwheel that run.py trained, and an NSF
of the race's size, in turn on one thread, and writes times.md.
"""

import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import cnf
from cnf.dynamics import numerical
from cnf.race.contestants import SPLINES
from cnf.training.origin import environment

HERE = Path(__file__).parent
FLOWS = HERE.parents[1] / "runs" / "few_steps"
POINTS, REPEATS = 10_000, 15
STEPS = ("rk4-1", "rk4-2")


def calls() -> dict[str, tuple[Callable, Callable]]:
    """What samples and what scores, by name: the spline flow first."""
    x = cnf.data.toy("pinwheel").sample(POINTS, torch.Generator().manual_seed(0))
    spline = cnf.models.nsf(2, **SPLINES, between=None).eval()
    cnf.training.fit_preprocessing(spline, cnf.Batch(x))
    found = {"nsf": spline}
    for name in STEPS:
        found[f"{name}, explicit sample"] = cnf.load(FLOWS / f"pinwheel-0-both-{name}-sample")
        dense = f"pinwheel-0-likelihood-{name}-density"
        found[f"{name}, explicit density"] = cnf.load(FLOWS / dense)
    return {
        name: (lambda f=f: f.sample(POINTS), lambda f=f: f.log_prob(x))
        for name, f in found.items()
    }


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    contestants = calls()
    times: dict[tuple[str, int], list[float]] = {}
    with numerical.watched():
        for _ in range(REPEATS + 1):
            for name, pair in contestants.items():
                for kind, call in enumerate(pair):
                    start = time.perf_counter()
                    call()
                    times.setdefault((name, kind), []).append(time.perf_counter() - start)
    medians = {key: 1e3 * statistics.median(values[1:]) for key, values in times.items()}
    lines = ["| | samples | log_prob |", "|---|---:|---:|"]
    for name in contestants:
        cells = [
            f"{medians[name, k]:.0f} ms ({medians[name, k] / medians['nsf', k]:.1f})"
            for k in (0, 1)
        ]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    origin = (
        f"torch {torch.__version__}, {platform.machine()}, revision {environment()['revision']}"
    )
    text = (
        "\n".join(lines) + f"\n\n{POINTS:,} points, one thread, medians of {REPEATS}, {origin}.\n"
    )
    (HERE / "times.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
