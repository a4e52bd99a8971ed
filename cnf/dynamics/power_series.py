r"""The log-determinant of a step near the identity, by an unbiased estimate of its power series.

With :math:`A = \partial\Phi/\partial x - I` of a step Φ,

.. math:: \log\det(I + A) = \sum_{k \ge 1} \frac{(-1)^{k+1}}{k}\, \mathrm{tr}\, A^k

if the spectral radius of A is below 1. Each trace is estimated by Hutchinson's probes, and the
series ends after a random number of terms, whose weights make up for those that are left out.

Source: Chen et al. (2019), Residual Flows, https://arxiv.org/abs/1906.02735.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cnf.dynamics.numerical import NumericalStep
from cnf.dynamics.preimage import per_row
from cnf.dynamics.regularizers import Integrand
from cnf.random import draw

TERMS = 10  # computed always
MORE = 0.75  # probability of each further term
LARGEST = 0.85  # spectral radius; the variance is finite below √MORE


@dataclass(frozen=True)
class PowerSeries:
    """The estimates of a step's log-determinant by several probes, see the module.

    A row has NaN where its spectral radius, as seen in the growth of the probes' products, is not
    below `LARGEST`.

    Attributes:
        probe: Noise with E[εεᵀ] = I, shape (n, N, *event).
        generator: Source of the numbers of terms; None for torch's global generator.
    """

    probe: Tensor
    generator: torch.Generator | None = None

    lost = (
        f"is not near enough to the identity for a power series (its Jacobian minus the identity "
        f"has a spectral radius above {LARGEST}), or was not inverted; take more steps, or the "
        "exact log-determinant"
    )

    def __call__(
        self, step: NumericalStep, x: Tensor, integrands: Sequence[Integrand]
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Φ(x), the estimates of log|det ∂Φ|, shape (N, n), and the integrals, shape (N,)."""
        value, products, integrals = step.with_tangents(x, self.probe, integrands)
        power, half = products - self.probe, 0.0
        terms = self._terms(x)
        total, lost = x.new_zeros(terms.shape), x.new_zeros(len(x))
        for k in range(1, 1 + int(terms.amax()) if terms.numel() else 1):
            if k > 1:
                power = step.with_tangents(x, power, ())[1] - power
            trace = (self.probe * power).flatten(2).sum(-1)
            weight = (-1) ** (k + 1) / k * MORE ** -max(0, k - TERMS)
            total = total + torch.where(k <= terms, weight * trace, 0.0)
            if k == TERMS // 2:
                half = _size(power)
            if k == TERMS:
                near = _size(power) <= LARGEST ** (TERMS - TERMS // 2) * half
                lost = lost.masked_fill(~near, math.nan)
                power = torch.where(per_row(near, x), power, 0.0)
        return value, total.T + lost[:, None], integrals

    def _terms(self, x: Tensor) -> Tensor:
        """How many terms each probe of each row takes, shape (n, N): a geometric number more."""
        uniform = draw(torch.rand, self.probe.shape[:2], self.generator, like=x)
        return TERMS + (uniform.log() / math.log(MORE)).floor()


def _size(power: Tensor) -> Tensor:
    return power.detach().flatten(2).norm(dim=-1).mean(0)
