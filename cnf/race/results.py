"""What a race gives: entries, their scores over seeds, and the files that hold them."""

import csv
import json
import math
import statistics
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from cnf.errors import UnknownNameError
from cnf.flow import Flow
from cnf.metrics import METRICS, Estimate, Metric, Score
from cnf.plotting.style import color_of
from cnf.race.runs import Share

DECIDING = ("gap", "nll")  # one of them ranks, and all of them come first
FEW = 4  # steps at which the quality of samples in few steps is judged
# What is shown beside what METRICS measures.
TRAINING = (
    Score(
        "few_steps", "Sliced W2, few", f"With {FEW} steps of Euler or of a flow map, or one pass",
        note=f"{FEW} steps", contest="samples in few steps",
    ),
    Score("steps", "Steps", "Optimizer steps", note="count", lower=None, terminal="steps"),
    Score("train_seconds", "Training", "Seconds of training steps", "s", lower=None),
    Score(
        "compile_seconds", "Compilation",
        "Seconds before training, outside of the budget; a dash: steps are not compiled", "s",
        lower=None,
    ),
    Score(
        "steps_per_second", "Pace", "Training steps per second", "steps/s", lower=False,
        contest="speed of training", margin=0.1,
        cost="trains at a {} slower pace in steps per second than {}",
    ),
    Score(
        "peak_memory_mb", "Memory", "Of the GPU, else of the whole process", "MB", "peak",
        contest="memory in training", margin=0.05,
    ),
)  # fmt: skip


def race_metrics() -> list[Metric]:
    """What a race measures of every flow, in the order of its tables."""
    return sorted(METRICS.values(), key=lambda metric: metric.score.key not in DECIDING)


def distinct(titles: dict[str, str]) -> dict[str, str]:
    """The titles by name, with the name behind each that another has too."""
    every = list(titles.values())
    return {
        name: f"{title} ({name})" if every.count(title) > 1 else title
        for name, title in titles.items()
    }


def by_share(shares: dict[str, list[Share]]) -> dict[str, list[str]]:
    """The shares of the machine in words, and which runs had each; unknown ones are left out."""
    found: dict[str, list[str]] = {}
    for title, parts in shares.items():
        if parts:
            found.setdefault(", then ".join(map(str, parts)), []).append(title)
    return found


def shortened(titles: list[str]) -> str:
    """The first few of these runs, and how many more there are."""
    more = f" and {len(titles) - 4} more" if len(titles) > 5 else ""
    return " / ".join(titles[:4] if more else titles) + more


