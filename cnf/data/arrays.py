"""Conversion of tensors, arrays, tables of other libraries and nested lists to numbers."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.errors import expect_unmasked

EXACT = 2**53  # float64 represents every integer up to this one


def as_numbers(who: str, name: str, values: Any) -> Tensor:
    """The numbers in `values` as a detached tensor of the same shape and dtype.

    Args:
        who: Whose argument it is, for the message.
        name: Name of the argument, for the message.
        values: A tensor, an array in any byte order or layout, a table or column of pandas, polars
            or pyarrow, or nested lists of numbers.

    Returns:
        A tensor. A dtype that torch lacks becomes a wider one: unsigned integers int64 or, of 64
        bits, float64. A missing value becomes NaN.

    Raises:
        ValueError: There is something other than real numbers, or float64 would round different
            integers to the same number; the message names the columns.
    """
    expect_unmasked(who, name, values)
    if isinstance(values, Tensor):
        if values.layout != torch.strided:
            raise ValueError(
                f"{who}: expected {name} to be dense, got {values.layout}; give it "
                f"{name}.to_dense()"
            )
        if values.dtype == torch.int64:
            expect_exact(who, _columns(values, values.cpu().numpy()))
        return values.detach()
    values = without_index(values)
    try:
        given = array = np.asarray(values)
        if array.dtype.kind == "O" and not any(isinstance(v, str) for v in array.flat):
            array = array.astype(np.float64)  # nullable columns; None becomes NaN
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{who}: expected {name} to be an array of numbers, got a {type(values).__name__} "
            f"({error})"
        ) from error
    expect_exact(who, _columns(values, given))
    if array.dtype.kind not in "fiub":
        raise ValueError(
            f"{who}: expected {name} to be an array of numbers, got {_others(values, array)}; "
            "leave them out, or encode them (labels: pandas.get_dummies or "
            "torch.nn.functional.one_hot)"
        )
    unsigned = array.dtype.kind == "u" and array.dtype.itemsize > 1
    native = array.dtype.newbyteorder("=")
    if array.dtype.itemsize > 8 or (unsigned and array.dtype.itemsize == 8):
        native = np.float64
    elif unsigned:
        native = np.int64
    # torch.from_numpy shares memory, which must be writeable, contiguous and not reversed.
    return torch.from_numpy(np.require(array, dtype=native, requirements=("C", "W")))


def expect_exact(who: str, columns: Mapping[Any, np.ndarray]) -> None:
    """Raise ValueError if float64, in which data are standardized, merges different integers.

    Args:
        who: Whose argument it is, for the message.
        columns: Columns by name or number.
    """
    merged = [repr(name) for name, values in columns.items() if _merges(values)]
    if merged:
        raise ValueError(
            f"{who}: float64 merges different integers in column{'s' * (len(merged) > 1)} "
            f"{', '.join(merged)}, which are beyond 2^53 (times in nanoseconds?); subtract an "
            "origin first, as integers"
        )


def _merges(column: np.ndarray) -> bool:
    if column.dtype.kind == "O":  # Python integers, maybe among other objects
        column = np.array([v for v in column.flat if isinstance(v, int)], dtype=object)
    if column.dtype.kind not in "iuO" or column.dtype.itemsize < 8:
        return False
    beyond = np.unique(column[(column > EXACT) | (column < -EXACT)])
    return len(np.unique(beyond.astype(np.float64))) < len(beyond)


def _columns(values: Any, array: np.ndarray) -> Mapping[Any, np.ndarray]:
    """Columns that may hold integers; those of a table before conversion to a common dtype."""
    if column_names(values) is not None:
        keys = getattr(values, "column_names", getattr(values, "columns", ()))
        return {key: np.asarray(values[key]) for key in keys}
    if array.dtype.kind not in "iuO" or not array.size:
        return {}
    return dict(enumerate(array.reshape(len(array), -1).T)) if array.ndim > 1 else {0: array}


def column_names(values: Any) -> tuple[str, ...] | None:
    """The column names of a table of pandas, polars or pyarrow; None for anything else."""
    values = without_index(values)
    names: Any = getattr(values, "column_names", getattr(values, "columns", None))
    if names is None or callable(names) or not hasattr(values, "__array__"):
        return None
    return tuple(map(str, names))


def index_columns(table: Any) -> list[str]:
    """The columns of an Arrow table that hold the index of a pandas frame."""
    about = getattr(getattr(table, "schema", None), "pandas_metadata", None)
    if not isinstance(about, Mapping):
        return []
    # A RangeIndex is described by a mapping, and has no column.
    names = [name for name in about.get("index_columns", ()) if isinstance(name, str)]
    return [name for name in names if name in table.column_names]


def without_index(values: Any) -> Any:
    """An Arrow table without its `index_columns`; anything else unchanged."""
    index = index_columns(values)
    return values.drop_columns(index) if index else values


def is_rows(values: Any) -> bool:
    """Whether `values` is an array, a table or a list of lists of numbers."""
    if isinstance(values, list | tuple) and len(values) and isinstance(values[0], list | tuple):
        return all(isinstance(cell, int | float | np.number) for cell in values[0])
    return isinstance(values, Tensor) or hasattr(values, "__array__")


def _others(values: Any, array: np.ndarray) -> str:
    """The description, for a message, of what is not a number."""
    names = column_names(values)
    if names is None or array.ndim != 2:
        return f"dtype {array.dtype}"
    wrong = [
        n
        for n, cells in zip(names, array.T, strict=True)
        if any(isinstance(c, str) for c in cells)
    ]
    return f"text in the columns {', '.join(wrong)}" if wrong else f"dtype {array.dtype}"
