"""Points of the user: reading them from a table, and drawing from them."""

import contextlib
import copy
import csv
import gzip
import io
import pickle
import re
import zipfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Self

import numpy as np
import torch
from torch import Tensor

from cnf.data.arrays import EXACT, as_numbers, column_names, index_columns
from cnf.data.columns import Columns, Table, as_column, as_text, integers, is_missing, is_number
from cnf.data.density import expect_count
from cnf.errors import expect_finite, expect_generator, expect_weights, optional, warn
from cnf.random import device_of

YEARS = range(1800, 2200)
DECIMAL = re.compile(r"[.eE]")  # in a line of numbers
SPLIT = 497_831_422  # seed of the random split into training and test rows
LARGE = 2**30  # bytes: points beyond are not read whole before training, but as they are drawn


class Points:
    """Points of the user as a data source, with the interface of a `Toy` but no density.

    Args:
        x: The points in rows: floating, integer or boolean tensor, array or table, shape (N, D)
            or (N,), N at least 1; `fit` takes two rows or more.
        name: Name of the data.
        columns: Names of the D columns; those of a data frame if None.
        context: Condition of each row, shape (N, C).
        weight: Weight of each row, at least 0, shape (N,).

    Attributes:
        x: The points, shape (N, D), in float64 unless they were given in float32 or less.
        dim: Number of columns D.
        columns: Names of the columns, or None.
        context: The context, in float64 unless it was given in float32 or less, or None.
        weight: The weights, likewise, or None.
        reading: Roles of the columns of the file that the points were read from, or None.
        rows: Numbers of the rows in that file, from 0, without those left out, or None.
        incomplete: How many rows of that file were left out, as a value is missing.
        test_share: Part of the rows that `split` has set aside.
        validation: Points that the data set holds out for validation, or None.
        test: Those that it holds out as a test, or None.
        support: Box of shape (2, D), rows low and high: the quantiles 0.001 and 0.999 of each
            column, extended by 10 % of their distance.
        entropy: None, as it is unknown.

    Of points larger than `LARGE`, such as a mapped file, `fit` checks that they are finite as it
    draws them, and `support` is that of a hundred blocks of rows.

    Raises:
        ValueError: The shape is another, there are no rows, a value is not a finite
            number, or the columns, context or weight do not match the points.

    >>> mine = Points(torch.randn(100, 3), "mine")
    >>> mine.dim, mine.sample(7).shape
    (3, torch.Size([7, 3]))
    """

    entropy = None
    rowwise = ("x", "context", "weight", "rows")
    source: str | None = None  # the file they were read from
    reading: Columns | None = None
    rows: Tensor | None = None
    incomplete = 0
    test_share = 0.0
    validation: Self | None = None
    test: Self | None = None

    def __init__(
        self,
        x: Any,
        name: str = "points",
        columns: Sequence[str] | None = None,
        context: Tensor | np.ndarray | None = None,
        weight: Tensor | np.ndarray | None = None,
    ) -> None:
        self.name = name
        self.x = as_points("Points", x)
        self.dim = self.x.shape[1]
        self.columns: tuple[str, ...] | None = (
            column_names(x) if columns is None else tuple(map(str, columns))
        )
        if self.columns is not None and len(self.columns) != self.dim:
            raise ValueError(
                f"Points: expected {self.dim} names in columns, got {len(self.columns)}"
            )
        self.context = self._of_each_row("context", context)
        weight = self._of_each_row("weight", weight)
        if weight is not None and weight.shape[1] > 1:
            shape = tuple(weight.shape)
            raise ValueError(f"Points: expected one weight for each row, got them of {shape}")
        if weight is not None:
            expect_weights("Points", weight[:, 0])
        self.weight = None if weight is None else weight[:, 0]
        some = _blocks(self.x).cpu().double().numpy()
        low, high = np.quantile(some, (0.001, 0.999), axis=0)
        margin = np.where(high > low, 0.1 * (high - low), 0.5)
        self.support = torch.from_numpy(np.stack([low - margin, high + margin])).to(self.x.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw rows with replacement, by their weights if they have any, shape (n, D).

        Args:
            n: Number of rows.
            generator: Source of the draws, on whose device they are; None for torch's global one.

        Raises:
            ValueError: n is not an integer of at least 0.
        """
        return self.take(self.draw(n, generator)).x

    def draw(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw indices of rows with replacement, by their weights if they have any, shape (n,).

        Args:
            n: Number of rows.
            generator: Source of the draws, on whose device they are; None for torch's global one.

        Raises:
            ValueError: n is not an integer of at least 0.
        """
        expect_count(f"{self.name}.sample", n)
        expect_generator(f"{self.name}.sample", generator)
        device = device_of(generator)
        if self.weight is None:
            return torch.randint(len(self.x), (n,), generator=generator, device=device)
        edges = self.weight.double().cumsum(0).to(device or "cpu")
        drawn = torch.rand(n, generator=generator, device=device, dtype=torch.float64)
        return torch.searchsorted(edges, drawn * edges[-1], right=True).clamp(max=len(edges) - 1)

    @property
    def sizes(self) -> dict[str, Any]:
        """Options of a model for these points: dim, and context if they have one."""
        context = {} if self.context is None else {"context": self.context.shape[1]}
        return {"dim": self.dim, **context}

    def take(self, rows: Tensor) -> Self:
        """The points at indices `rows`, with contexts and weights, on the device of `rows`."""
        return self._each(lambda value: value.to(rows.device)[rows])

    def first(self, n: int) -> Self:
        """The first n points, or all there are."""
        return self._each(lambda value: value[:n])

    def split(self, share: float) -> tuple[Self, Self]:
        """The rows to train on, and the test part: the data set's own, where it has one.

        Else the test part is drawn, always in the same way for the same number of rows. Of points
        larger than `LARGE` it is the last rows, so that nothing is copied: a file that is sorted
        is to be shuffled before.

        Args:
            share: Part of the rows in a test part that is drawn, in [0, 1).
        """
        if self.test is not None:
            return self, self.test
        count = int(share * len(self.x))
        if is_large(self.x):
            kept = len(self.x) - count
            rest, aside = self.first(kept), self._each(lambda value: value[kept:])
        elif not count:  # as `fit` takes the very same rows
            rest, aside = copy.copy(self), self.first(0)
        else:
            order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(SPLIT))
            rest, aside = self.take(order[count:]), self.take(order[:count])
        rest.test_share = share
        return rest, aside

    def _each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """A copy, with whatever has a row for each point changed."""
        changed = copy.copy(self)
        for name in self.rowwise:
            value = getattr(self, name)
            setattr(changed, name, None if value is None else change(value))
        return changed

    def _of_each_row(self, name: str, values: Any) -> Tensor | None:
        if values is None:
            return None
        rows = as_points(f"Points({name})", values).to(self.x.device)
        if len(rows) != len(self.x):
            raise ValueError(f"Points: expected {len(self.x)} rows of {name}, got {len(rows)}")
        return rows

    def log_prob(self, x: Tensor) -> NoReturn:
        """Raise ValueError, because the density of the points is unknown."""
        raise ValueError(
            f"{self.name}.log_prob: the density of one's own points is not known; "
            "compare models by their log-likelihood on held-out points, or use a toy"
        )

    def __repr__(self) -> str:
        return f"Points({self.name!r}, {len(self.x)} rows, dim={self.dim})"


