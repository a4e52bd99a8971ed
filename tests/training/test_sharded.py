"""Training of shards by two processes: the weights of one process, in half of the memory."""

import pytest
import torch

import cnf
from cnf.fields import Adapter, MLPField, Piecewise, UNetField
from cnf.fields.wrappers import EndTime
from cnf.training.checkpoint import load_state
from cnf.training.sharded import _blocks, _called, _expect_shardable
from cnf.transforms import Continuous
from tests.training.process_runs import RUNS, metrics, weights

LAUNCHER = {1: "one", 2: "fabric"}  # by processes


@pytest.fixture
def runs(launched):
    """Processes → the folder of their runs, and the lines that they printed."""
    return lambda processes: launched("sharded", LAUNCHER[processes])


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS["sharded"])
def test_two_sharded_processes_give_the_weights_of_one(name, runs):
    (alone, _), (folder, said) = runs(1), runs(2)
    one, two = weights(alone / name), weights(folder / name)
    assert one.dtype == torch.float64
    # rounding alone: gradients and norms are summed in another order
    torch.testing.assert_close(one, two, rtol=0, atol=1e-10)
    lines = [line for line in said if line.startswith(name)]
    assert len(lines) == 2 and lines[0] == lines[1]  # both hold the kept weights afterwards


@pytest.mark.slow
def test_resumed_shards_equal_those_of_an_uninterrupted_run(runs):
    folder = runs(2)[0]
    assert torch.equal(weights(folder / "mlp"), weights(folder / "resumed"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["unet", "unaveraged"])
def test_checkpoint_of_shards_is_that_of_one_process(name, runs):
    """So that any number of processes can go on with it."""
    one, two = (load_state(runs(n)[0] / name / "checkpoints")["learner"] for n in (1, 2))
    assert one["steps"] == two["steps"]
    for part in ("module", "kept"):
        torch.testing.assert_close(dict(one[part]), dict(two[part]), rtol=0, atol=1e-10)
    moments = [each["optimizer"]["state"] for each in (one, two)]
    assert moments[0]
    torch.testing.assert_close(*moments, rtol=0, atol=1e-10)


@pytest.mark.slow
def test_scores_of_shards_are_those_of_one_process(runs):
    rows = [metrics(runs(n)[0] / "mlp") for n in (1, 2)]
    scores = [[float(row["val_nll"]) for row in each if row["val_nll"]] for each in rows]
    assert len(scores[0]) == 2
    assert scores[1] == pytest.approx(scores[0], abs=1e-10)


@pytest.mark.slow
def test_each_of_two_processes_holds_half(runs):
    """Weights, gradients, moments and averages of a U-Net; a bias of one cannot be halved."""
    (one,), both = (
        [int(line.split()[1]) for line in runs(n)[1] if line.startswith("holds")] for n in (1, 2)
    )
    assert len(both) == 2
    assert all(0.49 * one < count < 0.52 * one for count in both)


@pytest.mark.slow
def test_weights_used_outside_of_their_block_are_refused(runs):
    said = [line for line in runs(2)[1] if line.startswith("refused")]
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
