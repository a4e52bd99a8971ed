"""How a run ends: by a signal, an error, divergence or a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch.distributions import Independent, Uniform

import cnf
from cnf.training import checkpoint
from cnf.training.run import Run
from cnf.training.validation import Validation

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]


@pytest.fixture(autouse=True)
def hangup():
    """SIGHUP as a terminal has it, also where the tests themselves run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def manifest(tmp_path):
    return lambda: json.loads((tmp_path / "run" / "manifest.json").read_text())


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_saves_and_stops_the_run(number, small, config, acting_data, manifest, tmp_path):
    data, _ = acting_data("toy", lambda: signal.raise_signal(number))
    before = [signal.getsignal(each) for each in SIGNALS]
    told = f"{signal.Signals(number).name} ended training at step 4"
    with pytest.warns(UserWarning, match=told):  # as no progress bar tells it
        history = cnf.fit(small(), cnf.FlowMatching(), data, config(folder=tmp_path / "run"))
    assert (history.reason, history.signal, history.steps) == ("interrupted", number, 4)
    assert checkpoint.load_state(tmp_path / "run")["budget"]["step"] == 4
    assert manifest()["ended"] == "interrupted"
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_interrupted_before_its_first_validation_patience_keeps_what_was_trained(
    small, config, acting_data
):
    data, _ = acting_data("toy", lambda: signal.raise_signal(signal.SIGINT))
    flow = small()
    history = cnf.fit(flow, cnf.FlowMatching(), data, config(patience=3, validations=1))
    assert history.reason == "interrupted" and not history.column("val_nll")
    pairs = zip(flow.parameters(), small().parameters(), strict=True)
    assert not all(torch.equal(trained, first) for trained, first in pairs)


def test_hangup_signal_ignored_by_nohup_stays_ignored(small, config, acting_data):
    data, _ = acting_data("toy", lambda: signal.raise_signal(signal.SIGHUP))
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        history = cnf.fit(small(), cnf.FlowMatching(), data, config())
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (history.reason, history.steps) == ("budget", 6)


def test_manifest_tells_the_peak_memory_of_the_process(small, config, manifest, tmp_path):
    held = torch.ones(2**24, dtype=torch.float64)
    cnf.fit(small(), cnf.FlowMatching(), "moons", config(folder=tmp_path / "run"))
    assert held.nbytes < manifest()["peak_process_bytes"] < 2**40


def test_own_handler_of_the_user_signal_stays_in_place(small, config, acting_data):
    data, _ = acting_data("toy", lambda: signal.raise_signal(signal.SIGUSR1))
    received = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))
    try:
        history = cnf.fit(small(), cnf.FlowMatching(), data, config())
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert (history.reason, received) == ("budget", [signal.SIGUSR1])


def test_validation_that_takes_longer_than_training_warns(
    small, config, monkeypatch, manifest, capsys, tmp_path
):
    monkeypatch.setattr("cnf.training.loop.SLOW", 0)
    monkeypatch.setattr(Validation, "score", lambda *_: time.sleep(0.6) or 1.0)
    settings = config(steps=1, validations=1, progress=True, folder=tmp_path / "run")
    history = cnf.fit(small(), cnf.FlowMatching(), "moons", settings)
    assert history.validating >= 0.6 > history.seconds
    assert manifest()["validation_seconds"] == pytest.approx(history.validating, abs=1e-3)
    said = " ".join(capsys.readouterr().out.split())
    assert "Validation took 1 s, training 0." in said
    assert "(validations=1, validation_rows=50)." in said


def test_validation_waits_while_it_has_taken_longer_than_training(
    small, config, monkeypatch, capsys
):
    monkeypatch.setattr("cnf.training.loop.SLOW", 0)
    monkeypatch.setattr(Validation, "score", slow_score)
    settings = config(steps=6, validations=6, progress=True)
    history = cnf.fit(small(), cnf.FlowMatching(), "moons", settings)
    scored = [record["step"] for record in history.records if "val_loss" in record]
    assert scored == [1, 6]
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("the next waits until training has caught up") == 1
    settings = config(steps=6, validations=6, patience=9)  # it decides when training ends
    with pytest.warns(UserWarning, match="no validation was better"):
        history = cnf.fit(small(), cnf.FlowMatching(), "moons", settings)
    assert sum("val_nll" in record for record in history.records) == 6


