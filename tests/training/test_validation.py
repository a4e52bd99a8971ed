"""Held-out scores."""

import math
from copy import deepcopy

import pytest
import torch

import cnf
from cnf import Batch, Flow, MaximumLikelihood, TrainConfig
from cnf.errors import SolverError
from cnf.fields import ConvField
from cnf.objectives import Objective
from cnf.training import validation as validating
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
    with pytest.raises(ValueError, match="expected validation_divergence to be exact or unbiased"):
        TrainConfig(validation_divergence="learned")


def test_an_estimated_score_is_a_held_out_nll_like_any_other():
    record = {"step": 3, "seconds": 1.5, "loss": 4.0, "val_nll (Hutchinson, 1 probe)": 2.5}
    history = cnf.training.History([{"step": 1, "seconds": 0.5, "loss": 5.0}, record])
    assert history.curve() == [(1.5, 2.5)] and history.curve("loss") == [(0.5, 5.0), (1.5, 4.0)]
    assert held_out_nll(record) == 2.5 and held_out_nll({"step": 3, "val_loss": 1.0}) is None
    assert "val_nll (Hutchinson, 1 probe) 2.5" in repr(history)


class Mean(Objective):
    """The mean of x plus noise that is drawn beforehand; fails on rows above 1,000."""

    def prepare(self, module, batch, generator=None):
        noise = torch.randn(batch.x.shape, generator=generator, dtype=batch.x.dtype)
        return batch.but(x=batch.x + noise)

    def __call__(self, module, batch, generator=None):
        if batch.x.max() > 1_000:
            raise SolverError("too stiff", "Smooth the field", t=0.5, nfe=3, settings="dopri5")
        weight = torch.ones(len(batch.x)) if batch.weight is None else batch.weight
        return cnf.Loss((weight * batch.x.mean(1)).sum() / weight.sum(), {})


def exact(small):
    return small().double(), MaximumLikelihood(), {}


def estimated(small):
    flow = small().double()
    torch.nn.init.constant_(flow.field.field.layers[-1].weight, 0.1)  # else its trace is 0
    return flow, MaximumLikelihood(), {"validation_divergence": "hutchinson"}


def dequantized(small):
    parts = small("realnvp").double()
    return Flow(parts.base, parts.transform, dequantization=Rounded()), MaximumLikelihood(), {}


def by_loss(small):
    return torch.nn.Linear(2, 2), Mean(), {}


@pytest.mark.parametrize("case", [exact, estimated, dequantized, by_loss])
def test_score_is_the_same_for_any_number_of_processes(
    case, small, points, in_processes, monkeypatch
):
    monkeypatch.setattr(validating, "AT_ONCE", (16, 2**16))
    monkeypatch.setattr(validating, "BATCH_SIZE", 16)
    module, objective, settings = case(small)
    rows = Batch(points.double(), weight=points[:, 0].square())
    config = TrainConfig(steps=1, **settings)

    def score(fabric=None):
        return Validation(objective, config, rows, fabric).score(deepcopy(module), 1.0)

    alone = score()
    assert math.isfinite(alone)
    for count in (2, 3, 8):  # of 7 chunks
        assert in_processes(count, score) == count * [alone]


@pytest.mark.parametrize("case", [estimated, dequantized, by_loss])
def test_chunks_have_draws_of_their_own(case, small, points, monkeypatch):
    monkeypatch.setattr(validating, "AT_ONCE", (16, 2**16))
    monkeypatch.setattr(validating, "BATCH_SIZE", 16)
    module, objective, settings = case(small)
    once = points[:16].double()
    scores = [
        Validation(objective, TrainConfig(steps=1, **settings), Batch(rows)).score(module, 1.0)
        for rows in (once, torch.cat([once, once]))
    ]
    assert scores[0] != pytest.approx(scores[1], rel=1e-6)


def test_chunks_make_the_score_of_all_rows(small, points, monkeypatch):
    flow, weight = small().double(), points[:, 0].square().double()
    points = points.double()
    whole = -(weight * flow.log_prob(points)).sum() / weight.sum()
    rows, config = Batch(points, weight=weight), TrainConfig(steps=1)
    for most in (100, 30, 1):
        monkeypatch.setattr(validating, "AT_ONCE", (most, 2**16))
        score = Validation(MaximumLikelihood(), config, rows).score(flow, 1.0)
        assert score == pytest.approx(whole.item(), rel=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_is_so_in_all_processes(bad, points, in_processes):
    points = points.clone()
    points[60] = bad

    class Plain(Objective):
        def __call__(self, module, batch, generator=None):
            return cnf.Loss(batch.x.mean(), {})

    def score(fabric):
        return Validation(Plain(), TrainConfig(steps=1), Batch(points), fabric).score(
            torch.nn.Identity(), 1.0
        )

    found = torch.tensor(in_processes(3, score))
    torch.testing.assert_close(found, torch.full((3,), bad), equal_nan=True)


def test_each_process_scores_its_part_and_the_first_compares_solvers(
    small, points, in_processes, monkeypatch
):
    monkeypatch.setattr(validating, "AT_ONCE", (25, 2**16))
    scored, compared = [], []
    log_prob = Flow.log_prob
    monkeypatch.setattr(
        Flow,
        "log_prob",
        lambda self, x, *a, **k: scored.append(len(x)) or log_prob(self, x, *a, **k),
    )
    monkeypatch.setattr(validating, "warn_of_few_steps", lambda *a, **k: compared.append(1))

    def score(fabric):
        rows = Batch(points.double())
        return Validation(MaximumLikelihood(), TrainConfig(steps=1), rows, fabric).score(flow, 1.0)

    flow = small().double()
    in_processes(2, score)
    assert scored == [25] * 4 and len(compared) == 1


def test_what_fails_in_one_process_is_raised_in_all(points, in_processes, monkeypatch):
    monkeypatch.setattr(validating, "BATCH_SIZE", 25)
    points = points.clone()
    points[60] = 1e6  # the first process's second chunk

    def score(fabric):
        return Validation(Mean(), TrainConfig(steps=1), Batch(points), fabric).score(
            torch.nn.Identity(), 1.0
        )

    errors = in_processes(2, score)
    assert [type(error) for error in errors] == [SolverError, SolverError]


def test_rows_at_once_are_few_where_they_are_large():
    def most(*shape):
        return validating._rows_at_once(Batch(torch.empty(shape)))

    assert (most(10_000, 2), most(9, 3, 32, 32), most(2, 3, 512, 512)) == (2_500, 21, 1)
