"""Runs of a race in several processes: what workers get, do and give back."""

import csv
import importlib
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import joblib
import pytest
import torch

import cnf
from cnf.fields import VectorField
from cnf.race import runs, workers
from cnf.race.contestants import CONTESTANTS, Contestant, Stage
from cnf.race.report import page_of
from cnf.race.runs import Share
from cnf.training import checkpoint, learner
from cnf.training.interrupt import Interrupted
from cnf.transforms import Continuous

MOONS = cnf.data.toy("moons")
LIKELIHOOD = (Stage(cnf.MaximumLikelihood()),)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(importlib.import_module("cnf.race.compare"), "VALIDATION_POINTS", 100)


@pytest.fixture
def in_this_process(monkeypatch):
    """joblib's tasks run here, one after the other, when each result is asked for."""
    given = []

    def parallel(*arguments, **options):
        given.append((arguments, options))
        return lambda tasks: (task(*args, **named) for task, args, named in tasks)

    monkeypatch.setattr(joblib, "Parallel", parallel)
    monkeypatch.setattr(workers, "_die_with", lambda parent: None)
    return given


def planned(name="planar", seed=0, folder=None, **settings):
    settings = {"steps": 3, "validation_rows": 50, "progress": False, **settings}
    resume = "auto" if folder else False
    config = cnf.TrainConfig(**settings, seed=seed, folder=folder, resume=resume)
    contestant = name if isinstance(name, Contestant) else CONTESTANTS[name]
    return runs.Run(contestant.title, f"{contestant.title}, seed {seed}", contestant, config)


def train_all(planned, data=MOONS, folder=None, say=lambda _: None):
    found = workers.several_at_a_time(planned, data, 2, folder, False, say)
    return [(run, outcome()) for run, outcome in found]


def weights(flow):
    return torch.cat([p.detach().flatten() for p in flow.parameters()])


def race(contestants, **settings):
    settings = {"steps": 3, "progress": False, "w2_points": 20, "test_points": 30, **settings}
    return cnf.compare("moons", contestants, **settings)


def own_flow():
    class Local(VectorField):  # which no other process can import
        def __init__(self):
            super().__init__((2,))
            self.linear = torch.nn.Linear(2, 2)

        def forward(self, t, x, context=None):
            return self.linear(x)

    solver = cnf.Solver("rk4", steps=2)
    return cnf.Flow(None, Continuous(Local(), solver), event_shape=(2,))


def broken(dim):
    flow = cnf.models.planar(dim)
    flow.lock = threading.Lock()
    return flow


def nan_after_building(dim):
    flow = cnf.models.planar(dim)
    torch.nn.init.constant_(next(flow.parameters()), float("nan"))
    return flow


def test_workers_give_the_numbers_of_one_process_and_failures_cost_only_themselves():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sound = ["nsf", ("Local", own_flow(), cnf.FlowMatching())]
        failing = [
            ("Lambda", lambda dim: broken(dim), cnf.MaximumLikelihood()),
            ("NaN", nan_after_building, cnf.MaximumLikelihood()),
        ]
        lines = []
        several = race(sound + failing, workers=2, say=lines.append)
        one = race(sound)
    finally:
        torch.set_num_threads(threads)
    assert several.contestants == one.contestants == ["nsf", "Local"]
    for a, b in zip(several.entries, one.entries, strict=True):
        assert torch.equal(weights(a.flow), weights(b.flow))
        assert a.scores["gap"] == b.scores["gap"] and a.log_prob == b.log_prob
        assert a.scores["peak_memory_mb"] > 50
    assert type(several.flows["Local"].field) is type(one.flows["Local"].field)
    failed = several.settings["failed"]
    assert "model, objective or settings cannot be pickled" in failed["Lambda, seed 0"]
    assert "NaN" in failed["NaN, seed 0"] and len(failed) == 2
    assert several.settings["workers"] == 2 and "workers" not in one.settings
    assert several.settings["threads_per_worker"] == 1
    assert any("/4 NSF, seed 0: 3 steps, " in line for line in lines)


