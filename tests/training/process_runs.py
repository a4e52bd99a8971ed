"""Runs of `fit` that one process or two train, and how tests start them.

As a script, `process_runs.py KIND FOLDER PROCESSES` trains the runs of a kind, each in a folder of
its own, and every process prints what it came to.
"""

import csv
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import cnf
from cnf.objectives import Objective
from cnf.training import shards, validation
from cnf.training.learner import launch_fabric
from cnf.training.learners import learner_for

RUNS = {
    "replicated": (
        "flow-matching", "likelihood", "hutchinson", "weighted", "semidiscrete", "actnorm",
        "resumed", "nan-in-one", "probes", "patience",
    ),
    "sharded": (
        "mlp", "unet", "accumulated", "patient", "unaveraged", "resumed", "nan-in-one",
    ),
    "timed": ("timed",),
}  # fmt: skip
LAUNCHERS = {"one": 1, "fabric": 2, "torchrun": 2}  # and the processes that they start


def command(kind: str, folder: Path, launcher: str) -> list[str]:
    """What starts the runs of a kind."""
    script = [__file__, kind, str(folder), str(LAUNCHERS[launcher])]
    if launcher == "torchrun":
        torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port"]
        return [sys.executable, *torchrun, str(_free_port()), *script]
    return [sys.executable, *script]


def environment() -> dict[str, str]:
    """This process's, without what another launcher may have left there."""
    left = ("RANK", "WORLD_SIZE", "MASTER_", "LOCAL_", "GROUP_", "TORCHELASTIC", "SLURM", "NODE_")
    kept = {k: v for k, v in os.environ.items() if not k.startswith(left)}
    path = os.pathsep.join([os.getcwd(), *filter(None, [kept.get("PYTHONPATH")])])
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "MASTER_PORT": str(_free_port())}


