"""Errors, and checks that raise them: who, what was expected, what was given, what to try."""

import contextlib
import difflib
import importlib
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["CheckpointError", "DivergedError", "SolverError", "UnknownNameError"]

WEIGHTS = (1e-30, 1e30)  # least and largest for the maximum of the weights of rows
DISTRIBUTION = "torch-cnf"  # the name of the package on the index
# Code between a user's line and a warning: this package's, and what wraps its functions.
INSIDE = (str(Path(__file__).parent), str(Path(torch.__file__).parent), contextlib.__file__)


class SolverError(RuntimeError):
    """An ODE solve that failed; the message says why, at which time, and what to try.

    Args:
        cause: What went wrong, in words.
        remedy: What to try, in words.
        t: Time of the last evaluation.
        nfe: Evaluations of the vector field so far.
        settings: The solver's settings, in words.
    """

    def __init__(self, cause: str, remedy: str, *, t: float, nfe: int, settings: str) -> None:
        super().__init__(f"{cause} at t={t:.4g} after {nfe} evaluations ({settings}). {remedy}")
        self.cause, self.remedy, self.t, self.nfe, self.settings = cause, remedy, t, nfe, settings

    def __reduce__(self) -> Any:  # between processes: the state, not the constructor's arguments
        return _restored, (type(self), self.args, self.__dict__)


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read, or put into the given flow."""


class DivergedError(ValueError):
    """Training with a loss, gradients or weights that are not finite, or an unsolvable ODE."""


class UnknownNameError(ValueError, KeyError):
    """A name that is not registered; the message lists the known ones and the closest.

    Args:
        kind: What the name is of, such as "coupling".
        name: The name.
        known: The registered names.
    """

    def __init__(self, kind: str, name: object, known: Iterable[str]) -> None:
        names = sorted(known)
        close = difflib.get_close_matches(str(name), names, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        super().__init__(f"unknown {kind} {name!r}; known: {', '.join(names)}.{hint}")

    def __reduce__(self) -> Any:
        return _restored, (type(self), self.args, self.__dict__)

    __str__ = ValueError.__str__  # KeyError would print the quoted repr


def _restored(kind: type[Exception], args: tuple[Any, ...], state: dict[str, Any]) -> Exception:
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


def optional(module: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency.

    Args:
        module: Name of the module.
        extra: The extra of this distribution that installs it.

    Raises:
        ImportError: It is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        packages = " ".join(f"'{package}'" for package in _requirements(extra))
        raise ImportError(
            f"{module} is needed here ({error}); install it with: pip install {packages or module}"
        ) from error


def _requirements(extra: str) -> list[str]:
    """The requirements of an extra; none if this package was not installed by pip."""
    try:
        listed = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return []
    marked = (requirement.split(";", 1) for requirement in listed if ";" in requirement)
    wanted = re.compile(rf"extra == ['\"]{re.escape(extra)}['\"]")
    return [package.strip() for package, marker in marked if wanted.search(marker)]


def expect_tensor(who: str, name: str, value: Any) -> None:
    """Raise ValueError unless `value` is a tensor.

    Args:
        who: Whose argument it is, for the message.
        name: Name of the argument.
        value: The argument.
    """
    if not isinstance(value, Tensor):
        rows = isinstance(getattr(value, "x", None), Tensor)  # of Points, Images, a Batch
        raise ValueError(
            f"{who}: expected {name} to be a torch.Tensor, got {type(value).__name__}; write "
            + ("its rows, .x" if rows else f"torch.as_tensor({name})")
        )


def expect_event(who: str, name: str, value: Tensor, event_shape: Sequence[int]) -> None:
    """Raise ValueError unless `value` is a floating tensor of shape (*, *event_shape).

    Args:
        who: Whose argument it is, for the message.
        name: Name of the argument.
        value: The argument.
        event_shape: Shape of an event.
    """
    event_shape = tuple(event_shape)
    expect_tensor(who, name, value)
    if not value.is_floating_point():
        raise ValueError(f"{who}: expected {name} of floating dtype, got {value.dtype}")
    if tuple(value.shape[value.dim() - len(event_shape) :]) != event_shape:
        wanted = ", ".join(["*", *map(str, event_shape)])
        raise ValueError(f"{who}: expected {name} of shape ({wanted}), got {tuple(value.shape)}")


def expect_context(who: str, context: Tensor | None, size: int) -> Tensor:
    """Return the context; raise ValueError unless it has the shape (*, size)."""
    if context is None:
        raise ValueError(
            f"{who}: expected a context of shape (*, {size}), got None; give context=…, also to "
            "cnf.fit"
        )
    expect_event(who, "context", context, (size,))
    return context


def expect_finite(who: str, name: str, value: Tensor, numbers: Tensor | None = None) -> None:
    """Raise ValueError if `value` contains NaN or infinity, naming the first such rows.

    Args:
        who: Whose argument it is, for the message.
        name: Name of the argument.
        value: The rows, shape (N, *event).
        numbers: Row numbers to name, shape (N,), if the rows were drawn from the user's.
    """
    found = (~torch.isfinite(value)).nonzero()[:, 0].unique()
    rows = (found if numbers is None else numbers[found.to(numbers.device)].sort().values).tolist()
    if rows:
        raise ValueError(
            f"{who}: expected {name} to be finite, got NaN or infinity in {len(rows)} of "
            f"{len(value)} rows (rows {abbreviated(rows)}); drop or impute them"
        )


def expect_weights(who: str, weight: Tensor, numbers: Tensor | None = None) -> None:
    """Raise ValueError unless weights are finite, at least 0, not all 0, and of a usable scale.

    The scale must be such that sums of them are finite and not zero in float32.

    Args:
        who: Whose weights they are, for the message.
        weight: The weights, shape (N,).
        numbers: Row numbers to name, shape (N,), if the rows were drawn from the user's.
    """
    wrong = (~((weight >= 0) & torch.isfinite(weight))).nonzero().flatten().tolist()
    if wrong:
        row = wrong[0] if numbers is None else int(numbers[wrong[0]])
        raise ValueError(
            f"{who}: expected weights that are finite and at least 0, got {weight[wrong[0]]:g} in "
            f"row {row} ({len(wrong)} of {len(weight)} rows)"
        )
    largest = weight.max().item() if len(weight) else 1.0
    if not largest:
        raise ValueError(f"{who}: expected a weight above 0, got zero in all {len(weight)} rows")
    if not WEIGHTS[0] <= largest <= WEIGHTS[1]:
        raise ValueError(
            f"{who}: expected the largest weight between {WEIGHTS[0]:g} and {WEIGHTS[1]:g}, got "
            f"{largest:g}, whose sums float32 cannot hold; divide them by their mean"
        )


def expect_unmasked(who: str, name: str, value: Any) -> None:
    """Raise ValueError if an array has masked entries, naming their rows and columns."""
    if not isinstance(value, np.ma.MaskedArray) or not np.ma.is_masked(value):
        return
    where = np.argwhere(np.ma.getmaskarray(value))
    rows = np.unique(where[:, 0]).tolist()
    columns = ""
    if where.shape[1] > 1:
        columns = f", columns {abbreviated(np.unique(where[:, 1]).tolist())}"
    raise ValueError(
        f"{who}: expected {name} without masked entries, got {len(rows)} of {len(value)} rows "
        f"with some (rows {abbreviated(rows)}{columns}); drop these rows, or fill them: "
        f"{name}.filled(…)"
    )


# What torch's errors say if a tensor that autograd needs was, or would be, modified in place.
_EDITED = re.compile(r"in-?place|written-to tensor", re.IGNORECASE)


def explain_edit(module: torch.nn.Module, error: RuntimeError) -> None:
    """Raise ValueError with an explanation if torch's error is of an operation in place.

    Args:
        module: The flow, field or network that was called.
        error: The error that torch raised.
    """
    if _EDITED.search(str(error)):
        told = str(error).split(". ")[0].strip()
        raise ValueError(
            f"{_author(module)}: a tensor is edited in place whose value its derivative still "
            "needs; write h = h * 0.5, not h.mul_(0.5), and torch.cat or torch.where, not "
            f"h[..., 0] = … (torch: {told})"
        ) from error


def warn(text: str) -> None:
    """Warn at the line of the user's that led here, which is what the warning shows.

    Args:
        text: Who, what was expected, what came, what to do.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(INSIDE):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, stacklevel=level)