def test_runs_come_in_their_order_whoever_ends_first(monkeypatch, in_this_process):
    class Backwards:
        def __init__(self, *_, **__): ...

        def __call__(self, tasks):
            return (task(*args) for task, args, _ in reversed(list(tasks)))

    monkeypatch.setattr(joblib, "Parallel", Backwards)
    lines = []
    planned_runs = [planned(seed=seed) for seed in (0, 1, 2)]
    found = train_all(planned_runs, say=lines.append)
    assert [run.config.seed for run, _ in found] == [0, 1, 2]
    assert "1/3 Planar, seed 2: 3 steps, " in lines[1]
    for run, trained in found:
        assert torch.equal(weights(trained.flow), weights(run.train(MOONS).flow))


@pytest.mark.parametrize(
    "data",
    [
        MOONS,
        cnf.data.Points(torch.randn(80, 2, generator=torch.Generator().manual_seed(0))),
        torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        cnf.models.planar(2),
    ],
    ids=["toy", "points", "distribution", "flow"],
)
def test_data_of_every_kind_reach_the_workers(data, in_this_process):
    source = importlib.import_module("cnf.race.compare")._source(data)
    (run, trained), _ = train_all([planned(), planned(seed=1)], source)
    assert torch.equal(weights(trained.flow), weights(run.train(source).flow))


def test_contestant_that_fails_in_a_worker_tells_its_reason(monkeypatch, in_this_process):
    def fails(*_):
        raise cnf.SolverError("stiff", "loosen", t=0.5, nfe=3, settings="dopri5")

    monkeypatch.setattr(workers, "train", fails)
    found = workers.several_at_a_time([planned(), planned()], MOONS, 2, None, False, print)
    for _, outcome in found:
        with pytest.raises(RuntimeError, match=r"stiff at t=0.5 after 3 evaluations .* loosen"):
            outcome()


def test_warnings_of_a_worker_are_given_here_with_its_title(monkeypatch, in_this_process):
    def warns(flow, *_):
        warnings.warn("few rows", stacklevel=1)
        return runs.Trained(flow, [cnf.training.History(steps=1, seconds=1.0)], 1.0)

    monkeypatch.setattr(workers, "train", warns)
    with pytest.warns(UserWarning, match="Planar, seed 3: few rows"):
        train_all([planned(seed=3)])


def test_run_that_is_stopped_saves_and_goes_on_from_there(monkeypatch, tmp_path):
    fit, run = runs.fit, planned(folder=tmp_path / "run")
    parcel = workers._parcel(run, MOONS, workers._pickled(MOONS, ""), tmp_path / "stop")

    def stopped(*arguments):
        return fit(*arguments, callbacks=[lambda record: parcel.stop.touch()])

    monkeypatch.setattr(workers, "_die_with", lambda parent: None)
    monkeypatch.setattr(runs, "fit", stopped)
    assert workers._answer(0, parcel)[1].interrupted == signal.SIGTERM
    assert checkpoint.load_state(tmp_path / "run" / "stage-1")["budget"]["step"] == 1
    monkeypatch.setattr(runs, "fit", lambda *_: pytest.fail("begins though it is to stop"))
    assert workers._answer(0, parcel)[1].interrupted == signal.SIGTERM
    monkeypatch.setattr(runs, "fit", fit)
    parcel.stop.unlink()
    trained = workers._received(workers._answer(0, parcel)[1])
    assert torch.equal(weights(trained.flow), weights(planned().train(MOONS).flow))


def test_stop_file_that_a_killed_race_of_the_same_process_number_left_stops_nobody(
    in_this_process, tmp_path
):
    (tmp_path / f".stop-{os.getpid()}").touch()
    found = train_all([planned(), planned(seed=1)], folder=tmp_path)
    assert [trained.steps for _, trained in found] == [3, 3]


@pytest.fixture
def raced_by_two(monkeypatch, in_this_process, tmp_path):
    """(budget) → resumes, with other settings, a race whose two runs two workers have trained."""
    monkeypatch.setattr(joblib, "cpu_count", lambda: 2)
    threads = torch.get_num_threads()

    def begin(**budget):
        settings = {"steps": None, **budget, "folder": tmp_path / "race"}
        torch.set_num_threads(1)
        race(["planar"], **settings, seeds=(0, 1), workers=2)
        in_this_process.clear()
        return lambda **changes: race(["planar"], **settings, resume=True, **changes)

    yield begin
    torch.set_num_threads(threads)


