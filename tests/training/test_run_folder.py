"""A run's folder: its settings, metrics, checkpoints and results."""

import csv
import errno
import json
import os
import re
import sys

import pytest
import torch
import yaml

import cnf
from cnf.training.memory import peak_memory
from cnf.training.origin import configuration


@pytest.fixture
def run(small, config, tmp_path):
    flow = small()
    folder = tmp_path / "deep" / "run"
    toy = cnf.data.toy("moons")
    history = cnf.fit(flow, cnf.FlowMatching(), toy, config(steps=20, folder=folder, seed=4))
    return flow, folder, history


def test_folder_holds_the_promised_files_and_no_others(run):
    _, folder, _ = run
    assert sorted(os.listdir(folder)) == [
        ".lock", "checkpoints", "config.yaml", "figures", "manifest.json", "metrics.csv",
        "tensorboard",
    ]  # fmt: skip
    assert sorted(os.listdir(folder / "checkpoints")) == ["flow.safetensors", "state.pt"]
    assert os.listdir(folder / "figures") == []


def test_config_holds_all_settings_of_the_run(run):
    _, folder, _ = run
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["data"] == "moons" and written["model"] == "cnf"
    assert written["objective"] == "flow-matching"
    assert written["options"]["hidden"] == [8] and written["options"]["dim"] == 2
    assert written["options"]["solver"]["method"] == "rk4"
    assert (written["steps"], written["seed"], written["batch_size"]) == (20, 4, 16)
    settings = set(cnf.TrainConfig.__dataclass_fields__) - {"folder", "resume"}
    assert settings <= set(written)


def test_manifest_names_versions_machine_seed_steps_and_time(run):
    _, folder, history = run
    manifest = json.loads((folder / "manifest.json").read_text())
    for package in ("cnf", "torch", "torchdiffeq", "numpy", "python"):
        assert re.match(r"\d+\.\d+", manifest[package])
    assert manifest["revision"] is None or re.fullmatch(r"[0-9a-f]{12}\+?", manifest["revision"])
    assert (manifest["seed"], manifest["steps"], manifest["ended"]) == (4, 20, "budget")
    assert (manifest["device"], manifest["processes"], manifest["threads"]) == ("cpu", 1, 1)
    assert manifest["seconds"] == pytest.approx(history.seconds, abs=1e-3)
    assert manifest["parameters"] == sum(p.numel() for p in run[0].parameters())
    assert manifest["skipped_steps"] == 0
    assert manifest["learning_rate"] == cnf.FlowMatching().learning_rate(run[0])


def test_metrics_file_equals_the_history(run):
    _, folder, history = run
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(1, 21))
    assert [float(row["loss"]) for row in rows] == history.column("loss")
    scores = [float(row["val_nll"]) for row in rows if row["val_nll"]]
    assert scores == history.column("val_nll") and len(scores) == 10
    assert {"seconds", "lr", "nfe", "fm"} <= rows[0].keys()


def test_tensorboard_file_holds_loss_and_score(run):
    _, folder, history = run
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, 21))
    assert [event.value for event in losses] == pytest.approx(history.column("loss"))
    assert len(events.Scalars("val_nll")) == 10


def test_load_accepts_run_folder_checkpoint_folder_and_file(run, points):
    flow, folder, _ = run
    expected = flow.log_prob(points)
    checkpoints = folder / "checkpoints"
    for path in (folder, str(folder), checkpoints, checkpoints / "flow.safetensors"):
        assert torch.equal(cnf.load(path).log_prob(points), expected)


def test_hand_built_flow_trains_with_a_folder_and_loads_with_into(small, config, points, tmp_path):
    def by_hand():
        return cnf.Flow(None, small("realnvp").transform, event_shape=(2,))

    flow, folder = by_hand(), tmp_path / "run"
    cnf.fit(flow, cnf.MaximumLikelihood(), points, config(folder=folder))
    with pytest.raises(cnf.CheckpointError, match="into="):
        cnf.load(folder)
    assert torch.equal(cnf.load(folder, into=by_hand()).log_prob(points), flow.log_prob(points))


