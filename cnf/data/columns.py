"""The roles of a table's columns: modeled variables, context and weight."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from cnf.data.arrays import EXACT, expect_exact
from cnf.errors import UnknownNameError

MISSING = ("", "na", "n/a", "nan", "null", "none")


@dataclass
class Table:
    """The columns of a file, by their names or, without names, by their numbers from 1.

    Attributes:
        columns: Name → an array of numbers, NaN where one is missing, or of text, "" where it is
            missing. Integers beyond those that float64 represents stay integers, in a masked
            array if some are missing.
        named: Whether the names are from the file.
        lines: Line number of each row in a text file; None for other files.
        index: Columns that hold the index of a pandas frame: not modeled unless they are named.
    """

    columns: dict[str, np.ndarray]
    named: bool
    lines: Sequence[int] | None = None
    index: Sequence[str] = ()

    def place(self, row: int) -> str:
        """Where a row stands in the file, for messages."""
        return f"row {row}" if self.lines is None else f"line {self.lines[row]}"

    def take(self, rows: np.ndarray) -> "Table":
        """The table of some rows, given by a mask or by their indices."""
        lines = None if self.lines is None else np.asarray(self.lines)[rows].tolist()
        columns = {name: values[rows] for name, values in self.columns.items()}
        return Table(columns, self.named, lines, self.index)


class Picked(NamedTuple):
    """The parts of a table of N rows, as `Columns.pick` returns them.

    Attributes:
        x: Modeled variables, shape (N, D).
        context: Context with one-hot labels, shape (N, C), or None.
        weight: Weights, shape (N,), or None.
        rows: Numbers of the rows in the whole table, from 0, shape (N,).
    """

    x: np.ndarray
    context: np.ndarray | None
    weight: np.ndarray | None
    rows: np.ndarray


@dataclass
class Columns:
    """The roles of a table's columns.

    Args:
        columns: The columns to model, by name, or by number from 1 in a file without names; all
            that are neither context nor weight if not given.
        context: The columns that the model is conditioned on; text is encoded one-hot.
        weight: The column of the rows' weights.
        drop_missing: Leave out rows with a missing value in a column that is used.
        labels: The labels of each context column of text, in the order of their one-hot encoding,
            such as {species: [cat, dog]}; those of the file if not given.
    """

    columns: list[str] | None = None
    context: list[str] | None = None
    weight: str | None = None
    drop_missing: bool = False
    labels: dict[str, list[str]] | None = None

    @property
    def header(self) -> list[str] | None:
        """The names of the modeled columns; None if the file has none or none are chosen."""
        return None if all(map(is_number, self.columns or [])) else self.columns

    def resolve(self, who: str, table: Table) -> "Columns":
        """The same roles with all columns and labels of a table named, to read other tables by.

        Args:
            who: Who reads it, for messages.
            table: The table whose columns and labels are taken.

        Raises:
            ValueError: A column is unknown or has two roles, there is none to model, or most texts
                of a context column occur once.
        """
        context, labels = self.context or [], dict(self.labels or {})
        apart = [*context, *([] if self.weight is None else [self.weight])]
        names = self.columns
        if names is None:
            names = [name for name in table.columns if name not in (*apart, *table.index)]
        for name in [*names, *apart]:
            if name not in table.columns:
                raise ValueError(f"{who}: {UnknownNameError('column', name, table.columns)}")
        if not names or len({*names, *apart}) < len(names) + len(apart):
            raise ValueError(
                f"{who}: expected one purpose for each column and one to model at least, got "
                f"columns {names}, context {context}, weight {self.weight}"
            )
        for name in context:
            cells = table.columns[name]
            if cells.dtype != object or name in labels:
                continue
            labels[name] = sorted(set(cells) - {""})
            if len(labels[name]) > max(8, len(cells) // 2):
                raise ValueError(
                    f"{who}: expected labels in {name}, got {len(labels[name])} different texts "
                    f"in {len(cells)} rows"
                )
        return replace(self, columns=names, labels=labels or None)

    def pick(self, who: str, table: Table) -> Picked:
        """Extract modeled variables, context and weights from a table.

        The roles must name all columns, as those that `resolve` returns do.

        Args:
            who: Who reads it, for messages.
            table: The table.

        Raises:
            ValueError: There is text where numbers are needed, a missing value, or an unknown
                label.
        """
        names, context = self.columns or [], self.context or []
        weights = [] if self.weight is None else [self.weight]
        rows = self._complete_rows(who, table, [*names, *context, *weights])
        if self.drop_missing:
            table = table.take(rows)
        _expect_numbers(who, table, [*names, *weights])
        numbers = (n for n in [*names, *context] if table.columns[n].dtype != object)
        expect_exact(who, {n: table.columns[n] for n in numbers})
        return Picked(
            np.stack([np.asarray(table.columns[name]) for name in names], 1),
            np.concatenate([self._coded(who, table, name) for name in context], 1)
            if context
            else None,
            table.columns[weights[0]] if weights else None,
            rows,
        )

    def parse(self, who: str, values: Sequence[str]) -> list[float]:
        """Parse one context that was typed: a value for each column in order, or name=value.

        Args:
            who: Who asks, for messages.
            values: The texts, such as ["cat", "3"] or ["u=3", "pet=cat"].

        Returns:
            The context with one-hot labels, C numbers.

        Raises:
            ValueError: A column is missing or unknown, or a value is not a number or label.

        >>> columns = Columns(context=["u", "pet"], labels={"pet": ["cat", "dog"]})
        >>> columns.parse("sample", ["pet=dog", "u=3"])
        [3.0, 0.0, 1.0]
        """
        names = self.context or [str(k + 1) for k in range(len(values))]
        given = dict(zip(names, values, strict=False))
        if values and all(value.partition("=")[0] in names for value in values):
            given = {name: value for name, _, value in (text.partition("=") for text in values)}
        if len(values) != len(names) or set(given) != set(names):
            missing = [name for name in names if name not in given]
            told = f", without {', '.join(missing)}" if missing else ""
            labels = [one for name in names for one in (self.labels or {}).get(name, ())]
            commas = [one for one in labels if "," in one]
            quoted = json.dumps(commas[:1], ensure_ascii=False)
            hint = f"; a label with a comma stands in a list: --context '{quoted}'"
            raise ValueError(
                f"{who}: expected a context of {', '.join(names)}, got "
                f"{', '.join(values) or 'none'}{told}; write "
                f"--context {','.join(f'{name}=…' for name in names)}{hint if commas else ''}"
            )
        texts = self.labels or {}
        table = Table(
            {
                name: np.array([text], dtype=object) if name in texts else as_column([text])
                for name, text in given.items()
            },
            named=True,
        )
        coded = [self._coded(who, table, name)[0] for name in names]
        return np.concatenate(coded).tolist()

    def _complete_rows(self, who: str, table: Table, used: list[str]) -> np.ndarray:
        """Numbers of the rows in which no value is missing, if these may be left out."""
        missing = {name: _missing(table.columns[name]) for name in used}
        bad = np.logical_or.reduce(list(missing.values()))
        if self.drop_missing or not bad.any():
            return np.flatnonzero(~bad)
        first = [
            f"{name} ({table.place(int(rows.argmax()))})"
            for name, rows in missing.items()
            if rows.any()
        ]
        raise ValueError(
            f"{who}: expected no missing values, got some in {bad.sum()} of {len(bad)} rows, "
            f"first in {', '.join(first)}; fill them in, or leave the rows out: "
            "drop_missing=True, or --drop-missing"
        )

    def _coded(self, who: str, table: Table, name: str) -> np.ndarray:
        """A context column as numbers, shape (N, 1), or labels one-hot, shape (N, labels)."""
        cells, labels = table.columns[name], (self.labels or {}).get(name)
        if labels is None:
            _expect_numbers(who, table, [name])
            return np.asarray(cells, dtype=np.float64)[:, None]
        # Numbers of a binary file have no spelling and are compared by value.
        known = labels if cells.dtype == object else [as_column([label])[0] for label in labels]
        for row, cell in enumerate(cells):
            if cell not in known:
                place = f" in {table.place(row)}" if len(cells) > 1 else ""
                raise ValueError(f"{who}{place}: {UnknownNameError(name, str(cell), labels)}")
        equal = cells.astype(object)[:, None] == np.array(known, dtype=object)
        return equal.astype(np.float64)


def as_column(cells: Sequence[str]) -> np.ndarray:
    """A column of a `Table` from cells: numbers if all are numbers or missing, else text."""
    present = [None if is_missing(cell) else cell for cell in cells]
    if not all(cell is None or is_number(cell) for cell in present):
        return as_text(cells)
    numbers = np.array([np.nan if cell is None else float(cell) for cell in present])
    return _whole(present, numbers) if (np.abs(numbers) > EXACT).any() else numbers


def as_text(cells: Sequence[str]) -> np.ndarray:
    """A column of a `Table` from cells as text, "" where it is missing."""
    return np.array(["" if is_missing(cell) else cell for cell in cells], dtype=object)


def is_missing(cell: str) -> bool:
    """Whether a cell is empty or holds a word for a missing value, one of `MISSING`."""
    return cell.lower() in MISSING


def _whole(cells: Sequence[str | None], numbers: np.ndarray) -> np.ndarray:
    """The cells as integers if all are 64-bit integers or missing, else the given numbers."""
    try:
        whole = np.array([0 if cell is None else int(cell) for cell in cells], dtype=np.int64)
    except (ValueError, OverflowError):
        return numbers
    return integers(whole, np.isnan(numbers))


def integers(whole: np.ndarray, missing: np.ndarray) -> np.ndarray:
    """A column of integers, masked where they are missing.

    Args:
        whole: The integers, shape (N,), arbitrary where they are missing.
        missing: Mask of the missing ones, shape (N,).
    """
    return np.ma.masked_array(whole, missing) if missing.any() else whole


def _missing(column: np.ndarray) -> np.ndarray:
    if isinstance(column, np.ma.MaskedArray):
        return np.ma.getmaskarray(column)
    return column == "" if column.dtype == object else np.isnan(column)


def _expect_numbers(who: str, table: Table, names: Sequence[str]) -> None:
    wrong, cell = [], ""
    for name in names:
        if table.columns[name].dtype == object:
            cells = enumerate(table.columns[name])
            row, cell = next((row, cell) for row, cell in cells if not is_number(cell))
            wrong.append(f"{name} ({cell!r} in {table.place(row)})")
    if wrong:
        raise ValueError(
            f"{who}: expected numbers in every column, got others in {', '.join(wrong)}; "
            f"{_remedy(cell)}leave them out by naming the columns to model, or make labels a "
            "context"
        )


def _remedy(cell: str) -> str:
    if re.match(r"\d{4}-\d\d-\d\d|\d\d?[./]\d\d?[./]\d{2,4}", cell):
        return "write dates as numbers, such as days or Unix seconds, or "
    return "write decimals with a point, or " if re.fullmatch(r"-?\d+,\d+", cell) else ""


def is_number(cell: str) -> bool:
    """Whether a cell holds a number; 1_2, which Python reads as 12, does not."""
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell
