"""Shards of a batch: consecutive rows that are drawn and prepared together.

A batch is made of the same shards on any number of processes, and each shard has a generator of
its own. So the numbers of a row do not depend on the process that has it, and a process draws only
the shards that hold its rows.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from cnf.objectives import Batch
from cnf.objectives.batch import Prepared, rows_of, tensors_of

ROW = 8  # numbers whose draws take as long as what a row needs besides: a time, a toy's choices
# Numbers in a shard, at least. A CPU needs 0.1 ms of Python for a shard, and 0.6 to 1 ms for the
# draws of 2**16 numbers; a GPU should draw 2**22 about as fast as it is told to.
LEAST = {"cpu": 2**16}
LEAST_ON_GPU = 2**22
MOST = 64  # shards of a batch

Rows = TypeVar("Rows", bound=Prepared)


@dataclass(frozen=True)
class Shards:
    """Rows of a batch, all or one process's, and the shards that hold them.

    Attributes:
        size: How many rows the whole batch has.
        own: The rows.
        ranges: The rows of each shard that holds some of these, by its place in the streams of a
            step's draws: (), as if it were the whole batch, for the first, then (1,), (2,), ….
    """

    size: int
    own: range
    ranges: Mapping[tuple[int, ...], range]

    @property
    def whole(self) -> bool:
        """Whether these are all rows of the batch."""
        return len(self.own) == self.size

    def of_process(self, rank: int, processes: int) -> "Shards":
        """The rows of one process, and the shards that hold them."""
        own = rows_of(self.size, rank, processes)
        held = {
            place: rows
            for place, rows in self.ranges.items()
            if rows.start < own.stop and own.start < rows.stop
        }
        return replace(self, own=own, ranges=held)

    def spread(self, rows: Batch) -> list[Batch]:
        """A batch for each shard, of these rows alone.

        In the place of a row of another process stands one of these, as what is drawn for a shard
        depends on its number of rows.

        Args:
            rows: The rows `own`.
        """
        if self._held != self.own:
            numbers = torch.arange(self._held.start, self._held.stop, device=rows.x.device)
            numbers = numbers.clamp(self.own.start, self.own.stop - 1) - self.own.start
            rows = rows.map(lambda value: value[numbers])
        if len(self.ranges) == 1:
            return [rows]
        first = self._held.start
        return [
            rows.map(lambda value, r=r: value[r.start - first : r.stop - first])
            for r in self.ranges.values()
        ]

    def taken(self, parts: Iterable[Rows]) -> Rows:
        """The rows `own`, in order, of what is made of each shard.

        Args:
            parts: For each shard as many rows as it has; they are let go one by one.
        """
        if len(self.ranges) == 1:
            (part,), (inside,) = parts, self.inside
            # A coupling may have made more pairs, or fewer, of a whole batch than it has rows.
            return part if self.whole else part.map(lambda value: value[inside])
        rows, first = None, 0
        for inside, part in zip(self.inside, parts, strict=True):
            if rows is None:
                rows = part.map(lambda value: value.new_empty(len(self.own), *value.shape[1:]))
            for all_rows, value in zip(tensors_of(rows), tensors_of(part), strict=True):
                all_rows[first : first + inside.stop - inside.start] = value[inside]
            first += inside.stop - inside.start
        assert rows is not None
        return rows

    @property
    def inside(self) -> list[slice]:
        """Where in each shard the rows `own` are."""
        return [
            slice(max(0, self.own.start - r.start), min(r.stop, self.own.stop) - r.start)
            for r in self.ranges.values()
        ]

    @property
    def _held(self) -> range:
        """All rows of the shards."""
        ranges = list(self.ranges.values())
        return range(ranges[0].start, ranges[-1].stop)


def one_shard(size: int) -> Shards:
    """A batch that is drawn and prepared in one go.

    Args:
        size: Its number of rows.
    """
    return Shards(size, range(size), {(): range(size)})


def shards_of(size: int, numbers: int, device: torch.device) -> Shards:
    """All shards of a batch, a power of two of them, which as many processes share evenly.

    Args:
        size: Its number of rows.
        numbers: How many numbers a row of data has.
        device: Where draws are made.
    """
    least = LEAST.get(device.type, LEAST_ON_GPU)
    possible = max(1, min(MOST, size, size * (ROW + numbers) // least))
    count = 1 << (possible.bit_length() - 1)
    ranges = (rows_of(size, k, count) for k in range(count))
    return Shards(size, range(size), {(k,) if k else (): rows for k, rows in enumerate(ranges)})
