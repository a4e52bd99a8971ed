"""The race over the eight toy densities: results.csv, table.md, and a picture for each density.

`python experiments/toy/run.py` races the contestants of config.yaml on each of its densities that
results.csv lacks, and records a density as soon as its race is over; reports go to runs/toy/.
"""

import csv
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import matplotlib.figure
import torch
import yaml

import cnf
from cnf.plotting import plot_density
from cnf.race import CONTESTANTS, compare
from cnf.race.report import write_report

HERE = Path(__file__).parent
RUNS = Path("runs/toy")
COLUMNS = 6  # of a picture


def race(name: str, config: dict) -> str:
    torch.set_num_threads(config["threads"])
    results = compare(
        name, config["contestants"], seconds=config["seconds"], seeds=[config["seed"]],
        folder=RUNS / name, progress=False,
        say=lambda line: print(f"{name}: {line}", flush=True),
    )  # fmt: skip
    write_report(results, RUNS / name)
    return name


def record(name: str, config: dict) -> None:
    """Put a density's race into results.csv, its picture beside it, and write the table again."""
    machine = json.loads((RUNS / name / "results.json").read_text())["machine"]
    about = {key: machine[key] for key in ("processor", "threads", "torch", "revision")}
    rows = [row for row in recorded() if row["data"] != name]
    rows += [{**row, **about} for row in csv.DictReader((RUNS / name / "results.csv").open())]
    rows.sort(key=lambda row: config["densities"].index(row["data"]))
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with (HERE / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    (HERE / "table.md").write_text(table(config, rows))
    gaps = {row["contestant"]: float(row["gap"]) for row in rows if row["data"] == name}
    picture(name, config["seed"], gaps)


def picture(name: str, seed: int, gaps: dict[str, float]) -> None:
    """The density and what each contestant made of it, on the density's own scale of colors."""
    truth = cnf.data.toy(name)
    peak = float(truth.log_prob(truth.grid()[0]).exp().max())
    things = {f"the density {name}": truth}
    for contestant, gap in gaps.items():
        flow = cnf.load(RUNS / name / "runs" / f"{contestant}-seed-{seed}")
        things[f"{CONTESTANTS[contestant].title}\n{gap:.3f}"] = flow
    rows = -(-len(things) // COLUMNS)
    figure = matplotlib.figure.Figure((1.7 * COLUMNS, 2 * rows), layout="constrained")
    axes = figure.subplots(rows, COLUMNS).ravel()
    for ax in axes:
        ax.set_axis_off()
    for ax, (title, thing) in zip(axes, things.items(), strict=False):
        plot_density(thing, window=truth.support, ax=ax, vmax=peak, resolution=150)
        ax.set_title(title.replace(" then", "\nthen"), fontsize=8)
    (HERE / "pictures").mkdir(exist_ok=True)
    figure.savefig(HERE / "pictures" / f"{name}.webp", dpi=90, pil_kwargs={"quality": 85})


def recorded() -> list[dict[str, str]]:
    file = HERE / "results.csv"
    return list(csv.DictReader(file.open())) if file.exists() else []


def table(config: dict, rows: list[dict[str, str]]) -> str:
    """Gaps by contestant and density, each with its error in units of the last digit."""
    found = {(row["contestant"], row["data"]): row for row in rows}
    densities = [n for n in config["densities"] if any(row["data"] == n for row in rows)]
    lines = [f"| gap (nats) | {' | '.join(densities)} |", "|---|" + "---:|" * len(densities)]
    for name in config["contestants"]:
        cells = []
        for density in densities:
            row = found.get((name, density))
            rivals = [float(r["gap"]) for r in rows if r["data"] == density]
            text = "–" if row is None else f"{float(row['gap']):.3f}({_digit(row['gap_error'])})"
            best = row is not None and float(row["gap"]) == min(rivals)
            cells.append(f"**{text}**" if best else text)
        lines.append(f"| {CONTESTANTS[name].title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n" + _about(config, rows) + "\n"


def _digit(error: str) -> int:
    return max(1, round(1e3 * float(error)))


def _about(config: dict, rows: list[dict[str, str]]) -> str:
    keys = ("threads", "processor", "torch", "revision")
    where = {tuple(row[key] for key in keys): set() for row in rows}
    for row in rows:
        where[tuple(row[key] for key in keys)].add(row["data"])
    machines = "; ".join(
        f"{', '.join(n for n in config['densities'] if n in names)}: {threads} thread of "
        f"{processor}, torch {version}, revision {revision}"
        for (threads, processor, version, revision), names in where.items()
    )
    return f"{config['seconds']} s of training per contestant, seed {config['seed']}. {machines}."


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    known = {row["data"] for row in recorded()}
    todo = [name for name in config["densities"] if name not in known]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config["processes"], mp_context=spawn) as pool:
        for future in as_completed([pool.submit(race, name, config) for name in todo]):
            record(future.result(), config)
    print((HERE / "table.md").read_text())


if __name__ == "__main__":
    main()
