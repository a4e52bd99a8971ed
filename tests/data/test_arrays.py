"""Conversion of array-like data, against numpy's."""

import numpy as np
import pandas
import pyarrow
import pytest
import torch

from cnf.data import Points
from cnf.data.arrays import as_numbers, column_names, is_rows

ROWS = np.arange(12.0).reshape(6, 2) / 8
FRAME = pandas.DataFrame(ROWS, columns=["x", "income"])
FLOATS = {
    "array": ROWS,
    "big-endian": ROWS.astype(">f8"),
    "reversed": ROWS[::-1][::-1],
    "transposed": np.asfortranarray(ROWS),
    "every other row of more": np.repeat(ROWS, 2, axis=0)[::2],
    "read-only": np.broadcast_to(ROWS, (1, 6, 2))[0],
    "half": ROWS.astype(np.float16),
    "unsigned of 64 bits": (8 * ROWS).astype(np.uint64),
    "long double": ROWS.astype(np.longdouble),
    "list of lists": ROWS.tolist(),
    "tensor with gradient": torch.tensor(ROWS, requires_grad=True),
    "bfloat16": torch.tensor(ROWS).bfloat16(),
    "frame": FRAME,
    "nullable frame": FRAME.astype("Float64"),
    "Arrow table": pyarrow.table(FRAME),
}


@pytest.mark.parametrize("kind", FLOATS)
def test_numbers_keep_their_values(kind):
    found = as_numbers("fit", "data", FLOATS[kind])
    assert is_rows(FLOATS[kind])
    assert found.is_floating_point() and not found.requires_grad
    scale = 8 if kind == "unsigned of 64 bits" else 1
    torch.testing.assert_close(found.double(), torch.tensor(scale * ROWS), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["i1", "i8", ">i4", "u1", "u2", "u4", "?"])
def test_integers_stay_integers(dtype):
    found = as_numbers("fit", "data", np.array([[0, 1], [1, 0]], dtype=dtype))
    assert not found.is_floating_point() and found.long().tolist() == [[0, 1], [1, 0]]


def test_a_missing_value_is_nan():
    found = as_numbers("fit", "data", pandas.DataFrame({"a": [1.0, None]}, dtype="object"))
    assert found[0, 0] == 1 and found[1, 0].isnan()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (FRAME.assign(town="Ulm"), "text in the columns town; leave them out, or encode"),
        (pyarrow.table({"a": [1.0], "town": ["Ulm"]}), "text in the columns town"),
        (np.array(["1.5", "2"]), "dtype <U3"),
        (ROWS + 1j, "dtype complex128"),
        (np.array(["2020-01-01"], dtype="M8[D]"), r"dtype datetime64\[D\]"),
        ([[1.0, 2.0], [3.0]], "an array of numbers, got a list"),
    ],
)
def test_values_that_are_not_numbers_are_named(values, message):
    with pytest.raises(ValueError, match=f"^fit: expected data to be .*{message}"):
        as_numbers("fit", "data", values)


def test_points_take_the_names_of_a_table():
    assert column_names(FRAME) == ("x", "income") == Points(FRAME).columns
    assert column_names(pyarrow.table(FRAME)) == Points(pyarrow.table(FRAME)).columns
    assert column_names(ROWS) is None is column_names(FRAME["x"])
    assert not is_rows([torch.ones(2, 2)]) and not is_rows([(torch.ones(2, 2), torch.ones(2, 2))])


NANOSECONDS = 1_700_000_000_000_000_000 + np.arange(100)


@pytest.mark.parametrize(
    ("values", "column"),
    [
        (NANOSECONDS, "0"),
        (-NANOSECONDS, "0"),
        (np.stack([np.arange(100), NANOSECONDS], 1).astype(np.uint64), "1"),
        (torch.tensor(NANOSECONDS), "0"),
        (pandas.DataFrame({"x": np.ones(100), "t": NANOSECONDS}), "'t'"),
        (pandas.DataFrame({"x": np.ones(100), "t": NANOSECONDS}).astype({"t": "object"}), "'t'"),
        (pyarrow.table({"x": np.ones(100), "t": NANOSECONDS}), "'t'"),
    ],
)
def test_integers_that_float64_does_not_resolve_are_refused(values, column):
    with pytest.raises(ValueError, match=f"^fit: float64 merges .* in column {column},.*origin"):
        as_numbers("fit", "data", values)


def test_large_integers_that_float64_resolves_are_accepted():
    seconds = 1_700_000_000_000_000_000 + 1_000_000_000 * np.arange(100)
    assert as_numbers("fit", "data", seconds).tolist() == seconds.tolist()
