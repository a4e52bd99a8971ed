"""Training of shards by two processes: the weights of one process, in half of the memory."""

import subprocess
import sys

import pytest
import torch

import cnf
from cnf.fields import Adapter, MLPField, Piecewise, UNetField
from cnf.fields.wrappers import EndTime
from cnf.training.checkpoint import load_state
from cnf.training.sharded import _blocks, _called, _expect_shardable
from cnf.transforms import Continuous
from tests.training.test_processes import environment, metrics, weights

SCRIPT = """
import os
import signal
import sys
import torch
import cnf
from cnf.training.learners import learner_for
from cnf.training.learner import launch_fabric

torch.set_num_threads(1)
out, devices = sys.argv[1], int(sys.argv[2])
strategy = "fsdp" if devices > 1 else "auto"
solver = cnf.Solver("rk4", steps=2)


class Bad(cnf.FlowMatching):  # of the last process, whose gradient does not tell
    calls = []

    def __call__(self, module, batch, generator=None):
        loss = super().__call__(module, batch, generator)
        if not torch.is_grad_enabled():
            return loss
        self.calls.append(1)
        last = int(os.environ.get("LOCAL_RANK", 0)) == devices - 1
        bad = last and len(self.calls) in (3, 5)
        return cnf.Loss(loss.value + float("nan"), loss.metrics) if bad else loss


def stop(record):
    if record["step"] == 11:
        signal.raise_signal(signal.SIGTERM)


def build(name):
    torch.manual_seed(7)
    if name == "unet":
        options = {"width": 4, "scales": (1, 2), "blocks": 1}
        return cnf.models.build("unet", shape=(1, 4, 4), solver=solver, **options).double()
    return cnf.models.build("cnf", dim=3, hidden=(9, 7), solver=solver).double()


def config(name, **options):
    settings = {
        "steps": 20 if name in ("mlp", "unet", "resumed") else 8, "batch_size": 16,
        "device": "cpu", "devices": devices, "strategy": strategy, "progress": False,
        "validation_rows": 20, "validations": 2, "lr": 1e-2, "clip": 1.0,
        "validation_divergence": "hutchinson" if name == "unet" else None,
    }
    return cnf.TrainConfig(**{**settings, **options})


options = {
    "accumulated": {"accumulate": 2}, "patient": {"patience": 5}, "unaveraged": {"ema": None},
    "nan-in-one": {"checkpoint_seconds": 1e-9},
}
for name in RUNS:
    flow, goal = build(name), Bad() if name == "nan-in-one" else cnf.FlowMatching()
    before = [type(module) for module in flow.modules()]
    generator = torch.Generator().manual_seed(3)
    shape = flow.event_shape
    data = 1 + 2 * torch.randn(64, *shape, generator=generator, dtype=torch.float64)
    settings = config(name, folder=f"{out}/{name}", **options.get(name, {}))
    if name == "resumed":
        assert cnf.fit(flow, goal, data, settings, callbacks=[stop]).reason == "interrupted"
        settings.resume, flow = True, build(name)
        for weight in flow.parameters():
            torch.nn.init.zeros_(weight)
    history = cnf.fit(flow.eval(), goal, data, settings)
    assert history.skipped == (2 if name == "nan-in-one" else 0)
    assert before == [type(module) for module in flow.modules()]
    assert {type(weight) for weight in flow.parameters()} == {torch.nn.Parameter}
    total = sum(weight.double().sum().item() for weight in flow.parameters())
    sys.stdout.write(f"{name} {history.steps} steps, {total:.14f}\\n")
    sys.stdout.flush()



class Tied(torch.nn.Module):  # its blocks share a weight, or one is taken out of a block
    def __init__(self, taken):
        super().__init__()
        self.blocks = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))
        self.taken = taken
        if not taken:
            self.blocks[1].weight = self.blocks[0].weight

    def forward(self, t, x):
        x = self.blocks[1](self.blocks[0](x))
        return x @ self.blocks[1].weight if self.taken else x


for taken in (True, False):
    field = cnf.fields.Adapter(Tied(taken), (3,)).double()
    flow = cnf.Flow(cnf.distributions.StandardNormal(3), cnf.transforms.Continuous(field))
    try:
        cnf.fit(flow, cnf.FlowMatching(), torch.randn(64, 3).double(), config("tied"))
    except ValueError as error:
        sys.stdout.write(f"refused: {error}\\n")

flow, objective, settings = build("unet"), cnf.FlowMatching(), config("unet")
fabric = launch_fabric(settings, torch.float64)
learner = learner_for(flow.eval(), objective, settings, fabric)
assert learner.module.training or devices == 1
generator = torch.Generator().manual_seed(3)
batch = cnf.Batch(torch.randn(16, 1, 4, 4, generator=generator, dtype=torch.float64))
learner.step(learner.prepare(batch, generator)[0], 1e-2)
states = learner._adam.state.values()
moments = [state[name] for state in states for name in ("exp_avg", "exp_avg_sq")]
gradients = [weight.grad for weight in learner.parameters]
held = [*learner.parameters, *moments, *gradients, *learner._ema_weights]
held = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in held]
stored = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in held}
sys.stdout.write(f"holds {sum(storage.nbytes() for storage in stored.values())} bytes\\n")
sys.stdout.flush()
"""
RUNS = ["mlp", "unet", "accumulated", "patient", "unaveraged", "resumed", "nan-in-one"]


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """processes → (the folder of their runs, the lines that they printed)."""
    done = {}
    for processes in (1, 2):
        folder = tmp_path_factory.mktemp(f"of-{processes}")
        (folder / "script.py").write_text(SCRIPT.replace("RUNS", str(RUNS)))
        command = [sys.executable, str(folder / "script.py"), str(folder), str(processes)]
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=240, env=environment()
        )
        assert run.returncode == 0, run.stdout + run.stderr
        done[processes] = folder, run.stdout.splitlines()
    return done


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_two_sharded_processes_give_the_weights_of_one(name, launched):
    (alone, _), (folder, said) = launched[1], launched[2]
    one, two = weights(alone / name), weights(folder / name)
    assert one.dtype == torch.float64
    # rounding alone: gradients and norms are summed in another order
    torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
    lines = [line for line in said if line.startswith(name)]
    assert len(lines) == 2 and lines[0] == lines[1]  # both hold the kept weights afterwards