def as_points(who: str, values: Any) -> Tensor:
    """Convert a tensor, array or table of numbers to points of shape (N, D).

    Numbers keep their value: floats of at most 32 bits become float32, others and integers
    float64. A vector is one column.

    Args:
        who: Whose argument it is, for messages.
        values: The numbers.

    Raises:
        ValueError: The shape is another, there are no rows, or a value is not a finite
            number.
    """
    x = as_numbers(who, "x", values)
    if x.is_complex():
        raise ValueError(f"{who}: expected real numbers, got dtype {x.dtype}; split the parts")
    x = x[:, None] if x.dim() == 1 else x
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{who}: expected points of shape (N, D), got {tuple(x.shape)}")
    if not len(x):
        raise ValueError(f"{who}: expected one row or more, got none")
    x = x.to(
        torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.double
    )
    if not is_large(x):
        expect_finite(who, "x", x)
    return x


def is_large(x: Tensor) -> bool:
    """Whether rows are not read whole before training, being larger than `LARGE`."""
    return x.nbytes > LARGE


def _blocks(x: Tensor, count: int = 100, rows: int = 1_000) -> Tensor:
    """The points, or of more than count·rows the finite ones in evenly spaced blocks."""
    if len(x) <= count * rows:
        return x
    starts = torch.linspace(0, len(x) - rows, count).long().tolist()
    found = torch.cat([x[start : start + rows] for start in starts])
    finite = found.isfinite().all(1)
    return found[finite] if finite.any() else torch.zeros_like(found[:2])


