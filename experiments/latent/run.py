"""Latent structure on MNIST: round trip, interpolation, arithmetic of thickness and slant.

`python experiments/latent/run.py` trains and asks what config.yaml says and results.csv lacks, one
space after the other, then writes table.md and pictures/. `--config` names another file, whose
results lie beside it. Set `CNF_DATA` to the folder that holds `mnist/`.
"""

import argparse
import csv
import itertools
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pictures as drawn
import torch
import yaml
from questions import arithmetic, interpolation, round_trip
from spaces import Judge, Pictures, Space, pictures, space_of

from cnf.metrics import Estimate
from cnf.training.origin import environment

HERE = Path(__file__).parent
RUNS = HERE.parent.parent / "runs"
OPERATIONS = "operations"  # of scipy on pictures, which have no codes
COLUMNS = ["space", "seed", "question", "of", "at", "number", "value", "revision"]
Value = Callable[..., str]


def folder(path: Path) -> Path:
    """Where the flows of a configuration lie."""
    return RUNS / ("latent" if path.parent == HERE else f"latent-{path.parent.name}")


def space(config: dict, name: str, data: Pictures, seed: int, flows: Path) -> tuple[Space, dict]:
    told = config["spaces"][name]
    file = re.sub(r"[^a-z0-9]+", "-", f"{told.get('weights', name)} {seed}".lower())
    return space_of(told, data.train, seed, config, flows / file)


def asked(
    config: dict, name: str, data: Pictures, judge: Judge, seed: int, flows: Path
) -> list[dict[str, Any]]:
    """The answers of one space and seed, rows of results.csv."""
    if name == OPERATIONS:
        found = list(arithmetic(None, data, judge, seed, config))
        return [{"space": name, "seed": seed, **answer._asdict()} for answer in found]
    began = time.process_time()
    made, took = space(config, name, data, seed, flows)
    took["core_seconds"] = time.process_time() - began
    rows = [
        {"question": "training", "of": "", "at": "", "number": number, "value": value}
        for number, value in took.items()
    ]
    for question in (round_trip, interpolation, arithmetic):
        rows += [answer._asdict() for answer in question(made, data, judge, seed, config)]
    rows.append({
        "question": "judge", "of": "", "at": "", "number": "accuracy",
        "value": judge.model.score(judge.rows(data.test.x), data.test.labels),
    })  # fmt: skip
    return [{"space": name, "seed": seed, **row} for row in rows]


TABLES: dict[str, list[tuple[str, str, str, tuple[float | str, ...], str]]] = {
    "Round trip": [
        ("largest error of a picture: median", "round trip", "pictures", ("",), "median"),
        ("worst", "round trip", "pictures", ("",), "max"),
        ("RMS of a pixel", "round trip", "pictures", ("",), "rms"),
        ("of real numbers: median", "round trip", "numbers", ("",), "median"),
        ("worst", "round trip", "numbers", ("",), "max"),
        ("tight solver: median", "round trip", "numbers, tight", ("",), "median"),
        ("worst", "round trip", "numbers, tight", ("",), "max"),
        ("RMS of code", "round trip", "codes", ("",), "norm"),
        ("share of noise", "round trip", "codes", ("",), "noise"),
        ("bits/dim", "round trip", "codes", ("",), "bits"),
        ("core seconds", "training", "", ("",), "core_seconds"),
    ],
    "{way}": [
        ("digit kept", "interpolation", "{way}", (0.25, 0.5, 0.75), "kept"),
        ("one of two digits", "interpolation", "{way}", (0.25, 0.5, 0.75), "either"),
        ("entropy, halfway", "interpolation", "{way}", (0.5,), "entropy"),
        ("told from pictures, halfway", "interpolation", "{way}", (0.5,), "auc"),
        ("length of codes, halfway", "interpolation", "{way}", (0.5,), "norm"),
        ("bits/dim, halfway", "interpolation", "{way}", (0.5,), "bits"),
    ],
    "{attribute}": [
        ("R² of readout", "arithmetic", "{attribute}", ("",), "r2"),
        ("gain", "arithmetic", "{attribute}", ("",), "gain"),
        ("step", "arithmetic", "{attribute}", ("",), "step"),
        ("change at −1.5", "arithmetic", "{attribute}", (-1.5,), "change"),
        ("at 0", "arithmetic", "{attribute}", (0.0,), "change"),
        ("at 1.5", "arithmetic", "{attribute}", (1.5,), "change"),
        ("error at ±0.75", "arithmetic", "{attribute}", (-0.75, 0.75), "error"),
        ("at ±1.5", "arithmetic", "{attribute}", (-1.5, 1.5), "error"),
        ("digit kept at ±0.75", "arithmetic", "{attribute}", (-0.75, 0.75), "kept"),
        ("at ±1.5", "arithmetic", "{attribute}", (-1.5, 1.5), "kept"),
        ("right way at ±1.5", "arithmetic", "{attribute}", (-1.5, 1.5), "right"),
        ("other attribute at ±1.5", "arithmetic", "{attribute}", (-1.5, 1.5), "other"),
    ],
}
KINDS = {"{way}": ("ends", "linear", "arc"), "{attribute}": ("thickness", "slant")}


