"""Who is told of a run's records as they come: loggers and callbacks."""

from collections.abc import Callable, Sequence
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
        """Hand on a record; what a listener raises ends the run."""
        metrics = {name: value for name, value in record.items() if name != "step"}
        for logger in self._loggers:
            logger.log_metrics(dict(metrics), int(record["step"]))
        for callback in self._callbacks:
            callback(dict(record))

    def __enter__(self) -> "Listeners":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for logger in self._loggers:
            if callable(finalize := getattr(logger, "finalize", None)):
                finalize("failed" if kind else "success")
