"""Predictive distributions of one number for each row, and the scores of them.

A predictive distribution of N rows has `log_prob(y)` and `cdf(y)` of y, shape (N,), and
`quantiles(levels)`, shape (N, L). All are NumPy arrays in float64, in the units of the target.
"""

from typing import NamedTuple, Protocol

import numpy as np
import torch
from scipy.special import logsumexp, ndtr, ndtri

import cnf
from cnf.metrics import log_prob_chunked

MIDPOINTS = (np.arange(40) + 0.5) / 40  # levels of the quantiles that CRPS and means are sums over
COVERED = (0.5, 0.8, 0.9, 0.95)  # probabilities of central intervals
BINS = 20  # of the histogram of PIT values


class Predictive(Protocol):
    """One distribution for each of N rows."""

    def log_prob(self, y: np.ndarray) -> np.ndarray: ...

    def cdf(self, y: np.ndarray) -> np.ndarray: ...

    def quantiles(self, levels: np.ndarray) -> np.ndarray: ...


class Mixture(NamedTuple):
    """Mixtures of K normal distributions, each array of shape (N, K)."""

    weight: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    def log_prob(self, y: np.ndarray) -> np.ndarray:
        z = (y[:, None] - self.mean) / self.std
        return logsumexp(
            np.log(self.weight) - 0.5 * z**2 - np.log(self.std) - 0.5 * np.log(2 * np.pi), axis=1
        )

    def cdf(self, y: np.ndarray) -> np.ndarray:
        return (self.weight * ndtr((y[:, None] - self.mean) / self.std)).sum(1)

    def quantiles(self, levels: np.ndarray) -> np.ndarray:
        """By bisection, to 2⁻⁴⁰ of the range in which the quantiles must be."""
        z = ndtri(levels)
        ends = self.mean[:, None] + self.std[:, None] * z[:, None]  # (N, L, K): those of a part
        low, high = ends.min(2), ends.max(2)
        for _ in range(40):
            middle = (low + high) / 2
            below = np.stack([self.cdf(column) for column in middle.T], 1) < levels
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return (low + high) / 2


class OfFlow(NamedTuple):
    """Those of a flow of one variable, whose distribution function is Φ(z) of its base sample z.

    Such a flow is monotone, here increasing, so that its quantiles are base quantiles decoded.
    """

    flow: cnf.Flow
    context: torch.Tensor

    def log_prob(self, y: np.ndarray) -> np.ndarray:
        found = log_prob_chunked(self.flow, torch.from_numpy(y)[:, None], self.context)
        return found.double().numpy()

    @torch.no_grad()
    def cdf(self, y: np.ndarray) -> np.ndarray:
        z = self.flow.encode(torch.from_numpy(y)[:, None], self.context)
        return ndtr(z[:, 0].double().numpy())

    @torch.no_grad()
    def quantiles(self, levels: np.ndarray) -> np.ndarray:
        z = torch.from_numpy(ndtri(levels)).to(self.flow.dtype)
        z = z[:, None, None].expand(-1, len(self.context), 1)
        return self.flow.decode(z, self.context)[..., 0].double().numpy().T


class Ensemble(NamedTuple):
    """Equal mixtures of predictive distributions of the same rows."""

    members: list[Predictive]

    def log_prob(self, y: np.ndarray) -> np.ndarray:
        found = np.stack([member.log_prob(y) for member in self.members])
        return logsumexp(found, axis=0) - np.log(len(found))

    def cdf(self, y: np.ndarray) -> np.ndarray:
        return np.mean([member.cdf(y) for member in self.members], axis=0)

    def quantiles(self, levels: np.ndarray) -> np.ndarray:
        """Of 200 midpoint quantiles of each member together."""
        fine = (np.arange(200) + 0.5) / 200
        pooled = np.concatenate([member.quantiles(fine) for member in self.members], axis=1)
        return np.quantile(pooled, levels, axis=1, method="hazen").T


def crps(quantiles: np.ndarray, levels: np.ndarray, y: np.ndarray) -> np.ndarray:
    r"""Continuous ranked probability score, in the units of y, shape (N,).

    .. math:: \int (F(t) - 1[t \ge y])^2\,dt = 2 \int_0^1 (1[y < q_u] - u)(q_u - y)\,du

    Source: Gneiting and Raftery (2007), https://doi.org/10.1198/016214506000001437; Laio and Tamea
    (2007), https://doi.org/10.5194/hess-11-1267-2007, for the quantiles.

    Args:
        quantiles: At evenly spaced midpoints of (0, 1), shape (N, L).
        levels: The midpoints, shape (L,).
        y: Shape (N,).
    """
    apart = quantiles - y[:, None]
    return 2 * (((apart > 0) - levels) * apart).mean(1)


def recalibrated(held_out: np.ndarray, pit: np.ndarray, part: float) -> float:
    """Coverage of central intervals whose level held-out rows set: split conformal prediction.

    The interval is |F(y) - 1/2| <= h, with h the ⌈(n + 1) part⌉-th smallest of n held-out rows.
    Source: Chernozhukov et al. (2021), https://doi.org/10.1073/pnas.2107794118.

    Args:
        held_out: F(y) of held-out rows, shape (n,).
        pit: F(y) of test rows.
        part: Probability of the intervals.
    """
    apart = np.sort(np.abs(held_out - 0.5))
    place = int(np.ceil((len(apart) + 1) * part)) - 1
    half = apart[place] if place < len(apart) else 0.5
    return float(np.mean(np.abs(pit - 0.5) <= half))


def scores(told: Predictive, y: np.ndarray, few: Predictive, scored: int) -> dict[str, str]:
    """Of all rows NLL and calibration; of the first `scored` what quantiles are needed for.

    Args:
        told: Predictive distributions of all rows.
        y: Targets, shape (N,).
        few: Those of the first rows.
        scored: Their number.
    """
    nll, pit = -told.log_prob(y), told.cdf(y)
    levels = np.concatenate([MIDPOINTS, [0.05, 0.95]])
    quantiles = few.quantiles(levels)
    middle, width = quantiles[:, :-2], quantiles[:, -1] - quantiles[:, -2]
    first = y[:scored]
    covered = {
        f"covered_{100 * part:.0f}": f"{np.mean(np.abs(pit - 0.5) <= part / 2):.4f}"
        for part in COVERED
    }
    histogram = np.histogram(pit, BINS, (0, 1))[0]
    return {
        "nll": f"{nll.mean():.4f}", "nll_error": f"{nll.std(ddof=1) / len(y) ** 0.5:.4f}",
        "worst": f"{nll.max():.1f}", **covered,
        "width_90": f"{width.mean():.5g}", "crps": f"{crps(middle, MIDPOINTS, first).mean():.5g}",
        "rmse": f"{np.sqrt(np.mean((middle.mean(1) - first) ** 2)):.5g}",
        "pit": " ".join(map(str, histogram)),
    }  # fmt: skip
