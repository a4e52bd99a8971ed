"""Docstrings of public names: a summary, the arguments and the errors."""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from dataclasses import is_dataclass

import pytest

import cnf
from cnf.registry import Registry


def public_names(module):
    """A module's `__all__` and what it registers; of a file of `cnf` without one, all its own."""
    if hasattr(module, "__all__"):
        yield from (getattr(module, name) for name in module.__all__)
    elif module.__name__.count(".") == 1:
        for name, thing in vars(module).items():
            if not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__:
                yield thing
    for thing in vars(module).values():
        if isinstance(thing, Registry):
            yield from thing.values()


def public_things():
    """Place → {name: (class or function, the class that it is a method of)}."""
    found = {}
    for info in pkgutil.walk_packages(cnf.__path__, "cnf."):
        if info.name == "cnf.__main__":
            continue
        for thing in public_names(importlib.import_module(info.name)):
            home = getattr(thing, "__module__", "")
            if not home.startswith("cnf.") or not (
                inspect.isclass(thing) or inspect.isfunction(thing)
            ):
                continue
            things = found.setdefault(".".join(home.split(".")[:2]), {})
            things[f"{home}.{thing.__qualname__}"] = thing, None
            for name, method in vars(thing).items() if inspect.isclass(thing) else ():
                method = getattr(method, "__func__", getattr(method, "fget", method))
                if inspect.isfunction(method) and not name.startswith("_"):
                    things[f"{home}.{thing.__qualname__}.{name}"] = method, thing
    return found


def docs_of(thing, owner):
    """Its own docstring, "" for none, and those of the methods that it overrides."""
    above = [] if owner is None else [vars(base).get(thing.__name__) for base in owner.__mro__[1:]]
    return [inspect.cleandoc(getattr(each, "__doc__", None) or "") for each in (thing, *above)]


def raises_value_error(thing):
    """Whether `raise ValueError` stands in a function's body, or in that of a constructor."""
    if inspect.isclass(thing):
        name = "__post_init__" if is_dataclass(thing) else "__init__"
        return name in vars(thing) and raises_value_error(vars(thing)[name])
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(thing))).body
    todo = list(ast.iter_child_nodes(tree))
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if getattr(node.exc.func, "id", "") == "ValueError":
                return True
        if not isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            todo += ast.iter_child_nodes(node)
    return False


def faults(thing, owner):
    docs = docs_of(thing, owner)
    own, said, found = docs[0], "\n".join(docs), []
    if not any(docs):
        found.append("has no docstring")
    if own and not own.split("\n")[0].endswith("."):
        found.append("its first line does not end with a period")
    if own and len(arguments := arguments_of(thing)) > 1:
        found += [f"Args does not name {a}" for a in arguments if not is_explained(a, said)]
    if raises_value_error(thing) and not re.search(r"ValueError|\b[Rr]aises?\b", said):
        found.append("does not say that it raises ValueError")
    return found


def arguments_of(thing):
    """The arguments of a function, or of a class that writes its own constructor."""
    written = "__init__" in vars(thing) and not getattr(thing, "_is_protocol", False)
    if inspect.isclass(thing) and not written:
        return []
    return [name for name in inspect.signature(thing).parameters if name not in ("self", "cls")]


def is_explained(name, doc):
    """Whether a line after `Args:`, or `Attributes:` of a dataclass, begins with the name."""
    section = re.split(r"^(?:Args|Attributes):$", doc, maxsplit=1, flags=re.MULTILINE)[1:]
    line = rf"^\s+(\w+, )*\**{name}(, \w+)*( \(.*\))?:"
    return any(re.search(line, part, re.MULTILINE) for part in section)


THINGS = public_things()


def faults_in(place):
    return [
        f"{name}: {fault}" for name, found in THINGS[place].items() for fault in faults(*found)
    ]


@pytest.mark.parametrize("place", sorted(THINGS))
def test_public_names_document_summary_arguments_and_errors(place):
    assert faults_in(place) == []


def test_checker_finds_a_missing_argument_period_and_error():
    def f(a, b):
        """Too short"""
        raise ValueError(a)

    assert faults(f, None) == [
        "its first line does not end with a period",
        "Args does not name a",
        "Args does not name b",
        "does not say that it raises ValueError",
    ]
