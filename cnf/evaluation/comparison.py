"""The race: contestants on one density, same budget, same data stream, same evaluation."""

import csv
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cnf import models
from cnf.data import load
from cnf.dynamics.ode import Solver
from cnf.evaluation import metrics
from cnf.flow import Flow
from cnf.objectives import FlowMatching, MaximumLikelihood, Objective
from cnf.registry import Registry
from cnf.training import History, TrainConfig, checkpoint, fit
from cnf.training.describe import machine
from cnf.training.stream import seeded
from cnf.transforms.continuous import Continuous

TIGHT = Solver("dopri5", rtol=1e-6, atol=1e-6)  # evaluation: solver error far below the gaps
TEST_POINTS = 10_000
FEW_STEPS = (1, 2, 4, 8, 16, 32)

CONTESTANTS = Registry("contestant")


@dataclass(frozen=True)
class Stage:
    """A part of a contestant's training.

    Args:
        objective: What is minimised.
        share: Part of the budget.
        settings: `TrainConfig` fields that this stage sets, such as lr or batch_size.
    """

    objective: Objective
    share: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contestant:
    """A model and the way it is trained.

    Args:
        title: Its name in tables and pictures.
        model: A name in `MODELS`.
        stages: What is done one after the other; the shares sum to one.
        options: The model's options.
    """

    title: str
    model: str
    stages: tuple[Stage, ...]
    options: dict[str, Any] = field(default_factory=dict)


# Cheap, exact-for-what-it-computes gradients; the evaluation's solver is another and tight.
TRAINING_SOLVER = Solver("rk4", steps=8, gradient="backprop")
LIKELIHOOD = MaximumLikelihood(solver=TRAINING_SOLVER)
LIKELIHOOD_SETTINGS = {"batch_size": 256, "lr": 1e-3, "ema": 0.99, "clip": 1.0}
MATCHING_SETTINGS = {"batch_size": 512, "lr": 3e-3}

for _name, _contestant in {
    "cnf-likelihood": Contestant(
        "CNF, likelihood", "cnf", (Stage(LIKELIHOOD, settings=LIKELIHOOD_SETTINGS),)
    ),
    "cnf-flow-matching": Contestant(
        "CNF, flow matching", "cnf", (Stage(FlowMatching(), settings=MATCHING_SETTINGS),)
    ),
    "cnf-both": Contestant(
        "CNF, flow matching then likelihood",
        "cnf",
        (
            Stage(FlowMatching(), 0.7, MATCHING_SETTINGS),
            Stage(LIKELIHOOD, 0.3, LIKELIHOOD_SETTINGS),
        ),
    ),
    "ffjord": Contestant(
        "FFJORD, as published",
        "ffjord",
        (
            Stage(
                MaximumLikelihood(divergence="hutchinson"),
                settings={
                    "batch_size": 100, "lr": 1e-3, "weight_decay": 1e-5, "optimizer": "adamw",
                    "schedule": "constant", "clip": None, "warmup": 0.0,
                },
            ),
        ),
    ),
    "realnvp": Contestant(
        "RealNVP",
        "realnvp",
        (Stage(MaximumLikelihood(), settings={"batch_size": 512, "lr": 2e-3}),),
    ),
}.items():  # fmt: skip
    CONTESTANTS.register(_name)(_contestant)


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
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        return statistics.fmean(values), spread

    def ranking(self) -> list[str]:
        """Contestants, best first by the deciding score; a NaN comes last."""

        def key(name: str) -> tuple[bool, float]:
            value = self.mean(name, self.score)[0]
            return value != value, value

        return sorted(self.contestants, key=key)

    def save(self, folder: Path) -> None:
        """Write results.csv (a row per contestant and seed) and results.json (everything but the
        flows)."""
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