def slow_score(validation, module, fraction):
    time.sleep(0.6)
    validation.count_done(fraction)
    return 1.0


def run_out_of_memory():
    raise MemoryError("no room")


def test_run_that_fails_leaves_metrics_and_a_manifest_that_says_so(
    small, config, acting_data, manifest, tmp_path
):
    data, _ = acting_data("toy", run_out_of_memory)
    with pytest.raises(MemoryError):
        cnf.fit(small(), cnf.FlowMatching(), data, config(folder=tmp_path / "run"))
    written = manifest()
    assert (written["ended"], written["steps"]) == ("failed", 3)
    assert written["error"] == "MemoryError: no room"
    assert len((tmp_path / "run" / "metrics.csv").read_text().splitlines()) == 1 + 3


def test_divergence_error_keeps_the_last_finite_checkpoint(
    config, broken, points, manifest, tmp_path
):
    folder = tmp_path / "run"
    settings = config(steps=90, folder=folder, checkpoint_seconds=1e-9, ema=None)
    with pytest.raises(cnf.DivergedError, match="lower lr="):
        cnf.fit(torch.nn.Linear(2, 2), broken(range(3, 90)), points, settings)
    assert manifest()["ended"] == "diverged" and "lower lr=" in manifest()["error"]
    state = checkpoint.load_state(folder)
    assert all(torch.isfinite(value).all() for value in state["learner"]["module"].values())
    assert state["budget"]["step"] == 3 + 19


def test_nan_weights_never_replace_a_checkpoint(
    small, config, points, acting_data, manifest, tmp_path
):
    flow = small()
    data, _ = acting_data(
        "toy", lambda: torch.nn.init.constant_(next(flow.parameters()), torch.nan)
    )

    class Blind(cnf.FlowMatching):
        def __call__(self, module, batch, generator=None):
            value = sum(p.nan_to_num().square().sum() for p in module.parameters())
            return cnf.Loss(value, {})

    settings = config(folder=tmp_path / "run", checkpoint_seconds=1e-9, validations=0)
    with pytest.raises(cnf.DivergedError, match="is NaN or infinite at step 4"):
        cnf.fit(flow, Blind(), data, settings)
    assert manifest()["ended"] == "diverged"
    assert checkpoint.load_state(tmp_path / "run")["budget"]["step"] == 3
    cnf.load(tmp_path / "run")


def stiff():
    raise cnf.SolverError("the field is stiff", "loosen rtol", t=0.5, nfe=3, settings="dopri5")


def test_ode_that_becomes_unsolvable_in_training_is_a_divergence_error(
    small, config, acting_data, manifest, tmp_path
):
    data, _ = acting_data("toy", stiff)
    with pytest.raises(cnf.DivergedError, match="weights of step 3 .* lower lr=") as raised:
        cnf.fit(small(), cnf.FlowMatching(), data, config(folder=tmp_path / "run"))
    assert isinstance(raised.value.__cause__, cnf.SolverError)
    assert manifest()["ended"] == "diverged"


def test_ode_that_fails_at_the_first_step_is_a_solver_error(small, config, points):
    class Stiff(cnf.FlowMatching):
        def __call__(self, module, batch, generator=None):
            return stiff()

    with pytest.raises(cnf.SolverError, match="stiff"):
        cnf.fit(small(), Stiff(), points, config())


def test_refused_resume_does_not_change_the_manifest(small, config, points, manifest, tmp_path):
    settings = {"folder": tmp_path / "run"}
    cnf.fit(small(), cnf.FlowMatching(), points, config(**settings))
    with pytest.raises(cnf.CheckpointError, match="is another run: seed was 0, is 1"):
        cnf.fit(small(), cnf.FlowMatching(), points, config(resume=True, seed=1, **settings))
    assert manifest()["ended"] == "budget"


def test_resume_auto_starts_and_then_resumes_a_run(small, config, acting_data, same, tmp_path):
    data, whole = acting_data("toy", lambda: signal.raise_signal(signal.SIGTERM))
    settings = config(folder=tmp_path / "run", resume="auto")
    assert cnf.fit(small(), cnf.FlowMatching(), data, settings).steps == 4
    resumed, straight = small(), small()
    assert cnf.fit(resumed, cnf.FlowMatching(), whole, settings).steps == 6
    cnf.fit(straight, cnf.FlowMatching(), whole, config())
    assert same(resumed, straight)


