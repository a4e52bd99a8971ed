"""Normalization of command-line arguments to the spelling that jsonargparse reads."""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import is_dataclass
from inspect import Parameter, signature
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

SWITCHED = ("true", "false")


def flags(function: Callable[..., Any]) -> dict[str, Any]:
    """The type of each flag: of a function's arguments, and of the fields of dataclasses."""
    found = {}
    for name, kind in get_type_hints(function).items():
        if name != "return":
            own = settings_class(kind)
            found |= get_type_hints(own) if own else {name: kind}
    return found


def settings_class(kind: Any) -> type | None:
    """The dataclass in an argument's type, or None."""
    return next((part for part in (kind, *get_args(kind)) if is_dataclass(part)), None)  # pyright: ignore


def required(function: Callable[..., Any]) -> list[str]:
    """The arguments without a default, in order, which may be given without their flags."""
    every = signature(function).parameters.items()
    return [name for name, parameter in every if parameter.default is Parameter.empty]


def normalized(
    words: Sequence[str], kinds: Mapping[str, Any], positional: Iterable[str]
) -> list[str]:
    """Rewrite a command's words as flags with one value each.

    Dashes in a flag become underscores; words without a flag are the values of `positional`, in
    order; "a,b" becomes a list where one is expected; a switch needs no value, and is turned off
    by `--no-…`.

    >>> kinds = {"data": str, "batch_size": int, "seeds": list[int], "resume": bool}
    >>> normalized(["moons", "--batch-size", "9", "--seeds", "0,1", "--resume"], kinds, ["data"])
    ['--data=moons', '--batch_size=9', '--seeds=["0", "1"]', '--resume=true']

    Args:
        words: The words after the command.
        kinds: Type of each flag.
        positional: Flags that may be omitted, in the order of their values.

    Raises:
        ValueError: A flag is unknown or has no value, or there is a value without a flag.
    """
    waiting, rest, found = list(positional), list(words), []
    while rest:
        word = rest.pop(0)
        if word in ("-h", "--help"):
            return ["--help"]
        if not word.startswith("-"):
            if not waiting:
                raise ValueError(f"unexpected {word!r}; every other value stands behind its flag")
            found.append(f"--{waiting.pop(0)}={word}")
            continue
        name, equals, value = word.lstrip("-").partition("=")  # -n too
        name = name.replace("-", "_")
        if name.startswith("no_") and kinds.get(name[3:]) is bool and not equals:
            name, equals, value = name[3:], "=", "false"
        kind = _kind(name, kinds)
        if not equals:
            value = _value(word, kind, rest)
        waiting = [one for one in waiting if one != name]
        found.append(f"--{name}={_listed(value, kind)}")
    return found


def _value(word: str, kind: Any, rest: list[str]) -> str:
    """The value of a flag, removed from the rest of the words; a switch may have none."""
    switch = bool in (kind, *get_args(kind))
    alone = not rest or rest[0].startswith("--") or kind is bool and rest[0] not in SWITCHED
    if switch and alone:
        return "true"
    if not rest:
        raise ValueError(f"expected a value behind {word}")
    return rest.pop(0)


def _kind(name: str, kinds: Mapping[str, Any]) -> Any:
    """The type of a flag; Any for an entry of a mapping, such as `options.hidden`."""
    top, dot, _ = name.partition(".")
    if top not in kinds:
        close = difflib.get_close_matches(top, kinds, n=1)
        hint = f" Did you mean {_shown(close[0])}?" if close else ""
        raise ValueError(f"unknown flag {_shown(name)}.{hint}")
    return Any if dot else kinds[top]


def _listed(value: str, kind: Any) -> str:
    parts = value.split(",")
    if any(get_origin(part) is list for part in (kind, *get_args(kind))):
        return value if value.startswith("[") or value == "null" else json.dumps(parts)
    if kind is Any and len(parts) > 1 and value[0] not in "[{'\"":  # such as --options.hidden 8,8
        return f"[{value}]"
    return value


def error_message(error: Exception, kinds: Mapping[str, Any]) -> str:
    """The message of an error of jsonargparse in one line, with flags as they are typed.

    Args:
        error: The error.
        kinds: Type of each flag.
    """
    text = " ".join(str(error).split())
    key = re.match(r'Parser key "(\w+)', text)
    if key and key[1] in kinds and (got := re.search(r"(?:Given|Got) value: (.*)$", text)):
        return f"expected {_shown(key[1])} to be {_named(kinds[key[1]])}, got {got[1]}"
    if missing := re.match(r"the following arguments are required: (.*)", text):
        wanted = [name.split(".")[-1].upper() for name in missing[1].split(", ")]
        return f"expected {' and '.join(wanted)}"
    return text


def _shown(name: str) -> str:
    return "--" + name.replace("_", "-")


def _named(kind: Any) -> str:
    if isinstance(kind, str):
        return repr(kind)
    if get_origin(kind) is list:
        return f"a list of {_named(get_args(kind)[0])}"
    if get_origin(kind) is not dict and get_args(kind):
        return " or ".join("null" if part is NoneType else _named(part) for part in get_args(kind))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(kind, "a mapping" if get_origin(kind) is dict else kind.__name__)
