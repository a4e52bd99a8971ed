"""How the gap falls with the seconds of training: likelihood and flow matching of one field, NSF.

`python experiments/toy/budgets.py` races the contestants that config.yaml names under `budgets`,
with several seeds, on each density for the shortest budget, then for the next one. It writes
budgets.csv, the table in README.md and pictures/budgets.webp after each race, and does not race
again what budgets.csv holds. Stopped in whatever way, the same command goes on: races lie in
runs/toy-budgets/.
"""

import argparse
import csv
import io
import math
import multiprocessing
import os
import statistics
import threading
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import matplotlib.figure
import torch
import yaml
from matplotlib.axes import Axes

from cnf.plotting.style import FAINT, TRUTH, color_of, styled
from cnf.race import CONTESTANTS, Results, compare
from cnf.training.checkpoint import write_whole

HERE = Path(__file__).parent
RUNS = Path("runs/toy-budgets")
SCORES = ("gap", "gap_error", "nll", "w2", "steps", "train_seconds", "compile_seconds")
MACHINE = ("processor", "threads", "torch", "revision")
COLUMNS = ("data", "budget", "contestant", "seed", *SCORES, *MACHINE)
BEGIN, END = "<!-- from here on by budgets.py -->\n", "<!-- by budgets.py up to here -->"
PICTURE = "![Gap against seconds of training, a panel for each density](pictures/budgets.webp)"
LEAST = 1e-3  # nats, about the standard error of a small gap: the picture ends there
Row = dict[str, str]


@dataclass(frozen=True)
class Plan:
    """What the table and the picture hold, raced or not.

    Attributes:
        densities: Names.
        contestants: Names.
        budgets: Seconds of training, from the least on.
        seeds: One run of each contestant for each.
        folder: Of budgets.csv, README.md and pictures/.
        threads: Of each race.
    """

    densities: list[str]
    contestants: list[str]
    budgets: list[float]
    seeds: list[int]
    folder: Path
    threads: int = 1

    def lacks(self, rows: list[Row], budget: float, density: str) -> bool:
        """Whether some run of a race is not among the rows."""
        found = {(row["contestant"], int(row["seed"])) for row in of(rows, budget, density)}
        return not {(name, seed) for name in self.contestants for seed in self.seeds} <= found


def of(rows: list[Row], budget: float, density: str, contestant: str | None = None) -> list[Row]:
    """The rows of a race, or of a contestant in it."""
    return [
        row for row in rows
        if float(row["budget"]) == budget and row["data"] == density
        and contestant in (None, row["contestant"])
    ]  # fmt: skip


def race_all(plan: Plan, races: list[tuple[float, str]], workers: int) -> list[Row]:
    """Run the races that are not recorded, so many at a time, and record each that ends."""
    rows = recorded(plan.folder)
    record(plan, rows)
    todo = iter([one for one in races if plan.lacks(rows, *one)])
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, die_with_parent) as pool:
        running = {pool.submit(race, plan, *one) for one in islice(todo, workers)}
        while running:  # none waits in the pool, where an interrupt would not stop it
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                found = future.result()
                names = {(row["budget"], row["data"]) for row in found}
                rows = [row for row in rows if (row["budget"], row["data"]) not in names] + found
                record(plan, rows)
            running |= {pool.submit(race, plan, *one) for one in islice(todo, len(ended))}
    return rows


def die_with_parent() -> None:
    """End this process when its parent is killed, so that another can go on with its race."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def race(plan: Plan, budget: float, density: str) -> list[Row]:
    """Race on one density, or go on with it, and return a row for each contestant and seed."""
    torch.set_num_threads(plan.threads)
    results = compare(
        density, plan.contestants, seconds=budget, seeds=plan.seeds,
        folder=RUNS / f"{budget:g}s" / density, resume=True, progress=False,
        say=lambda line: print(f"{budget:g} s, {density}: {line}", flush=True),
    )  # fmt: skip
    return [
        row_of(results, budget, name, seed) for name in plan.contestants for seed in plan.seeds
    ]


def row_of(results: Results, budget: float, contestant: str, seed: int) -> Row:
    """A run's scores; NaN where it failed."""
    found = {(entry.contestant, entry.seed): entry for entry in results.entries}
    entry = found.get((contestant, seed))
    scores = {key: math.nan if entry is None else entry.score(key) for key in SCORES}
    return {
        "data": results.data, "budget": f"{budget:g}", "contestant": contestant,
        "seed": str(seed), **{key: f"{value:.6g}" for key, value in scores.items()},
        **{key: str(results.machine[key]) for key in MACHINE},
    }  # fmt: skip


def recorded(folder: Path) -> list[Row]:
    file = folder / "budgets.csv"
    return list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []


