"""Normal rows and anomalies: a table with a class that is none, and a table with injected ones."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from sklearn.datasets import load_breast_cancer
from torch import Generator, Tensor

from cnf.data import Points
from cnf.data.table_sets import TABLE_SETS
from cnf.random import stream


class Problem(NamedTuple):
    """Normal rows in parts, and anomalies by kind, all in float64.

    Attributes:
        points: Normal rows to train on, which know others as `validation` and `test`.
        held_out: Normal rows that nothing has seen, which calibrate p-values.
        anomalies: Rows of each kind.
    """

    points: Points
    held_out: Tensor
    anomalies: dict[str, Tensor]


def breast_cancer(seed: int) -> Problem:
    """Wisconsin's 569 tumors in 30 numbers: 357 benign ones are normal, 212 malignant ones not."""
    data = load_breast_cancer()
    x, benign = torch.from_numpy(data.data), torch.from_numpy(data.target) == 1
    points, held_out = parts(x[benign], seed, "breast-cancer")
    return Problem(points, held_out, {"malignant": x[~benign]})


def power_plant(seed: int) -> Problem:
    """9,568 hours of a power plant in 5 numbers, and rows made of its test rows."""
    table = TABLE_SETS["power-plant"]()
    rows = torch.cat([part.x.double() for part in (table, table.validation, table.test)])
    points, held_out = parts(rows, seed, "power-plant")
    generator = stream(seed, "anomalies")
    made = {
        name: kind(points.test.x, points.x.mean(0), points.x.std(0), generator)
        for name, kind in KINDS.items()
    }
    return Problem(points, held_out, made)


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "breast-cancer": breast_cancer, "power-plant": power_plant,
}  # fmt: skip


def parts(rows: Tensor, seed: int, name: str) -> tuple[Points, Tensor]:
    """Of shuffled rows 55 % to train on, 15 % each for validation, p-values and the test."""
    rows = rows[torch.randperm(len(rows), generator=stream(seed, "split"))]
    n = [int(share * len(rows)) for share in (0.55, 0.7, 0.85)]
    train, validation, held_out, test = rows.tensor_split(n)
    points = Points(train, name)
    points.validation, points.test = Points(validation, name), Points(test, name)
    return points, held_out


def permuted(x: Tensor, mean: Tensor, std: Tensor, generator: Generator) -> Tensor:
    """Each column in an order of its own: all marginals are kept, dependence is not."""
    order = torch.rand(x.shape, generator=generator).argsort(0)
    return x.gather(0, order)


def shifted(x: Tensor, mean: Tensor, std: Tensor, generator: Generator) -> Tensor:
    """One column of each row, drawn at random, moved by a standard deviation up or down."""
    column = torch.randint(x.shape[1], (len(x), 1), generator=generator)
    sign = 2 * torch.randint(2, (len(x), 1), generator=generator) - 1
    return x + torch.zeros_like(x).scatter(1, column, sign.to(x)) * std


def scaled(x: Tensor, mean: Tensor, std: Tensor, generator: Generator) -> Tensor:
    """Half as far again from the mean."""
    return mean + 1.5 * (x - mean)


def shrunk(x: Tensor, mean: Tensor, std: Tensor, generator: Generator) -> Tensor:
    """A fifth as far from the mean: where the density may be high, and typical rows are not."""
    return mean + 0.2 * (x - mean)


KINDS: dict[str, Callable[[Tensor, Tensor, Tensor, Generator], Tensor]] = {
    "permuted": permuted, "shifted": shifted, "scaled": scaled, "shrunk": shrunk,
}  # fmt: skip
