"""Registries of named classes and functions, which the commands, tests and documentation read."""

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from inspect import Parameter, isclass, signature
from typing import Any, TypeVar

from cnf.errors import UnknownNameError

__all__ = ["Registry", "spec"]

T = TypeVar("T")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class Registry(Mapping[str, Any]):
    """A mapping from names to classes or functions of one kind.

    An entry may have an `example`, a factory of small instances, over which the property tests
    run.

    >>> SHAPES = Registry("shape")
    >>> @SHAPES.register("square", example=lambda: Square())
    ... class Square:
    ...     def __init__(self, side=1): self.side = side
    >>> SHAPES
    shapes: square
    >>> SHAPES["square"] is Square, SHAPES.build({"name": "square", "side": 3}).side
    (True, 3)
    >>> SHAPES["sqare"]
    Traceback (most recent call last):
    cnf.errors.UnknownNameError: unknown shape 'sqare'; known: square. Did you mean 'square'?

    Args:
        kind: What an entry is called, in the singular.
        base: The base class of instances; None if entries are functions or any callables.
    """

    def __init__(self, kind: str, base: type | None = None) -> None:
        self.kind, self.base = kind, base
        self.examples: dict[str, Callable[..., Any]] = {}
        self._entries: dict[str, Any] = {}
        _TABLES.append(self)

    def register(self, name: str, example: Callable[..., Any] | None = None) -> Callable[[T], T]:
        """Decorator that registers a class or function.

        Args:
            name: Its name.
            example: A factory of small instances for tests.

        Raises:
            ValueError: The name is registered already.
        """

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered already")
            self._entries[name] = entry
            if example is not None:
                self.examples[name] = example
            return entry

        return add

    def build(
        self, spec: Any, who: str | None = None, defaults: Mapping[str, Any] | None = None
    ) -> Any:
        """Build an instance from its specification.

        Args:
            spec: An instance, which is returned unchanged; a name or a registered class; or a
                mapping with a "name" and the options of that class or function.
            who: Whose argument it is, for errors.
            defaults: Options for those entries that take them, where the mapping lacks them.

        Returns:
            An instance, or, of a registered function, the function with its options bound.

        Raises:
            UnknownNameError: The name is not registered.
            ValueError: A mapping has no "name", or an option that the entry does not have.
            TypeError: The specification is of another type.
        """
        if isinstance(spec, str):
            spec = {"name": spec}
        elif isclass(spec) and self.name_of(spec):
            spec = {"name": self.name_of(spec)}
        if not isinstance(spec, Mapping):
            if isinstance(spec, self.base) if self.base else callable(spec) and not isclass(spec):
                return spec
            raise TypeError(f"{self._expected(who)}, got {_shown(spec)}")
        if "name" not in spec:
            got = ", ".join(map(str, spec)) or "an empty mapping"
            raise ValueError(f"{self._expected(who)}, got {got} without a name")
        name, options = spec["name"], {k: v for k, v in spec.items() if k != "name"}
        entry = self[name]
        called = self.base is not None or isclass(entry)
        expect_options_of(entry, name, options, called)
        known = options_of(entry, called)
        options = {**{k: v for k, v in (defaults or {}).items() if k in known}, **options}
        if called:
            _expect_complete(entry, name, options)
        return entry(**options) if called else partial(entry, **options)

    def _expected(self, who: str | None) -> str:
        own = f"an instance of {self.base.__name__}" if self.base else "a function"
        return (
            f"{who or self.kind}: expected {self.kind} to be one of {', '.join(self)}, a mapping "
            f"with 'name' and options, or {own}"
        )

    def name_of(self, entry: Any) -> str | None:
        """The name of a class, of a function, or of an instance's class; None without one."""
        entry = entry.func if isinstance(entry, partial) else entry
        found = (name for name, own in self.items() if own is entry or own is type(entry))
        return next(found, None)

    def __getitem__(self, name: str) -> Any:
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            raise UnknownNameError(self.kind, name, self._entries) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self)

    def __repr__(self) -> str:
        return f"{self.kind}s: {', '.join(self)}"


_TABLES: list[Registry] = []


def options_of(entry: Callable[..., Any], called: bool = True) -> list[str]:
    """Names of the arguments that a specification may give.

    Args:
        entry: A class or function.
        called: Whether `Registry.build` calls it; if it only binds options, these are the
            keyword-only arguments.
    """
    kinds = [Parameter.KEYWORD_ONLY]
    if called:
        kinds.append(Parameter.POSITIONAL_OR_KEYWORD)
    return [name for name, p in signature(entry).parameters.items() if p.kind in kinds]


def expect_options_of(
    entry: Callable[..., Any], who: str, options: Iterable[str], called: bool = True
) -> None:
    """Raise ValueError for the first option that an entry does not take, as of `options_of`.

    Args:
        entry: A class or function; one with **options of its own takes any.
        who: Whose options they are, for the message.
        options: Names that were given.
        called: As of `options_of`.
    """
    if all(p.kind is not Parameter.VAR_KEYWORD for p in signature(entry).parameters.values()):
        expect_options(who, options, options_of(entry, called))


def _expect_complete(entry: Callable[..., Any], who: str, options: Iterable[str]) -> None:
    """Raise ValueError for options that have no default and were not given."""
    needed = (
        name
        for name, p in signature(entry).parameters.items()
        if p.default is Parameter.empty
        and p.kind in (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    )
    if missing := [name for name in needed if name not in options]:
        raise ValueError(f"{who}: expected {', '.join(missing)} to be given")


def _shown(value: Any) -> str:
    plain = value is None or isinstance(value, int | float | type)
    return repr(value) if plain else f"a {type(value).__name__}"


def expect_options(who: str, options: Iterable[str], known: Sequence[str]) -> None:
    """Raise ValueError for the first option that is unknown.

    Args:
        who: Whose options they are, for the message.
        options: Names that were given.
        known: Names that exist.
    """
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            hint = f". Did you mean {close[0]!r}?" if close else ""
            listed = ", ".join(known) or "it has none"
            raise ValueError(f"{who}: unknown option {option!r}; known: {listed}{hint}")


def spec(value: Any) -> Any:
    """The specification of a value in terms of JSON, from which `Registry.build` restores it.

    An instance with a `spec` becomes that; one of a registered class its name and fields, without
    those that are None or empty mappings. One's own functions and objects, which no registry
    builds, become their `repr` without the address in memory, which differs between processes.

    >>> import cnf
    >>> spec(cnf.matching.paths.Bridge(sigma=0.5))
    {'name': 'bridge', 'sigma': 0.5}
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if hasattr(value, "tolist"):  # numbers and arrays of NumPy, tensors
        return value.tolist()
    if isinstance(value, Mapping):
        return {key: spec(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [spec(item) for item in value]
    own = None if isclass(value) else getattr(value, "spec", None)
    if own is not None:
        return spec(own)
    found = (table.name_of(value) for table in _TABLES)
    name = next((name for name in found if name is not None), None)
    if isinstance(value, partial) and name:
        return {"name": name, **spec(value.keywords)}
    if is_dataclass(value) and not isinstance(value, type):
        values = {field.name: getattr(value, field.name) for field in fields(value)}
        options = {k: spec(v) for k, v in values.items() if v is not None and v != {}}
        return {"name": name, **options} if name else options
    return name or _ADDRESS.sub("", repr(value))
