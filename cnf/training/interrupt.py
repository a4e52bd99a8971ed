"""Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 between steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")  # the last two are not known to every system
_ASKED: ContextVar[Callable[[], int]] = ContextVar("asked", default=lambda: 0)


class Interrupted(KeyboardInterrupt):
    """A signal that ends the work.

    Attributes:
        number: The signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[int]]:
        return Interrupted, (self.number,)  # a process that pickles it gives the number, no name


@contextmanager
def asked_to_end(asked: Callable[[], int]) -> Iterator[None]:
    """Inside, training ends as by a signal, also where no signal can reach it.

    Args:
        asked: Called between steps; the number of the signal, 0 to go on.
    """
    before = _ASKED.set(asked)
    try:
        yield
    finally:
        _ASKED.reset(before)


@contextmanager
def interruptible(then: Callable[[], Any] = lambda: None) -> Iterator[Callable[[], int]]:
    """Inside, the first signal is reported between steps; a second one raises `Interrupted`.

    Yields a function that gives the number of the signal that came, 0 for none. Only the main
    thread can see signals. One that the process was started to ignore, as `nohup` does, stays
    ignored, and a program's own handler of SIGUSR1, by which SLURM tells that time runs out, stays
    in place.

    Args:
        then: Called when the first signal comes.
    """
    received: list[int] = []
    asked = _ASKED.get()

    def receive(number: int, frame: Any) -> None:
        if received:
            raise Interrupted(number)
        received.append(number)
        then()

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in numbers}
    taken = [n for n in before if _may_take(n, before[n])]
    for number in taken:
        signal.signal(number, receive)
    try:
        yield lambda: received[0] if received else asked()
    finally:
        for number in taken:
            signal.signal(number, before[number] or signal.SIG_DFL)


def _may_take(number: int, handler: Any) -> bool:
    """Whether a signal with this handler is ours to receive."""
    if number == signal.SIGINT:
        return True
    if number == getattr(signal, "SIGUSR1", None):
        return handler == signal.SIG_DFL
    return handler != signal.SIG_IGN
