"""Times every case once, `python job.py WAY`, and prints the seconds of a step as JSON.

WAY is "alone" (one process), "beside a copy" (one process, while an independent copy of it does
the same on the other core), or "two" (two processes share each step). One thread each.
"""

import contextlib
import json
import multiprocessing
import sys
from collections.abc import Callable
from threading import BrokenBarrierError
from typing import Any

import torch
from cases import CASES, QUICK, train

WAYS = ("alone", "beside a copy", "two")
LONGEST = 600  # seconds that one of two copies waits for the other


def timed(quick: bool, devices: int, meet: Callable[[], object]) -> dict[str, dict[int, float]]:
    """Seconds of a step of each case by rows for each process.

    Args:
        quick: Tiny sizes.
        devices: Processes.
        meet: Called before each measurement.
    """
    torch.set_num_threads(1)
    found = {}
    for name, case in (QUICK if quick else CASES).items():
        for rows, steps in case.rows.items():
            meet()
            found.setdefault(name, {})[rows] = train(case, rows, steps, devices)
    return found


def timed_beside(quick: bool, barrier: Any) -> None:
    """What the copy does; where it fails, the other does not wait for it.

    Args:
        quick: Tiny sizes.
        barrier: Where both meet before each measurement.
    """
    try:
        timed(quick, 1, barrier.wait)
    except BaseException:
        barrier.abort()
        raise


def main(way: str, quick: bool) -> None:
    meet, copy = (lambda: None), None
    if way == "beside a copy":
        spawn = multiprocessing.get_context("spawn")
        barrier = spawn.Barrier(2, timeout=LONGEST)
        meet = barrier.wait
        copy = spawn.Process(target=timed_beside, args=(quick, barrier), daemon=True)
        copy.start()
    found = None
    with contextlib.suppress(BrokenBarrierError):
        found = timed(quick, 2 if way == "two" else 1, meet)
    if copy is not None:
        copy.join(LONGEST)
    if found is None or copy is not None and copy.exitcode != 0:
        sys.exit(f"job.py: the copy failed, or took more than {LONGEST} s; see its error above")
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], "--quick" in sys.argv)
