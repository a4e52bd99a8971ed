"""Errors and warnings for users."""

import math
import pickle
import tomllib
from pathlib import Path

import pytest
import torch
from torch import nn

from cnf import TrainConfig, errors, fit, sampling
from cnf.distributions import StandardNormal
from cnf.dynamics.solver import Solver
from cnf.errors import (
    SolverError,
    UnknownNameError,
    expect_choice,
    expect_event,
    expect_finite,
    expect_positive,
    optional,
)
from cnf.fields import Adapter, Preconditioned
from cnf.flow import Flow
from cnf.models import build
from cnf.objectives import Batch, FlowMatching
from cnf.transforms import ActNorm, Continuous, Coupling, Standardize

ROOT = Path(__file__).parent.parent


def test_solver_error_says_cause_place_and_remedy():
    error = SolverError("it broke", "Try less.", t=0.421234, nfe=118, settings="rk4, 8 steps")
    assert str(error) == "it broke at t=0.4212 after 118 evaluations (rk4, 8 steps). Try less."
    assert (error.t, error.nfe, error.cause) == (0.421234, 118, "it broke")


@pytest.mark.parametrize(
    "error",
    [
        SolverError("it broke", "Try less.", t=0.5, nfe=1, settings="rk4"),
        UnknownNameError("model", "rael", ["real"]),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_survive_pickling(error):
    # data loaders and spawned ranks send their errors to the parent by pickle
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)


def test_unknown_name_lists_known_ones_and_the_nearest():
    error = UnknownNameError("model", "relnvp", ["realnvp", "cnf"])
    assert str(error) == "unknown model 'relnvp'; known: cnf, realnvp. Did you mean 'realnvp'?"
    assert isinstance(error, ValueError) and isinstance(error, KeyError)


def test_missing_extra_names_the_packages_to_install():
    """Not `cnf[…]`: on the public index that is another package."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    with pytest.raises(ImportError) as caught:
        optional("no_such_module_anywhere", "evaluation")
    named = str(caught.value).split("pip install ")[1].replace("'", "").split()
    assert sorted(map(str.lower, named)) == sorted(map(str.lower, extras["evaluation"]))
    assert optional("math", "evaluation") is math


def test_missing_module_is_named_where_the_package_was_not_installed(monkeypatch):
    monkeypatch.setattr(errors, "DISTRIBUTION", "no-such-distribution")
    with pytest.raises(ImportError, match="pip install no_such_module_anywhere$"):
        optional("no_such_module_anywhere", "evaluation")


@pytest.mark.parametrize("shape", [(2,), (5, 2), (0, 2), (3, 4, 2)])
def test_event_of_the_right_shape_passes(shape):
    expect_event("f", "x", torch.zeros(shape), (2,))


@pytest.mark.parametrize(
    ("value", "event", "text"),
    [
        (torch.zeros(5, 3), (2,), r"f: expected x of shape (*, 2), got (5, 3)"),
        (torch.zeros(()), (2,), r"f: expected x of shape (*, 2), got ()"),
        (torch.zeros(4, 4), (1, 4, 4), r"f: expected x of shape (*, 1, 4, 4), got (4, 4)"),
        (torch.zeros(5, 2).long(), (2,), r"f: expected x of floating dtype, got torch.int64"),
        (
            [[0.0, 0.0]],
            (2,),
            "f: expected x to be a torch.Tensor, got list; write torch.as_tensor(x)",
        ),
    ],
)
def test_event_of_wrong_shape_or_dtype_is_refused(value, event, text):
    with pytest.raises(ValueError) as caught:
        expect_event("f", "x", value, event)
    assert str(caught.value) == text


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_rows_are_named(bad):
    x = torch.zeros(8, 2)
    x[3, 1] = x[6, 0] = bad
    with pytest.raises(ValueError, match=r"in 2 of 8 rows \(rows 3, 6\)"):
        expect_finite("fit", "x", x)


@pytest.mark.parametrize("shape", [(4, 2), (4,), (0, 2), (2, 1, 3, 3)])
def test_finite_rows_pass(shape):
    expect_finite("fit", "x", torch.zeros(shape))


def test_error_for_a_choice_lists_the_choices():
    expect_choice("f", "mode", "a", ("a", None))
    with pytest.raises(ValueError, match="f: expected mode to be one of 'a', None, got 'b'"):
        expect_choice("f", "mode", "b", ("a", None))


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, math.inf])
def test_numbers_that_are_not_positive_are_refused(bad):
    expect_positive("f", rate=1e-3, other=None)
    with pytest.raises(ValueError, match="f: expected rate > 0"):
        expect_positive("f", other=2, rate=bad)


class Halving(nn.Module):
    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        return given[-1].mul_(0.5) * 1.0


@pytest.mark.parametrize(
    "use",
    [
        lambda flow, z: flow.trajectory(z, (0.0, 0.5, 1.0)),
        lambda flow, z: sampling.sde(flow, 3, steps=2),
        lambda flow, z: FlowMatching()(flow, Batch(z)),
    ],
    ids=["trajectory", "sde", "flow matching"],
)
def test_field_that_modifies_its_input_is_refused_wherever_it_is_called(use):
    flow = Flow(StandardNormal((2,)), Continuous(Adapter(Halving(), (2,)), Solver("rk4", steps=2)))
    with torch.no_grad(), pytest.raises(ValueError, match="Halving: edits its input x in place"):
        use(flow, torch.ones(3, 2))


def test_conditioner_that_modifies_its_input_is_refused():
    coupling = Coupling(
        4, conditioner=lambda inputs, outputs: nn.Sequential(Halving(), nn.Linear(2, 4))
    )
    with torch.no_grad(), pytest.raises(ValueError, match="Sequential: edits its input x in pl"):
        coupling(torch.ones(3, 4))
    # With gradients as well: torch lets an edit of a part of x pass where x needs none.
    with pytest.raises(ValueError, match="Sequential: edits its input x in place"):
        coupling(torch.ones(3, 4))


class Editing(nn.Module):
    """x ↦ W tanh(V x), edited on the way in one place or another."""

    def __init__(self, way):
        super().__init__()
        self.way, self.into, self.out = way, nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, given):
        if self.way == "a part of the input":
            given[..., 0].mul_(2)
        hidden = torch.tanh(self.into(given))
        if self.way == "what tanh has kept":
            hidden.mul_(0.5)
        if self.way == "a part of what tanh has kept":
            hidden[..., 0] = 0.0
        if self.way == "an expanded tensor":
            torch.ones(1, device=given.device).expand(7).mul_(2.0)
        return self.out(hidden)


WAYS = ["what tanh has kept", "a part of what tanh has kept", "an expanded tensor"]
USES = {
    "estimate": lambda flow, x: flow.log_prob(x, divergence="hutchinson"),
    "fit by likelihood": lambda flow, x: fit(flow, "maximum-likelihood", x, SHORT),
    "fit by flow matching": lambda flow, x: fit(flow, "flow-matching", x, SHORT),
}
SHORT = TrainConfig(steps=1, progress=False, device="cpu", validations=0)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("way", WAYS)
def test_operation_in_place_that_autograd_rejects_is_explained(way, use):
    field = Preconditioned(Adapter(Editing(way), (2,), call="concat"))
    flow = Flow(StandardNormal((2,)), Continuous(field, Solver("rk4", steps=1)))
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(
        ValueError, match="Editing: a tensor is edited in place.*not h.mul_.*torch:"
    ):
        USES[use](flow, x)


@pytest.mark.parametrize("use", USES)
def test_network_may_modify_the_concatenated_input_in_place(use):
    field = Adapter(Editing("a part of the input"), (2,), call="concat")
    flow = Flow(StandardNormal((2,)), Continuous(field, Solver("rk4", steps=1)))
    USES[use](flow, torch.randn(64, 2, generator=torch.Generator().manual_seed(0)))


def test_other_errors_of_a_field_are_not_changed():
    field = Adapter(nn.Linear(5, 2), (2,), call="concat")
    flow = Flow(StandardNormal((2,)), Continuous(field, Solver("rk4", steps=1)))
    with pytest.raises(ValueError, match="Adapter: expected Linear .*mat1 and mat2 shapes"):
        flow.log_prob(torch.ones(3, 2))


SHAPED = {
    "base": StandardNormal,
    "field": lambda shape: Adapter(nn.Identity(), shape),
    "actnorm": ActNorm,
    "standardize": Standardize,
}


@pytest.mark.parametrize("kind", SHAPED)
def test_event_shape_of_one_number_is_that_of_a_vector(kind):
    assert SHAPED[kind](3).event_shape == SHAPED[kind]((3,)).event_shape == (3,)


@pytest.mark.parametrize("kind", SHAPED)
@pytest.mark.parametrize("shape", ["3", 2.5, (2, -1), None])
def test_event_shape_that_is_none_is_named(kind, shape):
    if shape is None and kind in ("actnorm", "standardize"):
        pytest.skip("None is where any shape fits")
    with pytest.raises(ValueError, match=r"expected event_shape to be a whole number.*got"):
        SHAPED[kind](shape)


def test_warning_shows_the_line_of_the_user():
    flow = build("nsf", dim=2)
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 3.0
    with pytest.warns(UserWarning) as heard:
        fit(flow, "maximum-likelihood", x, TrainConfig(steps=1, progress=False))
        with torch.no_grad():
            flow.log_prob(x * 1e6)
    assert {warning.filename for warning in heard} == {__file__}
    assert len({warning.lineno for warning in heard}) == 2
