"""Fixed steps that are too few for the likelihood that they report."""

import warnings

import pytest
import torch

import cnf
from cnf import MaximumLikelihood
from cnf.training.validation import Validation

COARSE = cnf.Solver("rk4", steps=1, gradient="backprop")


def steep(small, **options):
    flow = small("cnf", **options)
    with torch.no_grad():
        flow.field.field.layers[0].linear.weight.mul_(3.0)
        torch.nn.init.normal_(flow.field.field.layers[-1].weight, std=1.0)
    return flow


@pytest.mark.parametrize("whose", ["flow", "loss"])
def test_few_steps_are_compared_with_twice_as_many_and_warned_about_once(
    whose, small, config, points
):
    own = COARSE if whose == "flow" else cnf.Solver()
    flow = steep(small, solver=own)
    objective = MaximumLikelihood(solver=None if whose == "flow" else COARSE)
    validation = Validation(objective, config(validations=4), cnf.Batch(points))
    with pytest.warns(
        UserWarning, match=f"rk4, 1 steps that the {whose}.*twice.*more steps"
    ) as all:
        validation.score(flow, 0.25)
        validation.score(flow, 0.5)
    assert len(all) == 1


def test_steps_that_are_enough_are_not_warned_about(small, config, points):
    flow = small(solver=cnf.Solver("rk4", steps=8))
    validation = Validation(MaximumLikelihood(), config(), cnf.Batch(points))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        validation.score(flow, 1.0)
