"""One's own points: reading them from a table, and drawing from them."""

import csv
import gzip
import pickle
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from cnf.data.density import expect_count
from cnf.errors import expect_finite, optional


class Points:
    """One's own points as a data source: the interface of a `Toy`, short of a density.

    Args:
        x: The points, one a row: floating, integer or boolean tensor or array, shape (N, D) or
            (N,), N at least 2.
        name: What they are called.
        columns: The columns' names, D of them, if they have any.

    Attributes:
        x: The points, float32, shape (N, D).
        dim: D.
        columns: The columns' names, or None.
        support: Box of shape (2, D), rows low and high: the quantiles 0.001 and 0.999 of each
            column, and a tenth of their distance beyond.
        entropy: None: it is not known.

    Raises:
        ValueError: The shape is another, there are fewer than 2 rows, or a value is NaN, infinite
            or no number.

    >>> mine = Points(torch.randn(100, 3), "mine")
    >>> mine.dim, mine.sample(7).shape
    (3, torch.Size([7, 3]))
    """

    entropy = None
    source: str | None = None  # the file they were read from

    def __init__(
        self, x: Tensor | np.ndarray, name: str = "points", columns: Sequence[str] | None = None
    ) -> None:
        self.name = name
        self.x = as_points("Points", x)
        self.dim = self.x.shape[1]
        self.columns: tuple[str, ...] | None = (
            None if columns is None else tuple(map(str, columns))
        )
        if self.columns is not None and len(self.columns) != self.dim:
            raise ValueError(
                f"Points: expected {self.dim} names in columns, got {len(self.columns)}"
            )
        low, high = np.quantile(self.x.cpu().double().numpy(), (0.001, 0.999), axis=0)
        margin = np.where(high > low, 0.1 * (high - low), 0.5)
        self.support = torch.from_numpy(np.stack([low - margin, high + margin])).float()

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """n rows drawn with replacement, shape (n, D), float32, on the generator's device."""
        expect_count(f"{self.name}.sample", n)
        device = generator.device if generator is not None else None
        rows = torch.randint(len(self.x), (n,), generator=generator, device=device)
        return self.x.to(rows.device)[rows]

    def log_prob(self, x: Tensor) -> NoReturn:
        """Raise: nobody knows the density that one's own points come from."""
        raise ValueError(
            f"{self.name}.log_prob: the density of one's own points is not known; "
            "compare models by their log-likelihood on held-out points, or use a toy"
        )

    def __repr__(self) -> str:
        return f"Points({self.name!r}, {len(self.x)} rows, dim={self.dim})"


def as_points(who: str, values: Any) -> Tensor:
    """Float32 tensor of shape (N, D) from a tensor or array of numbers; a vector is one column."""
    if isinstance(values, Tensor):
        x = values.detach()
    else:
        values = np.asarray(values)
        if values.dtype.kind not in "fiub":
            raise ValueError(f"{who}: expected an array of numbers, got dtype {values.dtype}")
        x = torch.from_numpy(np.array(values, dtype=np.float64))
    if x.is_complex():
        raise ValueError(f"{who}: expected real numbers, got dtype {x.dtype}; split the parts")
    x = x[:, None] if x.dim() == 1 else x
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"{who}: expected points of shape (N, D), got {tuple(values.shape)}")
    if len(x) < 2:
        raise ValueError(f"{who}: expected at least 2 rows, got {len(x)}")
    x = x.float()
    expect_finite(who, "x", x)
    return x


def read_table(path: str | Path) -> Tensor:
    """The rows of a table of numbers, float32, shape (N, D): see `read_points`."""
    return read_points(path).x


