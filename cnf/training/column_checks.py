"""What columns of one's own data may hold that a density cannot be learned from."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from cnf.data import Points
from cnf.data.arrays import column_names
from cnf.distributions import FromTorch, expect_volume
from cnf.errors import warn
from cnf.flow import Flow
from cnf.objectives import Batch
from cnf.precision import collapsing
from cnf.training.batches import Placement
from cnf.training.stream import DistributionData

NEAR = 1e-4  # of a column's spread that others do not explain: less, and they explain all of it
ATOM = 0.1  # of the rows with one and the same value
ALIKE = 20  # pairs expected, where there are none: no accident
FEW = 20  # values: so few in many rows are no continuous distribution
REPEATED = 0.5  # of the rows with a value that some other row has too
OUTLYING = 30.0  # standard deviations, in those that the quartiles of a normal would have
LEVELS = (1, 255, 256)  # of gray, in a unit


def check_columns(module: nn.Module, head: Batch, placed: Placement, data: Any, own: bool) -> None:
    """Warn of columns that make no density; raise where the module's dtype merges values.

    Args:
        module: What is trained.
        head: The first rows.
        placed: How rows come to the module.
        data: What `fit` was given, which may name the columns.
        own: Whether these are rows of the user's, not draws from a density.
    """
    names = data.columns if isinstance(data, Points) else column_names(data)
    continuous = isinstance(module, Flow) and module.dequantization is None
    source = data.inner if isinstance(data, DistributionData) else data
    source = source.distribution if isinstance(source, FromTorch) else source
    if continuous and isinstance(source, Distribution):
        expect_volume(source, "fit", "data")
    if own and continuous:
        warn_of_degenerate(head.x, names)
        warn_of_numbering(head.x, names)
        warn_of_outliers(head.x, names)
    for name, rows, columns in (("x", head.x, names), ("context", head.context, None)):
        if name not in placed.wide:
            _expect_resolved(name, rows, placed.dtype, columns)


def _expect_resolved(
    name: str, rows: Tensor | None, dtype: torch.dtype, columns: Sequence[str] | None = None
) -> None:
    """Raise where a cast to `dtype` would merge the values of a column of x or of the context."""
    if rows is None or not rows.is_floating_point():
        return
    if merged := collapsing(rows, dtype):
        of, option = {"x": ("", "preprocess"), "context": (" of context", "context_preprocess")}[
            name
        ]
        raise ValueError(
            f"fit: {dtype} merges different values of {_named(merged, columns)}{of}; build the "
            f"model with {option}='standardize', which works in float64, or subtract a constant "
            "from these columns, or train module.double()"
        )


def _named(columns: Iterable[int], names: Sequence[str] | None) -> str:
    found = [str(k) if names is None else repr(names[k]) for k in columns]
    return f"column{'s' if len(found) > 1 else ''} {', '.join(found)}"


def warn_of_degenerate(head: Tensor, names: Sequence[str] | None) -> None:
    """Warn of columns along which no density is bounded, so that the NLL falls for ever.

    These are constant columns, those that repeat or combine others, those with a value that many
    rows share, and those of few values, as rounding leaves (ages in years).

    Args:
        head: Rows, shape (N, *event), at most 10,000 of which are looked at; images, whose
            borders may well be constant, are asked for whole gray levels only.
        names: Of the columns.
    """
    remedy = (
        "drop these columns, make them a context, or add noise as wide as the steps between values"
    )
    most = 10_000 if head.dim() == 2 else 100
    rows = head.detach()[:: max(1, len(head) // most)].double().cpu()
    if rows.dim() > 2 and any(_whole(levels * rows) for levels in LEVELS):
        found = ["all values are whole gray levels"]
        remedy = (
            "build the model with dequantization='uniform', and give it the pixels as whole "
            "numbers"
        )
    elif rows.dim() == 2 and len(rows) >= 10:
        found = [*_constant(rows, names), *_combinations(rows, names)]
        found += _repeated(rows, names) if len(rows) >= 50 else []
    else:
        return
    if found:
        warn(
            f"fit: these data have no bounded density ({'; '.join(found)}): the NLL can fall "
            f"without end and means nothing; {remedy}"
        )


def warn_of_outliers(head: Tensor, names: Sequence[str] | None) -> None:
    """Warn of columns whose standard deviation is that of a few outlying rows.

    Standardized by it, all other rows come to lie in one point.

    Args:
        head: Rows, shape (N, *event); of images nothing is said.
        names: Of the columns.
    """
    rows = head.detach().double().cpu()
    if rows.dim() != 2 or len(rows) < 50:
        return
    away = _away(rows)
    found = (away.square().mean(0).sqrt() > OUTLYING).nonzero().flatten().tolist()
    if found:
        warn(
            f"fit: {_named(found, names)}: a few rows are so far out (the farthest "
            f"{away[:, found].max():.2g} standard deviations of the middle half) that beside them "
            "all others are nearly one point; drop these rows, or model the logarithm"
        )


def _away(rows: Tensor) -> Tensor:
    """Distances from the median of each column, 0 in a column whose quartiles coincide.

    The unit is the standard deviation of a normal distribution with these quartiles.
    """
    places = (max(1, round(q * len(rows))) for q in (0.25, 0.5, 0.75))
    low, middle, high = (rows.kthvalue(k, 0).values for k in places)
    spread = (high - low) / 1.349
    return torch.where(spread > 0, (rows - middle).abs() / spread, 0.0)


def _whole(values: Tensor) -> bool:
    """Whether all are whole numbers, up to float32's rounding, and not all the same."""
    near = values.round()
    return bool(near.amax() > near.amin() and (values - near).abs().amax() < 1e-4)


