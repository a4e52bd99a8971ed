"""Trajectories of single cells: W1 from a snapshot that is held out, beside what needs no model.

`CNF_DATA=… python experiments/single_cell/run.py` runs what config.yaml says and is not in
results.csv yet, then writes table.md. With `--smoke` it makes a few steps, and keeps nothing.
"""

import csv
import itertools
import statistics
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from snapshots import BASELINES, Gap, gap, snapshots
from torch import Tensor

import cnf
from cnf.random import stream
from cnf.training.origin import environment

HERE = Path(__file__).parent
COLUMNS = ["set", "time", "contestant", "seed", "w1", "cells", "steps", "revision"]


class Case(NamedTuple):
    """A contestant, or a baseline, at one time."""

    set: str
    time: int
    contestant: str
    seed: int


def run(case: Case, cells: list[Tensor], config: dict) -> dict:
    torch.manual_seed(case.seed)
    own = gap(cells, case.time, stream(case.seed, "halves"))
    draws = stream(case.seed, case.contestant)
    if case.contestant in BASELINES:
        x = BASELINES[case.contestant](own, draws)
    else:
        contestant = config["contestants"][case.contestant]
        flow = trained(own, contestant, config, case.seed)
        x = predicted(flow, own, contestant["between"], draws)
    return {
        **case._asdict(), "w1": f"{own.distance(x):.5f}", "cells": len(own.target),
        "steps": config["steps"], "revision": environment()["revision"],
    }  # fmt: skip


def trained(own: Gap, contestant: dict, config: dict, seed: int) -> cnf.Flow:
    """A flow from the snapshot before to the one after, or a density given the time."""
    dim, name = own.target.shape[1], contestant["model"]
    rows = len(own.after) if contestant["between"] else sum(map(len, own.seen.values()))
    settings = cnf.TrainConfig(
        steps=config["steps"], batch_size=min(config["batch_size"], rows), seed=seed,
        validations=0, compile=False, progress=False, device="cpu",
    )  # fmt: skip
    if contestant["between"]:
        model = cnf.models.build(name, dim=dim, preprocess=None)  # points are scaled already
        flow = cnf.Flow(own.before, model.transform)
        cnf.fit(flow, contestant["objective"], own.after, settings)
        return flow
    flow = cnf.models.build(name, dim=dim, context=1)
    times = torch.cat([torch.full((len(x), 1), float(k)) for k, x in own.seen.items()])
    cnf.fit(
        flow, contestant["objective"], torch.cat(list(own.seen.values())), settings, context=times
    )
    return flow


@torch.no_grad()
def predicted(flow: cnf.Flow, own: Gap, between: bool, generator: torch.Generator) -> Tensor:
    """What the flow says of the held-out time, as many points as are compared."""
    count = len(own.target)
    if between:
        z = flow.base.sample((count,), generator)
        return flow.trajectory(z, [0.0, 0.5, 1.0])[1]
    return flow.sample((count,), torch.tensor([float(own.time)]), generator=generator)


def cases(config: dict) -> list[Case]:
    """All of one seed before the next."""
    return [
        Case(name, time, contestant, seed)
        for seed, name in itertools.product(config["seeds"], config["sets"])
        for time in range(1, len(snapshots(name)) - 1)
        for contestant in (*BASELINES, *config["contestants"])
    ]


def table(rows: list[dict], config: dict) -> str:
    """The mean over seeds of each time, with the standard deviation, and the mean over times."""
    names = [*BASELINES, *config["contestants"]]
    lines = [f"| held out | points | {' | '.join(names)} |", f"|---|---:|{'---:|' * len(names)}"]
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    points = {}
    for row in rows:
        place = row["set"], int(row["time"])
        points[place] = row["cells"]
        found.setdefault(place, {}).setdefault(row["contestant"], []).append(float(row["w1"]))
    for place in sorted(found, key=lambda own: (config["sets"].index(own[0]), own[1])):
        told = [spread(found[place].get(name, [])) for name in names]
        lines.append(f"| {place[0]}, t = {place[1]} | {points[place]} | {' | '.join(told)} |")
    means = {
        name: [statistics.fmean(own[name]) for own in found.values() if name in own]
        for name in names
    }
    told = (f"{statistics.fmean(own):.3f}" if own else "–" for own in means.values())
    return "\n".join([*lines, f"| mean | | {' | '.join(told)} |"])


def spread(values: list[float]) -> str:
    """The mean and standard deviation of some seeds."""
    if not values:
        return "–"
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    smoke = "--smoke" in sys.argv
    config |= config["smoke"] if smoke else {}
    folder = Path(tempfile.mkdtemp()) if smoke else HERE
    torch.set_num_threads(1)
    path = folder / "results.csv"
    rows: list[dict] = list(csv.DictReader(path.open())) if path.exists() else []
    done = {(r["set"], r["time"], r["contestant"], r["seed"]) for r in rows}
    sets = {name: snapshots(name) for name in config["sets"]}
    for case in cases(config):
        if tuple(map(str, case)) in done:
            continue
        row = run(case, sets[case.set], config)
        rows.append({name: str(value) for name, value in row.items()})
        print(rows[-1], flush=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    (folder / "table.md").write_text(table(rows, config) + "\n")
    print(table(rows, config))


if __name__ == "__main__":
    main()
