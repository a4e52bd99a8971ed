"""Work that the processes of a run share: each does a part, and all know the results."""

import pickle
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from torch import distributed

if TYPE_CHECKING:
    from lightning_fabric import Fabric

T = TypeVar("T")


def shared(work: Callable[[int], T], count: int, fabric: "Fabric | None" = None) -> list[T]:
    """The results of work(0), …, work(count − 1), each computed by one process and told to all.

    All processes get the same numbers, bit for bit, however many they are. Where one raises, all
    do, so that none waits for a process that has gone.

    Args:
        work: Must not itself wait for other processes; its results and errors can be pickled.
        count: Number of parts; process r of P does parts r, r + P, r + 2P, ….
        fabric: That of the processes; None where there is but this one.
    """
    if fabric is None or fabric.world_size == 1:
        return [work(k) for k in range(count)]
    rank, processes = fabric.global_rank, fabric.world_size
    own: list[T] | Exception
    try:
        own = [work(k) for k in range(rank, count, processes)]
    except Exception as error:
        own = _sendable(error, rank)
    parts: list[list[T] | Exception] = [[] for _ in range(processes)]
    distributed.all_gather_object(parts, own)
    failed = [part for part in (own, *parts) if isinstance(part, Exception)]
    if failed:
        raise failed[0]
    return [parts[k % processes][k // processes] for k in range(count)]  # pyright: ignore


def is_first() -> bool:
    """Whether this process is the first of a run, or the only one: the one that tells."""
    running = distributed.is_available() and distributed.is_initialized()
    return not running or distributed.get_rank() == 0


def _sendable(error: Exception, rank: int) -> Exception:
    """The error, or its text where it cannot be pickled: the others would wait for it for ever."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"process {rank}: {type(error).__name__}: {error}")
    return error


def by_first(work: Callable[[], T], fabric: "Fabric | None" = None) -> T:
    """The result of what the first process does, told to all; its error is raised in all.

    Args:
        work: As of `shared`.
        fabric: As of `shared`.
    """
    return shared(lambda _: work(), 1, fabric)[0]
