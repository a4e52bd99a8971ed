"""Posteriors of simulators, ours and sbi's: how well a classifier tells them from the exact ones.

`python experiments/simulators/run.py` runs what config.yaml says and is not in results.csv yet,
then writes table.md and pictures/calibration.png.
"""

import csv
import itertools
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import yaml
from contestants import CONTESTANTS, draws
from tasks import TASKS, Task
from torch import Tensor

from cnf.metrics import c2st
from cnf.random import stream_seed
from cnf.training.origin import environment

HERE = Path(__file__).parent
PATH, RANKS = HERE / "results.csv", HERE / "ranks.npz"
DRAWS = 100  # for each rank
COLUMNS = [
    "task", "contestant", "simulations", "seed", "c2st", "least", "most", "train_seconds",
    "sample_seconds", "revision",
]  # fmt: skip


class Case(NamedTuple):
    """One posterior to be learned."""

    task: str
    contestant: str
    simulations: int
    seed: int


class Reference(NamedTuple):
    """What was observed, (O, C), and draws of its posteriors, (n, O, D)."""

    x: Tensor
    theta: Tensor


def reference(name: str, task: Task, config: dict) -> Reference:
    torch.manual_seed(stream_seed(0, f"observations of {name}"))
    x = task.simulate(task.prior.sample((config["observations"],)))
    return Reference(x, torch.stack([task.posterior(one, config["samples"]) for one in x], 1))


def run(case: Case, known: Reference, config: dict) -> tuple[dict, object]:
    """A row of results.csv, and the posterior."""
    task = TASKS[case.task]()
    torch.manual_seed(stream_seed(case.seed, f"simulations of {case.task}"))
    theta = task.prior.sample((case.simulations,))
    x = task.simulate(theta)
    torch.manual_seed(case.seed)
    start = time.process_time()
    posterior = CONTESTANTS[case.contestant](task.prior, theta, x, config, case.seed)
    trained = time.process_time()
    drawn = draws(posterior, known.x, config["samples"])
    sampled = time.process_time()
    pairs = zip(known.theta.unbind(1), drawn.unbind(1), strict=True)
    scores = [c2st(*pair) for pair in pairs]
    row = {
        **case._asdict(),
        "c2st": f"{statistics.fmean(scores):.4f}",
        "least": f"{min(scores):.4f}", "most": f"{max(scores):.4f}",
        "train_seconds": f"{trained - start:.1f}", "sample_seconds": f"{sampled - trained:.2f}",
        "revision": environment()["revision"],
    }  # fmt: skip
    return row, posterior


def ranks(posterior: object, task: Task, count: int, n: int = DRAWS) -> np.ndarray:
    """The part of n draws below the true parameter, (count, D): uniform if calibrated.

    Source: Talts et al. (2018), https://arxiv.org/abs/1804.06788.
    """
    torch.manual_seed(stream_seed(0, "calibration"))
    theta = task.prior.sample((count,))
    drawn = draws(posterior, task.simulate(theta), n)
    return (drawn < theta).double().mean(0).numpy()


def table(rows: list[dict]) -> str:
    """The mean over seeds of the mean over observations, with the range over seeds."""
    lines = [
        "| task | simulations | contestant | C2ST | of seeds | training, s | 3,000 draws, s |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]

    def kind(row: dict) -> tuple:
        order = list(CONTESTANTS).index(row["contestant"])
        return list(TASKS).index(row["task"]), int(row["simulations"]), order

    for _, group in itertools.groupby(sorted(rows, key=kind), kind):
        own = list(group)
        scores = [float(r["c2st"]) for r in own]
        train, sample = (
            statistics.median(float(r[name]) for r in own)
            for name in ("train_seconds", "sample_seconds")
        )
        lines.append(
            f"| {own[0]['task']} | {int(own[0]['simulations']):,} | {own[0]['contestant']} | "
            f"{statistics.fmean(scores):.3f} | {min(scores):.3f}–{max(scores):.3f} | "
            f"{train:.0f} | {sample:.1f} |"
        )
    return "\n".join(lines)


def picture(found: dict[str, np.ndarray]) -> None:
    """The part of ranks at most a, less a: of calibrated posteriors within the gray band."""
    import matplotlib.pyplot as plt

    cells = [name.split("/") for name in found]
    tasks = [name for name in TASKS if any(task == name for task, _ in cells)]
    figure, axes = plt.subplots(1, len(tasks), figsize=(4 * len(tasks), 3.2), sharey=True)
    grid = np.linspace(0, 1, DRAWS + 1)
    uniform = (DRAWS * grid + 1) / (DRAWS + 1)  # of ranks 0, …, DRAWS
    for axis, task in zip(np.atleast_1d(axes), tasks, strict=True):
        for contestant in CONTESTANTS:
            own = found.get(f"{task}/{contestant}")
            if own is not None:
                below = (own.ravel()[:, None] <= grid).mean(0)
                axis.plot(grid, below - uniform, label=contestant)
                count = len(own)
        band = 2 * np.sqrt(grid * (1 - grid) / count)
        axis.fill_between(grid, -band, band, color="0.9", zorder=0)
        axis.set(title=task, xlabel="rank of the true parameter among draws")
    np.atleast_1d(axes)[0].set_ylabel("part of ranks below, less uniform")
    np.atleast_1d(axes)[0].legend(fontsize=7)
    (HERE / "pictures").mkdir(exist_ok=True)
    figure.savefig(HERE / "pictures" / "calibration.png", dpi=110, bbox_inches="tight")


def main() -> None:
    torch.set_num_threads(1)
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    if "--smoke" in sys.argv:
        config |= {
            "simulations": [250],
            "seeds": [0],
            "steps": 40,
            "samples": 50,
            "calibration": 10,
        }
    rows: list[dict] = list(csv.DictReader(PATH.open())) if PATH.exists() else []
    found = dict(np.load(RANKS)) if RANKS.exists() else {}
    done = {(r["task"], r["contestant"], r["simulations"], r["seed"]) for r in rows}
    references: dict[str, Reference] = {}
    for seed, *rest in itertools.product(
        *(config[name] for name in ("seeds", "tasks", "contestants", "simulations"))
    ):
        case = Case(*rest, seed)
        if tuple(map(str, case)) in done:
            continue
        if case.task not in references:
            references[case.task] = reference(case.task, TASKS[case.task](), config)
        row, posterior = run(case, references[case.task], config)
        print(row, flush=True)
        if "--smoke" in sys.argv:
            continue
        rows.append({key: str(value) for key, value in row.items()})
        with PATH.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        if (case.simulations, case.seed) == (config["simulations"][-1], config["seeds"][0]):
            own = ranks(posterior, TASKS[case.task](), config["calibration"])
            found[f"{case.task}/{case.contestant}"] = own
            np.savez(RANKS, **found)
    if rows:
        (HERE / "table.md").write_text(table(rows) + "\n")
        print(table(rows))
        picture(found)


if __name__ == "__main__":
    main()