def _author(module: torch.nn.Module) -> str:
    """The class of the innermost network of a flow or field."""
    while isinstance(field := getattr(module, "field", None), torch.nn.Module):
        module = field
    return type(getattr(module, "net", module)).__name__


def call_without_edits(
    module: torch.nn.Module, call: Callable[[], Any], **given: Tensor | None
) -> Any:
    """Return `call()`; raise ValueError if `module` modifies its inputs in place.

    There is no check in compiled code and in inference mode, where tensors have no version.

    Args:
        module: The module that is called, for the message.
        call: A function that calls it.
        given: Its inputs by name; None is skipped.
    """
    tensors = {name: value for name, value in given.items() if value is not None}
    if torch.compiler.is_compiling() or any(value.is_inference() for value in tensors.values()):
        return call()
    before = [value._version for value in tensors.values()]
    try:
        found = call()
    except RuntimeError as error:
        explain_edit(module, error)
        raise
    for (name, value), version in zip(tensors.items(), before, strict=True):
        if value._version != version:
            raise ValueError(
                f"{_author(module)}: edits its input {name} in place, which is still needed, so "
                f"that the result would be wrong; write {name} = {name} * 0.5, not "
                f"{name}.mul_(0.5)"
            )
    return found


def abbreviated(values: Sequence[Any]) -> str:
    """The first five values, separated by commas, for a message."""
    return ", ".join(map(str, values[:5])) + (", …" if len(values) > 5 else "")


