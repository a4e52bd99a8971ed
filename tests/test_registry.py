"""Tables of names."""

import pytest

import cnf
from cnf.errors import UnknownNameError
from cnf.registry import Registry

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


def test_entries_come_back_in_the_order_of_registration():
    table = Registry("letter")
    for name in "cab":
        assert table.register(name)(name.upper()) == name.upper()
    assert list(table) == ["c", "a", "b"] and len(table) == 3
    assert table["a"] == "A" and "a" in table and "z" not in table and table.get("z") is None


def test_example_is_kept_beside_the_entry():
    table = Registry("letter")
    table.register("a", example=lambda: 7)("A")
    table.register("b")("B")
    assert list(table.examples) == ["a"] and table.examples["a"]() == 7


def test_a_name_is_registered_once():
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
