"""Held-out scores."""

import pytest
import torch

import cnf
from cnf import Batch, Flow, MaximumLikelihood, TrainConfig
from cnf.training.validation import Validation


class Rounded:
    """Integers spread over [0, 1) above them."""

    def encode(self, x, generator=None):
        u = torch.rand(x.shape, generator=generator, dtype=x.dtype)
        return x + u, torch.zeros(x.shape[:-1], dtype=x.dtype)

    def decode(self, y):
        return y.floor()


def test_dequantized_flow_is_validated_with_the_same_noise_each_time():
    base = cnf.distributions.StandardNormal((2,))
    flow = Flow(base, cnf.models.build("realnvp", dim=2).transform, dequantization=Rounded())
    rows = Batch(torch.arange(8.0).reshape(4, 2))
    validation = Validation(MaximumLikelihood(), TrainConfig(progress=False), rows)
    torch.manual_seed(0)
    first = validation.score(flow, 0.5)
    assert first == validation.score(flow, 1.0)
    assert first != Validation(MaximumLikelihood(), TrainConfig(seed=1), rows).score(flow, 0.5)


def scored(*scores, began=3.0):
    """Warn of held-out scores that came one after the other, behind a first step's loss."""
    rows = Batch(torch.zeros(4, 2))
    records = [{"step": 1, "nll": began}]
    records += [{"step": 10 * k, "val_nll": score} for k, score in enumerate(scores, 1)]
    Validation(MaximumLikelihood(), TrainConfig(progress=False), rows).warn_of_worsening(records)


def test_warning_for_an_increasing_held_out_score_names_the_best():
    scored(2.5, 2.1, 2.55)
    scored(7.0)
    with pytest.warns(UserWarning, match=r"ends at 2.65 nats, and at step 20 it was 2.1:.*patien"):
        scored(2.5, 2.1, 2.65)
    with pytest.warns(UserWarning, match="ends at 1e.26 nats, and it began at 3: the flow overf"):
        scored(1e26)
    with pytest.raises(cnf.DivergedError, match="held-out NLL is NaN; lower lr"):
        scored(2.5, float("nan"))


def test_standardize_refuses_columns_whose_squares_overflow():
    x = torch.randn(50, 2, dtype=torch.float64)
    for scale in (1e-200, 1e300):
        flow = cnf.models.build("realnvp", dim=2)
        with pytest.raises(ValueError, match=r"columns \[0, 1\] are too large or too small"):
            flow.preprocess.fit(scale * x)
