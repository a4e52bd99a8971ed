"""Flow matching's couplings and paths on four 2-D tasks: W2, path energy, and few-step sampling.

`python experiments/flow_matching_2d/run.py` trains what config.yaml says and is not in results.csv
yet, then writes table.md. `--methods` and `--seeds` choose some, `--table` only writes the table.
"""

import argparse
import csv
import math
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from table import tables
from torch import Tensor

import cnf
from cnf.dynamics.solver import Solver
from cnf.fields import MLPField, VectorField, WithScore
from cnf.matching import COUPLINGS, Pairing
from cnf.metrics.distances import wasserstein2
from cnf.metrics.flows import path_energy
from cnf.metrics.nfe_curves import nfe_curve
from cnf.random import stream
from cnf.training.origin import environment
from cnf.transforms import Continuous

HERE = Path(__file__).parent
PATH = HERE / "results.csv"
COLUMNS = [
    "task", "seed", "method", "w2", "npe", "euler_1", "euler_2", "euler_4", "euler_8",
    "train_seconds", "coupling_seconds", "revision",
]  # fmt: skip
FLOOR, REFLOW, BEST = "floor", "rectified flow", "best recipe"


@dataclass
class Task:
    """The draws that all methods of one task and seed share."""

    seed: int
    config: dict
    source: str | None
    target: str

    def __post_init__(self) -> None:
        toy, count = cnf.data.toy(self.target), self.config["points"]
        self.rows = toy.sample(self.config["rows"], stream(self.seed, "rows"))
        self.test = toy.sample(count, stream(self.seed, "test"))
        starts = self.flow().base.sample((count,), stream(self.seed, "starts"))
        self.squared = wasserstein2(starts, self.test) ** 2
        self.pairings: list[Tensor] = []

    def flow(self, score: str | None = None) -> cnf.Flow:
        torch.manual_seed(self.seed)
        field: VectorField = MLPField(2, **self.config["field"])
        if score is not None:
            field = WithScore(field, MLPField(2, **self.config["field"]), score)
        solver = Solver("euler", steps=self.config["euler"])
        base = None if self.source is None else cnf.data.toy(self.source)
        return cnf.Flow(base, Continuous(field, solver), event_shape=(2,))

    def settings(self, **change) -> cnf.TrainConfig:
        return cnf.TrainConfig(**{**self.config["train"], "seed": self.seed, **change})

    def row(self, method: str, w2: float, **more) -> dict:
        known = {"seed": self.seed, "method": method, "w2": f"{w2:.4f}", **more}
        return {name: known.get(name, "") for name in COLUMNS}

    def scored(self, method: str, flow: cnf.Flow, *histories) -> dict:
        """W2 from fresh base samples, path energy, and W2 after few Euler steps."""
        starts = flow.base.sample((len(self.test),), stream(self.seed, "starts of the solver"))
        with torch.no_grad():
            w2 = wasserstein2(flow.decode(starts), self.test)
        energy = path_energy(flow, len(self.test), stream(self.seed, "energy")).value
        squared = self.squared
        if flow.preprocess is not None:  # both in the field's space
            squared = wasserstein2(starts, flow.preprocess.inverse(self.test)[0]) ** 2
        few = {}
        if self.seed in self.config["few_step_seeds"]:
            steps = self.config["few_steps"]
            curve = nfe_curve(
                flow, self.test, steps=steps, seed=self.seed,
                distance=lambda x: wasserstein2(x, self.test),
            )  # fmt: skip
            few = {f"euler_{n}": f"{v:.4f}" for n, (_, v) in zip(steps, curve, strict=False)}
        return self.row(
            method, w2, **few,
            npe=f"{abs(energy - squared) / squared:.4f}",
            train_seconds=f"{sum(h.seconds for h in histories):.1f}",
            coupling_seconds=f"{sum(h.preparing + h.pairing for h in histories):.1f}",
        )  # fmt: skip

    def remembered(self, x0, x1, context=None, generator=None) -> Pairing:
        """minibatch-ot, solved once for each step: all methods see the same draws."""
        found = COUPLINGS["minibatch-ot"](x0, x1, context, generator)
        self.pairings.append(found.j.to(torch.int16))
        return found

    def recalled(self) -> "Recalled":
        return Recalled(self.pairings)


