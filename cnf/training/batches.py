"""Rows as they come from a user, read and checked: tensors, arrays, tables, pairs, mappings."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from cnf.data import Points
from cnf.data.arrays import as_numbers, is_rows
from cnf.data.tabular import is_large
from cnf.errors import expect_finite, expect_weights
from cnf.objectives import Batch
from cnf.precision import widest


def as_batch(
    item: Any,
    name: str = "x",
    missing: bool = False,
    who: str = "fit",
    numbers: Tensor | None = None,
) -> Batch:
    """A Batch from x, a pair (x, context), a mapping with the names of a Batch, or a Batch.

    Args:
        item: One of these.
        name: What errors call x.
        missing: Whether a context may be missing, NaN.
        who: What errors begin with.
        numbers: The rows' numbers in the data that they were drawn from, for errors.
    """
    if isinstance(item, Batch):
        for key, value in vars(item).items():
            if value is not None:
                _expect_numbers(who, name if key == "x" else key, value, missing, numbers)
        return item
    tensors = {
        key: _checked(who, name if key == "x" else key, value, missing, numbers)
        for key, value in _by_name(who, item).items()
        if value is not None
    }
    rows = len(tensors["x"])
    for key, value in tensors.items():
        if not value.dim():
            raise ValueError(f"{who}: expected {rows} rows of {key}, got the one number {value:g}")
        if len(value) != rows:
            raise ValueError(f"{who}: expected {rows} rows of {key}, got {len(value)}")
    weight = tensors.pop("weight", None)
    batch = Batch(**tensors)  # without the weight: chance may draw weights of 0
    return batch if weight is None else batch.but(weight=_weights(who, weight, rows, numbers))


def _by_name(who: str, item: Any) -> dict[str, Any]:
    """The parts of a mapping, of a pair (x, context), or of x alone, as a Batch names them."""
    if isinstance(item, Mapping):
        known = [field.name for field in fields(Batch)]
        if "x" in item and set(item) <= set(known):
            return dict(item)
        raise ValueError(
            f"{who}: expected a mapping with x and any of {', '.join(known[1:])}, got "
            f"{', '.join(map(str, item))}; rename those that are meant, and leave out the others "
            "(dataset.select_columns)"
        )
    pair = isinstance(item, Sequence) and not isinstance(item, str) and not is_rows(item)
    given = item if pair else [item]
    if not 1 <= len(given) <= 2:
        raise ValueError(
            f"{who}: expected a batch to be x or (x, context), got {len(given)} parts; name "
            'them: {"x": …, "context": …, "weight": …}'
        )
    return dict(zip(("x", "context"), given, strict=False))


def in_memory(data: Any, context: Any = None, weight: Any = None, missing: bool = False) -> Batch:
    """Rows in memory, with their contexts and weights, less those of weight 0.

    Args:
        data: Of `fit`, where it is a tensor, an array, a table, a mapping or `Points`.
        context: Of `fit`.
        weight: Of `fit`.
        missing: Whether a context may be missing, NaN.

    That numbers are finite is not checked where they are large, see `is_large`.

    Raises:
        ValueError: There are fewer than two rows, or they are not what `fit` takes.
    """
    own = {"x": data}
    if isinstance(data, Mapping):
        own = dict(data)
    elif isinstance(data, Points):
        own = {"x": data.x, "context": data.context, "weight": data.weight}
    for name, value in (("context", context), ("weight", weight)):
        if value is not None and own.get(name) is not None:
            raise ValueError(f"fit: the data hold their own {name}, got {name}=… beside it")
        if value is not None:
            own[name] = value
    if "x" in own:
        own["x"] = _checked("fit", "data", own["x"])
        if len(own["x"]) < 2:
            shape = tuple(own["x"].shape)
            raise ValueError(f"fit: expected data of two rows or more, got shape {shape}")
    return drop_zero_weights(as_batch(own, missing=missing))


def as_context(who: str, context: Any, missing: bool = False) -> Tensor:
    """A context for each row, shape (N, C), from a tensor, an array, a table or lists of numbers.

    Args:
        who: What errors begin with.
        context: The numbers; of labels an error says how to code them.
        missing: Whether it may be missing, NaN.
    """
    return _checked(who, "context", context, missing)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a module's parameters; torch's default where it has none."""
    return next((p.dtype for p in module.parameters()), torch.get_default_dtype())