def record(plan: Plan, rows: list[Row]) -> None:
    """Write what is known: the numbers, the picture, and the table in README.md."""
    if not rows:
        return fill_readme(plan.folder / "README.md", [missing(plan, rows)])
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n", restval="nan")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(plan.folder / "budgets.csv", text.getvalue().encode())
    picture(plan, rows, plan.folder / "pictures" / "budgets.webp")
    fill_readme(plan.folder / "README.md", [table(plan, rows), about(plan, rows), PICTURE])


def fill_readme(page: Path, parts: list[str]) -> None:
    """Put paragraphs between the marks of a page, which is begun where there is none."""
    text = "".join(f"\n{part}\n" for part in parts) + "\n"
    before = page.read_text() if page.exists() else f"{BEGIN}{END}\n"
    head, begun, rest = before.partition(BEGIN)
    _, ended, tail = rest.partition(END)
    if not (begun and ended):
        raise SystemExit(
            f"{page} lacks the lines {BEGIN.strip()} and {END}, between which it is filled"
        )
    write_whole(page, f"{head}{BEGIN}{text}{END}{tail}".encode())


def table(plan: Plan, rows: list[Row]) -> str:
    """Gaps by budget, contestant and density, with steps and what was compiled."""
    lines = [
        f"| gap (nats) | budget | steps | compilation | {' | '.join(plan.densities)} |",
        "|---|" + "---:|" * (3 + len(plan.densities)),
    ]
    for budget in plan.budgets:
        for name in plan.contestants:
            own = [row for d in plan.densities for row in of(rows, budget, d, name)]
            cells = (gap_cell(plan, rows, budget, d, name) for d in plan.densities)
            lines.append(
                f"| {CONTESTANTS[name].title} | {budget:g} s | {steps_cell(own)} "
                f"| {compilation_cell(own)} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def gap_cell(plan: Plan, rows: list[Row], budget: float, density: str, contestant: str) -> str:
    """The mean over seeds with its error in units of the last digit; in bold if least."""
    own = of(rows, budget, density, contestant)
    if not own:
        return "not run"
    if failed := sum(not math.isfinite(float(row["gap"])) for row in own):
        return f"{failed} of {len(own)} failed"
    rivals = [of(rows, budget, density, name) for name in plan.contestants]
    least = min(mean_gap(rival) for rival in rivals if rival)
    text = f"{mean_gap(own):.3f}({max(1, round(1e3 * error_of_mean(own)))})"
    return f"**{text}**" if mean_gap(own) == least else text


def mean_gap(rows: list[Row]) -> float:
    """The mean gap of runs that differ in their seed, infinite if one failed; NaN of none."""
    gaps = [float(row["gap"]) for row in rows]
    if not all(map(math.isfinite, gaps)):
        return math.inf
    return statistics.fmean(gaps) if gaps else math.nan


def error_of_mean(rows: list[Row]) -> float:
    """The standard error of `mean_gap`, of seeds and test points, which all seeds share."""
    gaps = [float(row["gap"]) for row in rows]
    seeds = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
    return math.hypot(seeds, max(float(row["gap_error"]) for row in rows))


def steps_cell(rows: list[Row]) -> str:
    """The fewest and the most steps of runs."""
    steps = [float(row["steps"]) for row in rows if math.isfinite(float(row["steps"]))]
    ends = [f"{step:,.0f}" for step in (min(steps, default=0), max(steps, default=0))]
    return "–".join(dict.fromkeys(ends)) if steps else "–"


def compilation_cell(rows: list[Row]) -> str:
    """The median seconds of compilation, and of how many of the runs."""
    seconds = [float(row["compile_seconds"]) for row in rows]
    seconds = [value for value in seconds if value > 0]
    if not seconds:
        return "none" if rows else "–"
    share = "" if len(seconds) == len(rows) else f", {len(seconds)} of {len(rows)} runs"
    return f"{statistics.median(seconds):.0f} s{share}"


def about(plan: Plan, rows: list[Row]) -> str:
    """What the table holds and where it was made, in sentences."""
    revisions: dict[tuple[str, ...], dict[str, None]] = {}
    for row in rows:
        machine = tuple(row[key] for key in MACHINE[:-1])
        revisions.setdefault(machine, {})[row["revision"]] = None
    where = "; ".join(
        f"{threads} thread of {processor} for each run, torch {version}, revision "
        f"{', '.join(found)}"
        for (processor, threads, version), found in revisions.items()
    )
    seeds = ", ".join(map(str, plan.seeds))
    return (
        f"Means over seeds {seeds}; in brackets their standard error, of seeds and test points "
        "together, in units of the last digit; in bold the least of each budget. Steps are the "
        "fewest and the most of a run. Seconds of compilation are medians, which no budget "
        f"counts; none: plain steps. {missing(plan, rows)} {where}."
    )


def missing(plan: Plan, rows: list[Row]) -> str:
    """The races that have not been run, in a sentence."""
    parts = []
    for budget in plan.budgets:
        names = [name for name in plan.densities if plan.lacks(rows, budget, name)]
        every = len(names) == len(plan.densities)
        parts += [f"{budget:g} s on {'all' if every else ', '.join(names)}"] if names else []
    return f"Not run yet: {'; '.join(parts)}." if parts else "All races have been run."


def picture(plan: Plan, rows: list[Row], file: Path) -> None:
    """Gap against seconds of training, a panel for each density."""
    columns = min(4, len(plan.densities))
    lines = -(-len(plan.densities) // columns)
    with styled():
        size = (2.9 * columns, 2.6 * lines + 0.5)
        figure = matplotlib.figure.Figure(size, layout="constrained")
        axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
        for ax in axes.flat[len(plan.densities) :]:
            ax.remove()
        for ax, density in zip(axes.flat, plan.densities, strict=False):
            panel(ax, plan, rows, density)
        for ax in axes[:, 0]:
            ax.set_ylabel("gap (nats)")
        for ax in axes.flat[max(0, len(plan.densities) - columns) : len(plan.densities)]:
            ax.set_xlabel("seconds of training")
        lines, titles = axes.flat[0].get_legend_handles_labels()
        figure.legend(lines, titles, loc="outside lower center", ncols=len(titles))
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=110, pil_kwargs={"quality": 90})


def panel(ax: Axes, plan: Plan, rows: list[Row], density: str) -> None:
    """Means over seeds as lines, the seeds as dots, from the least to the most of them a band."""
    budgets = plan.budgets
    ax.set(xscale="log", yscale="log", title=density, ylim=(LEAST, 3.0))
    ax.set_xlim(budgets[0] / 1.4, budgets[-1] * 1.4)
    ax.set_xticks(budgets, [f"{budget:g}" for budget in budgets])
    ax.set_yticks([1e-3, 1e-2, 1e-1, 1], ["0.001", "0.01", "0.1", "1"])
    ax.minorticks_off()
    ax.grid(True)
    for place, name in enumerate(plan.contestants):
        color = TRUTH if name == "nsf" else color_of(place)  # a landmark
        races = [(b, runs) for b in budgets if (runs := of(rows, b, density, name))]
        races = [(b, runs) for b, runs in races if math.isfinite(mean_gap(runs))]
        gaps = [[max(LEAST, float(row["gap"])) for row in runs] for _, runs in races]
        at = [budget for budget, _ in races]
        ax.plot(
            at, [max(LEAST, mean_gap(runs)) for _, runs in races], color=color, lw=2,
            ls="--" if name == "nsf" else "-", label=CONTESTANTS[name].title,
        )  # fmt: skip
        ax.fill_between(at, [*map(min, gaps)], [*map(max, gaps)], color=color, alpha=0.18, lw=0)
        dots = [(b, gap) for b, seeds in zip(at, gaps, strict=True) for gap in seeds]
        ax.plot(*zip(*dots, strict=True) if dots else ([], []), "o", color=color, ms=3.5)
    ax.text(
        0.97, 0.97, not_drawn(plan, rows, density), transform=ax.transAxes, ha="right", va="top",
        color=FAINT, fontsize=9,
    )  # fmt: skip


def not_drawn(plan: Plan, rows: list[Row], density: str) -> str:
    """What a panel lacks, in words."""
    budgets = plan.budgets
    lacking = [f"{budget:g} s" for budget in budgets if plan.lacks(rows, budget, density)]
    failed = [
        f"{CONTESTANTS[name].title}, {budget:g} s: failed"
        for budget in budgets for name in plan.contestants
        if math.isinf(mean_gap(of(rows, budget, density, name)))
    ]  # fmt: skip
    return "\n".join([*([f"not run: {', '.join(lacking)}"] if lacking else []), *failed])


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    own = config["budgets"]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budgets", type=float, nargs="+", default=own["seconds"])
    parser.add_argument("--toys", nargs="+", default=config["densities"])
    parser.add_argument("--workers", type=int, default=own["workers"], help="races at a time")
    parser.add_argument("--folder", type=Path, default=HERE, help="where the results are written")
    given = parser.parse_args()
    budgets = sorted({*own["seconds"], *given.budgets})
    densities = list(dict.fromkeys([*config["densities"], *given.toys]))
    plan = Plan(
        densities, own["contestants"], budgets, own["seeds"], given.folder, config["threads"]
    )
    races = [(budget, name) for budget in sorted(given.budgets) for name in given.toys]
    plan.folder.mkdir(parents=True, exist_ok=True)
    rows = race_all(plan, races, given.workers)
    print(f"{table(plan, rows)}\n\n{about(plan, rows)}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("Interrupted; the same command goes on.") from None