@pytest.mark.slow
def test_resumed_shards_equal_those_of_an_uninterrupted_run(launched):
    folder = launched[2][0]
    assert torch.equal(weights(folder / "mlp"), weights(folder / "resumed"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "unaveraged"])
def test_checkpoint_of_shards_is_that_of_one_process(name, launched):
    """So that any number of processes can go on with it."""
    one, two = (load_state(launched[n][0] / name / "checkpoints")["learner"] for n in (1, 2))
    assert one["steps"] == two["steps"]
    for part in ("module", "kept"):
        torch.testing.assert_close(dict(one[part]), dict(two[part]), rtol=0, atol=1e-10)
    moments = [each["optimizer"]["state"] for each in (one, two)]
    assert moments[0]
    torch.testing.assert_close(*moments, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_scores_of_shards_are_those_of_one_process(launched):
    rows = [metrics(launched[n][0] / "mlp") for n in (1, 2)]
    scores = [[float(row["val_nll"]) for row in each if row["val_nll"]] for each in rows]
    assert len(scores[0]) == 2
    assert scores[1] == pytest.approx(scores[0], abs=1e-10)


@pytest.mark.slow
def test_each_of_two_processes_holds_half(launched):
    """Weights, gradients, moments and averages of a U-Net; a bias of one cannot be halved."""
    (one,), both = (
        [int(line.split()[1]) for line in launched[n][1] if line.startswith("holds")]
        for n in (1, 2)
    )
    assert len(both) == 2
    assert all(0.49 * one < count < 0.52 * one for count in both)


@pytest.mark.slow
def test_weights_used_outside_of_their_block_are_refused(launched):
    said = [line for line in launched[2][1] if line.startswith("refused")]
    assert sum("takes weights out of a block" in line for line in said) == 2
    assert sum("two blocks of which share a weight" in line for line in said) == 2


def test_blocks_are_the_members_of_lists_that_are_called():
    field = UNetField((1, 4, 4), 4, 0, (1, 2), 1, frequencies=1)
    assert list(_blocks(field, _called(field))) == [*field.down, *field.up, *field.middle]
    field = MLPField(3, hidden=(8,), layer="concat")  # takes the weights out of its layers
    assert list(_blocks(field, _called(field))) == []
    net = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
    field = Adapter(net, (2,), context_dim=2, call="concat")
    assert list(_blocks(field, _called(field))) == [net[0], net[2]]


@pytest.mark.parametrize(
    ("field", "objective", "got"),
    [
        (MLPField(3), cnf.MaximumLikelihood(), "got MaximumLikelihood"),
        (Piecewise([MLPField(3), MLPField(3)]), cnf.FlowMatching(), "stacked blocks"),
        (EndTime(MLPField(3)), cnf.FlowMatching(), "a weight that is one number"),
    ],
)
def test_what_cannot_be_sharded_is_refused_in_words(field, objective, got):
    flow = cnf.Flow(cnf.distributions.StandardNormal(3), Continuous(field))
    with pytest.raises(ValueError, match=f"strategy='fsdp' shards a field .*{got}.*'ddp'"):
        _expect_shardable(flow, objective)
