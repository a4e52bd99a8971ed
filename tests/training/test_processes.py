"""Training in two processes, by torchrun and Fabric: same weights as in one."""

import contextlib
import csv
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch

import cnf

pytestmark = pytest.mark.slow

SCRIPT = """
import os
import signal
import sys
import torch
import cnf
from cnf.training import shards, validation

torch.set_num_threads(1)
validation.AT_ONCE = (4, 2**16)  # so that there is something to share


class Bad(cnf.MaximumLikelihood):  # of the last process, whose gradient does not tell
    calls = []

    def __call__(self, module, batch, generator=None):
        loss = super().__call__(module, batch, generator)
        if not torch.is_grad_enabled():
            return loss
        self.calls.append(len(batch.x))
        last = int(os.environ.get("LOCAL_RANK", 0)) == devices - 1
        bad = last and len(self.calls) in (3, 5)
        return cnf.Loss(loss.value + float("nan"), loss.metrics) if bad else loss


def stop(record):
    if record["step"] == 4:
        signal.raise_signal(signal.SIGTERM)


out, devices = sys.argv[1], int(sys.argv[2])
rows = torch.randn(64, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
runs = {
    "flow-matching": (cnf.FlowMatching(), cnf.data.toy("moons")),
    "likelihood": (cnf.MaximumLikelihood(), rows),
    "hutchinson": (cnf.MaximumLikelihood(divergence="hutchinson"), list(rows.split(16))),
    "weighted": (cnf.FlowMatching(), rows),
    "semidiscrete": (cnf.FlowMatching(coupling={"name": "semidiscrete", "steps": 20}), rows),
    "actnorm": (cnf.MaximumLikelihood(), rows),
    "resumed": (cnf.MaximumLikelihood(), rows),
    "nan-in-one": (Bad(), rows),
    "probes": (cnf.FlowMatching(), rows),
    "patience": (cnf.FlowMatching(), rows),
}
solver = cnf.Solver("rk4", steps=2, gradient="backprop")
for name, (objective, data) in runs.items():
    torch.manual_seed(7)
    few = name in ("hutchinson", "weighted", "actnorm", "resumed")
    shards.LEAST["cpu"] = 40 if few else 2**16  # numbers of a shard: four shards, or one
    if name in ("actnorm", "resumed", "nan-in-one"):
        flow = cnf.models.build("glow", dim=2, hidden=(8,), layers=2, preprocess=None).double()
    else:
        flow = cnf.models.build("cnf", dim=2, hidden=(8,), solver=solver).double()
    config = cnf.TrainConfig(
        steps=8, batch_size=16, device="cpu", devices=devices,
        strategy="ddp" if devices > 1 else "auto", folder=f"{out}/{name}", progress=False,
        validation_rows=50, lr=1e-2, patience=5, checkpoint_seconds=1e-9,
        validation_divergence="hutchinson" if name == "probes" else None,
    )
    if name == "patience":
        config.patience, config.lr = 3, 1.0
    weight = 1.0 + (rows[:, 0] > 0).double() if name == "weighted" else None
    if name == "resumed":
        assert cnf.fit(flow, objective, data, config, callbacks=[stop]).reason == "interrupted"
        config.resume = True
        for p in flow.parameters():
            torch.nn.init.zeros_(p)
    records = []
    history = cnf.fit(flow, objective, data, config, weight=weight, callbacks=[records.append])
    assert history.reason == "patience" or name != "patience"
    assert history.skipped == (2 if name == "nan-in-one" else 0)
    assert bool(records) == (int(os.environ.get("LOCAL_RANK", 0)) == 0)  # the first one tells
    x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
    # One write: two processes share the pipe, and print writes its newline by itself.
    sys.stdout.write(f"{name} {history.steps} steps, {flow.log_prob(x).sum().item():.12f}\\n")
    sys.stdout.flush()
"""
RUNS = [
    "flow-matching", "likelihood", "hutchinson", "weighted", "semidiscrete", "actnorm", "resumed",
    "nan-in-one", "probes", "patience",
]  # fmt: skip


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def environment():
    """This process's, without what another launcher may have left there."""
    left = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "TORCHELASTIC", "SLURM", "NODE_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(left)}
    path = os.pathsep.join([os.getcwd(), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "MASTER_PORT": str(free_port())}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """launcher → (the folder of its three runs, what it printed); each is started once."""
    done = {}

    def launch(launcher):
        if launcher in done:
            return done[launcher]
        folder = tmp_path_factory.mktemp(launcher)
        path = folder / "script.py"
        path.write_text(SCRIPT)
        devices = 1 if launcher == "one" else 2
        command = [sys.executable, str(path), str(folder), str(devices)]
        if launcher == "torchrun":
            torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
            command[1:1] = [*torchrun, str(free_port())]
        env = environment()
        run = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
        assert run.returncode == 0, run.stdout + run.stderr
        done[launcher] = folder, run.stdout
        return done[launcher]

    return launch


def metrics(folder):
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(folder):
    flow = cnf.load(folder)
    return torch.cat([p.detach().flatten() for p in flow.parameters()])


@pytest.mark.parametrize("launcher", ["torchrun", "fabric"])
@pytest.mark.parametrize("name", RUNS)
def test_two_processes_give_the_same_weights_as_one(launcher, name, launched):
    (alone, _), (folder, said) = launched("one"), launched(launcher)
    one, two = weights(alone / name), weights(folder / name)
    assert one.dtype == torch.float64
    # float64; Adam divides by small √v, and weights are summed in another order
    atol = 1e-8 if name == "weighted" else 1e-10
    torch.testing.assert_close(one, two, rtol=0, atol=atol)
    lines = [line for line in said.splitlines() if line.startswith(name)]
    assert len(lines) == 2 and lines[0] == lines[1]  # both hold the kept weights afterwards


@pytest.mark.parametrize("name", [name for name in RUNS if name != "nan-in-one"])
def test_metrics_of_two_processes_are_of_all_rows(name, launched):
    """A weighted run has shares that differ."""
    one, two = (metrics(launched(launcher)[0] / name) for launcher in ("one", "fabric"))
    assert len(one) == len(two) > 1
    for alone, both in zip(one, two, strict=True):
        assert alone.keys() == both.keys()
        same = [key for key in alone if key not in ("seconds", "nfe") and alone[key]]
        assert "loss" in same
        assert [float(both[k]) for k in same] == pytest.approx([float(alone[k]) for k in same])


def test_glow_resumed_by_two_processes_equals_uninterrupted_training(launched):
    folder = launched("fabric")[0]
    assert torch.equal(weights(folder / "actnorm"), weights(folder / "resumed"))


def test_only_the_first_process_writes(launched):
    folder = launched("fabric")[0] / "flow-matching"
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
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    command = [sys.executable, str(path), str(tmp_path), "2"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(),
        start_new_session=True,
    ) as process:  # fmt: skip
        try:
            _, errors = process.communicate(timeout=60)  # returns once no process holds the pipe
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode != 0
    assert "exists already" in errors
