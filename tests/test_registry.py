"""Registries of names."""

import collections
import functools
import json
import sys

import numpy as np
import pytest

import cnf
from cnf.errors import UnknownNameError
from cnf.models.build import Models
from cnf.registry import Registry, spec

TABLES = [
    cnf.models.MODELS,
    cnf.nets.ACTIVATIONS,
    cnf.fields.FIELDS,
    cnf.transforms.TRANSFORMS,
    cnf.dynamics.DIVERGENCES,
    cnf.dynamics.REGULARIZERS,
    cnf.matching.PATHS,
    cnf.matching.COUPLINGS,
    cnf.objectives.OBJECTIVES,
]


def test_entries_are_listed_in_the_order_of_registration():
    table = Registry("letter")
    for name in "cab":
        assert table.register(name)(name.upper()) == name.upper()
    assert list(table) == ["c", "a", "b"] and len(table) == 3
    assert table["a"] == "A" and "a" in table and "z" not in table and table.get("z") is None


def test_example_is_stored_with_the_entry():
    table = Registry("letter")
    table.register("a", example=lambda: 7)("A")
    table.register("b")("B")
    assert list(table.examples) == ["a"] and table.examples["a"]() == 7


def test_registering_a_name_twice_is_refused():
    table = Registry("letter")
    table.register("a")("A")
    with pytest.raises(ValueError, match="letter 'a' is registered already"):
        table.register("a")("other")
    assert table["a"] == "A"


@pytest.mark.parametrize("bad", ["nonesuch", 3, None, ["list"]])
@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.kind)
def test_unknown_name_lists_the_known_ones(table, bad):
    with pytest.raises(UnknownNameError) as caught:
        table[bad]
    assert f"unknown {table.kind} {bad!r}" in str(caught.value)
    assert all(name in str(caught.value) for name in table)


def test_specification_is_an_instance_a_name_a_class_or_a_mapping():
    path = cnf.matching.paths.Bridge(sigma=0.5)
    build = cnf.matching.PATHS.build
    assert build(path) is path
    assert build("bridge") == build({"name": "bridge"}) == build(type(path)) == type(path)()
    assert build({"name": "bridge", "sigma": 0.5}) == path


@pytest.mark.parametrize("table", TABLES[4:], ids=lambda table: table.kind)
def test_spec_of_every_entry_rebuilds_it(table):
    for name in table:
        if table.kind == "regularizer" or name in ("reverse-kl", "importance-weighted"):
            continue  # weights by name, not options; a function of one's own
        built = table.build(name)
        again = table.build(spec(built))
        assert again == built or (again.func, again.keywords) == (built.func, built.keywords)
        assert table.name_of(built) in table


@pytest.mark.parametrize("table", TABLES[4:], ids=lambda table: table.kind)
def test_misspelt_options_give_the_same_error_everywhere(table):
    name = next(iter(table))
    with pytest.raises(ValueError, match=f"^{name}: unknown option 'nonesuch'; known: "):
        table.build({"name": name, "nonesuch": 1})
    with pytest.raises(ValueError, match=f"^{table.kind}: expected {table.kind} to be one of "):
        table.build({"nonesuch": 1})
    with pytest.raises(TypeError, match=f"^me: expected {table.kind} to be .* got 0.3$"):
        table.build(0.3, "me")


@pytest.mark.parametrize("other", [int, Registry, cnf.FlowMatching])
@pytest.mark.parametrize("table", TABLES[4:], ids=lambda table: table.kind)
def test_a_class_of_another_kind_is_refused(table, other):
    if table.name_of(other) is None:
        with pytest.raises(
            TypeError, match=f"^{table.kind}: expected {table.kind} to be .* got <"
        ):
            table.build(other)


def test_the_spec_leaves_out_what_is_not_set():
    assert spec(cnf.MaximumLikelihood(penalties={})) == spec(cnf.MaximumLikelihood())
    assert "penalties" not in spec(cnf.MaximumLikelihood(penalties={}))


def test_options_of_couplings_are_bound_and_errors_propose_close_names():
    coupling = cnf.matching.COUPLINGS.build({"name": "conditional-ot", "weight": 3.0})
    assert coupling.keywords == {"weight": 3.0}
    assert spec(coupling) == {"name": "conditional-ot", "weight": 3.0}
    with pytest.raises(ValueError, match=r"conditional-ot: unknown option 'wieght'.*'weight'\?"):
        cnf.matching.COUPLINGS.build({"name": "conditional-ot", "wieght": 3.0})


