"""Ctrl-C, SIGTERM and SIGHUP between steps."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is not known to every system


class Interrupted(KeyboardInterrupt):
    """A signal that ends the work.

    Attributes:
        number: The signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@contextmanager
def interruptible() -> Iterator[Callable[[], int]]:
    """Inside, a signal to end is seen between steps, a second one at once.

    Yields what tells the number of the signal that came, 0 for none. Only the main thread can see
    signals. One that the process was started to ignore, as `nohup` does, stays ignored.
    """
    received: list[int] = []

    def receive(number: int, frame: Any) -> None:
        if received:
            raise Interrupted(number)
        received.append(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in numbers}
    taken = [n for n in before if before[n] != signal.SIG_IGN or n == signal.SIGINT]
    for number in taken:
        signal.signal(number, receive)
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number in taken:
            signal.signal(number, before[number] or signal.SIG_DFL)
