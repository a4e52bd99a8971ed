"""Warnings about fixed solver steps that are too few for the likelihood."""

import math
import warnings

import pytest
import torch

import cnf
from cnf import MaximumLikelihood
from cnf.metrics.error_bars import log_prob_with_error
from cnf.objectives import Loss, Objective
from cnf.race.judge import Judge
from cnf.training import diagnosis
from cnf.training.diagnosis import warn_of_difference, warn_of_few_steps, warn_of_other_loss
from cnf.training.validation import Validation

COARSE = cnf.Solver("rk4", steps=1, gradient="backprop")


def steep(small, **options):
    flow = small("cnf", **options)
    with torch.no_grad():
        flow.field.field.layers[0].linear.weight.mul_(3.0)
        torch.nn.init.normal_(flow.field.field.layers[-1].weight, std=1.0)
    return flow


@pytest.mark.parametrize("whose", ["flow", "loss"])
def test_too_few_solver_steps_warn_once_by_comparison_with_twice_as_many(
    whose, small, config, points
):
    own = COARSE if whose == "flow" else cnf.Solver()
    flow = steep(small, solver=own)
    objective = MaximumLikelihood(solver=None if whose == "flow" else COARSE)
    validation = Validation(objective, config(validations=4), cnf.Batch(points))
    with pytest.warns(
        UserWarning, match=f"the {whose}'s solver .rk4, 1 steps.*twice.*more steps"
    ) as all:
        validation.score(flow, 0.25)
        validation.score(flow, 0.5)
    assert len(all) == 1


def test_enough_solver_steps_do_not_warn(small, config, points):
    flow = small(solver=cnf.Solver("rk4", steps=8))
    validation = Validation(MaximumLikelihood(), config(), cnf.Batch(points))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        validation.score(flow, 1.0)


@pytest.mark.parametrize("off, warns", [(0.04, False), (0.06, True), (-0.06, True)])
def test_difference_of_a_twentieth_of_a_nat_warns(off, warns, small):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warned = diagnosis.warn_of_difference("fit", small(), 1.0, 1.0 + off, "the NLL of rows")
    assert warned == warns


def test_comparison_runs_at_some_validations_and_at_the_last(small, config, points, monkeypatch):
    validation = Validation(MaximumLikelihood(), config(validations=7), cnf.Batch(points))
    compared = []
    monkeypatch.setattr(validation, "compare_solvers", lambda *_: compared.append(validation.done))
    for k in range(1, 8):
        validation.score(small(), k / 7)
    assert compared == [1, 2, 4, 7]


def test_comparison_uses_evenly_spaced_rows(small, points, monkeypatch):
    monkeypatch.setattr(diagnosis, "ROWS", 10)
    flow = steep(small, solver=COARSE)
    nll = -flow.log_prob(points[::10]).mean().item()
    with pytest.warns(UserWarning, match=f"NLL of 10 own rows is {nll:.4g} nats"):
        diagnosis.warn_of_few_steps("fit", flow, cnf.Batch(points), whose="flow", kind="own")


def test_batch_statistics_are_not_taken_for_solver_error(small, points):
    ode = small(solver=cnf.Solver("rk4", steps=8)).transform
    transform = cnf.transforms.Compose([ode, cnf.transforms.BatchNorm(2)])
    flow = cnf.Flow(None, transform, event_shape=(2,)).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not warn_of_few_steps("fit", flow, cnf.Batch(points), whose="flow", kind="held-out")
    assert all(part.training for part in flow.modules())


def test_comparison_is_weighted(small, points):
    flow, weight = steep(small, solver=COARSE).double(), torch.zeros(100)
    points = points.double()
    weight[7] = 2.0
    validation = Validation(
        MaximumLikelihood(), cnf.TrainConfig(steps=1), cnf.Batch(points, weight=weight)
    )
    nll = -flow.log_prob(points[7]).item()
    with pytest.warns(UserWarning, match=f"NLL of 100 held-out rows is {nll:.4g} nats"):
        validation.score(flow, 1.0)


@pytest.mark.parametrize("likelihood", [MaximumLikelihood(), cnf.objectives.Joint()], ids=repr)
def test_comparison_uses_training_rows_if_none_are_held_out(likelihood, small, config, points):
    settings = config(validations=0, steps=1, lr=1e-9, ema=None)
    with pytest.warns(UserWarning, match="NLL of 100 training rows.*rk4, 1 steps.*twice") as all:
        cnf.fit(steep(small, solver=COARSE), likelihood, points, settings)
    assert len(all) == 1
    cnf.fit(steep(small, solver=COARSE), cnf.FlowMatching(), points, settings)
    cnf.fit(steep(small, solver=cnf.Solver()), likelihood, points, settings)


