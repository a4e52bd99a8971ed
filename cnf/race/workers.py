"""Where a race trains its runs: here one after the other, or several at a time by joblib.

What a worker gets and gives back is bytes, written by cloudpickle: lambdas and classes of a
notebook travel too, and what cannot be sent costs its own run only.
"""

import os
import pickle
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from cnf.errors import optional, warn
from cnf.race.runs import Run, Trained, train
from cnf.training.interrupt import Interrupted, asked_to_end, interruptible
from cnf.training.progress import counted

Say = Callable[[str], None]
# A run, and what returns it trained, or raises why it could not be.
Outcome = tuple[Run, Callable[[], Trained]]

WATCH = 0.5  # seconds between looks at whether the race's own process still runs
_ALONE = threading.Lock()  # torch's generator and threads are the process's: one run at a time


def one_after_the_other(runs: Sequence[Run], data: Any, say: Say) -> Iterator[Outcome]:
    """Runs that train in this process, each when its outcome is called.

    Args:
        runs: What is to be trained.
        data: What all of them are trained on.
        say: Called with the title of each.
    """
    for run in runs:
        say(run.title)
        yield run, partial(run.train, data)


def several_at_a_time(
    runs: Sequence[Run], data: Any, workers: int, folder: Path | None, show: bool, say: Say
) -> Iterator[Outcome]:
    """Runs that workers have trained, in their order; the first comes when all have ended.

    They are scored, and timed, when the machine does nothing else. Workers are joblib's: processes
    of this machine or, where `joblib.parallel_config` says so, those of Dask or Ray. Each takes an
    equal share of the cores, or OMP_NUM_THREADS threads, but no more than this process has; run k
    takes GPU k modulo their number.

    Args:
        runs: What is to be trained.
        data: What all of them are trained on; every worker holds it.
        workers: How many train at a time.
        folder: The race's, where workers see that they are to stop.
        show: Whether a terminal shows how many have ended.
        say: Called with a line on each run that ends.

    Raises:
        Interrupted: A signal came; runs with a folder are saved.
        ChildProcessError: A worker died.
        ValueError: The data cannot be sent, or joblib's workers are threads or forks.
    """
    joblib = optional("joblib", "evaluation")
    backend, _ = joblib.parallel.get_active_backend()
    forks = type(backend) is joblib.parallel.MultiprocessingBackend  # Ray's is a subclass
    if forks or getattr(backend, "supports_sharedmem", False):
        raise ValueError(
            f"compare: expected joblib's workers to be fresh processes, got those of "
            f"{type(backend).__name__}: threads share torch's random numbers, and in forks torch "
            "hangs; take joblib.parallel_config(backend='loky')"
        )
    if isinstance(backend, joblib.parallel.LokyBackend):
        _warn_of_sharing(runs, workers, joblib.cpu_count())
    where = (folder or Path(tempfile.gettempdir())).absolute()
    where.mkdir(parents=True, exist_ok=True)
    stop = where / f".stop-{os.getpid()}"
    # A race that was killed leaves it, and in a container the next one has the same number.
    stop.unlink(missing_ok=True)
    packed = _pickled(data, "the data")
    tasks = (
        joblib.delayed(_answer)(number, _parcel(run, data, packed, stop))
        for number, run in enumerate(runs)
    )
    tells = getattr(backend, "supports_return_generator", False)  # which Ray's does not
    parallel = joblib.Parallel(
        workers, return_as="generator_unordered" if tells else "list", pre_dispatch="n_jobs",
        batch_size=1,
    )  # fmt: skip
    answers: dict[int, _Answer] = {}
    say(f"{len(runs)} runs, {workers} at a time; scores are taken when all are trained")
    with interruptible(stop.touch) as interrupted, counted("training", len(runs), show) as count:
        try:
            for number, answer in parallel(tasks):
                answers[number] = answer
                if answer.interrupted:  # maybe by a signal to that worker: it is for the race
                    stop.touch()
                    continue
                _tell(runs[number].title, answer, f"{len(answers)}/{len(runs)}", say)
                count()
        except BrokenProcessPool as error:
            if not interrupted():
                raise _dead(workers, folder) from error
        finally:
            stop.unlink(missing_ok=True)
        ended = interrupted() or max(answer.interrupted for answer in answers.values())
    if ended:
        raise Interrupted(ended)
    for number, run in enumerate(runs):
        yield run, partial(_received, answers.pop(number))


@dataclass(frozen=True)
class _Parcel:
    """What a worker gets.

    Attributes:
        data: The data, pickled.
        rest: Flow, stages, settings and the number of workers, pickled.
        device: As in `TrainConfig`.
        threads: Of the race's own process.
        parent: The number of that process.
        stop: A file that exists once training is to end.
    """

    data: bytes
    rest: bytes
    device: str
    threads: int
    parent: int
    stop: Path


@dataclass
class _Answer:
    """What a worker gives back.

    Attributes:
        told: Steps and seconds, or why it failed, in words.
        trained: A `Trained` and the kind of its device, pickled; None if it failed.
        interrupted: The signal that ended it, else 0.
        warned: The texts of warnings.
    """

    told: str = ""
    trained: bytes | None = None
    interrupted: int = 0
    warned: list[str] = field(default_factory=list)