@pytest.mark.parametrize("resume", [False, "auto"])
def test_run_killed_before_its_first_checkpoint_can_be_restarted(
    resume, small, config, points, monkeypatch, tmp_path
):
    settings = config(folder=tmp_path / "run", resume=resume)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "save", lambda *_: run_out_of_memory())
        with pytest.raises(MemoryError):
            cnf.fit(small(), cnf.FlowMatching(), points, settings)
    assert (tmp_path / "run" / "manifest.json").is_file()
    assert cnf.fit(small(), cnf.FlowMatching(), points, settings).steps == 6


@pytest.mark.parametrize("name", ["config.yaml", "mine.txt"])
def test_run_never_starts_in_a_folder_with_other_files(name, small, config, points, tmp_path):
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        cnf.fit(small(), cnf.FlowMatching(), points, config(folder=tmp_path, resume="auto"))
    assert (tmp_path / name).read_text() == "mine"


def test_temporary_files_of_dead_processes_are_removed(small, config, points, tmp_path):
    folder = tmp_path / "run"
    cnf.fit(small(), cnf.FlowMatching(), points, config(folder=folder))
    for place in (folder / ".config.yaml.1.tmp", folder / "checkpoints" / ".state.pt.1.tmp"):
        place.write_text("half")
    cnf.fit(small(), cnf.FlowMatching(), points, config(folder=folder, resume=True))
    assert not [path for path in folder.rglob("*") if path.suffix == ".tmp"]


def test_folder_in_use_by_another_process_is_refused(small, config, points, tmp_path):
    folder = tmp_path / "run"
    hold = "import sys; from cnf.training.run import lock; from pathlib import Path\n"
    hold += "held = lock(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()"
    cnf.fit(small(), cnf.FlowMatching(), points, config(folder=folder))
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", hold, str(folder)]
    settings = config(folder=folder, resume=True)
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(cnf.CheckpointError, match=f"being written by process {other.pid} on"):
            cnf.fit(small(), cnf.FlowMatching(), points, settings)
        other.kill()
    cnf.fit(small(), cnf.FlowMatching(), points, settings)  # the lock of the dead is no lock


ODD = ["$x$ 50% [/b] 'a' \"b\"", "two\nlines", "Größe 数据", "x" * 200]


@pytest.mark.parametrize("name", ODD)
def test_run_in_a_folder_of_any_name_is_saved_and_resumed(
    name, small, config, acting_data, capsys, tmp_path
):
    data, whole = acting_data("toy", lambda: signal.raise_signal(signal.SIGINT))
    settings = {"folder": tmp_path / name, "progress": True}
    cnf.fit(small(), cnf.FlowMatching(), data, config(**settings))
    said = "".join(capsys.readouterr().out.split())
    assert "".join(str(tmp_path / name).split()) in said
    history = cnf.fit(small(), cnf.FlowMatching(), whole, config(resume=True, **settings))
    assert history.steps == 6
    cnf.load(tmp_path / name)


def test_read_only_folder_is_a_checkpoint_error(small, config, points, monkeypatch, tmp_path):
    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")  # as a test may run as root

    monkeypatch.setattr("pathlib.Path.mkdir", denied)
    with pytest.raises(cnf.CheckpointError, match="Permission denied"):
        cnf.fit(small(), cnf.FlowMatching(), points, config(folder=tmp_path / "run"))
    assert os.listdir(tmp_path) == []


@pytest.fixture
def boxed(small):
    """A flow on a base that has no density beyond 1."""
    box = Independent(Uniform(torch.zeros(2), torch.ones(2)), 1)
    return cnf.Flow(box, small().transform, event_shape=(2,))


def test_error_for_data_outside_of_a_bounded_base_names_its_support(boxed, points, config):
    settings = config(steps=30, validations=0)
    words = r"loss inf\); \d+ of 16 rows are mapped.*Interval\(.*take a base without bounds"
    with pytest.raises(cnf.DivergedError, match=words):
        cnf.fit(boxed, "maximum-likelihood", points, settings)


def test_infinite_held_out_score_of_a_bounded_base_warns_once(boxed, points, config):
    with pytest.warns(UserWarning, match="held-out NLL is infinite: .* base's support") as caught:
        cnf.fit(boxed, "flow-matching", points, config(validations=3))
    assert sum("base's support" in str(one.message) for one in caught) == 1