def compare(
    contestants: Sequence[str] | dict[str, Contestant] | None,
    data: Any,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    seeds: Sequence[int] = (0,),
    folder: str | Path | None = None,
    device: str = "auto",
    progress: bool = True,
    w2_points: int = 2_000,
    say: Callable[[str], None] = lambda _: None,
) -> Results:
    """Race contestants on one density and measure them all in the same way.

    Args:
        contestants: Names in `CONTESTANTS`, one's own by name, or None for all that are
            registered.
        data: A density, its name, one's own points, or a file: what `cnf.data.load` takes.
        seconds: Budget of each contestant, in seconds of training.
        steps: Budget of each contestant, in optimiser steps, instead of seconds.
        seeds: One run each.
        folder: Where runs and results are written; nothing is written if None.
        device: As in `TrainConfig`.
        progress: Show progress bars.
        w2_points: Points for the exact W2 (its cost grows with the cube).
        say: Called with a line of text as the race goes on.
    Raises:
        ValueError: An unknown contestant, a budget that is missing or not positive, a folder that
            exists.
    """
    TrainConfig(seconds=seconds, steps=steps)  # refuses a bad budget before anything is made
    if contestants is None or not isinstance(contestants, dict):
        contestants = {name: CONTESTANTS[name] for name in contestants or CONTESTANTS}
    density = load(data)
    folder = None if folder is None else Path(folder)
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"compare: {folder} exists already; choose another folder")
    judge = _Judge(density, w2_points)
    entries = []
    for name, contestant in contestants.items():
        for seed in seeds:
            say(f"{contestant.title}, seed {seed}")
            base = TrainConfig(
                seconds=seconds, steps=steps, seed=seed, device=device, progress=progress,
                folder=folder and folder / "runs" / f"{name}-seed-{seed}",
            )  # fmt: skip
            flow, histories, memory = _train(contestant, judge.train, density.dim, base)
            entries.append(judge.entry(name, contestant, seed, flow, histories, memory))
    results = Results(
        data=density.name, density=density, entries=entries, floor=judge.floor,
        entropy=getattr(density, "entropy", None),
        settings={
            "seconds": seconds, "steps": steps, "seeds": list(seeds), "test_points": len(judge.test),
            "w2_points": w2_points, "evaluation_solver": str(TIGHT),
        },
        machine=machine(),
    )  # fmt: skip
    if folder is not None:
        results.save(folder)
    return results


def _train(
    contestant: Contestant, data: Any, dim: int, base: TrainConfig
) -> tuple[Flow, list[History], float]:
    """The trained flow, each stage's history, and the peak memory of training in MB."""
    with torch.random.fork_rng():
        torch.manual_seed(base.seed)  # contestants with the same field start from the same weights
        flow = models.build(contestant.model, dim=dim, **contestant.options)
    histories, memory = [], 0.0
    for number, stage in enumerate(contestant.stages, 1):
        part = {
            "seconds": base.seconds and base.seconds * stage.share,
            "steps": base.steps and max(1, round(base.steps * stage.share)),
            "folder": base.folder and base.folder / f"stage-{number}",
        }
        with _peak_memory() as peak:
            histories.append(
                fit(flow, stage.objective, data, replace(base, **part, **stage.settings))
            )
        memory = max(memory, peak())
    if base.folder:
        checkpoint.save(flow, base.folder)
    return flow, histories, memory


