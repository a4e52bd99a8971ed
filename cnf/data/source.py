"""Loading of a data source from a name, a file or an array."""

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from cnf.data.arrays import is_rows
from cnf.data.columns import Columns
from cnf.data.density import Toy
from cnf.data.images import IMAGE_SETS, Images, is_images, read_images
from cnf.data.pictures import PICTURES, Picture
from cnf.data.table_sets import TABLE_SETS
from cnf.data.tabular import TABLES, Points, read_points, table_kind
from cnf.data.toys import TOYS, toy
from cnf.errors import UnknownNameError

Source = Toy | Points


def load(source: Any, columns: Columns | None = None) -> Source:
    """Load a density or points by name, by path, or from an array.

    The result has the attributes `name`, `dim` and `support` and a method `sample`.

    Args:
        source: The name of a density (see `TOYS`), of a set of pictures (`IMAGE_SETS`: "mnist") or
            of a table (`TABLE_SETS`: "power"); a path to a picture, which is a density, to
            pictures (see `read_images`) or to a table of numbers; points as a tensor, an array or
            a table of shape (N, D); or a `Toy` or `Points`, which is returned unchanged.
        columns: Roles of a table's columns, all of which are modeled if None; of pictures
            `Columns(context=["labels"])` makes their labels the context.

    Returns:
        A `Toy` for the name of a density, a `Picture` (a Toy too) for a picture, `Points` for a
        table or points, `Images` (Points too) for pictures.

    Raises:
        ValueError: A string is neither a name nor a file of a known kind, the points are not
            finite numbers of shape (N, D), or columns are given without a table.
        FileNotFoundError: There is no file at the path.
        TypeError: The source is of another type.

    >>> load("moons")
    Curves('moons')
    >>> load("mons")
    Traceback (most recent call last):
    ValueError: load: unknown density 'mons'; known: ... Did you mean 'moons'? ...
    """
    named = isinstance(source, str | PathLike)
    if named and names_images(source):
        return _images(source, columns)
    table = named and table_kind(Path(source)) is not None
    if columns not in (None, Columns()) and not table:
        got = (
            source if named else f"a {type(source).__name__}; write it to a .csv or .parquet file"
        )
        raise ValueError(f"load: columns can be chosen of a table in a file, got {got}")
    if isinstance(source, Toy | Points):
        return source
    if is_rows(source):
        return Points(source)
    if isinstance(source, str) and source in TOYS:
        return toy(source)
    if isinstance(source, str) and source in TABLE_SETS:
        return TABLE_SETS[source]()
    if not isinstance(source, str | PathLike):
        raise TypeError(
            "load: expected a name, a path, a tensor or an array, or a data source, "
            f"got {type(source).__name__}"
        )
    path = Path(source)
    if path.suffix.lower() in PICTURES:
        found = Picture(path)
    elif table:
        found = read_points(path, columns)
    else:
        raise ValueError(_refusal(str(source), path))
    found.source = str(path.resolve())  # so that a run's configuration can name it
    return found


def has_columns(source: str | PathLike[str]) -> bool:
    """Whether `load` can give the columns of such data roles: those of a table, or labels.

    Args:
        source: A name or a path.
    """
    return table_kind(Path(source)) is not None or names_images(source)


def names_images(source: str | PathLike[str]) -> bool:
    """Whether `load` gives pictures of this.

    Args:
        source: A name or a path.
    """
    return str(source) in IMAGE_SETS or is_images(Path(source))


def _images(source: str | PathLike[str], columns: Columns | None) -> Images:
    given = columns or Columns()
    if replace(given, labels=None) not in (Columns(), Columns(context=["labels"])):
        raise ValueError(
            "load: of pictures only the labels can be a context, Columns(context=['labels']), "
            f"got {columns} for {source}"
        )
    name = str(source)
    images = IMAGE_SETS[name]() if name in IMAGE_SETS else read_images(Path(source))
    classes = len((given.labels or {}).get("labels", ())) or None
    return images.conditional(classes) if given.context else images


def _refusal(source: str, path: Path) -> str:
    kinds = f"pictures ({', '.join(PICTURES)}) and tables ({', '.join(TABLES)})"
    if path.is_dir():
        return (
            f"load: expected a file, a name or a folder of pictures, got the folder {source} "
            f"without any; files may be {kinds}"
        )
    if path.exists():
        return f"load: expected a file of a known kind, got {source}; files may be {kinds}"
    known = [*TOYS, *IMAGE_SETS, *TABLE_SETS]
    return f"load: {UnknownNameError('density', source, known)} Or give a file: {kinds}."
