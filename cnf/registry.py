"""Public name → class or function: the tables that commands, tests and docs read."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

from cnf.errors import UnknownNameError

T = TypeVar("T")


class Registry(Mapping[str, Any]):
    """A named table of one kind of thing.

    An entry may carry an `example`, a factory of small instances: the property tests run over
    every entry's example, so what is registered is tested.

    >>> SHAPES = Registry("shape")
    >>> @SHAPES.register("square", example=lambda: Square())
    ... class Square: ...
    >>> SHAPES["square"] is Square, list(SHAPES)
    (True, ['square'])
    >>> SHAPES["sqare"]
    Traceback (most recent call last):
    cnf.errors.UnknownNameError: unknown shape 'sqare'; known: square. Did you mean 'square'?
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.examples: dict[str, Callable[..., Any]] = {}
        self._entries: dict[str, Any] = {}

    def register(self, name: str, example: Callable[..., Any] | None = None) -> Callable[[T], T]:
        """Decorator that puts a class or function into the table under `name`."""

        def add(entry: T) -> T:
            if name in self._entries:
                raise ValueError(f"{self.kind} {name!r} is registered already")
            self._entries[name] = entry
            if example is not None:
                self.examples[name] = example
            return entry

        return add

    def __getitem__(self, name: str) -> Any:
        try:
            return self._entries[name]
        except (KeyError, TypeError):
            raise UnknownNameError(self.kind, name, self._entries) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)
