"""The race: contestants on one density, same budget, same data stream, same evaluation."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch.distributions import Distribution

from cnf.data import Images, Points, load
from cnf.distributions import Base
from cnf.errors import CheckpointError, expect_counts, warn
from cnf.flow import Flow
from cnf.objectives import Batch
from cnf.race.contestants import RACE_OF_PICTURES, Contestant, entrants
from cnf.race.judge import TIGHT, Judge, draw_test_points
from cnf.race.results import Entry, Results, by_share, distinct, shortened
from cnf.race.runs import Run, Share, Trained, build, shares_with
from cnf.race.workers import (
    Outcome,
    Say,
    expected_threads,
    one_after_the_other,
    several_at_a_time,
)
from cnf.random import VERSION, stream
from cnf.training import History, TrainConfig, checkpoint
from cnf.training.origin import draws_of, environment, hash_of_rows
from cnf.training.progress import status
from cnf.training.stream import DistributionData, validation_draws
from cnf.transforms.continuous import has_discrete_steps

TEST_POINTS = 10_000
TEST_PICTURES = 1_000
VALIDATION_POINTS = 4_000
ENTRY, RACE = "entry.json", "race.json"  # of a run that has ended, and of one that has begun


def compare(
    data: Any,
    contestants: Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    seconds: float | None = None,
    steps: int | None = None,
    seeds: Sequence[int] = (0,),
    folder: str | Path | None = None,
    device: str = "auto",
    progress: bool = True,
    test_points: int = TEST_POINTS,
    w2_points: int = 2_000,
    patience: int | None = None,
    workers: int = 1,
    resume: bool = False,
    say: Say = lambda _: None,
) -> Results:
    """Race contestants on one density and measure them all in the same way.

    Args:
        data: A density, its name, one's own points (an array or a table), or a file: what
            `cnf.data.load` takes; or a torch distribution, a base or a flow of vectors.
        contestants: Names in `CONTESTANTS`, or one's own: `["nsf", ("Mine", flow,
            cnf.FlowMatching())]`; those of `RACE` if None, of `RACE_OF_PICTURES` on pictures. See
            `entrants`.
        seconds: Budget of each contestant, in seconds of training.
        steps: Budget of each contestant, in optimizer steps, instead of seconds.
        seeds: One run each.
        folder: Where runs and results are written; nothing is written if None.
        device: As in `TrainConfig`.
        progress: Show progress bars.
        test_points: Points of a density that scores are taken on; of one's own points a fifth is,
            of pictures 1,000 of those that are held out.
        w2_points: Points for the exact W2 (its cost grows with the cube).
        patience: As in `TrainConfig`, of eight validations in each stage: contestants stop before
            they overfit, and keep their best weights. None for the whole budget.
        workers: Runs that train at a time, each in a process of its own, by joblib, or on the
            cluster that `joblib.parallel_config` names; scores are taken when all are trained.
            Each has cores // workers threads. With as many threads, a budget in steps gives the
            numbers of one worker; one in seconds takes a core, or a GPU, for each worker.
        resume: Go on with the race in `folder`: who has finished is not raced again. With a budget
            in seconds it takes as many workers and threads as before to be fair, and a warning
            says where they differ.
        say: Called with a line of text as the race goes on.

    Raises:
        ValueError: An unknown contestant, a budget that is missing or not positive, a folder that
            exists, or that holds another race; every contestant failed.
        ChildProcessError: A worker died.
    """
    expect_counts("compare", workers=workers)
    folder = _folder(folder, resume)
    base = TrainConfig(  # refuses a bad budget before anything is made
        seconds=seconds, steps=steps, device=device, progress=progress, validations=8,
        validation_rows=VALIDATION_POINTS, patience=patience,
    )  # fmt: skip
    seeds, density = _listed(seeds), _source(data)
    default = RACE_OF_PICTURES if isinstance(density, Images) else None
    contestants = entrants(default if contestants is None else contestants)
    judge, train = _prepared(density, test_points, w2_points)
    settings = {"seconds": seconds, "steps": steps, "w2_points": w2_points, "patience": patience}
    settings["test_points"] = len(judge.test.x)
    rows = {"rows": _fingerprint(density), "random streams": VERSION}
    race = {"data": density.name, **settings, **rows}
    titles = distinct({name: contestant.title for name, contestant in contestants.items()})
    unfit = _unfit(contestants, density)
    failed = {titles[name]: reason for name, reason in unfit.items()}
    fitting = {name: one for name, one in contestants.items() if name not in unfit}
    made_of = {name: {**race, "contestant": one.made_of} for name, one in fitting.items()}
    runs = _planned(fitting, titles, seeds, replace(base, folder=folder), workers)
    entries = {run.title: _finished(run, made_of[run.name], density) for run in runs}
    left = _begun(runs, entries, made_of, say)
    warned = seconds is not None and _warn_of_shares(_expected_shares(left, entries))
    for run, outcome in _outcomes(left, train, folder, progress, say):
        try:
            trained = outcome()
            entries[run.title] = entry = _entry(run, trained, judge, density)
        except Exception as error:  # it must not cost the others their race
            failed[run.title] = str(error) or type(error).__name__
            say(f"{run.title} failed: {failed[run.title]}")
            continue
        if run.config.folder:
            _keep(run.config.folder, entry, made_of[run.name])
    ranked = _ranked(entries, failed)
    settings |= {**_workers_and_threads(ranked), "seeds": seeds, "failed": failed}
    results = _results(density, judge, ranked, settings)
    if seconds is not None and not warned:  # a cluster's threads were not known before
        _warn_of_shares(results.shares())
    if folder:
        results.save(folder)
    return results


def _ranked(entries: dict[str, Entry | None], failed: dict[str, str]) -> list[Entry]:
    """The entries that there are.

    Args:
        entries: By title.
        failed: Why the others failed, by title.

    Raises:
        ValueError: There are none.
    """
    ranked = [entry for entry in entries.values() if entry is not None]
    if not ranked:
        reasons = "; ".join(f"{title}: {reason}" for title, reason in failed.items())
        raise ValueError(f"compare: every contestant failed: {reasons}")
    return ranked


def _expected_shares(left: list[Run], entries: dict[str, Entry | None]) -> dict[str, list[str]]:
    """As `Results.shares`, of the runs that have been trained and of those that are to be.

    Args:
        left: Runs that have training left, or scoring alone.
        entries: By title; None where a run is left.
    """
    shares = {title: entry.shares for title, entry in entries.items() if entry is not None}
    threads = expected_threads(left[0].workers) if left else None
    if threads is not None:
        now = Share(left[0].workers, threads)
        shares |= {run.title: shares_with(run.config.folder, now) for run in left}
    return by_share(shares)


def _warn_of_shares(shares: dict[str, list[str]]) -> bool:
    """Warn where runs with a budget in seconds do not all have the same share of the machine.

    Args:
        shares: As `Results.shares`.
    """
    if len(shares) < 2:
        return False
    told = [f"{words}: {shortened(titles)}" for words, titles in shares.items()]
    warn(
        "compare: with a budget in seconds, scores can be compared where all runs have the same "
        f"share of the machine, but these differ: {'; '.join(told)}. Resume with as many workers "
        "and threads (OMP_NUM_THREADS) as the runs that have ended, or race all anew in another "
        "folder"
    )
    return True


def _workers_and_threads(entries: list[Entry]) -> dict[str, Any]:
    """What trained several runs at a time, for the results: a number, or all that there were."""
    shares = list(dict.fromkeys(share for entry in entries for share in entry.shares))
    if all(share.workers == 1 for share in shares) and len(shares) < 2:
        return {}
    workers, threads = (list(dict.fromkeys(part)) for part in zip(*shares, strict=True))
    return {
        "workers": workers[0] if len(workers) == 1 else workers,
        "threads_per_worker": threads[0] if len(threads) == 1 else threads,
    }


def _listed(seeds: Any) -> list[int]:
    if not isinstance(seeds, Iterable) or not (found := list(seeds)):
        raise ValueError(f"compare: expected seeds to be numbers, such as (0, 1), got {seeds!r}")
    if len(set(found)) < len(found):
        raise ValueError(f"compare: expected seeds that differ, got {found}")
    return found


def _planned(
    contestants: dict[str, Contestant],
    titles: dict[str, str],
    seeds: list[int],
    race: TrainConfig,
    workers: int,
) -> list[Run]:
    """A run for each contestant and seed, in this order, in a folder of its own in the race's.

    However few are left to train, each has the share of the machine that it has among all.
    """
    workers = min(workers, len(contestants) * len(seeds))

    def config(name: str, seed: int) -> TrainConfig:
        if race.folder is None:
            return replace(race, seed=seed)
        folder = race.folder / "runs" / f"{quote(name, safe=' ,=+()')}-seed-{seed}"
        return replace(race, seed=seed, folder=folder, resume="auto")

    return [
        Run(name, f"{titles[name]}, seed {seed}", contestant, config(name, seed), workers)
        for (name, contestant), seed in product(contestants.items(), seeds)
    ]


def _outcomes(
    runs: list[Run], data: Any, folder: Path | None, progress: bool, say: Say
) -> Iterator[Outcome]:
    """Each run, and what returns it trained."""
    if runs and runs[0].workers > 1:
        return several_at_a_time(runs, data, runs[0].workers, folder, progress, say)
    return one_after_the_other(runs, data, say)


def _folder(folder: str | Path | None, resume: bool) -> Path | None:
    """The race's folder, which must be empty unless that race is resumed."""
    if not folder:
        if resume:
            raise ValueError("compare: resume=True needs folder=…, the race to go on with")
        return None
    folder = Path(folder)
    if not resume and folder.exists() and any(folder.iterdir()):
        raise ValueError(
            f"compare: {folder} exists already; choose another folder, or resume that race"
        )
    return folder


def _results(
    density: Any, judge: Judge, entries: list[Entry], settings: dict[str, Any]
) -> Results:
    solver = str(TIGHT)
    if any(has_discrete_steps(entry.flow.transform) for entry in entries):
        solver += "; of solvers whose steps are the model, these"
    settings = {**settings, "evaluation_solver": solver}
    return Results(
        density.name, density, entries, judge.floor, density.entropy, settings, environment()
    )


def _source(data: Any) -> Any:
    """The data as a `Toy`, `Points`, or what has the interface of a `Toy`."""
    return DistributionData(data) if isinstance(data, Distribution | Base | Flow) else load(data)


def _fingerprint(density: Any) -> Any:
    """What tells data of one name from others; None where the name tells all."""
    if isinstance(density, Points):
        return hash_of_rows(Batch(density.x, density.context, weight=density.weight))
    if isinstance(density, DistributionData):
        drawn = draws_of(density)
        return None if drawn is None else [f"{number:.4g}" for number in drawn.flatten().tolist()]
    return None


def _unfit(contestants: dict[str, Contestant], density: Any) -> dict[str, str]:
    """Contestants that cannot be built for such data, by name, and why."""
    found = {}
    for name, contestant in contestants.items():
        try:
            build(contestant, density, 0)
        except (ValueError, TypeError) as error:
            found[name] = str(error)
            if density.dim == 1 and isinstance(contestant.model, str):
                found[name] = (
                    f"{contestant.title} needs two dimensions or more, these data have one; "
                    "nsf-ar takes one"
                )
    return found


def _keep(run: Path, entry: Entry, race: dict[str, Any]) -> None:
    """Write what `_finished` reads; the flow lies beside it."""
    kept = {name: value for name, value in vars(entry).items() if name != "flow"}
    text = json.dumps({"race": race, "entry": kept}, indent=1)
    checkpoint.write_whole(run / ENTRY, text.encode())


def _begun(
    runs: list[Run],
    entries: dict[str, Entry | None],
    made_of: dict[str, dict[str, Any]],
    say: Say,
) -> list[Run]:
    """The runs that have no entry yet, which begin; of the others it is said that they ended."""
    left = []
    for run in runs:
        if entries[run.title] is not None:
            say(f"{run.title}: finished before")
        else:
            _begin(run, made_of[run.name])
            left.append(run)
    return left


def _begin(run: Run, race: dict[str, Any]) -> None:
    """Write in which race a run trains; one that was stopped goes on in no other.

    Raises:
        ValueError: It was begun in another race.
    """
    folder = run.config.folder
    if folder is None:
        return
    if (folder / RACE).exists():
        _expect_same(folder, json.loads((folder / RACE).read_text()), race)
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint.write_whole(folder / RACE, json.dumps(race, indent=1).encode())


def _expect_same(folder: Path, before: dict[str, Any], race: dict[str, Any]) -> None:
    """Raise ValueError where a run's race was another."""
    differs = [
        "another contestant of this name" if key == "contestant"
        else f"{key} was {before.get(key)!r}, is {race[key]!r}"
        for key in race if before.get(key) != race[key]
    ]  # fmt: skip
    if differs:
        raise ValueError(f"compare: {folder} ran in another race: {', '.join(differs)}")


def _finished(run: Run, race: dict[str, Any], density: Any) -> Entry | None:
    """The entry of a run that was raced to its end; None if it was not, or is unreadable.

    Raises:
        ValueError: It ran in another race than this.
    """
    folder = run.config.folder
    if folder is None:
        return None
    try:
        kept = json.loads((folder / ENTRY).read_text())
        # Version 0.1 did not record who the contestant was.
        entry, before = kept["entry"], {"contestant": race["contestant"], **kept["race"]}
        curve = [(seconds, gap) for seconds, gap in entry.pop("curve")]
        few = [(nfe, distance) for nfe, distance in entry.pop("few_steps")]
        shares = [Share(*share) for share in entry.pop("shares", [])]
        into = None if isinstance(run.contestant.model, str) else run.build(density)
        flow = checkpoint.load(folder, into=into)
        found = Entry(**entry, curve=curve, few_steps=few, flow=flow, shares=shares)
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        return None
    _expect_same(folder, before, race)
    return found


def _entry(run: Run, trained: Trained, judge: Judge, density: Any) -> Entry:
    """A trained run with its scores."""
    flow, seed = trained.flow, run.config.seed
    with status(f"scoring {run.title}", run.config.progress) as tell:
        scores, log_q = judge.judge(flow, seed, tell)
        scores |= _training_costs(trained)
        judge.warn_of_few_steps(f"compare: {run.contestant.title}", flow)
        curve = _curve(trained.histories, density, seed)
        tell("samples in few steps")
        few = judge.few_steps(flow, seed)
    paired = [] if judge.test.weight is not None else log_q.double().round(decimals=5).tolist()
    title, shares = run.contestant.title, trained.shares
    return Entry(run.name, title, seed, scores, curve, few, flow, paired, shares)


def as_results(flow: Flow, density: Any, title: str, curve: list[tuple[float, float]]) -> Results:
    """One trained flow as `Results`, for its own figures.

    Args:
        flow: The flow.
        density: What it was trained on.
        title: Its title.
        curve: As in `Entry`.
    """
    judge, _ = _prepared(density, TEST_POINTS, w2_points=1_000)
    entry = Entry(title, title, 0, judge.scores(flow), curve, judge.few_steps(flow), flow)
    return _results(density, judge, [entry], {"test_points": len(judge.test.x)})


def _prepared(density: Any, test_points: int, w2_points: int) -> tuple[Judge, Any]:
    """The judge, and what is trained on: the density, or four fifths of one's own points."""
    if density.entropy is not None:
        return Judge(*draw_test_points(density, test_points), density, w2_points), density
    train, test = density.split(0.2)
    if not len(test.x):
        raise ValueError(
            f"{density.name}: expected 5 rows or more, a fifth of which is for the scores, got "
            f"{len(train.x)}"
        )
    if isinstance(density, Images):
        test = test.take(
            torch.randperm(len(test.x), generator=stream(0, "test pictures"))[:TEST_PICTURES]
        )
    return Judge(test, train, None, w2_points), train


def _training_costs(trained: Trained) -> dict[str, float]:
    return {
        "steps": trained.steps,
        "train_seconds": trained.seconds,
        "compile_seconds": trained.compiling,
        "ms_per_step": 1e3 * trained.seconds / trained.steps,
        "peak_memory_mb": trained.memory,
    }


def _curve(histories: list[History], density: Any, seed: int) -> list[tuple[float, float]]:
    """Held-out gap (NLL for one's own points) against seconds of training, over all stages."""
    truth = 0.0
    if density.entropy is not None:  # the very points that training was validated on
        held_out = validation_draws(density, VALIDATION_POINTS, seed)
        truth = -float(density.log_prob(held_out).mean())
    curve, before = [], 0.0
    for history in histories:
        curve += [(before + at, nll - truth) for at, nll in history.curve()]
        before += history.seconds
    return curve
