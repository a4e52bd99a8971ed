"""The progress bar of a training run."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from cnf.errors import optional

PAIRING = 0.25  # part of the time above which pairing is shown


class ProgressBar:
    """Part of the budget, loss, held-out score, evaluations per step, steps per second, time left.

    A file or a pipe gets no bar, only what is said.

    Args:
        show: Whether anything is shown.
        title: What stands before the bar.
    """

    def __init__(self, show: bool, title: str) -> None:
        self._bar: Any = None
        self._shown_at = 0.0
        self._first: tuple[float, int] | None = None  # time and step of the first update
        if show:
            title = optional("rich.markup", "train").escape(title)
            progress = optional("rich.progress", "train")
            console = optional("rich", "train").get_console()
            text = progress.TextColumn
            self._bar = progress.Progress(
                text("[bold]{task.description}"),
                progress.BarColumn(bar_width=None),
                text("{task.percentage:>3.0f}%"),
                text("loss {task.fields[loss]}"),
                text("{task.fields[held_out]}"),
                text("{task.fields[cost]}"),
                text("{task.fields[rate]} it/s"),
                text("eta"),
                progress.TimeRemainingColumn(),
                disable=not (console.is_terminal or console.is_jupyter),
            )
            self._task = self._bar.add_task(
                title, total=1.0, loss="–", held_out="NLL –", cost="NFE –", rate="–"
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    @property
    def due(self) -> bool:
        """Whether a quarter of a second has passed since the bar, if shown, was redrawn."""
        shown = self._bar is not None and not self._bar.disable
        return shown and time.perf_counter() - self._shown_at > 0.25

    def update(
        self, fraction: float, step: int, loss: float, nfe: int, pairing: float = 0.0
    ) -> None:
        """Redraw; a large part of the time that goes into pairing stands where NFE else does."""
        if self._bar is None:
            return
        now = self._shown_at = time.perf_counter()
        self._first = self._first or (now, step)
        start, done = self._first
        rate = (step - done) / max(now - start, 1e-9)
        cost = f"pairing {pairing:.0%}" if not nfe and pairing > PAIRING else f"NFE {nfe}"
        fields = {"loss": f"{loss:.3f}", "cost": cost, "rate": f"{rate:.0f}"}
        self._bar.update(self._task, completed=fraction, **fields)

    def validated(self, name: str, score: float) -> None:
        """Show a new held-out score, "val_nll", which may name an estimator, or "val_loss"."""
        if self._bar is not None:
            words = name.replace("val_nll", "NLL").replace("val_loss", "held-out loss")
            self._bar.update(self._task, held_out=f"{words} {score:.3f}")

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Inside, the bar says so before its title."""
        if self._bar is None:
            yield
            return
        title = self._bar.tasks[0].description
        self._bar.update(self._task, description=f"{what} {title}")
        yield
        self._bar.update(self._task, description=title)

    def say(self, message: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(message, markup=False, highlight=False)


@contextmanager
def counted(what: str, total: int, show: bool = True) -> Iterator[Callable[[], None]]:
    """Inside, a terminal shows how many of several tasks have ended; what is yielded adds one.

    Args:
        what: Is being done.
        total: How many there are.
        show: Whether it is shown.
    """
    if not show:
        yield lambda: None
        return
    progress = optional("rich.progress", "train")
    console = optional("rich", "train").get_console()
    bar = progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=None),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        transient=True,
        disable=not (console.is_terminal or console.is_jupyter),
    )
    with bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)


@contextmanager
def status(what: str, show: bool = True) -> Iterator[Callable[[str], None]]:
    """Inside, a terminal shows what is being done; what is yielded changes the words.

    Args:
        what: Is being done.
        show: Whether it is shown.
    """
    if not show:
        yield lambda _: None
        return
    with optional("rich.console", "train").Console().status(what) as line:
        yield lambda part: line.update(f"{what}: {part}")