class Placement:
    """Puts batches on a device, in the module's dtype.

    What preprocessing is to standardize keeps the digits that it has so far.

    Attributes:
        wide: Names of the tensors that keep their digits: "x", "context".
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.device, self.dtype = device, dtype_of(module)
        parts = {"x": "preprocess", "context": "context_preprocess"}
        float64 = widest(device) == torch.float64
        self.wide = {
            name
            for name, part in parts.items()
            if float64 and getattr(module, part, None) is not None
        }

    def __call__(self, batch: Batch) -> Batch:
        placed = {}
        for name, value in vars(batch).items():
            if value is not None and not value.is_floating_point():  # pixels, of eight bits
                placed[name] = value.to(self.device).to(self.dtype)
            elif value is not None:
                wide = name in self.wide
                dtype = torch.promote_types(value.dtype, self.dtype) if wide else self.dtype
                placed[name] = value.to(self.device, dtype)
        return batch.but(**placed)


def check_event_shape(module: nn.Module, rows: Batch | None, name: str = "data") -> None:
    """Raise where the rows cannot be what the module models."""
    if rows is None or not rows.x[0].numel():  # contexts alone
        return
    expected = getattr(module, "event_shape", None)
    discrete = getattr(module, "dequantization", None) is not None
    if not rows.x.is_floating_point() and not discrete:
        remedy = f"use {name}.double(), or {name}.astype(float) of an array or a table"
        if rows.x.dim() == 4:
            remedy = "build a model of pixels with dequantization='uniform'"
        raise ValueError(f"fit: expected {name} of floating dtype, got {rows.x.dtype}; {remedy}")
    if expected is not None and tuple(rows.x.shape[1:]) != expected:
        raise ValueError(
            f"fit: the flow models points of shape {expected}, those of {name} are of shape "
            f"{tuple(rows.x.shape[1:])}"
        )


def is_batch(value: Any) -> bool:
    """Whether this is one batch, a pair (x, context) too, rather than an iterable of them."""
    if isinstance(value, tuple) and not is_rows(value):
        return 0 < len(value) <= 2 and all(map(is_rows, value))
    return isinstance(value, Batch | Mapping) or is_rows(value)


def first_rows(batches: Iterable[Batch], n: int) -> Batch:
    """The first n rows of some batches."""
    found, count = [], 0
    for batch in batches:
        found.append(batch)
        count += len(batch.x)
        if count >= n:
            break
    if not found:
        raise ValueError("fit: expected batches to validate on, got an empty iterable")
    names = [name for name, value in vars(found[0]).items() if value is not None]
    columns = {name: [vars(batch)[name] for batch in found] for name in names}
    return Batch(**{name: torch.cat(parts)[:n] for name, parts in columns.items()})


def drop_zero_weights(rows: Batch) -> Batch:
    """The rows without those of weight 0, which do not count in any mean."""
    if rows.weight is None:
        return rows
    expect_weights("fit", rows.weight)
    heavy = rows.weight > 0
    return rows if heavy.all() else rows.map(lambda value: value[heavy])


def _weights(who: str, weight: Tensor, n: int, numbers: Tensor | None) -> Tensor:
    if weight.shape != (n,):
        raise ValueError(f"{who}: expected weight of shape ({n},), got {tuple(weight.shape)}")
    if weight.any():  # chance may draw a batch of zeros; a table of them is refused in `in_memory`
        expect_weights(who, weight, numbers)
    return weight


def _checked(
    who: str, name: str, value: Any, missing: bool = False, numbers: Tensor | None = None
) -> Tensor:
    value = as_numbers(who, name, value)
    if name == "weight":
        return value
    if name == "context" and value.dim() == 1:
        value = _column(who, value)
    if value.dim() < 2 or not len(value):
        hint = "; one feature is x[:, None]" if value.dim() == 1 and name != "x" else ""
        if value.dim() == 1 and name == "x":
            hint = "; of single rows make batches: DataLoader(rows, batch_size=256)"
        raise ValueError(f"{who}: expected {name} of shape (N, D), got {tuple(value.shape)}{hint}")
    if name == "context" and not value.is_floating_point():
        value = value.double()  # times, or one-hot columns
    _expect_numbers(who, name, value, missing, numbers)
    return value


def _expect_numbers(
    who: str, name: str, value: Tensor, missing: bool, numbers: Tensor | None
) -> None:
    missing = missing and name == "context"
    if value.is_floating_point() and not missing and not is_large(value):
        expect_finite(who, name, value, numbers)


def _column(who: str, context: Tensor) -> Tensor:
    """A context of one number for each row as a column; integers may be labels."""
    if not context.is_floating_point():
        raise ValueError(
            f"{who}: expected context of shape (N, C), got {context.dtype} of shape "
            f"{tuple(context.shape)}; of labels make torch.nn.functional.one_hot(torch.as_tensor("
            "labels), classes).float(), of numbers numbers.float()[:, None]"
        )
    return context[:, None]