UNEQUAL = (
    "these differ: 2 runs at a time with 1 thread each: Planar, seed 0 / Planar, seed 1; "
    r"1 run at a time with 2 threads: Planar, seed 2\. Resume with as many workers"
)


@pytest.mark.parametrize("expected", ["expected", "unknown"])
def test_seconds_on_other_shares_of_the_machine_are_warned_of_and_told(
    expected, raced_by_two, monkeypatch, tmp_path
):
    """Before training where the threads are known, else when all are trained."""
    resume = raced_by_two(seconds=0.05)
    torch.set_num_threads(2)
    if expected == "unknown":
        racing = importlib.import_module("cnf.race.compare")
        monkeypatch.setattr(racing, "expected_threads", lambda workers: None)
    else:
        with (
            monkeypatch.context() as patch,
            pytest.raises(InterruptedError),
            pytest.warns(UserWarning, match=UNEQUAL),
        ):
            patch.setattr(importlib.import_module("cnf.race.compare"), "_outcomes", interrupts)
            resume(seeds=(0, 1, 2), workers=1)
    with pytest.warns(UserWarning, match=UNEQUAL) as warned:
        results = resume(seeds=(0, 1, 2), workers=1)
    assert len(warned) == 1
    assert [entry.shares for entry in results.entries] == [[(2, 1)], [(2, 1)], [(1, 2)]]
    assert results.settings["workers"] == [2, 1]
    assert results.settings["threads_per_worker"] == [1, 2]
    text = (tmp_path / "race" / "results.csv").read_text()
    rows = list(csv.DictReader(text.splitlines()))
    assert [(row["workers"], row["threads"]) for row in rows] == [("2", "1")] * 2 + [("1", "2")]
    page = page_of(results, {})
    assert "1 run at a time with 2 threads: Planar, seed 2<" in page
    with pytest.warns(UserWarning, match=UNEQUAL):  # nobody is left, and the table is as mixed
        resume(seeds=(0, 1, 2), workers=1)


def interrupts(*_):
    raise InterruptedError


def test_run_that_is_left_has_the_share_of_the_others(raced_by_two, in_this_process, tmp_path):
    resume = raced_by_two(seconds=0.05)
    (tmp_path / "race/runs/planar-seed-1/entry.json").unlink()
    results = resume(seeds=(0, 1), workers=2)
    assert [arguments for arguments, _ in in_this_process] == [(2,)]
    assert results.shares() == {
        "2 runs at a time with 1 thread each": ["Planar, seed 0", "Planar, seed 1"]
    }
    assert (results.settings["workers"], results.settings["threads_per_worker"]) == (2, 1)
    assert "<dd>2 runs at a time with 1 thread each</dd>" in page_of(results, {})


def test_steps_on_other_shares_of_the_machine_are_not_warned_of(raced_by_two):
    results = raced_by_two(steps=3)(seeds=(0, 1, 2), workers=1)
    assert results.settings["workers"] == [2, 1] and len(results.shares()) == 2


def test_share_of_a_run_is_told_for_each_part_of_its_training(monkeypatch, tmp_path):
    fit, run = runs.fit, replace(planned(folder=tmp_path / "run"), workers=4)

    def stopped(flow, objective, data, config):
        config = replace(config, checkpoint_seconds=1e-9)
        return fit(flow, objective, data, config, callbacks=[stop])

    def stop(record):
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(runs, "fit", stopped)
        run.train(MOONS)
    shares = [Share(4, torch.get_num_threads()), Share(1, torch.get_num_threads())]
    assert replace(run, workers=1).train(MOONS).shares == shares
    assert replace(run, workers=2).train(MOONS).shares == shares  # which has nothing left to train
    (tmp_path / "run" / "trained.json").unlink()
    for state in (tmp_path / "run").rglob("state.pt"):
        state.unlink()
    assert runs.shares_with(tmp_path / "run", Share(3, 2)) == [Share(3, 2)]  # it begins anew