def _parcel(run: Run, data: Any, packed: bytes, stop: Path) -> _Parcel | str:
    """What a worker needs for a run, or why it cannot be sent.

    The flow is built here, where names that a script has registered are known.
    """
    folder = run.config.folder and run.config.folder.absolute()
    config = replace(run.config, folder=folder, progress=False)
    try:
        content = run.build(data).cpu(), run.contestant.stages, config, run.workers
        rest = _pickled(content, "its model, objective or settings")
    except Exception as error:  # it must not cost the others their race
        return _words(error)
    return _Parcel(packed, rest, config.device, torch.get_num_threads(), os.getpid(), stop)


def _answer(number: int, parcel: _Parcel | str) -> tuple[int, _Answer]:
    """What a worker does: train a run of this number, and tell how it went."""
    if isinstance(parcel, str):
        return number, _Answer(parcel)
    _die_with(parcel.parent)
    with (
        _ALONE,
        _at_most(parcel.threads),
        asked_to_end(lambda: signal.SIGTERM if parcel.stop.exists() else 0),
        warnings.catch_warnings(record=True) as caught,
    ):
        try:
            answer = _trained(number, parcel)
        except KeyboardInterrupt as error:
            answer = _Answer(interrupted=getattr(error, "number", signal.SIGINT))
        except Exception as error:  # the others train on
            answer = _Answer(_words(error))
    answer.warned = [str(warning.message) for warning in caught]
    return number, answer


def _trained(number: int, parcel: _Parcel) -> _Answer:
    if parcel.stop.exists():
        raise Interrupted(signal.SIGTERM)
    if parcel.device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())
    flow, stages, config, at_once = pickle.loads(parcel.rest)
    trained = train(flow, stages, pickle.loads(parcel.data), config, at_once)
    kind = flow.device.type
    flow.cpu()  # of this process's GPU the other knows nothing
    told = f"{trained.steps:,} steps, {trained.seconds:.1f} s"
    return _Answer(told, _pickled((trained, kind), "its trained flow"))


def _received(answer: _Answer) -> Trained:
    """What a worker has trained, on the device of its kind here.

    Raises:
        RuntimeError: It failed, for the reason that the worker told.
    """
    if answer.trained is None:
        raise RuntimeError(answer.told)
    trained, kind = pickle.loads(answer.trained)
    trained.flow.to(kind if kind != "cuda" or torch.cuda.is_available() else "cpu")
    return trained


def _tell(title: str, answer: _Answer, count: str, say: Say) -> None:
    for text in answer.warned:
        warn(f"{title}: {text}")
    failed = " failed" if answer.trained is None else ""
    say(f"{count} {title}{failed}: {answer.told}")


def _words(error: Exception) -> str:
    return str(error) or type(error).__name__


def _pickled(content: Any, what: str) -> bytes:
    """The content as bytes, by cloudpickle where pickle does not do.

    Raises:
        ValueError: It cannot be pickled.
    """
    wrapped = optional("joblib", "evaluation").wrap_non_picklable_objects(content, False)
    try:
        return pickle.dumps(wrapped)
    except Exception as error:  # whatever an object's own __reduce__ raises
        raise ValueError(
            f"compare: expected what workers can be sent, but {what} cannot be pickled "
            f"({_words(error)}); leave out of it what holds open files, locks, generators or "
            "connections, or race with workers=1"
        ) from error


def _dead(workers: int, folder: Path | None) -> ChildProcessError:
    remedy = f"go on with fewer than {workers} workers"
    if folder is not None:
        remedy += f", and with what has been trained: resume the race in {folder}"
    return ChildProcessError(
        f"compare: a worker was killed or crashed, most often for want of memory; {remedy}"
    )


def expected_threads(workers: int) -> int | None:
    """Threads that each of so many runs at a time will have; None on a cluster, which decides."""
    if workers == 1:
        return torch.get_num_threads()
    joblib = optional("joblib", "evaluation")
    backend, _ = joblib.parallel.get_active_backend()
    if not isinstance(backend, joblib.parallel.LokyBackend):
        return None
    return _threads_each(workers, joblib.cpu_count())


def _threads_each(workers: int, cores: int) -> int:
    chosen = "OMP_NUM_THREADS" in os.environ
    return min(torch.get_num_threads(), cores if chosen else max(1, cores // workers))


def _warn_of_sharing(runs: Sequence[Run], workers: int, cores: int) -> None:
    """Warn where seconds are the budget and runs have to wait for a processor."""
    config, at_once = runs[0].config, min(workers, len(runs))
    if config.seconds is None:
        return
    threads = _threads_each(workers, cores)
    gpus = torch.cuda.device_count() if config.device in ("auto", "cuda") else 0
    kind, needed, found = "GPU", at_once, gpus
    if not gpus:
        kind, needed, found = "core", at_once * threads, cores
    if needed > found:
        warn(
            f"compare: {at_once} workers need {needed} {kind}s for a budget in seconds, and find "
            f"{found}: how far a run comes depends on the others, and scores cannot be compared "
            "with those of other races; take fewer workers, or a budget in steps"
        )


@contextmanager
def _at_most(threads: int) -> Iterator[None]:
    """Inside, torch takes no more threads than these."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, threads))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def _die_with(parent: int) -> None:
    """End this process when its parent, the race's own, is killed; only that heeds Ctrl-C.

    Processes that are not its children, such as those of a cluster, go on.
    """
    if os.getppid() != parent:
        return
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # `fit` sees it all the same, and saves

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