def _constant(rows: Tensor, names: Sequence[str] | None) -> Iterator[str]:
    constant = (rows.amax(0) == rows.amin(0)).nonzero().flatten().tolist()
    if constant:
        yield f"{_named(constant, names)}: constant"


def _repeated(rows: Tensor, names: Sequence[str] | None) -> Iterator[str]:
    """Words for the columns whose values recur."""
    counts = [column.unique(return_counts=True)[1] for column in rows.T]
    few = [k for k, count in enumerate(counts) if 1 < len(count) <= FEW]
    if few:
        yield f"{_named(few, names)}: {FEW} different values or fewer"
    sizes = [0 if k in few else int(count.max()) for k, count in enumerate(counts)]
    shared = [k for k, size in enumerate(sizes) if ATOM * len(rows) < size < len(rows)]
    if shared:
        yield f"{_named(shared, names)}: one value in more than {ATOM:.0%} of the rows"
    again = [int(count[count > 1].sum()) for count in counts]
    rounded = [
        k
        for k, size in enumerate(sizes)
        if 0 < size <= ATOM * len(rows) and again[k] > REPEATED * len(rows)
    ]
    if rounded:
        yield (
            f"{_named(rounded, names)}: more than {REPEATED:.0%} of the rows have a value that "
            "others have too, as if rounded"
        )


def warn_of_numbering(head: Tensor, names: Sequence[str] | None) -> None:
    """Warn of columns that number the rows, in whatever order.

    Such are whole numbers, no two alike, where as many draws from their range would hold `ALIKE`
    equal pairs or more.

    Args:
        head: Rows, shape (N, *event); of images nothing is said.
        names: Of the columns.
    """
    rows = head.detach().double().cpu()
    if rows.dim() != 2 or len(rows) < 50:
        return
    pairs = len(rows) * (len(rows) - 1) / 2
    spans = (rows.amax(0) - rows.amin(0) + 1).tolist()
    found = [
        k
        for k, (column, span) in enumerate(zip(rows.T, spans, strict=True))
        if pairs > ALIKE * span and not column.frac().any() and len(column.unique()) == len(rows)
    ]
    if found:
        warn(
            f"fit: {_named(found, names)} number{'s' * (len(found) == 1)} the rows, as an index "
            "does (whole numbers, no two alike), which is nothing to model; name the columns to "
            "model, without such"
        )


def _combinations(rows: Tensor, names: Sequence[str] | None) -> Iterator[str]:
    """Words for each column that those before it give, up to `NEAR` of its spread."""
    numbers = (rows.amax(0) > rows.amin(0)).nonzero().flatten().tolist()
    if not 1 < len(numbers) <= 500:
        return  # more take too long
    rows = rows[:, numbers]
    rows = rows[_away(rows).amax(1) < OUTLYING]  # one far out makes all columns proportional
    if len(rows) <= 2 * len(numbers):
        return  # so few lie in a plane by themselves
    spread = rows.std(0)
    if not (spread.isfinite() & (spread > 0)).all():
        return  # their squares overflow
    standard = (rows - rows.mean(0)) / spread
    left = torch.linalg.qr(standard, mode="r").R.diagonal().abs() / len(rows) ** 0.5
    free = [k for k in range(len(numbers)) if left[k] > NEAR]
    for k in range(len(numbers)):
        if left[k] <= NEAR:
            before = [j for j in free if j < k]
            weights = torch.linalg.lstsq(standard[:, before], standard[:, k]).solution
            used = [numbers[j] for j, w in zip(before, weights, strict=True) if w.abs() > 0.01]
            yield f"{_named([numbers[k]], names)}: follows from {_named(used, names)}"
