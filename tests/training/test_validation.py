"""Held-out scores."""

import pytest
import torch

import cnf
from cnf import Batch, Flow, MaximumLikelihood, TrainConfig
from cnf.fields import ConvField
from cnf.training.history import held_out_nll
from cnf.training.validation import Validation
from cnf.transforms.continuous import Continuous, Recipe


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


def picture_flow(shape, **recipe):
    solver = cnf.Solver("euler", steps=1)
    transform = Continuous(ConvField(shape, (2,)), solver, recipe=Recipe(**recipe))
    return Flow(None, transform, event_shape=shape)


def named_score(flow, objective=None, **settings):
    rows = Batch(torch.ones(4, *flow.event_shape))
    config = TrainConfig(progress=False, **settings)
    validation = Validation(objective or MaximumLikelihood(), config, rows)
    scores = [validation.score(flow, 0.3) for _ in range(2)]
    assert scores[0] == scores[1]  # the same probes each time
    return validation.name, scores[0]


@pytest.mark.filterwarnings("ignore:fit. the NLL of")  # one step of Euler
def test_pictures_are_scored_by_the_estimator_that_trains_them_and_the_name_tells():
    flow = picture_flow((1, 12, 12), divergence=cnf.Hutchinson(probes=2))
    exact = -flow.log_prob(torch.ones(4, 1, 12, 12)).mean().item()
    name, score = named_score(flow)
    assert name == "val_nll (Hutchinson, 2 probes)"
    assert score == pytest.approx(exact, abs=2) and score != exact  # four rows
    assert named_score(flow, MaximumLikelihood("hutchinson"))[0] == "val_nll (Hutchinson, 1 probe)"
    assert named_score(flow, cnf.FlowMatching())[0] == "val_nll (Hutchinson, 2 probes)"
    asked = named_score(flow, validation_divergence="exact")
    assert asked == ("val_nll", pytest.approx(exact, rel=1e-6))
    assert named_score(flow, MaximumLikelihood("exact"))[0] == "val_nll"
    assert named_score(picture_flow((1, 12, 12)))[0] == "val_nll (Hutchinson, 1 probe)"
    small = picture_flow((1, 8, 8), divergence="hutchinson")
    assert named_score(small)[0] == "val_nll"
    beyond = picture_flow((3, 20, 20), divergence="hutchinson")  # too large for an exact one
    assert named_score(beyond)[0] == "val_nll (Hutchinson, 1 probe)"
    with pytest.raises(ValueError, match="unknown divergence 'exakt'"):
        TrainConfig(validation_divergence="exakt")


def test_an_estimated_score_is_a_held_out_nll_like_any_other():
    record = {"step": 3, "val_nll (Hutchinson, 1 probe)": 2.5}
    history = cnf.training.History([record])
    assert held_out_nll(record) == 2.5 and held_out_nll({"step": 3, "val_loss": 1.0}) is None
    assert "val_nll (Hutchinson, 1 probe) 2.5" in repr(history)