def read_table(path: str | Path) -> Tensor:
    """Read the rows of a table of numbers, shape (N, D), in float64; see `read_points`."""
    return read_points(path).x


def read_points(path: str | Path, columns: Columns | None = None) -> Points:
    """Read a table of numbers as points, with the name of the file and those of its columns.

    The format follows from the ending: .csv and .txt (with or without a header line; separated by
    commas, semicolons, tabs or spaces; lines that start with # are skipped), .csv.gz and .txt.gz,
    .npy, .npz (a single array, or one named x) and .parquet. Nothing is unpickled. A .npy of
    floats that is larger than `LARGE` is mapped and not read, unless columns are chosen.

    Args:
        path: The file.
        columns: Roles of its columns; all are modeled if None.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The ending is unknown, or the file does not contain at least one row of
            finite numbers; the message names columns or rows.
        ImportError: pyarrow, which .parquet needs, is not installed.
    """
    path = Path(path)
    who = f"read_table({path.name})"
    kind = table_kind(path)
    if kind is None:
        ending = path.suffix or "no ending"
        raise ValueError(f"{who}: expected a file ending in {', '.join(TABLES)}, got {ending}")
    if not path.is_file():
        raise FileNotFoundError(f"{who}: expected a table, got {path}, which is no file")
    if columns in (None, Columns()) and (mapped := _mapped(path)) is not None:
        points = Points(mapped, path.name[: -len(kind)])
        points.reading = Columns([str(k + 1) for k in range(points.dim)])
        return points
    table = TABLES[kind](who, path, (columns and columns.labels) or {})
    reading = (columns or Columns()).resolve(who, table)
    x, context, weight, rows = reading.pick(who, table)
    total = len(next(iter(table.columns.values())))
    if not len(rows):
        raise ValueError(f"{who}: expected a row without a missing value, got none of {total}")
    names = reading.columns if table.named else None
    points = Points(as_points(who, x), path.name[: -len(kind)], names, context, weight)
    points.reading, points.rows = reading, torch.from_numpy(rows)
    points.incomplete = total - len(rows)
    return points


def table_kind(path: Path) -> str | None:
    """The ending of a path, if it is one of `TABLES`; else None."""
    return next((kind for kind in TABLES if path.name.lower().endswith(kind)), None)


def _read_text(who: str, path: Path, labels: Collection[str]) -> Table:
    """Read a text file; columns in `labels` stay text, as the file spells them.

    pyarrow.csv reads five times as fast, but skips no comments, splits at no runs of spaces and
    knows no file without a header from one with; and numbers are read without an extra.
    """
    try:
        opened = gzip.open if path.suffix.lower() == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig") as file:
            lines = [line.rstrip("\n") for line in file]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{who}: expected readable text, got {error}") from error
    numbered = [(i, s) for i, s in enumerate(lines, 1) if s.strip() and not s.startswith("#")]
    if not numbered:
        raise ValueError(f"{who}: expected one row or more, got an empty file")
    first = numbered[0][1]
    delimiter = next((mark for mark in ",;" if mark in first), None)
    top = [_split(line, delimiter) for _, line in numbered[:2]]
    below = [line for _, line in numbered[1:]]
    header = _named(top[0]) if _is_header(top) or _numbers_columns(who, top[0], below) else None
    body = numbered[header is not None :]
    if not body:
        raise ValueError(f"{who}: expected one row or more, got a header line and none")
    spelled = [k for k, name in enumerate(header or _numbers(top[0])) if name in labels]
    columns = None if spelled else _all_numbers([line for _, line in body], delimiter)
    if columns is None:
        columns = _mixed(who, body, delimiter, spelled)
    if header is not None and len(header) != len(columns):
        raise ValueError(
            f"{who}: expected as many names as columns, got {len(header)} names in line "
            f"{numbered[0][0]} and {len(columns)} columns"
        )
    return _table(columns, header, [number for number, _ in body])