def is_whole(n: object) -> bool:
    """Whether n is an integer of Python or NumPy, or a symbolic one of torch.compile."""
    return isinstance(n, int | Integral | torch.SymInt) and not isinstance(n, bool)


def is_count(n: Any) -> bool:
    """Whether n is an integer of at least 0."""
    return is_whole(n) and n >= 0


def expect_shape(who: str, shape: Any, name: str = "sample_shape") -> tuple[int, ...]:
    """Return a shape as a tuple, an int n as (n,); raise ValueError if it is none."""
    sizes = (shape,) if is_count(shape) else shape
    if isinstance(sizes, tuple | list) and all(map(is_count, sizes)):
        return tuple(sizes)
    raise ValueError(
        f"{who}: expected {name} to be a whole number of at least 0, or a tuple of such, "
        f"got {shape!r}"
    )


def expect_times(who: str, times: Any) -> list[float]:
    """Return the times as floats; raise ValueError unless they ascend from 0 within [0, 1]."""
    if isinstance(times, Tensor) and times.requires_grad:
        raise ValueError(f"{who}: times take no gradient; give it times.detach()")
    try:
        found = [float(t) for t in times]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{who}: expected times, a sequence of numbers, got {times!r}") from None
    if not found or found[0] != 0 or not all(a < b <= 1 for a, b in pairwise(found)):
        raise ValueError(
            f"{who}: expected times ascending from 0.0 and inside [0, 1], got {found}"
        )
    return found


def expect_device(who: str, device: str | torch.device) -> None:
    """Raise ValueError if torch finds no device of this kind."""
    there = {"cuda": torch.cuda.is_available, "mps": torch.backends.mps.is_available}
    kind = str(device).split(":")[0]
    if kind in there and not there[kind]():
        raise ValueError(
            f"{who}: expected a device that is there, got {str(device)!r}, and torch "
            f"{torch.__version__} finds none; take device='cpu'"
        )


def expect_generator(who: str, generator: Any) -> None:
    """Raise TypeError unless `generator` is a torch.Generator or None."""
    if generator is not None and not isinstance(generator, torch.Generator):
        seed = generator if is_whole(generator) else 0
        raise TypeError(
            f"{who}: expected generator to be a torch.Generator, got {generator!r}; write "
            f"generator=torch.Generator().manual_seed({seed})"
        )


def expect_choice(who: str, name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        known = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{who}: expected {name} to be one of {known}, got {value!r}")


def expect_positive(who: str, **values: float | None) -> None:
    """Raise ValueError for the first value that is neither None nor finite and above zero."""
    for name, value in values.items():
        if value is not None and not _is_positive(value):
            raise ValueError(f"{who}: expected {name} > 0, got {value!r}")


def _is_positive(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and bool(0 < value < float("inf"))
    except (TypeError, ValueError, RuntimeError):  # text; arrays and tensors of several numbers
        return False


def expect_not_negative(who: str, **values: float) -> None:
    """Raise ValueError for the first value that is not finite and zero or above."""
    for name, value in values.items():
        if not (_is_positive(value) or (value == 0 and not isinstance(value, bool))):
            raise ValueError(f"{who}: expected {name} >= 0, got {value!r}")


def expect_counts(who: str, least: int = 1, **values: Any) -> None:
    """Raise ValueError for the first value that is neither None nor an integer >= `least`."""
    for name, value in values.items():
        if value is None:
            continue
        if not is_whole(value):
            raise ValueError(f"{who}: expected {name} to be a whole number, got {value!r}")
        if value < least:
            bound = "> 0" if least == 1 else f">= {least}"
            raise ValueError(f"{who}: expected {name} {bound}, got {value!r}")