@dataclass
class Entry:
    """One contestant's run with one seed.

    Attributes:
        contestant: Its name in `CONTESTANTS`, or the one given.
        title: Its title.
        seed: The seed.
        scores: Key of a metric → number; NaN where it does not apply.
        curve: (seconds of training, gap or held-out NLL in nats), as training went on.
        few_steps: (evaluations of the field, sliced W2 of samples), from one step, of Euler's
            method or of a flow map, to the flow's own solver.
        flow: The trained flow.
        log_prob: log q at the test points, which are the same for all; empty where these have
            weights.
        shares: What its training had of the machine: one share, or several, in their order, where
            it was stopped and went on with another; none where that is unknown.
    """

    contestant: str
    title: str
    seed: int
    scores: dict[str, float]
    curve: list[tuple[float, float]]
    few_steps: list[tuple[int, float]]
    flow: Flow
    log_prob: list[float] = field(default_factory=list, repr=False)
    shares: list[Share] = field(default_factory=list)

    def score(self, key: str) -> float:
        """A score, measured or derived from others; NaN where there is none.

        Args:
            key: A key of `scores`; "few_steps", the sliced W2 in 4 steps (in its one pass,
                for a flow that solves no ODE); or "steps_per_second".
        """
        if key == "few_steps":
            curve = dict(self.few_steps)
            return curve.get(FEW, curve.get(0, math.nan))
        if key == "steps_per_second":
            pace = self.score("ms_per_step")
            return 1e3 / pace if pace > 0 else math.nan
        return self.scores.get(key, math.nan)


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

    def __repr__(self) -> str:
        from cnf.race.tables import as_text

        try:
            return as_text(self)
        except ImportError:  # of rich: a repr must not fail
            return f"Results({self.data!r}, {', '.join(self.contestants)})"

    @property
    def contestants(self) -> list[str]:
        """Names in the order in which they ran."""
        return list(dict.fromkeys(entry.contestant for entry in self.entries))

    @property
    def titles(self) -> dict[str, str]:
        """Contestant → its title, and its name where another has the same title."""
        return distinct({name: self.of(name)[0].title for name in self.contestants})

    @property
    def colors(self) -> dict[str, str]:
        """Contestant → its color, the same in every picture and on the page."""
        return {name: color_of(place) for place, name in enumerate(self.contestants)}

    @property
    def flows(self) -> dict[str, Flow]:
        """Title → the flow of the first seed, in the order in which they ran."""
        return {title: self.of(name)[0].flow for name, title in self.titles.items()}

    @property
    def score(self) -> str:
        """The score that decides: the gap to a known density, else the NLL."""
        return "nll" if self.entropy is None else "gap"

    @property
    def score_name(self) -> str:
        """The score that decides, in words."""
        return "NLL" if self.score == "nll" else "gap"

    @property
    def columns(self) -> list[Score]:
        """The scores for which somebody has a number, and the deciding one, in order."""
        memory = 0.05 if self.machine.get("gpu") else 0.25  # of a process: torch and leftovers too
        counts = {
            "test_points": f"{self.settings.get('test_points', 10_000):,}",
            "w2_points": f"{self.settings.get('w2_points', 2_000):,}",
        }
        return [
            replace(
                score,
                note=score.note.format(**counts),
                margin=memory if score.key == "peak_memory_mb" else score.margin,
            )
            for score in [*(metric.score for metric in race_metrics()), *TRAINING]
            if score.key == self.score
            or not all(math.isnan(entry.score(score.key)) for entry in self.entries)
        ]

    def of(self, contestant: str) -> list[Entry]:
        """A contestant's entries, one per seed."""
        if contestant not in self.contestants:
            raise UnknownNameError("contestant", contestant, self.contestants)
        return [entry for entry in self.entries if entry.contestant == contestant]

    def mean(self, contestant: str, key: str) -> Estimate:
        """A score's mean over seeds, and what stands behind its ±.

        That is the standard deviation over seeds or the standard error over test points,
        whichever is larger; NaN where there is neither. A score that is not finite for one seed
        is the mean.

        Args:
            contestant: Its name.
            key: As in `Entry.score`.
        """
        entries = self.of(contestant)
        values = [entry.score(key) for entry in entries]
        for value in values:
            if not math.isfinite(value):
                return Estimate(value, math.nan)
        errors = [entry.score(f"{key}_error") for entry in entries]
        errors += [statistics.stdev(values)] if len(values) > 1 else []
        return Estimate(
            statistics.fmean(values), max(filter(math.isfinite, errors), default=math.nan)
        )

    def standard_error(self, contestant: str, key: str) -> float:
        """The standard error of the mean over seeds, from seeds and test points together.

        All seeds see the same test points, so that more seeds do not shrink the error over points.

        Args:
            contestant: Its name.
            key: As in `Entry.score`.
        """
        entries = self.of(contestant)
        values = [entry.score(key) for entry in entries]
        errors = [entry.score(f"{key}_error") for entry in entries]
        points = max(filter(math.isfinite, errors), default=0.0)
        seeds = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
        return math.hypot(points, seeds)

    def paired_difference(self, one: str, other: str) -> Estimate | None:
        """The mean of log q of `other` less log q of `one` over the same test points, in nats.

        That is the gap or the NLL of `one` less that of `other`. Points that are hard for both
        cancel, so that its standard error, from points and seeds together, may be far smaller than
        that of either score. None where the log-densities were not kept or are not finite.

        Args:
            one: A contestant.
            other: Another.
        """
        kept = [[entry.log_prob for entry in self.of(name)] for name in (one, other)]
        sizes = {len(row) for rows in kept for row in rows}
        if len(sizes) > 1 or min(sizes) < 2:
            return None
        a, b = (torch.tensor(rows, dtype=torch.float64) for rows in kept)  # (seeds, points)
        rows = b.mean(0) - a.mean(0)
        if not rows.isfinite().all():
            return None
        seeds = [x.mean(1).var() / len(x) for x in (a, b) if len(x) > 1]
        return Estimate(rows.mean().item(), math.sqrt(rows.var() / len(rows) + sum(seeds)))

    def shares(self) -> dict[str, list[str]]:
        """What training had of the machine, in words → contestants and seeds that had it."""
        titles = self.titles
        return by_share({f"{titles[e.contestant]}, seed {e.seed}": e.shares for e in self.entries})

    def ranking(self) -> list[str]:
        """Contestants, best first by the deciding score; those without a finite one come last."""
        failed = self.failed()
        finite = [name for name in self.contestants if name not in failed]
        return sorted(finite, key=lambda name: self.mean(name, self.score).value) + failed

    def failed(self) -> list[str]:
        """Contestants whose deciding score is not finite for some seed."""
        return [
            name
            for name in self.contestants
            if not math.isfinite(self.mean(name, self.score).value)
        ]

    def score_text(self, contestant: str) -> str:
        """The deciding score in words, such as "gap 0.012 ± 0.003 nats"."""
        score = self.mean(contestant, self.score)
        return f"{self.score_name} {score} nats" if math.isfinite(score.value) else "failed"

    def save(self, folder: Path) -> None:
        """Write results.csv (a row per contestant and seed) and results.json (no flows).

        The last two columns say how many runs trained at a time, and with how many threads each.

        A cell is empty where an entry has no such score, as one of an earlier version's race.
        """
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "results.csv").open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            names = list(dict.fromkeys(name for entry in self.entries for name in entry.scores))
            writer.writerow(["data", "contestant", "seed", *names, *Share._fields])
            for entry in self.entries:
                found = entry.scores
                numbers = (f"{found[name]:.6g}" if name in found else "" for name in names)
                shares = (
                    ", then ".join(map(str, part)) for part in zip(*entry.shares, strict=True)
                )
                shares = list(shares) or ["", ""]
                writer.writerow([self.data, entry.contestant, entry.seed, *numbers, *shares])
        left_out = ("flow", "log_prob")  # beside the runs
        entries = [
            {k: v for k, v in vars(entry).items() if k not in left_out} for entry in self.entries
        ]
        whole = {k: v for k, v in vars(self).items() if k not in ("density", "entries")}
        text = json.dumps({**whole, "entries": entries}, indent=1, default=str)
        (folder / "results.json").write_text(text + "\n")