def _is_header(lines: list[list[str]]) -> bool:
    """Whether the first line contains names: a text above a number, or no number at all."""
    first, below = lines[0], lines[-1]
    pairs = zip(first, below, strict=False)
    above = [cell for cell, under in pairs if is_number(under) and not is_missing(under)]
    if not above and any(map(is_number, first)):
        return False
    return any(not is_number(cell) and not is_missing(cell) for cell in above or first)


def _numbers_columns(who: str, first: list[str], below: Sequence[str]) -> bool:
    """Whether the first line numbers the columns (0,1,2 by pandas, or years), above decimals.

    Above whole numbers it is read as a row, with a warning if it is likely to be a header.
    """
    cells = first[1:] if first[0] == "" else first  # pandas names its index ""
    if not cells or not all(cell.isdecimal() for cell in cells):
        return False
    begin = int(cells[0])
    counts = [int(cell) for cell in cells] == list(range(begin, begin + len(cells)))
    named = begin == 0 or (len(cells) > 1 and begin in YEARS)
    if not (below and counts and named):
        return False
    if all(DECIMAL.search(line) for line in below):
        return True
    if len(cells) > 2:
        warn(
            f"{who}: the first line, {first[0]},{first[1]},…, is read as a row; if these are the "
            "columns' names, give them a letter: x0,x1,…"
        )
    return False


def _named(cells: list[str]) -> list[str]:
    """The names of a header without duplicates; a column without a name gets its number."""
    names: list[str] = []
    for number, cell in enumerate(cells, 1):
        name = cell or f"column-{number}"
        names.append(name if name not in names else f"{name}-{number}")
    return names


def _all_numbers(lines: list[str], delimiter: str | None) -> list[np.ndarray] | None:
    """The columns of lines that contain numbers only, all exact in float64; else None."""
    try:
        columns = list(np.loadtxt(lines, delimiter=delimiter, ndmin=2, quotechar='"').T)
    except ValueError:
        return None
    return None if any((np.abs(column) > EXACT).any() for column in columns) else columns


def _mixed(
    who: str, body: list[tuple[int, str]], delimiter: str | None, spelled: Collection[int]
) -> list[np.ndarray]:
    """The columns of lines with text; those with a number in `spelled` are text, as spelled."""
    rows = [_split(line, delimiter) for _, line in body]
    for (number, _), row in zip(body, rows, strict=True):
        if len(row) != len(rows[0]):
            raise ValueError(
                f"{who}: expected {len(rows[0])} columns in every line, got {len(row)} in line "
                f"{number}"
            )
    columns = enumerate(zip(*rows, strict=True))
    return [as_text(cells) if k in spelled else as_column(cells) for k, cells in columns]


def _table(
    columns: Sequence[np.ndarray], names: Sequence[str] | None, lines: Sequence[int] | None = None
) -> Table:
    keys = names or _numbers(columns)
    return Table(dict(zip(keys, columns, strict=True)), names is not None, lines)


def _numbers(columns: Sequence[Any]) -> list[str]:
    """The names of columns without names: their numbers from 1."""
    return [str(k + 1) for k in range(len(columns))]


def _split(line: str, delimiter: str | None) -> list[str]:
    if delimiter is None:  # names that contain spaces are separated by tabs
        names = line.strip().split("\t")
        cells = names if len(names) > 1 and not is_number(names[0]) else line.split()
        return [cell.strip().strip('"') for cell in cells]
    return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))]


def _read_numpy(who: str, path: Path, _: Collection[str]) -> Table:
    try:
        # Opened here, as numpy does not close a broken .npz.
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            names = getattr(loaded, "files", [])
            name = "x" if "x" in names else names[0] if len(names) == 1 else None
            found = loaded if isinstance(loaded, np.ndarray) else name and loaded[name]
    except (OSError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{who}: expected an array of numbers as numpy.save writes it, got something else "
            f"({str(error).splitlines()[0]}); objects are not unpickled"
        ) from error
    if isinstance(found, np.ndarray):
        return _array(who, found)
    raise ValueError(
        f"{who}: expected one array or one called x, got {', '.join(names) or 'none'}; "
        "pass the array itself instead of the file"
    )