def launch(kind: str, folder: Path, launcher: str) -> list[str]:
    """Train the runs of a kind in a folder; the lines that all processes printed."""
    run = subprocess.run(
        command(kind, folder, launcher), capture_output=True, text=True, timeout=240,
        env=environment(),
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.splitlines()


def metrics(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def weights(folder: Path) -> torch.Tensor:
    """All weights of a run's flow."""
    return torch.cat([p.detach().flatten() for p in cnf.load(folder).parameters()])


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


class _BadInLast:
    """The loss of the last process is NaN in two steps, without its gradient being so."""

    processes = 1
    calls = 0

    def __call__(self, module: nn.Module, batch: Any, generator: Any = None) -> cnf.Loss:
        loss = super().__call__(module, batch, generator)  # pyright: ignore
        if not torch.is_grad_enabled():
            return loss
        _BadInLast.calls += 1
        bad = _rank() == _BadInLast.processes - 1 and _BadInLast.calls in (3, 5)
        return cnf.Loss(loss.value + float("nan"), loss.metrics) if bad else loss


class BadLikelihood(_BadInLast, cnf.MaximumLikelihood):
    """Likelihood with two bad steps."""


class BadMatching(_BadInLast, cnf.FlowMatching):
    """Flow matching with two bad steps."""


def _rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")  # one write: processes share the pipe, and print makes two
    sys.stdout.flush()


def _interrupt(
    flow: cnf.Flow, objective: Objective, data: Any, config: cnf.TrainConfig, step: int
) -> None:
    """Begin a run that a signal ends in a step, to be resumed with the config."""

    def stop(record: dict) -> None:
        if record["step"] == step:
            signal.raise_signal(signal.SIGTERM)

    history = cnf.fit(flow, objective, data, config, callbacks=[stop])
    assert history.reason == "interrupted"
    config.resume = True


def _set_to_zero(flow: cnf.Flow) -> None:
    for parameter in flow.parameters():
        nn.init.zeros_(parameter)


def replicated(out: str, devices: int) -> None:
    """Runs in which each process holds all weights."""
    validation.AT_ONCE = (4, 2**16)  # so that there is something to share
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(64, 2, generator=generator, dtype=torch.float64)
    semidiscrete = {"name": "semidiscrete", "steps": 20}
    runs = {
        "flow-matching": (cnf.FlowMatching(), cnf.data.toy("moons")),
        "likelihood": (cnf.MaximumLikelihood(), rows),
        "hutchinson": (cnf.MaximumLikelihood(divergence="hutchinson"), list(rows.split(16))),
        "weighted": (cnf.FlowMatching(), rows),
        "semidiscrete": (cnf.FlowMatching(coupling=semidiscrete), rows),
        "actnorm": (cnf.MaximumLikelihood(), rows),
        "resumed": (cnf.MaximumLikelihood(), rows),
        "nan-in-one": (BadLikelihood(), rows),
        "probes": (cnf.FlowMatching(), rows),
        "patience": (cnf.FlowMatching(), rows),
    }
    solver = cnf.Solver("rk4", steps=2, gradient="backprop")
    for name in RUNS["replicated"]:
        objective, data = runs[name]
        torch.manual_seed(7)
        few = name in ("hutchinson", "weighted", "actnorm", "resumed")
        shards.LEAST["cpu"] = 40 if few else 2**16  # numbers of a shard: four shards, or one
        if name in ("actnorm", "resumed", "nan-in-one"):
            flow = cnf.models.build("glow", dim=2, hidden=(8,), layers=2, preprocess=None).double()
        else:
            flow = cnf.models.build("cnf", dim=2, hidden=(8,), solver=solver).double()
        config = cnf.TrainConfig(
            steps=8, batch_size=16, device="cpu", devices=devices,
            strategy="ddp" if devices > 1 else "auto", folder=Path(out) / name, progress=False,
            validation_rows=50, lr=1e-2, patience=5, checkpoint_seconds=1e-9,
            validation_divergence="hutchinson" if name == "probes" else None,
        )  # fmt: skip
        if name == "patience":
            config.patience, config.lr = 3, 1.0
        weight = 1.0 + (rows[:, 0] > 0).double() if name == "weighted" else None
        if name == "resumed":
            _interrupt(flow, objective, data, config, 4)
            _set_to_zero(flow)
        records = []
        history = cnf.fit(flow, objective, data, config, weight=weight, callbacks=[records.append])
        assert history.reason == "patience" or name != "patience"
        assert history.skipped == (2 if name == "nan-in-one" else 0)
        assert bool(records) == (_rank() == 0)  # the first one tells
        x = torch.linspace(-1, 1, 8, dtype=torch.float64).reshape(4, 2)
        _say(f"{name} {history.steps} steps, {flow.log_prob(x).sum().item():.12f}")


class SlowToBegin(cnf.FlowMatching):
    """Flow matching that takes the second process half a second more to prepare."""

    def begin(self, module: nn.Module, rows: Any, generator: torch.Generator) -> Objective:
        time.sleep(0.5 * _rank())
        return super().begin(module, rows, generator)


def timed(out: str, devices: int) -> None:
    """A run under a budget in seconds, of which every process has another clock."""
    torch.manual_seed(7)
    flow = cnf.models.build("cnf", dim=2, hidden=(8,)).double()
    rows = torch.randn(64, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    config = cnf.TrainConfig(
        seconds=1.0, batch_size=16, device="cpu", devices=devices, folder=Path(out) / "timed",
        strategy="ddp" if devices > 1 else "auto", progress=False, ema=None, validation_rows=6,
    )  # fmt: skip
    history = cnf.fit(flow, SlowToBegin(), rows, config)
    total = sum(weight.sum().item() for weight in flow.parameters())
    _say(f"timed {history.steps} steps, ticks {sum(history.ticks)}, {total:.14f}")


class Tied(nn.Module):
    """A net whose blocks share a weight, or one of whose weights is taken out of a block."""

    def __init__(self, taken: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.taken = taken
        if not taken:
            self.blocks[1].weight = self.blocks[0].weight

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[1](self.blocks[0](x))
        return x @ self.blocks[1].get_parameter("weight") if self.taken else x


def sharded(out: str, devices: int) -> None:
    """Runs in which each process holds a part of the weights, and what it holds."""
    changes: dict[str, dict[str, Any]] = {
        "accumulated": {"accumulate": 2}, "patient": {"patience": 5}, "unaveraged": {"ema": None},
        "nan-in-one": {"checkpoint_seconds": 1e-9},
    }  # fmt: skip
    for name in RUNS["sharded"]:
        flow = _sharded_flow(name)
        objective = BadMatching() if name == "nan-in-one" else cnf.FlowMatching()
        before = [type(module) for module in flow.modules()]
        generator = torch.Generator().manual_seed(3)
        shape = flow.event_shape
        data = 1 + 2 * torch.randn(64, *shape, generator=generator, dtype=torch.float64)
        config = _sharded_config(name, devices, folder=f"{out}/{name}", **changes.get(name, {}))
        if name == "resumed":
            _interrupt(flow, objective, data, config, 11)
            flow = _sharded_flow(name)
            _set_to_zero(flow)
        history = cnf.fit(flow.eval(), objective, data, config)
        assert history.skipped == (2 if name == "nan-in-one" else 0)
        assert before == [type(module) for module in flow.modules()]
        assert {type(weight) for weight in flow.parameters()} == {nn.Parameter}
        total = sum(weight.double().sum().item() for weight in flow.parameters())
        _say(f"{name} {history.steps} steps, {total:.14f}")
    for taken in (True, False):
        field = cnf.fields.Adapter(Tied(taken), (3,)).double()
        flow = cnf.Flow(cnf.distributions.StandardNormal(3), cnf.transforms.Continuous(field))
        config = _sharded_config("tied", devices)
        try:
            cnf.fit(flow, cnf.FlowMatching(), torch.randn(64, 3).double(), config)
        except ValueError as error:
            _say(f"refused: {error}")
    _say(f"holds {_bytes_held(devices)} bytes")


def _sharded_flow(name: str) -> cnf.Flow:
    torch.manual_seed(7)
    solver = cnf.Solver("rk4", steps=2)
    if name == "unet":
        options = {"width": 4, "scales": (1, 2), "blocks": 1}
        return cnf.models.build("unet", shape=(1, 4, 4), solver=solver, **options).double()
    return cnf.models.build("cnf", dim=3, hidden=(9, 7), solver=solver).double()


def _sharded_config(name: str, devices: int, **changes: Any) -> cnf.TrainConfig:
    settings = {
        "steps": 20 if name in ("mlp", "unet", "resumed") else 8, "batch_size": 16,
        "device": "cpu", "devices": devices, "strategy": "fsdp" if devices > 1 else "auto",
        "progress": False, "validation_rows": 20, "validations": 2, "lr": 1e-2, "clip": 1.0,
        "validation_divergence": "hutchinson" if name == "unet" else None,
    }  # fmt: skip
    return cnf.TrainConfig(**{**settings, **changes})


def _bytes_held(devices: int) -> int:
    """What this process holds of a U-Net's weights, gradients, moments and averages."""
    flow, config = _sharded_flow("unet"), _sharded_config("unet", devices)
    fabric = launch_fabric(config, torch.float64)
    learner = learner_for(flow.eval(), cnf.FlowMatching(), config, fabric)
    assert learner.module.training or devices == 1
    generator = torch.Generator().manual_seed(3)
    batch = cnf.Batch(torch.randn(16, 1, 4, 4, generator=generator, dtype=torch.float64))
    learner.step(learner.prepare(batch, generator)[0], 1e-2)
    states = learner._adam.state.values()
    moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
    gradients = [weight.grad for weight in learner.parameters]
    held: list[Any] = [*learner.parameters, *moments, *gradients, *learner._ema_weights]
    held = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in held]
    stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in held}
    return sum(storage.nbytes() for storage in stored.values())


if __name__ == "__main__":
    torch.set_num_threads(1)
    _BadInLast.processes = int(sys.argv[3])
    kinds = {"replicated": replicated, "sharded": sharded, "timed": timed}
    kinds[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