@dataclass
class Shrunk:
    """A density divided by a number, as the base of a model of standardized data."""

    density: object
    scale: float
    dim: int = 2

    def sample(self, n, generator=None):
        return self.density.sample(n, generator) / self.scale

    def log_prob(self, x):
        return self.density.log_prob(self.scale * x) + self.dim * math.log(self.scale)


class Recalled:
    """The pairings of an earlier run, step by step."""

    def __init__(self, pairings: list[Tensor]) -> None:
        self.steps = iter(pairings)

    def __call__(self, x0, x1, context=None, generator=None) -> Pairing:
        return Pairing(j=next(self.steps).long())


def results(name: str, seed: int, methods: list[str], config: dict) -> Iterator[dict]:
    """One row for each method, as it is done."""
    task = Task(seed, config, *config["tasks"][name])
    for method in methods:
        if method == FLOOR:
            other = cnf.data.toy(task.target).sample(len(task.test), stream(seed, "other"))
            yield task.row(FLOOR, wasserstein2(other, task.test))
        elif method == REFLOW:
            flow = task.flow()
            first = cnf.fit(flow, cnf.FlowMatching(), task.rows, task.settings())
            again = cnf.training.reflow(flow, task.settings(), n=config["reflow_pairs"])
            yield task.scored(method, flow, first, *again)
        elif method == BEST:
            torch.manual_seed(seed)
            flow = cnf.models.build("cnf", dim=2)
            if task.source is not None:
                base = Shrunk(cnf.data.toy(task.source), task.rows.std().item())
                flow = cnf.Flow(base, flow.transform, flow.preprocess)
            objective = cnf.FlowMatching(**config["best"]["objective"])
            settings = cnf.TrainConfig(**config["best"]["train"], seed=seed)
            yield task.scored(method, flow, cnf.fit(flow, objective, task.rows, settings))
        else:
            options = dict(config["methods"][method])
            score = options["path"] if method.startswith("[SF]") else None
            if options.get("coupling") == "minibatch-ot":
                options["coupling"] = task.recalled() if task.pairings else task.remembered
            flow = task.flow(score)
            yield task.scored(
                method,
                flow,
                cnf.fit(flow, cnf.FlowMatching(**options), task.rows, task.settings()),
            )


def run(name: str, seed: int, methods: list[str], config: dict) -> None:
    torch.set_num_threads(1)
    revision = environment()["revision"]
    for row in results(name, seed, methods, config):
        with PATH.open("a", newline="") as file:  # one short write: processes do not mix
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(
                {**row, "task": name, "revision": revision}
            )
        print(name, row, flush=True)


def rows() -> list[dict[str, str]]:
    return list(csv.DictReader(PATH.open()))


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    known = [FLOOR, *config["methods"], REFLOW, BEST]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="only write the table again")
    parser.add_argument("--methods", nargs="+", default=known, choices=known)
    parser.add_argument("--seeds", nargs="+", type=int, default=config["seeds"])
    chosen = parser.parse_args()
    if not PATH.exists():
        PATH.write_text(",".join(COLUMNS) + "\n")
    done = {(row["task"], int(row["seed"]), row["method"]) for row in rows()}
    todo = []
    for seed in chosen.seeds:
        for task in config["tasks"]:
            missing = [m for m in known if m in chosen.methods and (task, seed, m) not in done]
            if missing and not chosen.table:
                todo.append((task, seed, missing))
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config["processes"], mp_context=spawn) as pool:
        list(pool.map(run, *zip(*todo, strict=True), [config] * len(todo)) if todo else ())
    (HERE / "table.md").write_text(tables(config, rows()) + "\n")


if __name__ == "__main__":
    main()