def tables(rows: list[dict[str, str]], config: dict) -> str:
    """Means over seeds with their standard errors, of a worst the worst; a row for each space."""
    by: dict[tuple[str, ...], dict[str, float]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("space", "question", "of", "at", "number"))
        by.setdefault(key, {})[row["seed"]] = float(row["value"])

    def cell(name: str, question: str, of: str, at: tuple, number: str) -> str:
        found = [by.get((name, question, of, str(each), number), {}) for each in at]
        seeds = [seed for seed in found[0] if all(seed in each for each in found)]
        means = [sum(each[seed] for each in found) / len(found) for seed in seeds]
        if number == "max":
            return str(Estimate(max(means), math.nan)) if means else "–"
        return str(Estimate.of(torch.tensor(means))) if means else "–"

    parts = []
    for title, columns in TABLES.items():
        for kind in KINDS.get(title, ("",)):
            own = [(head, q, kind if "{" in of else of, at, n) for head, q, of, at, n in columns]
            if kind == "ends":
                own = [(h.replace(", halfway", ""), q, of, (0.0,), n) for h, q, of, _, n in own]
            lines = [
                "| " + " | ".join([kind or title, *(head for head, *_ in own)]) + " |",
                "|---" + "|---:" * len(own) + "|",
            ]
            for name in [*config["spaces"], OPERATIONS]:
                cells = [cell(name, *rest) for _, *rest in own]
                if set(cells) - {"–"}:
                    lines.append("| " + " | ".join([name, *cells]) + " |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of results.csv, if there is one."""
    return list(csv.DictReader(path.open())) if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--spaces", nargs="*", help="some of them, and no table")
    arguments = parser.parse_args()
    path = arguments.config.resolve()
    config, results = yaml.safe_load(path.read_text()), path.parent / "results.csv"
    torch.set_num_threads(1)
    done = {(row["space"], row["seed"]) for row in read(results)}
    revision, data, flows = environment()["revision"], pictures(config), folder(path)
    judge = Judge(data.judge, config["judge"]["options"])
    names = arguments.spaces or [*config["spaces"], OPERATIONS]
    for seed, name in itertools.product(config["seeds"], names):
        if (name, str(seed)) in done:
            continue
        began = time.process_time()
        rows = asked(config, name, data, judge, seed, flows)
        with results.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            if file.tell() == 0:
                writer.writeheader()
            for row in rows:
                writer.writerow({**row, "value": f"{row['value']:.6g}", "revision": revision})
        print(f"{name}, seed {seed}: {time.process_time() - began:.0f} core seconds", flush=True)
    if arguments.spaces:
        return
    rows = read(results)
    (path.parent / "table.md").write_text(tables(rows, config) + "\n")
    seed = config["seeds"][0]
    spaces = {name: space(config, name, data, seed, flows)[0] for name in config["spaces"]}
    gains = {
        (row["space"], row["of"]): float(row["value"])
        for row in rows
        if row["number"] == "gain" and row["seed"] == str(seed)
    }
    drawn.draw(spaces, gains, data, seed, config, path.parent / "pictures")
    print(tables(rows, config))


if __name__ == "__main__":
    main()
