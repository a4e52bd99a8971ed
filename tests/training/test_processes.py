"""Training in two processes, by torchrun and Fabric: same weights as in one."""

import contextlib
import os
import signal
import subprocess

import pytest
import torch

from tests.training.process_runs import RUNS, command, environment, metrics, weights

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("launcher", ["torchrun", "fabric"])
@pytest.mark.parametrize("name", RUNS["replicated"])
def test_two_processes_give_the_same_weights_as_one(launcher, name, launched):
    (alone, _), (folder, said) = launched("replicated", "one"), launched("replicated", launcher)
    one, two = weights(alone / name), weights(folder / name)
    assert one.dtype == torch.float64
    # float64; Adam divides by small √v, and weights are summed in another order
    atol = 1e-8 if name == "weighted" else 1e-10
    torch.testing.assert_close(one, two, rtol=0, atol=atol)
    lines = [line for line in said if line.startswith(name)]
    assert len(lines) == 2 and lines[0] == lines[1]  # both hold the kept weights afterwards


@pytest.mark.parametrize("name", [name for name in RUNS["replicated"] if name != "nan-in-one"])
def test_metrics_of_two_processes_are_of_all_rows(name, launched):
    """A weighted run has shares that differ."""
    one, two = (metrics(launched("replicated", by)[0] / name) for by in ("one", "fabric"))
    assert len(one) == len(two) > 1
    for alone, both in zip(one, two, strict=True):
        assert alone.keys() == both.keys()
        same = [key for key in alone if key not in ("seconds", "nfe") and alone[key]]
        assert "loss" in same
        assert [float(both[k]) for k in same] == pytest.approx([float(alone[k]) for k in same])


def test_glow_resumed_by_two_processes_equals_uninterrupted_training(launched):
    folder = launched("replicated", "fabric")[0]
    assert torch.equal(weights(folder / "actnorm"), weights(folder / "resumed"))


def test_processes_with_other_clocks_have_one_learning_rate_and_end_together(launched):
    _, said = launched("timed", "fabric")
    first, second = (line for line in said if line.startswith("timed"))
    assert first == second


def test_only_the_first_process_writes(launched):
    folder = launched("replicated", "fabric")[0] / "flow-matching"
    files = {p.name for p in folder.rglob("*") if p.is_file()}
    events = {name for name in files if name.startswith("events.out")}
    assert len(events) == 1
    assert files - events == {
        ".lock", "config.yaml", "manifest.json", "metrics.csv", "flow.safetensors", "state.pt",
    }  # fmt: skip
    assert '"processes": 2' in (folder / "manifest.json").read_text()


def test_existing_folder_stops_both_processes(tmp_path):
    """The second must not wait for a first that has gone."""
    (tmp_path / "flow-matching").mkdir()
    (tmp_path / "flow-matching" / "mine").write_text("mine")
    with subprocess.Popen(
        command("replicated", tmp_path, "fabric"), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, env=environment(), start_new_session=True,
    ) as process:  # fmt: skip
        try:
            _, errors = process.communicate(timeout=60)  # returns once no process holds the pipe
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "exists already" in errors
