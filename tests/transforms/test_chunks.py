"""Evaluation of large batches in chunks gives the same results."""

import pytest
import torch

import cnf
from cnf.fields import Adapter, MLPField
from cnf.transforms import BatchNorm, Continuous, Coupling, Standardize, chunks


@pytest.mark.parametrize("batch", [(50,), (3, 20), (2, 3, 9)])
@pytest.mark.parametrize("name", ["nsf", "maf", "planar", "cnf"])
def test_evaluation_in_chunks_equals_evaluation_of_whole_batch(
    name, batch, small_flow, generator, monkeypatch
):
    options = {"solver": cnf.Solver("rk4", steps=2)} if name == "cnf" else {}
    flow = small_flow(name, context=2, **options)
    x = torch.randn(*batch, flow.event_shape[0], generator=generator, dtype=torch.float64)
    context = torch.randn(*batch, 2, generator=generator, dtype=torch.float64)
    sizes = []
    inverse = type(flow.transform).inverse

    def recording_inverse(self, x, context=None):
        if self.event_shape == flow.event_shape:
            sizes.append(x.shape[:-1].numel())
        return inverse(self, x, context)

    with torch.no_grad():
        whole = flow.log_prob(x, context)
        samples = flow.sample((), context, generator=torch.Generator().manual_seed(1))
        monkeypatch.setattr(chunks, "rows_at_once", lambda *_: 7)
        monkeypatch.setattr(type(flow.transform), "inverse", recording_inverse)
        torch.testing.assert_close(flow.log_prob(x, context), whole)
        again = flow.sample((), context, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(again, samples)
    assert max(sizes) <= 7 and sum(sizes) == whole.numel()
    sizes.clear()
    flow.log_prob(x, context)  # with gradients: whole
    assert sizes == [whole.numel()]


def test_batch_norm_in_train_mode_is_not_evaluated_in_chunks(generator, monkeypatch):
    """By hand: z = (x - mean)/√(variance + ε) with the statistics of all 50 rows."""
    flow = cnf.Flow(None, BatchNorm(2), event_shape=(2,)).double().train()
    x = (
        torch.randn(50, 2, generator=generator, dtype=torch.float64) * 3
        + torch.arange(50)[:, None]
    )
    monkeypatch.setattr(chunks, "rows_at_once", lambda *_: 7)
    variance = x.var(0, correction=0) + 1e-5
    z = (x - x.mean(0)) / variance.sqrt()
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1) - variance.log().sum() / 2
    with torch.no_grad():
        torch.testing.assert_close(flow.log_prob(x), expected)


def test_given_probes_apply_to_all_rows_at_once(small_flow, generator, monkeypatch):
    flow = small_flow("cnf", solver=cnf.Solver("rk4", steps=2))
    x = torch.randn(20, 2, generator=generator, dtype=torch.float64)
    estimate = cnf.Hutchinson(probe=cnf.Hutchinson(1).draw(x, generator))
    whole = flow.log_prob(x, divergence=estimate)
    monkeypatch.setattr(chunks, "rows_at_once", lambda *_: 7)
    with torch.no_grad():
        torch.testing.assert_close(flow.log_prob(x, divergence=estimate), whole)


@pytest.mark.parametrize(
    ("transform", "numbers"),
    [
        (Coupling(4, hidden=(500, 20)), 500),
        (Standardize((700,)), 700),
        (Continuous(MLPField(3, (64, 500))), 3 * 500),  # D tangents of an exact divergence
        (Continuous(Adapter(torch.nn.Conv2d(1, 7, 3), (1, 4, 4))), 7 * 16),
    ],
    ids=["coupling", "data wider than any layer", "continuous", "image"],
)
def test_memory_estimate_is_widest_layer_times_pixels_and_tangents(transform, numbers):
    x = torch.zeros(1, *transform.event_shape, dtype=torch.float64)
    assert chunks.rows_at_once(transform, x) == chunks.BYTES // (chunks.COPIES * 8 * numbers)
