r"""The log-determinant of a step near the identity, by an unbiased estimate of its power series.

With :math:`A = \partial\Phi/\partial x - I` of a step Φ, a probe ε and a random number N of terms,

.. math:: \log\det(I + A) = \sum_{k \ge 1} \frac{(-1)^{k+1}}{k}\, \mathrm{tr}\, A^k
    = E \sum_{k=1}^N \frac{(-1)^{k+1}}{k\, P(N \ge k)}\, \epsilon^\top A^k \epsilon

if the spectral radius of A is below 1. How fast the powers of A shrink is seen beforehand on other
vectors, so that a row is refused whatever its probes are.

Source: Chen et al. (2019), Residual Flows, https://arxiv.org/abs/1906.02735.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf.dynamics.numerical import NumericalStep
from cnf.dynamics.regularizers import Integrand
from cnf.precision import widest
from cnf.random import draw

FIXED_TERMS = 10  # which are always computed
CONTINUE = 0.75  # probability of each further term
LARGEST_GROWTH = 0.85  # of the powers of A; the variance is finite below √CONTINUE
VECTORS = 2  # on which their growth is seen
POWERS = (12, 16)  # between which it is measured: a large eigenvalue has come forth by then


@dataclass(frozen=True)
class PowerSeries:
    """An unbiased estimate of log|det ∂Φ| of a step by each probe, in rows near the identity.

    Attributes:
        probe: Noise with E[εεᵀ] = I, shape (n, N, *event).
        generator: Source of the numbers of terms and of the vectors on which growth is seen;
            None for torch's global generator.
    """

    probe: Tensor
    generator: torch.Generator | None = None

    failure = (
        "is too far from the identity for the power series of Hutchinson's estimate (each power "
        f"of its Jacobian minus the identity is above {LARGEST_GROWTH} times the one before), or "
        "was not inverted; take more steps, or the exact log-determinant"
    )

    def __call__(
        self, step: NumericalStep, x: Tensor, integrands: Sequence[Integrand]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        near = self._near(step, x)
        terms = self._numbers_of_terms(x).masked_fill(~near, 0)
        value, products, integrals = step.with_tangents(x, self.probe, integrands)
        power, rows = products - self.probe, torch.arange(len(x), device=x.device)
        total, k = x.new_zeros(terms.shape), 1
        while len(rows):  # those that have a k-th term
            weight = (-1) ** (k + 1) / k / CONTINUE ** max(0, k - FIXED_TERMS)
            trace = (self.probe[:, rows] * power).flatten(2).sum(-1)
            total = total.index_add(1, rows, torch.where(k <= terms[:, rows], weight * trace, 0.0))
            k += 1
            left = (terms[:, rows] >= k).any(0)
            rows, power = rows[left], power[:, left]
            if len(rows):
                power = step.of_rows(rows).with_tangents(x[rows], power, ())[1] - power
        return value, total.masked_fill(~near, math.nan).T, integrals

    def _numbers_of_terms(self, x: Tensor) -> Tensor:
        """Of each probe and row, shape (n, N): the fixed ones, and a geometric number more."""
        exact = x.new_empty(0, dtype=widest(x.device))  # the same numbers whatever x's dtype
        uniform = draw(torch.rand, self.probe.shape[:2], self.generator, like=exact)
        return FIXED_TERMS + (torch.log1p(-uniform) / math.log(CONTINUE)).floor()

    @torch.no_grad()
    def _near(self, step: NumericalStep, x: Tensor) -> Tensor:
        """Whether the powers of A are seen to shrink fast enough, shape (N,)."""
        exact = x.new_empty(0, dtype=widest(x.device))
        vectors = draw(torch.randn, (VECTORS, *x.shape), self.generator, like=exact).to(x)
        growth = x.new_zeros(VECTORS, len(x))  # the log of it
        for k in range(POWERS[1]):
            moved = step.with_tangents(x, vectors, ())[1] - vectors
            size = moved.flatten(2).norm(dim=-1)
            if k >= POWERS[0]:
                growth += size.log()
            vectors = moved / size.clamp(min=torch.finfo(x.dtype).tiny).reshape(
                *size.shape, *[1] * (x.dim() - 1)
            )
        largest = growth.amax(0) / (POWERS[1] - POWERS[0])
        return largest <= math.log(LARGEST_GROWTH)  # and not where it is NaN
