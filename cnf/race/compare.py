"""The race: contestants on one density, same budget, same data stream, same evaluation."""

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch.distributions import Distribution

from cnf import models
from cnf.data import Images, Points, Toy, load
from cnf.distributions import Base
from cnf.errors import CheckpointError
from cnf.flow import Flow
from cnf.objectives import Batch
from cnf.race.contestants import RACE_OF_PICTURES, Contestant, entrants
from cnf.race.judge import TIGHT, Judge, draw_test_points
from cnf.race.results import Entry, Results, distinct
from cnf.random import VERSION, preserved, reseed, stream
from cnf.training import History, TrainConfig, checkpoint, fit
from cnf.training.history import held_out_nll
from cnf.training.interrupt import Interrupted
from cnf.training.origin import draws_of, environment, hash_of_rows
from cnf.training.progress import status
from cnf.training.stream import DistributionData, validation_draws

TEST_POINTS = 10_000
TEST_PICTURES = 1_000
VALIDATION_POINTS = 4_000
ENTRY = "entry.json"


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
    resume: bool = False,
    say: Callable[[str], None] = lambda _: None,
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
        resume: Go on with the race in `folder`: who has finished is not raced again.
        say: Called with a line of text as the race goes on.

    Raises:
        ValueError: An unknown contestant, a budget that is missing or not positive, a folder that
            exists, or that holds another race; every contestant failed.
    """
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
    race = {"data": density.name, **settings, "rows": _fingerprint(density)}
    race["random streams"] = VERSION
    titles = distinct({name: contestant.title for name, contestant in contestants.items()})
    unfit = _unfit(contestants, density)
    entries, failed = [], {titles[name]: reason for name, reason in unfit.items()}
    fitting = {name: one for name, one in contestants.items() if name not in unfit}
    for (name, contestant), seed in product(fitting.items(), seeds):
        title = f"{titles[name]}, seed {seed}"
        say(title)
        run = folder and folder / "runs" / f"{quote(name, safe=' ,=+()')}-seed-{seed}"
        made_of = {**race, "contestant": contestant.made_of}
        if run and (finished := _finished(run, contestant, made_of, density)):
            entries.append(finished)
            continue
        config = replace(base, seed=seed, folder=run, resume="auto" if run else False)
        try:
            entry = _raced(name, contestant, judge, train, density, config)
        except Exception as error:  # it must not cost the others their race
            failed[title] = str(error) or type(error).__name__
            say(f"failed: {error}")
            continue
        entries.append(entry)
        if run:
            _keep(run, entry, made_of)
    if not entries:
        reasons = "; ".join(f"{title}: {reason}" for title, reason in failed.items())
        raise ValueError(f"compare: every contestant failed: {reasons}")
    settings |= {"seeds": seeds, "evaluation_solver": str(TIGHT), "failed": failed}
    results = _results(density, judge, entries, settings)
    if folder:
        results.save(folder)
    return results


def _listed(seeds: Any) -> list[int]:
    if not isinstance(seeds, Iterable) or not (found := list(seeds)):
        raise ValueError(f"compare: expected seeds to be numbers, such as (0, 1), got {seeds!r}")
    return found


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
            _built(contestant, density, 0)
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


def _finished(
    run: Path, contestant: Contestant, race: dict[str, Any], density: Any
) -> Entry | None:
    """The entry of a run that was raced to its end; None if it was not, or is unreadable.

    Raises:
        ValueError: It ran in another race than this.
    """
    try:
        kept = json.loads((run / ENTRY).read_text())
        # Version 0.1 did not record who the contestant was.
        entry, before = kept["entry"], {"contestant": race["contestant"], **kept["race"]}
        curve = [(seconds, gap) for seconds, gap in entry.pop("curve")]
        few = [(nfe, distance) for nfe, distance in entry.pop("few_steps")]
        into = None if isinstance(contestant.model, str) else _built(contestant, density, 0)
        found = Entry(**entry, curve=curve, few_steps=few, flow=checkpoint.load(run, into=into))
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        return None
    differs = [
        "another contestant of this name" if key == "contestant"
        else f"{key} was {before.get(key)!r}, is {race[key]!r}"
        for key in race if before.get(key) != race[key]
    ]  # fmt: skip
    if differs:
        raise ValueError(f"compare: {run} ran in another race: {', '.join(differs)}")
    return found


def _built(contestant: Contestant, density: Any, seed: int) -> Flow:
    options = {**density.sizes, **contestant.options}
    if isinstance(density, Toy):  # which need no preprocessing
        options |= contestant.toy_options
    cpu = torch.device("cpu")  # where models are built
    with preserved(cpu):
        reseed(seed, cpu)  # contestants with the same field start from the same weights
        if isinstance(contestant.model, Flow):
            return copy.deepcopy(contestant.model)
        if isinstance(contestant.model, str):
            return models.build(contestant.model, **options)
        return contestant.model(**options)


def _raced(
    name: str, contestant: Contestant, judge: Judge, train: Any, density: Any, config: TrainConfig
) -> Entry:
    flow, histories, memory = _train(contestant, train, density, config)
    with status("scoring", config.progress) as tell:
        scores, log_q = judge.judge(flow, config.seed, tell)
        scores |= _training_costs(histories, memory)
        judge.warn_of_few_steps(f"compare: {contestant.title}", flow)
        curve = _curve(histories, density, config.seed)
        tell("samples in few steps")
        few = judge.few_steps(flow, config.seed)
    paired = [] if judge.test.weight is not None else log_q.double().round(decimals=5).tolist()
    return Entry(name, contestant.title, config.seed, scores, curve, few, flow, paired)


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


def _train(
    contestant: Contestant, data: Any, density: Any, base: TrainConfig
) -> tuple[Flow, list[History], float]:
    """The trained flow, each stage's history, and the peak memory of training in MB."""
    flow = _built(contestant, density, base.seed)
    histories, memory = [], 0.0
    for number, stage in enumerate(contestant.stages, 1):
        part = {
            "seconds": base.seconds and base.seconds * stage.share,
            "steps": base.steps and max(1, round(base.steps * stage.share)),
            "folder": base.folder and base.folder / f"stage-{number}",
        }
        settings = dict(stage.settings)
        if isinstance(data, Points) and "batch_size" in settings:  # as many rows as there are
            settings["batch_size"] = min(settings["batch_size"], len(data.x) * 9 // 10)
        with _peak_memory() as peak:
            histories.append(fit(flow, stage.objective, data, replace(base, **part, **settings)))
        memory = max(memory, peak())
        if histories[-1].reason == "interrupted":
            raise Interrupted(histories[-1].signal)  # it is for the whole race
    if base.folder:
        checkpoint.save(flow, base.folder)
    return flow, histories, memory


def _prepared(density: Any, test_points: int, w2_points: int) -> tuple[Judge, Any]:
    """The judge, and what is trained on: the density, or four fifths of one's own points."""
    if density.entropy is not None:
        return Judge(*draw_test_points(density, test_points), density, w2_points), density
    train, test = density.split(0.2)
    if isinstance(density, Images):
        test = test.take(
            torch.randperm(len(test.x), generator=stream(0, "test pictures"))[:TEST_PICTURES]
        )
    return Judge(test, train, None, w2_points), train


def _training_costs(histories: list[History], memory: float) -> dict[str, float]:
    steps = sum(history.steps for history in histories)
    seconds = sum(history.seconds for history in histories)
    return {
        "steps": steps,
        "train_seconds": seconds,
        "ms_per_step": 1e3 * seconds / steps,
        "peak_memory_mb": memory,
    }


def _curve(histories: list[History], density: Any, seed: int) -> list[tuple[float, float]]:
    """Held-out gap (NLL for one's own points) against seconds of training, over all stages."""
    truth = 0.0
    if density.entropy is not None:  # the very points that training was validated on
        held_out = validation_draws(density, VALIDATION_POINTS, seed)
        truth = -float(density.log_prob(held_out).mean())
    curve, before = [], 0.0
    for history in histories:
        scored = ((record["seconds"], held_out_nll(record)) for record in history.records)
        curve += [(before + at, nll - truth) for at, nll in scored if nll is not None]
        before += history.seconds
    return curve


@contextmanager
def _peak_memory() -> Iterator[Callable[[], float]]:
    """Peak memory inside, in MB: the GPU's, else the whole process's (NaN off Linux)."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield lambda: torch.cuda.max_memory_allocated() / 1e6
        return
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if reset.exists():
        reset.write_text("5")  # sets VmHWM, the peak, to VmRSS, the present

    def peak() -> float:
        lines = status.read_text().splitlines() if status.exists() else []
        found = (line.split()[1] for line in lines if line.startswith("VmHWM"))
        return float(next(found, "nan")) / 1e3

    yield peak
