"""Regression problems: tables of the UCI repository, and one whose noise is known exactly."""

from typing import NamedTuple

import numpy as np
import torch
from predictive import Mixture, Predictive
from torch import Tensor

from cnf.data import Points
from cnf.data.table_sets import TABLE_SETS
from cnf.random import stream

ROWS = 5_000  # of the problem that is known


class Problem(NamedTuple):
    """Rows to train on, for validation and for the test: x is the target, context the features.

    Attributes:
        points: Training rows, which know the others as `validation` and `test`.
        truth: The exact predictive distribution of the test rows, or None.
    """

    points: Points
    truth: Predictive | None


def problem(name: str, seed: int) -> Problem:
    """The rows in an order by seed: a tenth is the test, a tenth of the rest for validation."""
    rows = bimodal(seed) if name == "bimodal" else table(name)
    rows = rows[torch.randperm(len(rows), generator=stream(seed, "split"))]
    rest = len(rows) - len(rows) // 10
    train, validation, test = (
        Points(part[:, -1:], name, context=part[:, :-1])
        for part in rows.tensor_split([rest - rest // 10, rest])
    )
    train.validation, train.test = validation, test
    return Problem(train, exact(test.context) if name == "bimodal" else None)


def table(name: str) -> Tensor:
    """All rows of a table of the library, the target last; rounded columns have noise."""
    parts = TABLE_SETS[name]()
    return torch.cat([part.x.double() for part in (parts, parts.validation, parts.test)])


def bimodal(seed: int, rows: int = ROWS) -> Tensor:
    """A feature, uniform on (-1, 1), and a target of two branches and of noise that varies."""
    generator = stream(seed, "bimodal")
    feature = 2 * torch.rand(rows, 1, generator=generator, dtype=torch.float64) - 1
    told = exact(feature)
    chosen = torch.rand(rows, generator=generator, dtype=torch.float64).numpy() < told.weight[:, 0]
    mean, std = (np.where(chosen, part[:, 0], part[:, 1]) for part in (told.mean, told.std))
    noise = torch.randn(rows, generator=generator, dtype=torch.float64).numpy()
    return torch.cat([feature, torch.from_numpy(mean + std * noise)[:, None]], 1)


def exact(feature: Tensor) -> Mixture:
    r"""The target given the feature f, whose branches part as it grows.

    .. math::
        w\,N(\sin 3f + 1 + f,\ s^2) + (1-w)\,N(\sin 3f - 1 - f,\ s^2), \quad
        w = \frac{1}{1 + e^{-f}}, \quad s = 0.1 + 0.15\,(1 + \sin 5f)
    """
    f = feature.double().numpy()
    w, s, middle = 1 / (1 + np.exp(-f)), 0.1 + 0.15 * (1 + np.sin(5 * f)), np.sin(3 * f)
    mean = np.concatenate([middle + 1 + f, middle - 1 - f], 1)
    return Mixture(np.concatenate([w, 1 - w], 1), mean, np.concatenate([s, s], 1))