def test_registry_prints_its_names():
    assert repr(cnf.dynamics.DIVERGENCES) == (
        "divergences: exact, auto, hutchinson, learned, hutch++"
    )


def test_model_registered_from_any_callable_has_its_specification():
    class Mine(cnf.Flow):
        def __init__(self, dim, *, width=8, **more):
            inner = cnf.models.realnvp(dim, hidden=(width,), **more)
            super().__init__(inner.base, inner.transform, event_shape=(dim,))

    models = Models("model")
    assert models.register("class")(Mine) is Mine
    models.register("partial")(functools.partial(cnf.models.nsf, bins=4))
    flow = models["class"](2, width=4, layers=2)
    assert type(flow) is Mine
    assert flow.spec == {"model": "class", "options": {"dim": 2, "width": 4, "layers": 2}}
    assert models["partial"](dim=2).spec["options"] == {"dim": 2}
    with pytest.raises(
        ValueError, match="partial: expected dim=… or shape=.*, the size of one data"
    ):
        models["partial"]()


def test_model_with_options_of_any_name_is_built_by_name_and_loaded(monkeypatch, tmp_path):
    models = Models("model")
    monkeypatch.setattr(sys.modules["cnf.models.build"], "MODELS", models)
    models.register("open")(lambda dim, name="x", **options: cnf.models.nsf(dim, **options))
    flow = cnf.models.build("open", dim=2, name="y", bins=3)
    assert flow.spec["options"] == {"dim": 2, "name": "y", "bins": 3}
    again = cnf.load(cnf.save(flow, tmp_path / "flow.safetensors"))
    assert again.spec == flow.spec
    with pytest.raises(TypeError, match="open: too many positional arguments"):
        models["open"](2, "y", 3)


def test_models_whose_arguments_have_no_names_or_that_give_no_flow_are_refused():
    models = Models("model")
    for builder in (lambda *sizes: cnf.models.nsf(*sizes), lambda dim, /: cnf.models.nsf(dim)):
        with pytest.raises(ValueError, match="mine: expected arguments that can be given by name"):
            models.register("mine")(builder)
    models.register("mine")(lambda dim: None)
    with pytest.raises(TypeError, match="mine: expected a model to return a Flow, got NoneType"):
        models["mine"](2)


def test_class_with_options_of_any_name_is_built_from_a_mapping():
    table = Registry("count", collections.Counter)

    @table.register("words")
    class Words(collections.Counter):
        def __init__(self, **counts):
            super().__init__(counts)

    assert table.build({"name": "words", "a": 3}) == {"a": 3}


def test_the_spec_of_ones_own_function_is_the_same_in_every_process():
    def one(x0, x1, context=None, generator=None):
        raise NotImplementedError

    told = spec(cnf.FlowMatching(coupling=one))["coupling"]
    assert "one" in told and "0x" not in told


@pytest.mark.parametrize(
    "widths", [np.array([3, 5]), range(3, 6, 2), collections.deque([3, 5])], ids=str
)
def test_sequences_of_any_kind_are_saved_as_lists(widths, tmp_path):
    flow = cnf.models.realnvp(2, hidden=widths, layers=2)
    again = cnf.load(cnf.save(flow, tmp_path / "flow.safetensors"))
    assert again.spec["options"]["hidden"] == [3, 5]


def test_numpy_numbers_are_saved_as_numbers(tmp_path):
    assert spec((np.int64(3), np.float32(0.5), np.bool_(True))) == [3, 0.5, True]
    flow = cnf.models.realnvp(np.int64(2), context=np.int64(1), layers=np.int64(2))
    assert json.loads(json.dumps(flow.spec))["options"] == {"dim": 2, "context": 1, "layers": 2}
    assert cnf.load(cnf.save(flow, tmp_path / "flow.safetensors")).context_dim == 1


def test_options_without_a_default_are_asked_for_by_name():
    with pytest.raises(ValueError, match="^reverse-kl: expected log_density to be given$"):
        cnf.objectives.OBJECTIVES.build("reverse-kl")
