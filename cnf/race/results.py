"""What a race gives: entries, their scores over seeds, and the files that hold them."""

import csv
import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnf.flow import Flow
from cnf.plotting.style import DASHES, PALETTE, number


@dataclass
class Entry:
    """One contestant's run with one seed.

    Attributes:
        contestant: Its name in `CONTESTANTS`, or the one given.
        title: Its title.
        seed: The seed.
        scores: Metric → number; NaN where it does not apply.
        curve: (seconds of training, gap or held-out NLL in nats), as training went on.
        few_steps: (evaluations of the field, sliced W2 of samples), from one Euler step to the
            adaptive solver.
        flow: The trained flow.
    """

    contestant: str
    title: str
    seed: int
    scores: dict[str, float]
    curve: list[tuple[float, float]]
    few_steps: list[tuple[int, float]]
    flow: Flow


@dataclass
class Results:
    """What `compare` returns.

    Attributes:
        data: Name of the density or file.
        density: The density or points themselves.
        entries: One per contestant and seed.
        floor: W2, sliced W2, … between two independent sets of true samples: what a perfect model
            scores.
        entropy: Of the density, in nats; None for one's own points.
        settings: Budget, seeds, evaluation.
        machine: Versions, processor, threads, revision.
    """

    data: str
    density: Any
    entries: list[Entry]
    floor: dict[str, float]
    entropy: float | None
    settings: dict[str, Any]
    machine: dict[str, Any]

    @property
    def contestants(self) -> list[str]:
        """Names in the order in which they ran."""
        return list(dict.fromkeys(entry.contestant for entry in self.entries))

    @property
    def score(self) -> str:
        """The score that decides: the gap to a known density, else the NLL."""
        return "nll" if self.entropy is None else "gap"

    def of(self, contestant: str) -> list[Entry]:
        """A contestant's entries, one per seed."""
        return [entry for entry in self.entries if entry.contestant == contestant]

    def mean(self, contestant: str, metric: str) -> tuple[float, float]:
        """Mean over seeds, and their standard deviation (NaN with one seed)."""
        values = [entry.scores[metric] for entry in self.of(contestant)]
        if len(values) < 2 or not all(map(math.isfinite, values)):
            return sum(values) / len(values), math.nan
        return statistics.fmean(values), statistics.stdev(values)

    def ranking(self) -> list[str]:
        """Contestants, best first by the deciding score; a NaN comes last."""

        def key(name: str) -> tuple[bool, float]:
            value = self.mean(name, self.score)[0]
            return value != value, value

        return sorted(self.contestants, key=key)

    def save(self, folder: Path) -> None:
        """Write results.csv (a row per contestant and seed) and results.json (no flows)."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "results.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            names = list(self.entries[0].scores)
            writer.writerow(["data", "contestant", "seed", *names])
            for entry in self.entries:
                numbers = (f"{entry.scores[name]:.6g}" for name in names)
                writer.writerow([self.data, entry.contestant, entry.seed, *numbers])
        entries = [
            {k: v for k, v in vars(entry).items() if k not in ("flow",)} for entry in self.entries
        ]
        whole = {k: v for k, v in vars(self).items() if k not in ("density", "entries")}
        text = json.dumps({**whole, "entries": entries}, indent=1, default=str)
        (folder / "results.json").write_text(text + "\n")


def colors(results: Results) -> dict[str, str]:
    """Contestant → its color, the same in every picture and in the page."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(results.contestants)}


def dashes(results: Results) -> dict[str, Any]:
    """Contestant → line style; solid until the colors repeat."""
    names = results.contestants
    return {name: DASHES[i // len(PALETTE) % len(DASHES)] for i, name in enumerate(names)}


def titles(results: Results) -> dict[str, str]:
    """Contestant → its title."""
    return {name: results.of(name)[0].title for name in results.contestants}


def mean_and_error(results: Results, contestant: str, metric: str) -> tuple[float, float]:
    """A score's mean over seeds and what stands behind its ±: the standard deviation over seeds or
    the standard error over test points, whichever is larger; NaN where there is neither."""
    entries = results.of(contestant)
    values = [entry.scores.get(metric, math.nan) for entry in entries]
    errors = [entry.scores.get(f"{metric}_error", math.nan) for entry in entries]
    if not all(map(math.isfinite, values)):
        bad = next(value for value in values if not math.isfinite(value))
        return bad, math.nan
    known = [*errors, statistics.stdev(values) if len(values) > 1 else math.nan]
    return statistics.fmean(values), max(filter(math.isfinite, known), default=math.nan)


def score_text(results: Results, contestant: str) -> str:
    """The deciding score in words: "gap 0.012 ± 0.003 nats"."""
    value, error = mean_and_error(results, contestant, results.score)
    name = "gap" if results.score == "gap" else "NLL"
    return f"{name} {number(value, error)} nats" if math.isfinite(value) else "failed"
