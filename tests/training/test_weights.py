"""Weights of rows: in the loss, in held-out scores, and invalid ones."""

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

import cnf
from cnf import Batch, FlowMatching, MaximumLikelihood
from cnf.objectives import Joint
from cnf.training import validation

WEIGHT = torch.linspace(0.1, 5, 100)


@pytest.mark.parametrize("objective", [FlowMatching(), MaximumLikelihood(), Joint()])
def test_weights_of_an_array_equal_those_of_a_batch(objective, small, config, same, points):
    beside, within, without = small(), small(), small()
    cnf.fit(beside, objective, points.numpy(), config(), weight=WEIGHT.double().numpy())
    cnf.fit(within, objective, Batch(points, weight=WEIGHT), config())
    cnf.fit(without, objective, points, config())
    assert same(beside, within) and not same(beside, without)


def test_held_out_likelihood_is_a_weighted_mean(small, config, points, monkeypatch):
    monkeypatch.setattr(validation, "AT_ONCE", (7, 2**16))
    flow, held_out, weight = small("realnvp"), points[:40] + 1, (points[:40, 0] - 1).square()
    history = cnf.fit(
        flow, MaximumLikelihood(), points, config(validations=1),
        validation=Batch(held_out, weight=weight),
    )  # fmt: skip
    expected = -(weight * flow.log_prob(held_out)).sum() / weight.sum()
    assert history.column("val_nll") == [pytest.approx(expected.item(), rel=1e-5)]
    assert abs(expected + flow.log_prob(held_out).mean()) > 0.05


def test_rows_held_out_of_a_weighted_table_keep_their_weights(small, config, points):
    """Of one far cluster of weight 0.001: unweighted scores would be of that cluster."""
    far = torch.arange(100) % 2 == 0
    rows = points + 30 * far[:, None]
    weight = torch.where(far, 1e-3, 1.0)
    flow = small("realnvp")
    history = cnf.fit(
        flow, MaximumLikelihood(), rows, config(steps=150, lr=2e-2, ema=0.9), weight=weight
    )
    near = -flow.log_prob(rows[~far]).mean().item()
    assert abs(history.column("val_nll")[-1] - near) < 1.5  # ten rows' mean
    assert -flow.log_prob(rows).mean() > near + 3


def test_held_out_loss_of_a_flow_without_density_is_weighted(small, config, points, monkeypatch):
    monkeypatch.setattr(validation, "BATCH_SIZE", 20)  # one part near, one far
    source = cnf.distributions.Empirical(points[:50])
    flow = cnf.Flow(source, small(preprocess=None).transform)
    held_out = torch.cat([points[:20], points[20:40] + 100])

    def score(weight):
        weighed = Batch(held_out, weight=weight)
        settings = config(validations=1, lr=1e-9)
        return cnf.fit(flow, FlowMatching(), points, settings, validation=weighed)

    near = torch.where(torch.arange(40) < 20, 1.0, 1e-6)
    weighted, plain = (score(w).column("val_loss")[-1] for w in (near, torch.ones(40)))
    assert weighted < 0.01 * plain


def test_rows_of_weight_0_have_no_effect(small, config, same, points):
    there, gone = small(), small()
    rows = torch.cat([torch.full((20, 2), 1e6), points])  # preprocessing must not see them
    weight = torch.cat([torch.zeros(20), WEIGHT])
    cnf.fit(there, FlowMatching(), rows, config(), weight=weight)
    cnf.fit(gone, FlowMatching(), points, config(), weight=WEIGHT)
    assert same(there, gone)


def test_process_with_weights_0_has_no_effect():
    batch = Batch(torch.ones(4, 2), weight=torch.tensor([0.0, 0.0, 1.0, 3.0]))
    assert [batch.shared(rank, 2)[1] for rank in (0, 1)] == [0.0, 2.0]
    nothing = batch.but(weight=torch.zeros(4))
    assert [nothing.shared(rank, 2)[1] for rank in (0, 1)] == [1.0, 1.0]


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_shards_partition_the_batch_and_average_to_its_mean(processes):
    x = torch.arange(14.0, dtype=torch.float64).reshape(7, 2) ** 2
    shares = [Batch(x).shared(rank, processes) for rank in range(processes)]
    assert torch.equal(torch.cat([own.x for own, _ in shares]), x)
    mean = sum(part * own.x.mean() for own, part in shares) / processes
    assert mean.item() == pytest.approx(x.mean().item(), rel=1e-14)


def test_batch_with_fewer_rows_than_processes_is_refused():
    with pytest.raises(
        ValueError,
        match="at least 4 rows, one for each process or part of accumulate, got one of 3",
    ):
        Batch(torch.ones(3, 2)).shared(0, 4)


X = torch.randn(100, 2, generator=torch.Generator().manual_seed(3))
REFUSED = {
    "a column": (X, WEIGHT[:, None], r"weight of shape \(100,\), got \(100, 1\)"),
    "too few": (X, WEIGHT[:50], "100 rows of weight, got 50"),
    "a negative one": (X, -WEIGHT, r"at least 0, got -0.1 in row 0 \(100 of 100"),
    "a NaN": (X, WEIGHT.log().sqrt(), "finite and at least 0, got nan in row 0"),
    "all 0": (X, 0 * WEIGHT, "above 0, got zero in all 100"),
    "one number": (X, 1.0, "expected 100 rows of weight, got the one number 1"),
    "too small for float32": (X, np.full(100, 1e-46), "got 1e-46.*divide them by their mean"),
    "far too small": (X, np.full(100, 1e-300), "divide them by their mean"),
    "too large": (X, np.full(100, 1e300), r"got 1e\+300.*divide them by their mean"),
    "a sum too large": (X, np.full(100, 3e38), "divide them by their mean"),
    "a Batch": (Batch(X), WEIGHT, "beside a Batch; batches carry their own"),
    "a density": (cnf.data.toy("moons"), WEIGHT, "goes with an array"),
    "batches": ([X], WEIGHT, r"cnf.Batch\(x, weight"),
    "a dataset": (TensorDataset(X), WEIGHT, "goes with an array"),
    "nothing": (None, WEIGHT, "goes with an array"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_invalid_weights_are_refused(kind, small, config):
    data, weight, message = REFUSED[kind]
    with pytest.raises(ValueError, match=f"^fit.*{message}"):
        cnf.fit(small(), FlowMatching(), data, config(), weight=weight)


def test_weights_of_validation_are_checked_before_training(small, config):
    bad = Batch(X).but(weight=-WEIGHT)
    with pytest.raises(ValueError, match="^fit: expected weights.*at least 0"):
        cnf.fit(small(), FlowMatching(), X, config(), validation=bad)