def read_points(path: str | Path) -> Points:
    """A table of numbers, named as its file, with the names of its columns where it has them.

    Reads .csv and .txt (one header line or none; commas, semicolons, tabs or spaces; lines that
    start with # are skipped), the same with .gz behind, .npy, .npz (one array, or one called x)
    and .parquet. Nothing is unpickled.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The kind of file is unknown, or what it holds is not a table of at least two
            rows of finite numbers; the message names columns or rows.
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
    values, columns = TABLES[kind](who, path)
    return Points(as_points(who, values), path.name[: -len(kind)], columns)


def table_kind(path: Path) -> str | None:
    """The ending in TABLES that the path has, if any."""
    return next((kind for kind in TABLES if path.name.lower().endswith(kind)), None)


Table = tuple[np.ndarray, Sequence[str] | None]  # the numbers, and their columns' names


def _read_text(who: str, path: Path) -> Table:
    try:
        opened = gzip.open if path.suffix.lower() == ".gz" else open
        with opened(path, "rt", encoding="utf-8-sig") as file:
            lines = [line.rstrip("\n") for line in file]
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{who}: expected readable text, got {error}") from error
    numbered = [(i, s) for i, s in enumerate(lines, 1) if s.strip() and not s.startswith("#")]
    if not numbered:
        raise ValueError(f"{who}: expected at least 2 rows, got an empty file")
    first = numbered[0][1]
    delimiter = next((mark for mark in ",;" if mark in first), None)
    names = _split(first, delimiter)
    header = None if all(map(_is_number, names)) else names
    body = numbered[header is not None :]
    if not body:
        raise ValueError(f"{who}: expected at least 2 rows, got a header line and none")
    lines = [line for _, line in body]
    try:
        values = np.loadtxt(lines, delimiter=delimiter, ndmin=2, quotechar='"')
    except ValueError as error:
        _explain(who, body, delimiter, header)
        raise ValueError(f"{who}: expected a table of numbers, got {error}") from error
    if header is not None and len(header) != values.shape[1]:
        raise ValueError(
            f"{who}: expected as many names as columns, got {len(header)} names in line "
            f"{numbered[0][0]} and {values.shape[1]} columns"
        )
    return values, header


def _explain(
    who: str, body: list[tuple[int, str]], delimiter: str | None, header: list[str] | None
) -> None:
    """Raise naming what stands where a number should, or the first line of another length."""
    width = len(header or _split(body[0][1], delimiter))
    names = header or [str(k + 1) for k in range(width)]
    wrong: dict[str, str] = {}
    for number, line in body:
        row = _split(line, delimiter)
        if len(row) != width:
            raise ValueError(
                f"{who}: expected {width} columns in every line, got {len(row)} in line {number}"
            )
        for name, cell in zip(names, row, strict=True):
            if not _is_number(cell):
                wrong.setdefault(name, f"{name} ({cell!r} in line {number})")
    if wrong:
        raise ValueError(
            f"{who}: expected numbers in every column, got others in {', '.join(wrong.values())}; "
            "drop the columns or encode them, and fill or drop missing values"
        )


def _split(line: str, delimiter: str | None) -> list[str]:
    if delimiter is None:  # a tab parts names that have spaces in them
        names = line.strip().split("\t")
        cells = names if len(names) > 1 and not _is_number(names[0]) else line.split()
        return [cell.strip().strip('"') for cell in cells]
    return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter))]


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _read_numpy(who: str, path: Path) -> Table:
    try:
        # Opened here: numpy leaves a broken .npz open.
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded, None
            names = loaded.files
            name = "x" if "x" in names else names[0] if len(names) == 1 else None
            if name is not None:
                return loaded[name], None
    except (OSError, EOFError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{who}: expected an array of numbers as numpy.save writes it, got something else "
            f"({str(error).splitlines()[0]}); objects are not unpickled"
        ) from error
    raise ValueError(
        f"{who}: expected one array or one called x, got {', '.join(names) or 'none'}; "
        "pass the array itself instead of the file"
    )


def _read_parquet(who: str, path: Path) -> Table:
    arrow, parquet = optional("pyarrow", "data"), optional("pyarrow.parquet", "data")
    try:
        table = parquet.read_table(path)
    except (OSError, arrow.ArrowException) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{who}: expected a Parquet file, got {reason}") from error
    types = arrow.types
    numeric = (types.is_integer, types.is_floating, types.is_boolean, types.is_decimal)
    wrong = [f"{f.name} ({f.type})" for f in table.schema if not any(ok(f.type) for ok in numeric)]
    if wrong:
        raise ValueError(
            f"{who}: expected numbers in every column, got others in {', '.join(wrong)}; "
            "drop the columns or encode them"
        )
    columns = [column.cast(arrow.float64()).to_numpy() for column in table.columns]
    return np.stack(columns, 1) if columns else np.empty((0, 0)), table.column_names


TABLES: dict[str, Callable[[str, Path], Table]] = {
    ".csv": _read_text,
    ".csv.gz": _read_text,
    ".txt": _read_text,
    ".txt.gz": _read_text,
    ".npy": _read_numpy,
    ".npz": _read_numpy,
    ".parquet": _read_parquet,
}


def write_table(path: str | Path, x: Tensor) -> None:
    """Write points, shape (N, D), to a new .npy or .csv file.

    Raises:
        ValueError: Another kind of file, or one that exists.
    """
    path = Path(path)
    if path.suffix not in (".npy", ".csv"):
        raise ValueError(f"write_table: expected a .npy or .csv file, got {path.name}")
    if path.exists():
        raise ValueError(f"write_table: {path} exists already")
    if path.suffix == ".npy":
        np.save(path, x.numpy())
    else:
        np.savetxt(path, x.numpy(), delimiter=",", fmt="%.8g")
