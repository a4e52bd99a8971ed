"""One run of a race: a contestant, trained with one seed in whatever process this is."""

import copy
import json
import math
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cnf import models
from cnf.data import Points, Toy
from cnf.flow import Flow
from cnf.race.contestants import Contestant, Stage
from cnf.random import preserved, reseed
from cnf.training import History, TrainConfig, checkpoint, fit
from cnf.training.interrupt import Interrupted

TRAINED = "trained.json"
SHARES = "shares.json"


class Share(NamedTuple):
    """What a run had of the machine while it trained.

    Attributes:
        workers: How many runs trained at a time.
        threads: Of torch, in the process that trained this one.
    """

    workers: int
    threads: int

    def __str__(self) -> str:
        at_once = "1 run" if self.workers == 1 else f"{self.workers} runs"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{at_once} at a time with {threads}{' each' if self.workers > 1 else ''}"


@dataclass(frozen=True)
class Run:
    """What is to be trained.

    Attributes:
        name: The contestant's name.
        title: Contestant and seed, in words.
        contestant: Who it is.
        config: The race's budget, with this run's seed and folder.
        workers: How many runs train at a time.
    """

    name: str
    title: str
    contestant: Contestant
    config: TrainConfig
    workers: int = 1

    def build(self, data: Any) -> Flow:
        """The flow before training.

        Args:
            data: What it is to be trained on.
        """
        return build(self.contestant, data, self.config.seed)

    def train(self, data: Any) -> "Trained":
        """The flow, built and trained here.

        Args:
            data: What it is trained on.
        """
        return train(self.build(data), self.contestant.stages, data, self.config, self.workers)


@dataclass
class Trained:
    """What training gave.

    Attributes:
        flow: The trained flow.
        histories: Of each stage.
        memory: Peak memory of training in MB: the GPU's, else the whole process's.
        shares: What training had of the machine; several where it was stopped and went on with
            another share, none where a version that did not record it has trained.
    """

    flow: Flow
    histories: list[History]
    memory: float
    shares: list[Share] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """Optimizer steps of all stages."""
        return sum(history.steps for history in self.histories)

    @property
    def seconds(self) -> float:
        """Seconds of training of all stages."""
        return sum(history.seconds for history in self.histories)

    @property
    def compiling(self) -> float:
        """Seconds of compilation of all stages; NaN where nothing was compiled."""
        if not any(history.compiled for history in self.histories):
            return math.nan
        return sum(history.compiling for history in self.histories)


def build(contestant: Contestant, data: Any, seed: int) -> Flow:
    """A contestant's flow before training.

    Args:
        contestant: Who it is.
        data: A density or points: sizes, and whether the density is known.
        seed: Of the weights: contestants with the same field start from the same ones.
    """
    options = {**data.sizes, **contestant.options}
    if isinstance(data, Toy):  # which need no preprocessing
        options |= contestant.toy_options
    cpu = torch.device("cpu")  # where models are built
    with preserved(cpu):
        reseed(seed, cpu)
        if isinstance(contestant.model, Flow):
            return copy.deepcopy(contestant.model)
        if isinstance(contestant.model, str):
            return models.build(contestant.model, **options)
        return contestant.model(**options)


def train(
    flow: Flow, stages: tuple[Stage, ...], data: Any, config: TrainConfig, workers: int = 1
) -> Trained:
    """Train a flow in stages, one after the other; a run that was begun in the folder goes on.

    Args:
        flow: Which is trained.
        stages: How; each has its share of the budget.
        data: What it is trained on.
        config: The whole budget, seed and folder.
        workers: How many runs train at a time.

    Raises:
        Interrupted: A signal ended training; what has a folder is saved.
    """
    histories, memory = [], _memory_before(config.folder)
    shares = shares_with(config.folder, Share(workers, torch.get_num_threads()))
    if config.folder:
        config.folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write_whole(config.folder / SHARES, json.dumps(shares).encode())
    for number, stage in enumerate(stages, 1):
        part = {
            "seconds": config.seconds and config.seconds * stage.share,
            "steps": config.steps and max(1, round(config.steps * stage.share)),
            "folder": config.folder and config.folder / f"stage-{number}",
        }
        settings = dict(stage.settings)
        if isinstance(data, Points) and "batch_size" in settings:  # as many rows as there are
            settings["batch_size"] = min(settings["batch_size"], len(data.x) * 9 // 10)
        histories.append(fit(flow, stage.objective, data, replace(config, **part, **settings)))
        memory = max(histories[-1].memory, memory)
        if histories[-1].reason == "interrupted":
            raise Interrupted(histories[-1].signal)  # it is for the whole race
    if config.folder:
        checkpoint.save(flow, config.folder)
        text = json.dumps({"peak_memory_mb": memory})
        checkpoint.write_whole(config.folder / TRAINED, text.encode())
    return Trained(flow, histories, memory, shares)


def _memory_before(folder: Path | None) -> float:
    """What a run took that was trained, but not yet scored, when its race was stopped; else 0."""
    file = folder and folder / TRAINED
    return json.loads(file.read_text())["peak_memory_mb"] if file and file.exists() else 0.0


def shares_with(folder: Path | None, now: Share) -> list[Share]:
    """What a run has had of the machine, and has now if it has training left.

    Args:
        folder: The run's.
        now: What it has now.
    """
    before: list[Share] = []  # where nothing was saved, the run begins anew
    if folder is not None and any(folder.rglob(checkpoint.STATE_FILE)):
        with suppress(OSError, ValueError, TypeError):  # a version before did not write it
            before = [Share(*share) for share in json.loads((folder / SHARES).read_text())]
    trained = folder is not None and (folder / TRAINED).exists()
    return before if trained or before[-1:] == [now] else [*before, now]
