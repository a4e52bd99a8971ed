"""What a training run has done, and who is told of it as it goes: loggers and callbacks."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from cnf.errors import warn

CLOCKS = ("preparing", "pairing", "validating", "compiling")
Callback = Callable[[dict[str, float]], object]


@dataclass
class History:
    """What a run has done.

    Attributes:
        records: One dict per logged step: step, seconds, loss, lr, nfe, the objective's metrics,
            and where it was scored val_nll, whose name tells an estimator: see `held_out_nll`.
        steps: Steps taken.
        seconds: Seconds of training.
        preparing: Of these, seconds in which the objective prepared itself, such as a coupling's
            fit to the data.
        pairing: Of these, seconds in which batches were drawn and paired.
        validating: Seconds of validation, which no budget counts.
        compiling: Seconds in which the step was compiled, or found not to be worth it, which no
            budget counts.
        compiled: Whether steps, or the dynamics of an ODE, were compiled.
        memory: Peak memory of training in MB: the GPU's, else the whole process's, NaN where the
            system does not tell.
        reason: Why it ended: "budget", "patience" or "interrupted".
        signal: Number of the signal that interrupted it, or came while it was saved at its end; 0
            for none.
        skipped: Steps left out because their loss or gradient was NaN or infinite.
        ticks: See `TrainConfig.ticks`.
    """

    records: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    preparing: float = 0.0
    pairing: float = 0.0
    validating: float = 0.0
    compiling: float = 0.0
    compiled: bool = False
    memory: float = math.nan
    reason: str = "budget"
    signal: int = 0
    skipped: int = 0
    ticks: list[int] = field(default_factory=list)

    def __repr__(self) -> str:
        told = f"{self.steps:,} steps in {self.seconds:.3g} s, ended by {self.reason}"
        scores = [(name, r[name]) for r in self.records for name in r if name.startswith("val_")]
        return f"History({told}{''.join(f', {n} {v:.4g}' for n, v in scores[-1:])})"

    def column(self, name: str) -> list[float]:
        """The values of one metric, where it was logged."""
        return [record[name] for record in self.records if name in record]

    def curve(self, name: str = "val_nll") -> list[tuple[float, float]]:
        """Pairs of (seconds, value) of one metric, for `cnf.plotting.plot_learning`.

        Args:
            name: The metric's; val_nll is the held-out NLL by whatever estimator.
        """
        get = held_out_nll if name == "val_nll" else lambda record: record.get(name)
        values = ((record["seconds"], get(record)) for record in self.records)
        return [(seconds, value) for seconds, value in values if value is not None]

    def interrupt(self, number: int) -> None:
        """Note the signal that ends the run."""
        self.reason, self.signal = "interrupted", number

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        clocks = {name: getattr(self, name) for name in CLOCKS}
        return {"records": self.records, "compiled": self.compiled, **clocks}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.records = [dict(record) for record in state["records"]]
        self.compiled = bool(state.get("compiled", False))
        for name in CLOCKS:  # which older checkpoints do not hold
            setattr(self, name, float(state.get(name, 0.0)))


def held_out_nll(record: Mapping[str, Any]) -> float | None:
    """The held-out NLL of a record, exact or estimated; None where it was not scored."""
    named = (value for name, value in record.items() if name.startswith("val_nll"))
    return next((float(value) for value in named if value not in ("", None)), None)


class Listeners:
    """Tells loggers and callbacks of records; as a context manager it finalizes the loggers.

    Args:
        loggers: Fabric's loggers, or whatever has `log_metrics(metrics, step)`.
        callbacks: Functions of a record.

    Raises:
        TypeError: They are no lists, or what is in one cannot be told anything.
    """

    def __init__(self, loggers: Sequence[Any], callbacks: Sequence[Callback]) -> None:
        for name, given in (("loggers", loggers), ("callbacks", callbacks)):
            if not isinstance(given, Sequence):
                raise TypeError(f"fit: expected a list in {name}, got {given!r}")
        for logger in loggers:
            if not callable(getattr(logger, "log_metrics", None)):
                raise TypeError(
                    f"fit: expected loggers with log_metrics(metrics, step), got {logger!r}; a "
                    "function goes into callbacks, and for TensorBoard a run's folder holds its "
                    "events already, or take lightning_fabric.loggers.TensorBoardLogger(folder)"
                )
        for callback in callbacks:
            if not callable(callback):
                raise TypeError(
                    f"fit: expected functions of a record in callbacks, got {callback!r}"
                )
        self._loggers, self._callbacks = loggers, callbacks

    def tell(self, record: dict[str, float]) -> None:
        """Hand on a record; what a listener raises ends the run, after a checkpoint."""
        metrics = {name: value for name, value in record.items() if name != "step"}
        step = int(record["step"])
        for logger in self._loggers:
            with naming(f"the logger {type(logger).__name__}", step):
                logger.log_metrics(dict(metrics), step)
        for callback in self._callbacks:
            callback(dict(record))

    def __enter__(self) -> "Listeners":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for logger in self._loggers:
            if callable(finalize := getattr(logger, "finalize", None)):
                with surviving(f"the logger {type(logger).__name__}"):
                    finalize("failed" if kind else "success")


@contextmanager
def naming(who: str, step: int) -> Iterator[None]:
    """Inside, an OSError (a full disk, no permission) is told with the name of who met it."""
    try:
        yield
    except OSError as error:
        raise OSError(
            f"fit: {who} cannot write its record of step {step} ({error}); make room for it or "
            "leave it out, and resume the run: its checkpoints are kept"
        ) from error


@contextmanager
def surviving(who: str) -> Iterator[None]:
    """Inside, an OSError is a warning: training has ended, and nothing of it may be lost now."""
    try:
        yield
    except OSError as error:
        warn(f"fit: {who} cannot write its last records ({error}); the run itself is not touched")
