"""How usual a row is: its log-density among those of held-out rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from cnf.data.arrays import as_numbers


class RowScores(NamedTuple):
    """What is said of each row.

    Attributes:
        log_density: That of the row, shape (N,), in the unit that was given.
        p_value: Two-sided p-value of the log-density, shape (N,): small where it is lower, or
            higher, than those of almost all held-out rows.
        rank: 1 for the lowest log-density, shape (N,); rows that have none come last.
    """

    log_density: Tensor
    p_value: Tensor
    rank: Tensor


def row_scores(log_density: Tensor, reference: Tensor) -> RowScores:
    r"""Score rows by their log-densities, calibrated on those of held-out rows.

    With n rows that the flow was not trained on, the fraction of them with at most a log-density
    s is :math:`(1 + \#\{s_i \le s\}) / (n + 1)`, likewise from above, and the p-value is twice
    the smaller one. Whatever the flow is, a row drawn as the held-out ones were has a p-value of
    at most a with probability a or less. A log-density that is too high is unusual, too: in many
    dimensions the densest points are not where samples are.

    >>> scores = row_scores(torch.tensor([-20.0, -2.5, 4.0]), -torch.arange(1.0, 40.0))
    >>> scores.p_value.tolist(), scores.rank.tolist()
    ([1.0, 0.15, 0.05], [1, 2, 3])

    Source: conformal p-values, Vovk et al. (2005), Algorithmic Learning in a Random World; for
    outliers Bates et al. (2023), https://arxiv.org/abs/2104.08279; of typical sets Nalisnick et
    al. (2019), https://arxiv.org/abs/1906.02994.

    Args:
        log_density: Log-densities of the rows, shape (N,), in nats or any other unit; an array,
            as of scikit-learn, or a tensor.
        reference: Those of rows that were held out from training, shape (n,).

    Raises:
        ValueError: An input is not one-dimensional or is empty, or a reference is NaN.
    """
    log_density = as_numbers("row_scores", "log_density", log_density)
    reference = as_numbers("row_scores", "reference", reference)
    for name, values in (("log_density", log_density), ("reference", reference)):
        if values.dim() != 1 or not len(values):
            raise ValueError(
                f"row_scores: expected {name} of shape (N,), one number a row, got "
                f"{tuple(values.shape)}"
            )
    if lost := int(reference.isnan().sum()):
        raise ValueError(
            f"row_scores: expected a log-density of each held-out row, got NaN in {lost} of "
            f"{len(reference)}; leave these rows out"
        )
    known, n = reference.double().sort().values, len(reference)
    rows = log_density.double().contiguous()
    below = torch.searchsorted(known, rows, right=True)
    above = n - torch.searchsorted(known, rows)
    p_value = 2 * (1 + torch.minimum(below, above)).double() / (n + 1)
    p_value = p_value.clamp(max=1).masked_fill(rows.isnan(), torch.nan)
    rank = rows.argsort(stable=True).argsort() + 1  # NaN is sorted to the end
    return RowScores(log_density, p_value, rank)