class _Judge:
    """Measures every flow on the same points."""

    def __init__(self, density: Any, w2_points: int) -> None:
        self.density, self.n = density, w2_points
        self.known = getattr(density, "entropy", None) is not None
        if self.known:
            self.train = density
            self.test, other = (density.sample(TEST_POINTS, seeded(seed, -9)) for seed in (1, 2))
        else:
            order = torch.randperm(len(density.x), generator=seeded(0, -9))
            held_out = max(1, len(order) // 5)
            self.test, rest = density.x[order[:held_out]], density.x[order[held_out:]]
            self.train = other = rest
        self.floor = self._distances(other[: len(self.test)])

    def entry(
        self, name: str, contestant: Contestant, seed: int, flow: Flow,
        histories: list[History], memory: float,
    ) -> Entry:  # fmt: skip
        flow.eval()
        device = next(flow.parameters()).device
        continuous = isinstance(flow.transform, Continuous)
        exact = flow.with_solver(TIGHT) if continuous else flow
        test = self.test.to(device)
        with torch.no_grad():
            drawn = flow.sample((len(test),), generator=seeded(seed, -8))
            scores = {**self._likelihood(exact, test), **self._distances(drawn.cpu())}
            scores |= self._cost(flow, test, histories, memory)
            scores["round_trip"] = metrics.round_trip_error(exact, test[:1000])
            nan = float("nan")
            scores["path_energy"] = metrics.path_energy(flow, 2000).value if continuous else nan
            scores["straightness"] = metrics.straightness(flow, 2000).value if continuous else nan
            few = self._few_steps(flow, seed) if continuous else [(0, scores["sliced_w2"])]
        return Entry(name, contestant.title, seed, scores, self._curve(histories), few, flow)

    def _likelihood(self, flow: Flow, test: Tensor) -> dict[str, float]:
        nll = metrics.nll(flow, test)
        scores = {"nll": nll.value, "nll_error": nll.error}
        if self.known:
            gap = metrics.gap(flow, self.density, test)
            scores = {"gap": gap.value, "gap_error": gap.error, **scores}
        return scores

    def _distances(self, drawn: Tensor) -> dict[str, float]:
        few, some = slice(self.n), slice(5_000)
        draw = seeded(0, -7)
        return {
            "w2": float(metrics.wasserstein2(drawn[few], self.test[few])),
            "sliced_w2": float(metrics.sliced_wasserstein2(drawn, self.test, 500, generator=draw)),
            "mmd": float(metrics.mmd(drawn[some], self.test[some])),
            "energy_distance": float(metrics.energy_distance(drawn[some], self.test[some])),
            "c2st": float(metrics.c2st(self.test, drawn)),
        }

    def _cost(
        self, flow: Flow, test: Tensor, histories: list[History], memory: float
    ) -> dict[str, float]:
        evaluations = metrics.nfe(flow, n=1000, generator=seeded(0, -6))
        steps = sum(history.steps for history in histories)
        seconds = sum(history.seconds for history in histories)
        return {
            "steps": steps,
            "train_seconds": seconds,
            "ms_per_step": 1e3 * seconds / steps,
            "peak_memory_mb": memory,
            "parameters": sum(p.numel() for p in flow.parameters()),
            "nfe_sample": evaluations.sample,
            "nfe_log_prob": evaluations.log_prob,
            "ms_sample": _milliseconds(lambda: flow.sample((len(test),))),
            "ms_log_prob": _milliseconds(lambda: flow.log_prob(test)),
        }

    def _few_steps(self, flow: Flow, seed: int) -> list[tuple[int, float]]:
        solvers = [(steps, Solver("euler", steps=steps)) for steps in FEW_STEPS]
        assert isinstance(flow.transform, Continuous)
        own = metrics.nfe(flow, n=1000, generator=seeded(0, -6)).sample
        points = []
        for evaluations, solver in [*solvers, (own, flow.transform.solver)]:
            drawn = flow.with_solver(solver).sample((len(self.test),), generator=seeded(seed, -8))
            distance = metrics.sliced_wasserstein2(
                drawn.cpu(), self.test, 500, generator=seeded(0, -7)
            )
            points.append((evaluations, float(distance)))
        return points

    def _curve(self, histories: list[History]) -> list[tuple[float, float]]:
        """Held-out gap (NLL for one's own points) against seconds of training, over all stages."""
        truth = 0.0
        if self.known:
            held_out = self.density.sample(TEST_POINTS, seeded(3, -9))
            truth = -float(self.density.log_prob(held_out).mean())
        curve, before = [], 0.0
        for history in histories:
            curve += [
                (before + record["seconds"], record["val_nll"] - truth)
                for record in history.records
                if "val_nll" in record
            ]
            before += history.seconds
        return curve


def _milliseconds(call: Callable[[], Any], repeats: int = 3) -> float:
    def once() -> float:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    once()
    return statistics.median(once() for _ in range(repeats))


@contextmanager
def _peak_memory() -> Iterator[Callable[[], float]]:
    """Peak memory inside, in MB: the GPU's where there is one, else the process's resident set
    (Linux; NaN elsewhere)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield lambda: torch.cuda.max_memory_allocated() / 1e6
        return
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def peak() -> float:
        lines = status.read_text().splitlines() if status.exists() else []
        return next(
            (int(line.split()[1]) / 1e3 for line in lines if line.startswith("VmHWM")),
            float("nan"),
        )

    if reset.exists():
        reset.write_text("5")  # resets VmHWM
    yield peak
