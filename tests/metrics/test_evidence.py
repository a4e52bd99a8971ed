"""Log evidence by importance sampling, against exact integrals."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal

import cnf
from cnf.flow import Flow
from cnf.metrics import log_evidence
from cnf.models import build


def wide(x):
    """Three times the density of N(0, 1.2²) in two dimensions."""
    return Normal(0.0, 1.2).log_prob(x).sum(-1) + math.log(3)


def standard():
    return Flow(None, cnf.transforms.Permutation(2), event_shape=(2,))


def test_value_error_and_ess_are_those_of_exact_integrals():
    """Σ p²/q of two normals is exact: E w² / (E w)² = s⁴ / (2 s² - 1) in two dimensions."""
    flow, n, s2 = standard(), 4_000, 1 / 1.2**2
    found = [
        log_evidence(flow, wide, n, generator=torch.Generator().manual_seed(k)) for k in range(60)
    ]
    values, errors = (torch.stack([each[k] for each in found]) for k in (0, 1))
    second = 1.2**-4 / (2 * s2 - 1)  # of w, in units of its mean squared
    assert (values.mean() - math.log(3)).abs() < 4 * values.std() / 60**0.5
    torch.testing.assert_close(values.std(), errors.mean(), rtol=0.3, atol=0)
    ess = torch.stack([each.ess for each in found]).mean() / n
    torch.testing.assert_close(ess.float(), torch.tensor(1 / second), rtol=0.05, atol=0)
    elbo = math.log(3) - 0.5 * 2 * (s2 - 1 + 2 * math.log(1.2))
    torch.testing.assert_close(found[0].elbo.float(), torch.tensor(elbo), rtol=0, atol=0.05)


def test_each_context_has_an_evidence_of_its_own():
    flow = build("realnvp", dim=2, context=1)
    y = torch.arange(6.0).reshape(2, 3, 1)

    def joint(x, y):
        return flow.log_prob(x, y) + 2 * y[:, 0]

    told = log_evidence(flow, joint, 25_000, y)
    assert told.value.shape == told.ess.shape == (2, 3)
    torch.testing.assert_close(told.value.float(), 2 * y[..., 0])
    torch.testing.assert_close(told.ess, torch.full((2, 3), 25_000.0).double())
    assert told.error.abs().max() < 1e-3


def test_draws_in_chunks_are_all_counted(monkeypatch):
    monkeypatch.setattr("cnf.metrics.evidence.CHUNK", 7)
    seen = []
    log_evidence(standard(), lambda x: seen.append(len(x)) or wide(x), 30)
    assert sum(seen) == 30 and max(seen) == 7


def test_one_draw_with_much_of_the_weight_is_told():
    with pytest.warns(UserWarning, match="one of 1000 draws has .* of all weight"):
        log_evidence(standard(), lambda x: Normal(4.0, 0.3).log_prob(x).sum(-1), 1_000)


def test_weights_that_are_no_numbers_are_refused():
    flow = standard()
    with pytest.raises(ValueError, match="NaN or infinity at 100 of 100 draws"):
        log_evidence(flow, lambda x: x.sum(-1) * torch.nan, 100)
    with pytest.raises(ValueError, match="got none; train the flow"):
        log_evidence(flow, lambda x: x.sum(-1) * 0 - torch.inf, 100)
    half = log_evidence(flow, lambda x: torch.where(x[:, 0] > 0, flow.log_prob(x), -torch.inf))
    assert half.value == pytest.approx(math.log(0.5), abs=0.05) and half.elbo == -torch.inf


@pytest.mark.parametrize(
    ("log_density", "error", "words"),
    [
        (lambda x: x.sum(), ValueError, r"give shape \(10,\) .*got shape \(\)"),
        (lambda x: -x.square(), ValueError, r"got shape \(10, 2\); of numbers .*\.sum\(-1\)"),
        (lambda x: x.sum(-1, keepdim=True), ValueError, r"got shape \(10, 1\)"),
        (lambda x: x.sum(-1) > 0, ValueError, "of real numbers, got torch.bool"),
        (lambda x: 3.0, ValueError, "of real numbers, got float"),
        (None, TypeError, "a function of x, or to have a log_prob, got NoneType"),
    ],
)
def test_other_things_than_one_number_a_draw_are_refused(log_density, error, words):
    with pytest.raises(error, match=f"^log_evidence: expected log_density to .*{words}"):
        log_evidence(standard(), log_density, 10)


def test_flow_and_context_are_looked_at_first():
    flow = cnf.models.realnvp(2, context=3)
    for context, words in (
        (torch.ones(()), r"shape \(\*, 3\), got"),
        ([1.0], "torch.Tensor, got"),
    ):
        with pytest.raises(ValueError, match=f"^log_evidence: expected context .*{words}"):
            log_evidence(flow, wide, 10, context)  # pyright: ignore
    with pytest.raises(TypeError, match="^log_evidence: expected a cnf.Flow, got function"):
        log_evidence(wide, wide)  # pyright: ignore


def test_one_draw_has_no_error():
    flow = cnf.models.realnvp(2)
    with pytest.warns(UserWarning, match="one of 1 draws has 100% of all weight"):
        told = log_evidence(flow, lambda x: -x.square().sum(-1), draws=1)
    assert told.error.isnan() and told.value.isfinite()


def test_few_draws_have_the_error_of_their_mean_weight():
    """By numpy, of three contexts: the deviation of w, with n - 1, by √n and its mean."""
    flow, y = build("realnvp", dim=2, context=1), torch.tensor([[0.0], [1.0], [2.0]])

    def joint(x, y):
        return -(x - y).square().sum(-1)

    with pytest.warns(UserWarning, match="one of 5 draws has .* of all weight"):
        told = log_evidence(flow, joint, 5, y, generator=torch.Generator().manual_seed(3))
    x, log_q = flow.sample_and_log_prob(5, y, generator=torch.Generator().manual_seed(3))
    log_w = (-(x - y).square().sum(-1) - log_q).detach().double().numpy()
    w = np.exp(log_w)
    error = w.std(0, ddof=1) / np.sqrt(5) / w.mean(0)
    expected = np.log(w.mean(0)), error, w.sum(0) ** 2 / (w**2).sum(0), log_w.mean(0)
    for found, value in zip(told, expected, strict=True):
        assert found.numpy() == pytest.approx(value, rel=1e-5)


def test_a_single_context_that_is_missed_is_told():
    flow, y = build("realnvp", dim=2, context=1), torch.tensor([[0.0], [1.0]])
    with pytest.warns(UserWarning, match="one of 500 draws has"):
        log_evidence(flow, lambda x, y: flow.log_prob(x, y) - 1e3 * y[:, 0] * x[:, 0] ** 2, 500, y)
    with pytest.raises(ValueError, match="got none; train the flow"):
        log_evidence(flow, lambda x, y: torch.where(y[:, 0] > 0, -torch.inf, 0 * y[:, 0]), 500, y)


class Loose(cnf.transforms.Identity):
    """The identity, which in training claims to double volumes."""

    def forward(self, z, context=None):
        z, ladj = super().forward(z, context)
        return z, ladj + math.log(2) * self.training


def test_a_flow_in_training_is_scored_as_it_will_be_used():
    flow = Flow(None, Loose(2), event_shape=(2,)).train()
    told = log_evidence(flow, standard().log_prob, 100)
    assert told.value.abs() < 1e-6 and flow.training
