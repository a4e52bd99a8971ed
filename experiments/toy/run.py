"""The race over the eight toy densities: results.csv, the table of README.md, and one picture.

`python experiments/toy/run.py` runs what config.yaml says; each density's own report goes to
runs/toy/. `--table` only writes the table and the picture again from what is there.
"""

import argparse
import csv
import json
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import yaml

from cnf.evaluation import CONTESTANTS, compare
from cnf.evaluation.report import write_report

HERE = Path(__file__).parent
RUNS = Path("runs/toy")


def race(config: dict) -> None:
    todo = [n for n in config["densities"] if not (RUNS / n / "results.csv").exists()]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config["processes"], mp_context=spawn) as pool:
        list(pool.map(race_on, todo, [config] * len(todo)))


def race_on(name: str, config: dict) -> None:
    torch.set_num_threads(config["threads"])
    results = compare(
        config["contestants"], name, seconds=config["seconds"], seeds=config["seeds"],
        folder=RUNS / name, progress=False,
        say=lambda line: print(f"{name}: {line}", flush=True),
    )  # fmt: skip
    write_report(results, RUNS / name)


def rows(config: dict) -> list[dict[str, str]]:
    found = []
    for name in config["densities"]:
        path = RUNS / name / "results.csv"
        if path.exists():
            found += list(csv.DictReader(path.open()))
    return found


def table(config: dict, found: list[dict[str, str]]) -> str:
    titles = [CONTESTANTS[name].title for name in config["contestants"]]
    lines = ["| gap (nats) | " + " | ".join(titles) + " |", "|---|" + "---:|" * len(titles)]
    for name in config["densities"]:
        cells = []
        for contestant in config["contestants"]:
            mine = [r for r in found if (r["data"], r["contestant"]) == (name, contestant)]
            cells.append(
                cell([float(r["gap"]) for r in mine], [float(r["gap_error"]) for r in mine])
            )
        best = min(range(len(cells)), key=lambda k: cells[k][0])
        shown = [f"**{text}**" if k == best else text for k, (_, text) in enumerate(cells)]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def cell(gaps: list[float], errors: list[float]) -> tuple[float, str]:
    if not gaps:
        return float("inf"), "–"
    mean = statistics.fmean(gaps)
    error = statistics.stdev(gaps) if len(gaps) > 1 else errors[0]
    return mean, f"{mean:.3f} ± {error:.3f}"


def picture(config: dict) -> None:
    """Every density above what the best contestant learned, on the density's own scale."""
    import matplotlib.figure

    from cnf import load
    from cnf.data import toy
    from cnf.evaluation.plotting import plot_density

    names = config["densities"]
    figure = matplotlib.figure.Figure(figsize=(2 * len(names), 4.4), layout="constrained")
    axes = figure.subplots(2, len(names))
    for column, name in enumerate(names):
        found = list(csv.DictReader((RUNS / name / "results.csv").open()))
        best = min(found, key=lambda r: float(r["gap"]))
        flow = load(RUNS / name / "runs" / f"{best['contestant']}-seed-{best['seed']}")
        truth = toy(name)
        peak = float(truth.log_prob(truth.grid()[0]).exp().max())
        for row, thing in enumerate((truth, flow)):
            plot_density(thing, window=truth.support, ax=axes[row, column], vmax=peak)
        axes[0, column].set_title(name)
        axes[1, column].set_title(
            f"{best['contestant']}\ngap {float(best['gap']):.3f}", fontsize=9
        )
    figure.savefig(HERE / "densities.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="only write table and picture again")
    only_table = parser.parse_args().table
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    if not only_table:
        race(config)
    found = rows(config)
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    machine = json.loads((RUNS / found[0]["data"] / "results.json").read_text())["machine"]
    about = (
        f"{config['seconds']} s of training per contestant, seeds {config['seeds']}, "
        f"{machine['threads']} thread of {machine['processor']} each, "
        f"{config['processes']} densities at a time, torch {machine['torch']}, "
        f"revision {machine['revision']}."
    )
    (HERE / "table.md").write_text(table(config, found) + "\n\n" + about + "\n")
    picture(config)
    print(table(config, found))


if __name__ == "__main__":
    main()