def test_signal_to_the_race_stops_its_workers_and_is_raised_when_they_have_ended(
    monkeypatch, in_this_process, tmp_path
):
    stops = []

    def interrupted(number, parcel):
        if not stops:
            signal.raise_signal(signal.SIGHUP)
        stops.append(parcel.stop.exists())
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr(workers, "_trained", interrupted)
    with pytest.raises(Interrupted) as ended:
        train_all([planned(), planned(seed=1)], folder=tmp_path)
    assert ended.value.number == signal.SIGHUP and stops == [True, True]
    assert not list(tmp_path.iterdir())


def test_dead_worker_is_told_in_words_with_the_way_on(monkeypatch, tmp_path):
    def dies(tasks):
        raise BrokenProcessPool("abruptly")
        yield

    monkeypatch.setattr(joblib, "Parallel", lambda *_, **__: dies)
    with pytest.raises(ChildProcessError, match="fewer than 2 workers.*resume the race in"):
        train_all([planned(), planned()], folder=tmp_path)


@pytest.mark.parametrize("backend", ["threading", "multiprocessing"])
def test_threads_and_forks_are_refused(backend):
    with joblib.parallel_config(backend=backend), pytest.raises(ValueError, match="fresh proc"):
        train_all([planned(), planned()])


def test_data_that_cannot_be_sent_are_refused_in_words(in_this_process):
    data = cnf.data.toy("rings")
    data.lock = threading.Lock()
    with pytest.raises(ValueError, match="the data cannot be pickled .* workers=1"):
        train_all([planned()], data)


@pytest.mark.parametrize(
    "cores, gpus, budget, words",
    [
        (1, 0, {"seconds": 5.0}, "2 workers need 2 cores for a budget in seconds, and find 1"),
        (2, 1, {"seconds": 5.0}, "2 workers need 2 GPUs for a budget in seconds, and find 1"),
        (2, 0, {"seconds": 5.0}, ""),
        (1, 0, {"steps": 5}, ""),
    ],
)
def test_seconds_on_shared_cores_are_warned_of(cores, gpus, budget, words, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        workers._warn_of_sharing([planned(**{"steps": None, **budget})] * 3, 2, cores)
    assert [words in str(warning.message) for warning in caught] == [True] * bool(words)


def test_runs_take_one_gpu_after_the_other(monkeypatch, in_this_process):
    """On a count of GPUs that are not there: which one each run takes, and that `fit` takes it."""
    current, taken = [0], []

    class Refuses:
        def __init__(self, accelerator, devices, **_):
            taken.append((current[0], devices))
            raise ValueError("no GPU")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: current.__setitem__(0, index))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(learner, "Fabric", Refuses)
    found = workers.several_at_a_time(
        [planned(seed=seed) for seed in range(3)], MOONS, 2, None, False, print
    )
    assert len(list(found)) == 3 and taken == [(0, [0]), (1, [1]), (0, [0])]


def test_memory_of_a_run_that_was_trained_but_not_scored_is_kept(monkeypatch, tmp_path):
    peaks = iter((5.0, 3.0))

    @contextmanager
    def peak(device):
        peak = next(peaks)
        yield lambda: peak

    monkeypatch.setattr("cnf.training.loop.peak_memory", peak)
    run = planned(folder=tmp_path / "run")
    assert [run.train(MOONS).memory for _ in range(2)] == [5.0, 5.0]


SCRIPT = """
import cnf, sys
cnf.compare("moons", ["planar", "radial"], steps=100_000, workers=2, progress=False,
            w2_points=20, test_points=30, folder=sys.argv[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_workers_of_a_killed_race_end(tmp_path):
    folder = tmp_path / "race"
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    race = subprocess.Popen([sys.executable, "-c", SCRIPT, str(folder)], env=environment)
    wait_for(lambda: len(list(folder.glob("runs/*/stage-1/manifest.json"))) == 2)
    children = Path(f"/proc/{race.pid}/task/{race.pid}/children").read_text().split()
    assert len(children) >= 2
    race.kill()
    race.wait()
    wait_for(lambda: not any(alive(child) for child in children))


def alive(process):
    path = Path(f"/proc/{process}/stat")
    return path.exists() and path.read_text().split(") ")[1][0] != "Z"


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.1)
