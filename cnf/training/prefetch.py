"""Rows of a large file: those of the next step are read while this one is taken."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from cnf.objectives import Batch


class Prefetched:
    """Batches by step number; a thread reads the next one ahead.

    Args:
        read: The batch of a step, which depends on the step alone.
    """

    def __init__(self, read: Callable[[int], Batch]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, "rows of the next step")  # ends with this object
        self._next: tuple[int, Future[Batch]] | None = None

    def __call__(self, step: int) -> Batch:
        """The batch of a step; what its reading raised is raised here."""
        ahead, self._next = self._next, None
        if ahead is not None and ahead[0] == step:
            batch = ahead[1].result()
        else:
            batch = self._thread.submit(self._read, step).result()
        self._next = step + 1, self._thread.submit(self._read, step + 1)
        return batch