def test_numpy_numbers_in_settings_are_written_as_numbers(small, config, points, tmp_path):
    numpy = pytest.importorskip("numpy")
    folder = tmp_path / "run"
    settings = config(lr=numpy.float64(1e-3), seed=numpy.int64(3), folder=folder)
    cnf.fit(small(), cnf.FlowMatching(), points, settings)
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert (written["lr"], written["seed"]) == (1e-3, 3)


def test_settings_of_an_objective_are_written(small, config, points, tmp_path):
    objective = cnf.MaximumLikelihood(
        divergence=cnf.Hutchinson(probes=2), penalties={"kinetic": 0.1}
    )
    cnf.fit(small(), objective, points, config(folder=tmp_path / "run"))
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    again = cnf.objectives.OBJECTIVES[written["objective"]](**written["objective_options"])
    assert again == objective


def test_existing_folder_is_refused_and_not_changed(run, small, config, points):
    _, folder, _ = run
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(ValueError, match=f"{folder} exists already; .*resume"):
        cnf.fit(small(), cnf.FlowMatching(), points, config(folder=folder))
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_empty_folder_is_accepted(small, config, points, tmp_path):
    cnf.fit(small(), cnf.FlowMatching(), points, config(folder=tmp_path))
    assert (tmp_path / "manifest.json").is_file()


@pytest.mark.parametrize("where", ["a file", "under a file"])
def test_folder_that_cannot_be_created_is_refused(where, small, config, points, tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    folder = file if where == "a file" else file / "run"
    with pytest.raises((cnf.CheckpointError, ValueError), match=str(folder)):
        cnf.fit(small(), cnf.FlowMatching(), points, config(folder=folder))
    assert file.read_text() == "mine"


def test_run_refused_before_its_first_step_leaves_no_folder(config, points, tmp_path, small):
    with pytest.raises(TypeError, match="MaximumLikelihood"):
        settings = config(folder=tmp_path / "run")
        cnf.fit(small("realnvp"), cnf.FlowMatching(), points, settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("file", ["metrics.csv", "flow.safetensors", "state.pt", "config.yaml"])
def test_full_disk_during_a_run_ends_in_a_one_line_error(
    file, small, config, acting_data, tmp_path, monkeypatch
):
    replace, folder = os.replace, tmp_path / "run"
    filled = []

    def refuse(source, target):
        if filled and str(target).endswith(file):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    data, _ = acting_data("toy", lambda: filled.append(True))
    settings = config(folder=folder, checkpoint_seconds=1e-9)
    with pytest.raises(cnf.CheckpointError, match="No space left") as raised:
        cnf.fit(small(), cnf.FlowMatching(), data, settings)
    assert "\n" not in str(raised.value)
    assert not [p for p in folder.rglob("*") if p.name.endswith(".tmp")]
    cnf.load(folder)  # what was there is kept, whole


def test_part_of_a_table_that_is_set_aside_is_reported(small, config, tmp_path):
    (tmp_path / "x.csv").write_text("a,b\n" + "".join(f"{k},{k * k}.5\n" for k in range(20)))
    rest, _ = cnf.data.load(tmp_path / "x.csv").split(0.3)
    options = configuration(small(), cnf.FlowMatching(), rest, config())
    assert options["test"] == 0.3 and options["columns"] == ["a", "b"]


def test_manifest_tells_rows_a_second_and_evaluations_a_step(small, config, points, tmp_path):
    objective = cnf.MaximumLikelihood(solver=cnf.Solver("rk4", steps=3, gradient="adjoint"))
    settings = config(steps=4, batch_size=16, validations=0, folder=tmp_path / "run")
    cnf.fit(small(), objective, points, settings)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["rows_per_second"] * manifest["seconds"] == pytest.approx(64, rel=0.01)
    assert manifest["evaluations_per_step"]["forward"] == 12
    assert manifest["evaluations_per_step"]["backward"] >= 12


def test_memory_is_told_where_the_peak_cannot_begin_anew(monkeypatch):
    """Some containers do not let a process write to /proc/self/clear_refs."""

    def refuse(self, text):
        raise PermissionError(self)

    monkeypatch.setattr("pathlib.Path.write_text", refuse)
    with peak_memory(torch.device("cpu")) as peak:
        found = peak()
    assert found > 10 or sys.platform != "linux"
