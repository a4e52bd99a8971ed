"""Who is told of a run's records as they come: loggers and callbacks."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Callback = Callable[[dict[str, float]], object]


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
                    "function goes into callbacks"
                )
        for callback in callbacks:
            if not callable(callback):
                raise TypeError(
                    f"fit: expected functions of a record in callbacks, got {callback!r}"
                )
        self._loggers, self._callbacks = loggers, callbacks

    def tell(self, record: dict[str, float]) -> None:
        """Hand on a record; what a listener raises ends the run, after a checkpoint."""
        metrics, step = (
            {k: value for k, value in record.items() if k != "step"},
            int(record["step"]),
        )
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
        warnings.warn(
            f"fit: {who} cannot write its last records ({error}); the run itself is not touched",
            stacklevel=3,
        )
