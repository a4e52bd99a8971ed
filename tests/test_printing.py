"""The repr of flows and their parts, within a screen's width."""

import inspect

import pytest
import torch

import cnf
from cnf import Solver, distributions
from cnf.fields import Adapter, Guided, MLPField, NullContext, Piecewise, Preconditioned, Predicts
from cnf.fields.base import FIELDS
from cnf.models import MODELS
from cnf.printing import grouped
from cnf.transforms import Compose, Coupling, Inverse, OnChannels, PerPixel, RationalQuadratic
from cnf.transforms.base import TRANSFORMS
from cnf.transforms.linear import LU


def lines_of(part):
    lines = repr(part).splitlines()
    assert max(map(len, lines)) <= 79
    return lines


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_repr_of_a_model_has_name_size_weights_and_parts_in_a_few_lines(name):
    flow = MODELS[name](dim=3, context=2)
    first, *rest = lines_of(flow)
    count = sum(weight.numel() for weight in flow.parameters())
    assert first == f"Flow {name!r}: points of 3, context 2; {count:,} weights"
    parts = ("base: ", "transform: ", "preprocess: ", "context_preprocess: ")
    assert [line for line in rest if line[4:].startswith(parts)] == [
        line for line in rest if line[4] != " "
    ]
    assert all(any(line.strip().startswith(part) for line in rest) for part in parts)
    assert len(rest) <= 8


def test_repr_of_a_hand_built_flow_has_its_transform_and_event_shape():
    flow = cnf.Flow(torch.distributions.Normal(torch.zeros(2), 1.0), Coupling(2))
    assert lines_of(flow)[0] == "Flow of a Coupling: points of 2; 4,418 weights"
    images = lines_of(MODELS["glow"](shape=(1, 8, 8), hidden=(4, 4)))
    assert "points of (1, 8, 8)" in images[0] and len(images) <= 10


@pytest.mark.parametrize("name", TRANSFORMS.examples)
def test_repr_of_a_transform_is_one_line_with_its_size(name):
    build = TRANSFORMS.examples[name]
    conditional = "context_dim" in inspect.signature(build).parameters
    transform = build(3, context_dim=5) if conditional else build(3)
    (line,) = lines_of(transform)
    assert line.startswith(f"{type(transform).__name__}(")
    assert transform.event_shape is None or "3" in line
    assert not conditional or "context 5" in line


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "diffusers"])
def test_repr_of_a_field_is_one_line_with_its_size(name):
    if name == "adapter":
        field = Adapter(torch.nn.Linear(3, 3), (3,))
    else:
        field = FIELDS[name]((3, 4, 4) if name in ("conv", "unet") else 3, context_dim=5)
    (line,) = lines_of(field)
    assert line.startswith(f"{type(field).__name__}(") and "3" in line
    assert not field.context_dim or "context 5" in line


def test_repr_of_a_wrapper_contains_that_of_the_wrapped_object():
    field = MLPField(2, (8,), 1)
    assert repr(Preconditioned(field)) == "Preconditioned(MLPField(2, context 1, hidden (8,)))"
    assert repr(Guided(NullContext(field), 1.5)).endswith("hidden (8,))), weight 1.5)")
    assert repr(Piecewise([MLPField(2, (8,)), MLPField(2, (8,))])) == (
        "Piecewise(2 × MLPField(2, hidden (8,)))"
    )
    assert "x1, Linear(" in repr(Predicts(field, "x1"))


def test_repr_of_a_stack_lists_each_repeated_part_once():
    layers = [Coupling(2, [k % 2]) for k in range(8)]
    assert repr(Compose(layers)) == "Compose(8 × Coupling(2, affine, hidden (64, 64)))"
    spline = Inverse(Coupling(2, [0], RationalQuadratic(4), hidden=(8,)))
    assert repr(spline) == "Inverse(Coupling(2, spline of 4 bins, hidden (8,)))"
    assert repr(OnChannels(PerPixel(LU(2)), 2)) == "OnChannels(2 channels, PerPixel(LU(2)))"
    assert grouped("abcabcabdd") == "2 × (a, b, c), a, b, 2 × d"


def test_repr_of_a_solver_is_the_call_that_creates_it():
    for solver in (Solver(), Solver("heun2", grid=(0, 0.5, 1)), Solver(rtol=1e-7, compile=True)):
        assert eval(repr(solver)) == solver
    assert repr(Solver("rk4", steps=8)) == "Solver(method='rk4', steps=8)"


@pytest.mark.parametrize(
    ("base", "text"),
    [
        (None, "StandardNormal(2)"),
        (cnf.data.toy("moons"), "FromDensity(2, Curves('moons'))"),
        (torch.zeros(5, 2), "Empirical(2, 5 points)"),
        (distributions.GaussianMixture(torch.zeros(3, 2), torch.ones(3, 2)), "3 components"),
        (distributions.UniformAngles(2), "UniformAngles(2, period 6.28319)"),
        (torch.distributions.Normal(torch.zeros(2), 1.0), "FromTorch(2, Independent(Normal("),
    ],
)
def test_repr_of_a_base_names_distribution_and_size(base, text):
    assert text in " ".join(lines_of(distributions.as_base(base, (2,))))


def test_repr_of_torch_modules_is_available():
    tree = torch.nn.Module.__repr__(Coupling(2))
    assert "(0): Linear(in_features=1, out_features=64, bias=True)" in tree
