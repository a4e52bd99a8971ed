"""Rows of a large file: those of the next step are read while this one is taken."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from cnf.objectives import Batch


class Prefetched:
    """Rows of batches by step number; a thread reads those of the next one ahead.

    Args:
        read: Some rows of the batch of a step, which depend on these two alone.
    """

    def __init__(self, read: Callable[[int, range], Batch]) -> None:
        self._read = read
        self._thread = ThreadPoolExecutor(1, "rows of the next step")  # ends with this object
        self._next: tuple[int, range, Future[Batch]] | None = None

    def __call__(self, step: int, rows: range) -> Batch:
        """Rows of the batch of a step; what their reading raised is raised here."""
        ahead, self._next = self._next, None
        if ahead is not None and ahead[:2] == (step, rows):
            batch = ahead[2].result()
        else:
            batch = self._thread.submit(self._read, step, rows).result()
        self._next = step + 1, rows, self._thread.submit(self._read, step + 1, rows)
        return batch
