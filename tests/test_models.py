"""The named models."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import cnf
from cnf.dequantization import UniformDequantization
from cnf.models import MODELS, build
from cnf.registry import options_of
from cnf.transforms import (
    MAPS,
    Compose,
    Coupling,
    RadialGaussianization,
    RationalQuadratic,
    Whiten,
    logit,
)


def fitting(name, **wanted):
    known = options_of(MODELS[name])
    return {key: value for key, value in wanted.items() if key in known}


@pytest.mark.parametrize(
    "name, options, words",
    [
        ("rnode", {"kinetic": -0.01}, "rnode: expected kinetic >= 0, got -0.01"),
        ("rnode", {"jacobian": float("nan")}, "rnode: expected jacobian >= 0, got nan"),
        ("otflow", {"transport": -1}, "otflow: expected transport >= 0, got -1"),
        ("otflow", {"hjb": float("inf")}, "otflow: expected hjb >= 0, got inf"),
        ("ffjord", {"end_time": float("nan")}, "ffjord: expected end_time > 0, got nan"),
    ],
)
def test_weights_of_penalties_and_end_times_that_make_no_sense_are_refused(name, options, words):
    with pytest.raises(ValueError, match=words):
        build(name, dim=2, **options)


def test_penalty_of_weight_zero_is_none():
    flow = build("rnode", dim=2, kinetic=0, jacobian=0.0)
    assert flow.transform.recipe.penalties == {}
    with pytest.raises(ValueError, match="Recipe: expected kinetic >= 0, got -2"):
        cnf.transforms.continuous.Recipe(penalties={"kinetic": -2})


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_build_gives_a_flow_of_the_given_size(name, context):
    flow = build(name, dim=4, **({"context": context} if context else {}))
    assert isinstance(flow, cnf.Flow)
    assert flow.event_shape == (4,) and flow.context_dim == context


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_every_model_standardizes_by_default(name):
    x = torch.tensor([5e4, 0.03]) + torch.tensor([1e4, 0.01]) * torch.randn(200, 2)
    flow = build(name, dim=2)
    flow.preprocess.fit(x)
    assert -flow.log_prob(x).mean() < 18  # a Gaussian has 7.4; millions as they are
    assert build(name, dim=2, preprocess=None).preprocess is None


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_spec_survives_json_and_rebuilds_the_same_architecture(name):
    options = fitting(
        name,
        hidden=(9, 9) if name == "otflow" else (9, 7),  # one width
        context=2,
        layers=3,
        activation="tanh",
        solver=cnf.Solver("rk4", steps=8),
        preprocess="standardize",
    )
    flow = build(name, dim=3, **options)
    spec = json.loads(json.dumps(flow.spec))
    assert spec["model"] == name
    again = build(spec["model"], **spec["options"])
    again.load_state_dict(flow.state_dict())  # strict: same names, same shapes
    x, c = torch.ones(4, 3), torch.ones(4, 2)
    assert torch.equal(flow.log_prob(x, c), again.log_prob(x, c))
    assert json.loads(json.dumps(again.spec)) == spec
    if "solver" in options:
        assert again.transform.solver == flow.transform.solver == options["solver"]


@pytest.mark.parametrize(
    "name", [name for name in MODELS.taking("dim") if fitting(name, solver=None)]
)
def test_spec_follows_the_solver(name):
    flow = build(name, dim=2).with_solver(cnf.Solver("rk4", steps=8))
    again = build(flow.spec["model"], **json.loads(json.dumps(flow.spec["options"])))
    assert again.transform.solver == flow.transform.solver


def test_spec_does_not_share_the_callers_list():
    hidden = [8, 8]
    flow = build("cnf", dim=2, hidden=hidden)
    hidden.append(8)
    assert flow.spec["options"]["hidden"] == [8, 8]


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_error_for_a_misspelt_option_lists_the_known_ones(name):
    with pytest.raises(ValueError, match="unknown option 'contxt'; known: dim, .*context"):
        build(name, dim=2, contxt=3)


@pytest.mark.parametrize("options", [{"dim": "2"}, {"dim": 2.0}, {"dim": 2, "context": "a"}])
def test_sizes_that_are_not_integers_are_refused(options):
    with pytest.raises(ValueError, match=r"expected (dim|context) to be a whole number >= [01]"):
        build("nsf", **options)


def test_unknown_name_and_missing_dim_are_refused():
    with pytest.raises(ValueError, match="unknown model 'relnvp'; .*Did you mean 'realnvp'"):
        build("relnvp", dim=2)
    with pytest.raises(ValueError, match="cnf: expected dim="):
        build("cnf")
    with pytest.raises(ValueError, match="cnf: expected dim=… or shape="):
        build("cnf", dim=2, shape=(1, 4, 4))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("cnf", {"hidden": ()}),
        ("cnf", {"hidden": (8, 0)}),
        ("cnf", {"dim": 0}),
        ("cnf", {"context": -1}),
        ("cnf", {"activation": "slu"}),
        ("cnf", {"frequencies": -1}),
        ("cnf", {"solver": {"method": "rk4"}}),
        ("cnf", {"preprocess": "whitened"}),
        ("realnvp", {"layers": 0}),
        ("realnvp", {"layers": "2"}),
        ("glow", {"layers": 1.5}),
        ("cnf", {"layers": 1.5}),
        ("realnvp", {"hidden": (8, 1.5)}),
        ("maf", {"hidden": "64"}),
        ("nsf", {"hidden": np.int64(8)}),
        ("realnvp", {"dim": 1}),
    ],
    ids=str,
)
def test_invalid_option_values_are_refused(name, options):
    with pytest.raises(ValueError):
        build(name, **{"dim": 2, **options})


@pytest.mark.parametrize("model", [cnf.models.coupling_flow, cnf.models.autoregressive_flow])
def test_transformer_is_a_map_its_class_or_its_name(model):
    spline = {"name": MAPS.name_of(RationalQuadratic), "bins": 3}
    assert "3 bins" in repr(model(2, spline)) and "affine" in repr(model(2, "affine"))
    assert "8 bins" in repr(model(2, RationalQuadratic))
    with pytest.raises(TypeError, match="expected elementwise map to be one of additive, affine"):
        model(2, Coupling(2))
    with pytest.raises(ValueError, match="unknown elementwise map 'afine'.*Did you mean 'affine'"):
        model(2, "afine")


def test_solver_may_be_given_as_its_arguments():
    flow = build("cnf", dim=2, solver={"method": "rk4", "steps": 8})
    assert flow.transform.solver == cnf.Solver("rk4", steps=8)


@pytest.mark.parametrize(
    "solver",
    [
        cnf.Solver("scipy_solver", adjoint_norm="full", norm="rows", memory=0.5),
        cnf.Solver("implicit_adams", steps=9, gradient="checkpoint", segments=3, compile=True),
    ],
    ids=str,
)
def test_every_setting_of_the_solver_survives_json(solver):
    flow = build("cnf", dim=2, hidden=(4,), solver=solver)
    again = build("cnf", **json.loads(json.dumps(flow.spec["options"])))
    assert again.transform.solver == solver


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_copies_and_pickles_give_the_same_results(name):
    flow, x = build(name, dim=2, **fitting(name, hidden=(5, 5), layers=2)), torch.ones(3, 2)
    for again in (copy.deepcopy(flow), pickle.loads(pickle.dumps(flow))):
        assert torch.equal(again.log_prob(x), flow.log_prob(x)) and again.spec == flow.spec


def test_misspelt_option_of_a_builder_is_suggested():
    with pytest.raises(ValueError, match="nsf: unknown option 'layer'.*Did you mean 'layers'"):
        cnf.models.nsf(2, layer=3)


def test_conditioner_of_ones_own_is_a_function_with_the_right_outputs():
    with pytest.raises(TypeError, match=r"a function \(inputs, outputs\).*got a Linear"):
        Coupling(2, conditioner=nn.Linear(1, 2))
    with pytest.raises(TypeError, match=r"returns a network, got a int"):
        Coupling(2, conditioner=lambda inputs, outputs: 3)
    wrong = Coupling(2, conditioner=lambda inputs, outputs: nn.Linear(inputs, outputs + 1))
    with pytest.raises(ValueError, match="Linear to give 2 numbers for each row, got 3"):
        wrong.inverse(torch.zeros(4, 2))


WAYS = {
    "a name": ("whiten", "Whiten"),
    "a mapping": ({"name": "logit", "alpha": 0.05}, "Sigmoid"),
    "an instance": (logit(2, alpha=0.1, levels=9), "Sigmoid"),
    "a list": (["whiten", "radial"], "Compose"),
    "all kinds in a list": (["standardize", Whiten(2), {"name": "radial"}], "Compose"),
    "an instance of several": (Compose([RadialGaussianization(2), Whiten(2)]), "Compose"),
    "none": (None, "NoneType"),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_preprocessing_is_an_option_of_every_model_and_saved_with_it(name, way, tmp_path):
    given, kind = WAYS[way]
    flow = build(name, dim=2, preprocess=given, **fitting(name, layers=1))
    assert type(flow.preprocess).__name__ == kind
    again = cnf.load(cnf.save(flow, tmp_path / "flow.safetensors"))
    assert repr(again) == repr(flow) and again.spec == flow.spec
    x = torch.rand(3, 2)
    assert torch.equal(flow.log_prob(x), again.log_prob(x))


def test_list_is_applied_to_the_data_in_its_order(generator):
    """Whitened heavy tails have lengths of a normal after, and not before, the radial map."""
    x = torch.randn(2_000, 2, generator=generator).double().exp()
    flow = build("realnvp", dim=2, preprocess=["whiten", "radial"])
    flow.preprocess.fit(x)
    whiten, radial = Whiten(2), RadialGaussianization(2)
    whiten.fit(x)
    radial.fit(whiten.inverse(x)[0])
    expected = radial.inverse(whiten.inverse(x)[0])[0]
    torch.testing.assert_close(flow.inside(x)[0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_dequantization_is_an_option_of_every_model_and_saved_with_it(name, tmp_path):
    for given in ("uniform", {"name": "variational", "levels": 9, "hidden": [3]}):
        flow = build(name, dim=2, dequantization=given, **fitting(name, layers=1))
        again = cnf.load(cnf.save(flow, tmp_path / "flow.safetensors"))
        assert repr(again.dequantization) == repr(flow.dequantization)
    flow = build(name, dim=2, dequantization=UniformDequantization(32), **fitting(name, layers=1))
    assert flow.spec["options"]["dequantization"] == {"name": "uniform", "levels": 32}


def test_levels_of_the_logit_are_those_of_the_dequantization():
    def low_and_high(**options):
        return build("glow", shape=(1, 4, 4), layers=1, **options).preprocess.support

    exact = {"name": "logit", "alpha": 0.0}
    assert low_and_high(preprocess=exact) == (0, 1)
    assert low_and_high(preprocess=exact, dequantization="uniform") == (0, 256)
    coarse = {"name": "uniform", "levels": 32}
    assert low_and_high(preprocess=exact, dequantization=coarse) == (0, 32)
    own = {**exact, "levels": 40}
    assert low_and_high(preprocess=own, dequantization=coarse) == (0, 40)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preprocess": "whitten"}, "unknown preprocessing 'whitten'; .*mean 'whiten'"),
        ({"preprocess": ["whiten", "radal"]}, "unknown preprocessing 'radal'; .*mean 'radial'"),
        ({"preprocess": {"name": "logit", "alfa": 1}}, "unknown option 'alfa'; .*mean 'alpha'"),
        ({"dequantization": "unifrm"}, "unknown dequantization 'unifrm'; .*mean 'uniform'"),
        ({"dequantization": {"name": "uniform", "level": 2}}, "'level'; .*mean 'levels'"),
    ],
    ids=str,
)
def test_misspelt_names_and_options_of_preprocessing_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        build("nsf", dim=2, **options)


def test_other_kinds_of_preprocessing_are_refused_by_name():
    with pytest.raises(TypeError, match="models: expected preprocessing to be one of standardize"):
        build("nsf", dim=2, preprocess=3)
    with pytest.raises(TypeError, match="models: expected dequantization to be one of uniform"):
        build("nsf", dim=2, dequantization=256)
    with pytest.raises(ValueError, match=r"expected a transform of \(2,\), got Whiten of \(3,\)"):
        build("nsf", dim=2, preprocess=Whiten(3))
