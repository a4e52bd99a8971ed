"""Held-out scores."""

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


def test_a_dequantised_flow_is_validated_with_the_same_noise_each_time():
    base = cnf.distributions.StandardNormal((2,))
    flow = Flow(base, cnf.models.build("realnvp", dim=2).transform, dequantisation=Rounded())
    rows = Batch(torch.arange(8.0).reshape(4, 2))
    validation = Validation(MaximumLikelihood(), TrainConfig(progress=False), rows)
    torch.manual_seed(0)
    first = validation.score(flow, 0.5)
    assert first == validation.score(flow, 1.0)
    assert first != Validation(MaximumLikelihood(), TrainConfig(seed=1), rows).score(flow, 0.5)
