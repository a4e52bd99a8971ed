"""A trace that can be checked where an exact one is out of reach: that of one direction."""

from dataclasses import dataclass

import torch
from torch import Tensor

from cnf.dynamics.divergence import Divergence, Hutchinson
from cnf.random import stream

_ESTIMATE = Hutchinson()


@dataclass(frozen=True)
class OneProbe(Divergence):
    """Hutchinson's estimate with one probe, the same for each row in each call.

    What it gives is a function of the row, so that all may be asked of it that is asked of an
    exact trace, but for being the trace. It is no `Hutchinson`, whose probes are drawn anew.
    """

    channels = _ESTIMATE.channels
    rates = _ESTIMATE.rates  # pyright: ignore

    def draw(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The probe in every row, shape (1, N, *event)."""
        return _ESTIMATE.draw(x[:1], stream(0, "probe of checks")).expand(1, *x.shape)