@pytest.mark.filterwarnings("error")
def test_steps_are_compared_of_weights_that_early_stopping_keeps(small, points):
    near, far = small(solver=cnf.Solver("rk4", steps=8)), steep(small, solver=COARSE)
    settings = cnf.TrainConfig(steps=8, validations=8, patience=3)
    validation = Validation(MaximumLikelihood(), settings, cnf.Batch(points))
    best, worse = (validation.score(flow, part) for flow, part in ((near, 0.125), (far, 0.25)))
    assert best < worse  # and of the worse ones nothing is said
    with pytest.warns(UserWarning, match="held-out rows.*twice the steps"):
        validation.compare_kept(far)


def test_a_finished_run_has_its_steps_compared_when_it_is_resumed(small, config, points, tmp_path):
    settings = {"steps": 200, "validations": 50, "patience": 1, "lr": 0.02, "folder": tmp_path}
    data = {"data": points, "validation": points[:30]}
    for resume in (False, True):
        own = config(**settings, resume=resume)
        with pytest.warns(UserWarning, match="NLL of 30 held-out rows.*by twice the steps"):
            history = cnf.fit(steep(small, solver=COARSE), "flow-matching", config=own, **data)
        assert history.reason == "patience"


def test_joint_objective_trains_with_the_solver_of_its_likelihood(small):
    flow, matching = small(solver=cnf.Solver()), cnf.FlowMatching()
    joint = cnf.objectives.Joint((matching, MaximumLikelihood(solver=COARSE)))
    assert joint.as_trained(flow).transform.solver == COARSE
    assert cnf.objectives.Joint((matching,), (1.0,)).as_trained(flow) is flow


@pytest.mark.parametrize(
    ("now", "then", "words"),
    [
        (2500.2, 2500.3, "is 2500.2 nats .* and 2500.3 by"),
        (2500.2, 2501.7, "is 2500 nats .* and 2502 by"),
        (math.nan, math.nan, "is nan nats .* and nan by"),
    ],
)
def test_comparison_of_steps_says_numbers_that_differ(now, then, words, small):
    with pytest.warns(UserWarning, match=words):
        assert warn_of_difference("who", small(solver=COARSE), now, then, "the NLL of 64 rows")


def test_error_bars_and_race_warn_about_too_few_solver_steps(small, points):
    flow = steep(small, solver=COARSE)
    words = r"NLL of .* rows is .* by the flow's solver \(rk4, 1 steps\) and .* by twice the steps"
    with pytest.warns(UserWarning, match=f"log_prob_with_error: the {words}"):
        log_prob_with_error(flow, points)
    judge = Judge(points, points, w2_points=20)
    with pytest.warns(UserWarning, match=f"compare: CNF: the {words}"):
        judge.warn_of_few_steps("compare: CNF", flow)
    judge.warn_of_few_steps("compare: CNF", flow.with_solver(cnf.Solver()))


# --- a module with a flow inside, and an objective of one's own ---


class Inside(torch.nn.Module):
    def __init__(self, flow):
        super().__init__()
        self.flow = flow


class Likelihood(Objective):
    """The negative log-likelihood of the flow inside."""

    def __call__(self, module, batch, generator=None):
        return Loss(-module.flow.log_prob(batch.x).mean(), {})


def test_steps_that_are_too_few_for_the_loss_of_any_module_are_told(small, config, points):
    told = r"held-out loss is .* nats by the module's solver .* twice the steps"
    settings = config(steps=2, validations=2, lr=1e-9)
    with pytest.warns(UserWarning, match=told) as record:
        cnf.fit(Inside(steep(small, solver=COARSE)), Likelihood(), points, settings)
    assert len(record) == 1


@pytest.mark.filterwarnings("error")
def test_steps_that_are_enough_for_the_loss_are_not_told(small, config, points):
    flow = small("cnf", solver=cnf.Solver("rk4", steps=16, gradient="backprop"))
    cnf.fit(Inside(flow), Likelihood(), points, config(steps=2, validations=2))


def test_a_loss_that_is_another_each_time_is_not_judged(small):
    draws = iter(range(9))
    assert not warn_of_other_loss("fit", small("cnf"), -1.0, lambda _: float(next(draws)))
    assert next(draws) == 2


def test_the_solver_of_the_module_stays(small):
    flow = small("cnf", solver=COARSE)
    with pytest.warns(UserWarning, match="the held-out loss is 1 nats by"):
        warn_of_other_loss("fit", flow, 1, lambda each: each.transform.solver.steps)
    assert flow.transform.solver == COARSE


def test_the_solver_by_which_a_recipe_trains_is_compared_too(small):
    flow = small("cnf", solver=cnf.Solver("dopri5"))
    flow.transform.recipe = cnf.transforms.continuous.Recipe(solver=COARSE)
    with pytest.warns(UserWarning, match="the held-out loss is 1 nats by"):
        warn_of_other_loss("fit", flow, 1, lambda each: each.transform.recipe.solver.steps)