def _mapped(path: Path) -> np.ndarray | None:
    """The rows of a large .npy of floats, mapped; None for any other file."""
    if path.suffix.lower() != ".npy" or path.stat().st_size <= LARGE:
        return None
    with contextlib.suppress(ValueError, EOFError, OSError):  # the reader of tables tells
        array = np.load(path, mmap_mode="c", allow_pickle=False)  # a copy where it is written to
        native = array.dtype in (np.float32, np.float64) and array.flags.c_contiguous
        return array if array.ndim == 2 and native else None
    return None


def _array(who: str, values: np.ndarray) -> Table:
    rows = values[:, None] if values.ndim == 1 else values
    if rows.ndim != 2 or rows.dtype.kind not in "fiub":
        hint = "; of pictures, give the pixels as uint8, from 0 to 255" if rows.ndim > 2 else ""
        raise ValueError(
            f"{who}: expected an array of numbers of shape (N, D), got {values.dtype} of shape "
            f"{values.shape}{hint}"
        )
    return _table(list(rows.T), None)


def _read_parquet(who: str, path: Path, _: Collection[str]) -> Table:
    arrow, parquet = optional("pyarrow", "data"), optional("pyarrow.parquet", "data")
    try:
        table = parquet.read_table(path)
    except (OSError, arrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{who}: expected a Parquet file, got {reason}") from error
    columns = _table([_arrow_column(arrow, c) for c in table.columns], table.column_names)
    return replace(columns, index=index_columns(table))


def _arrow_column(arrow: Any, column: Any) -> np.ndarray:
    types = arrow.types
    numeric = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal)
    if types.is_decimal(column.type) and column.type.scale == 0:
        with contextlib.suppress(arrow.ArrowInvalid):  # more digits than a 64-bit integer has
            column = column.cast(arrow.int64())
    if types.is_integer(column.type):
        return integers(column.fill_null(0).to_numpy(), column.is_null().to_numpy())
    if any(ok(column.type) for ok in numeric):
        return column.cast(arrow.float64()).to_numpy()
    cells = ("" if cell is None else str(cell) for cell in column.to_pylist())
    return np.array(list(cells), dtype=object)


TABLES: dict[str, Callable[[str, Path, Collection[str]], Table]] = {
    ".csv": _read_text,
    ".csv.gz": _read_text,
    ".txt": _read_text,
    ".txt.gz": _read_text,
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".parquet": _read_parquet,
}


def write_table(path: str | Path, x: Tensor, columns: Sequence[str] | None = None) -> None:
    """Write points to a new .npy or .csv file.

    Args:
        path: The file, which must not exist; its folder is created if necessary.
        x: Points, shape (N, D).
        columns: Names of the columns, for the header of a .csv file.

    Raises:
        ValueError: The ending is another, or the file exists.
        OSError: The file cannot be written.
    """
    path = expect_writable("write_table", path)
    try:
        if path.suffix == ".npy":
            np.save(path, x.numpy())
        else:
            header = io.StringIO()
            csv.writer(header, lineterminator="").writerow(columns or [])
            np.savetxt(  # the fewest digits that restore x exactly
                path, x.numpy(), delimiter=",", fmt="%s", header=header.getvalue(), comments=""
            )
    except OSError as error:
        path.unlink(missing_ok=True)
        raise unwritable("write_table", path, error) from error


def expect_writable(who: str, path: str | Path, endings: Sequence[str] = (".npy", ".csv")) -> Path:
    """Check that a new file can be written, and create its folder if necessary.

    Args:
        who: Who writes, for messages.
        path: The file.
        endings: Those it may have.

    Raises:
        ValueError: The ending is another, or the file exists.
        OSError: The folder cannot be created or written to.
    """
    path = Path(path)
    if path.suffix not in endings:
        *first, last = endings
        raise ValueError(f"{who}: expected a {', '.join(first)} or {last} file, got {path.name}")
    if path.exists():
        raise ValueError(f"{who}: {path} exists already; choose another name, or remove it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        path.unlink()
    except OSError as error:
        raise unwritable(who, path, error) from error
    return path


def unwritable(who: str, path: Path, error: OSError) -> OSError:
    """The error that says that a file cannot be written, and why.

    Args:
        who: Who writes.
        path: The file.
        error: The system's error.
    """
    return OSError(
        f"{who}: cannot write {path} ({error.strerror or error}); choose a file in a folder that "
        "you may write into, on a disk with room"
    )
