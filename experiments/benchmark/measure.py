"""How things are measured: calls taken in turn, memory in a fresh process each."""

import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch


@dataclass(frozen=True)
class Options:
    """What run.py was asked for.

    Attributes:
        device: "cpu" or "cuda".
        threads: torch's threads.
        repeats: Turns of each contestant, as far as its limit allows.
        limit: Seconds of timed calls for each contestant; it stops after the call that exceeds it.
        quick: Tiny sizes, to see that everything runs; its numbers mean nothing.
        turn: Seconds of a turn, in which calls follow each other as steps of training do, which
            find their code and numbers in the processor's caches; 0 for one call.
    """

    device: str = "cpu"
    threads: int = 2
    repeats: int = 15
    limit: float = 60.0
    quick: bool = False
    turn: float = 0.0


def synchronize(device: str) -> None:
    """Wait for the GPU, if that is what computes."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(call: Callable[[], object], device: str) -> float:
    """Milliseconds of one call."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


@contextmanager
def cores(count: int) -> Iterator[None]:
    """Run on the first `count` of this process's cores, and start threads there.

    JAX has no number of threads to set: it takes one for each core that the process may use.
    """
    all_cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, all_cores[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, all_cores)


def running(
    calls: dict[str, Callable[[], object]],
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Those calls that run, each called once, which compiles it; the error of each other one."""
    works, fails = {}, {}
    for name, call in calls.items():
        try:
            call()
            works[name] = call
        except Exception as error:  # compilers raise anything
            traceback.print_exc()
            fails[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return works, fails


def interleaved(
    calls: dict[str, Callable[[], object]], options: Options, warmups: int = 2
) -> dict[str, dict[str, float]]:
    """`summary` of each call's milliseconds, in turn so that drift of the machine hits all alike.

    A call is warmed up until it has run for a tenth of its limit, at most `warmups` times.
    """
    for call in calls.values():
        spent = 0.0
        for _ in range(warmups):
            spent += timed(call, options.device)
            if spent > 100 * options.limit:
                break
    counts = {name: _calls_in_a_turn(call, options) for name, call in calls.items()}
    times = {name: [] for name in calls}
    for _ in range(options.repeats):
        for name, call in calls.items():
            count = counts[name]
            if count * sum(times[name]) < 1e3 * options.limit:
                turn = partial(_several, call, count)
                times[name].append(timed(turn, options.device) / count)
    return {name: summary(values) for name, values in times.items()}


def _calls_in_a_turn(call: Callable[[], object], options: Options) -> int:
    if not options.turn:
        return 1
    return max(1, round(1e3 * options.turn / timed(call, options.device)))


def _several(call: Callable[[], object], times: int) -> None:
    for _ in range(times):
        call()


def summary(values: list[float]) -> dict[str, float]:
    """Median, quartiles and number of some measurements."""
    low, high = min(values), max(values)
    if len(values) > 2:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    median = statistics.median(values)
    return {"median": median, "low": low, "high": high, "runs": len(values)}


def fresh(options: Options, function: Callable[..., dict], *arguments) -> dict:
    """What `function` returns in a new process; {"failed": why} where that dies."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, torch.set_num_threads, (options.threads,)) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return {"failed": "the process was killed: out of memory?"}
        except torch.OutOfMemoryError:
            return {"failed": "out of GPU memory"}


class Peak:
    """Growth of memory since the start, in MB: the GPU's allocations, or this process's pages."""

    def __init__(self, device: str) -> None:
        self.device = device
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated() / 1e6
            return
        Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM, the peak, to the present
        self.start = _status("VmRSS")

    def growth(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() / 1e6 - self.start
        return _status("VmHWM") - self.start


def free_gigabytes(device: str) -> float:
    """Memory that may still be taken, in GB."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] / 1e9
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(float(line.split()[1]) / 1e6 for line in lines if line.startswith("MemAvailable"))


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1e3 for line in lines if line.startswith(name))
