"""Features that networks are given: of time, of the context, and of angles."""

import math

import torch
from torch import Tensor, nn


class TimeFeatures(nn.Module):
    """Features of time: t, then sin(kπt) and cos(kπt) for k = 1, …, frequencies.

    With them a small network can change fast with time.

    >>> TimeFeatures(frequencies=1)(torch.tensor(0.5)).tolist()
    [0.5, 1.0, -4.371138828673793e-08]

    Args:
        frequencies: Number of pairs of sine and cosine; 0 for t alone.

    Raises:
        ValueError: The number is negative.
    """

    multiples: Tensor

    def __init__(self, frequencies: int = 0) -> None:
        super().__init__()
        if frequencies < 0:
            raise ValueError(f"TimeFeatures: expected frequencies >= 0, got {frequencies}")
        self.size = 1 + 2 * frequencies
        multiples = math.pi * torch.arange(1, frequencies + 1, dtype=torch.get_default_dtype())
        self.register_buffer("multiples", multiples, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """Features of t, shape (*batch,), of shape (*batch, size)."""
        t = t.unsqueeze(-1)
        if self.size == 1:
            return t
        angle = t * self.multiples
        return torch.cat([t, torch.sin(angle), torch.cos(angle)], -1)


class Condition(nn.Module):
    """The conditioning input u = [τ(t), c] of a layer: features of time and the context.

    In an ODE solve all rows have the same t; without a context u is then a single vector.

    Args:
        frequencies: Number of pairs of sine and cosine, see `TimeFeatures`.
        context_dim: Size of the context; 0 for none.
    """

    def __init__(self, frequencies: int, context_dim: int = 0) -> None:
        super().__init__()
        self.time = TimeFeatures(frequencies)
        self.size = self.time.size + context_dim

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The conditioning input u, shape (size,) or (*batch, size).

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, D), whose dtype and batch shape are used.
            context: Condition, broadcasting to (*batch, C), or None.
        """
        features = self.time(t.to(x.dtype))
        if context is None:
            return features
        batch = x.shape[:-1]
        return torch.cat([features.expand(*batch, -1), context.expand(*batch, -1)], -1)


def on_circle(angle: Tensor, period: float | None) -> Tensor:
    """The sine and cosine of each angle, shape (*, 2D); the input if there is no period.

    Args:
        angle: Angles, shape (*, D).
        period: Length of the circle, or None.
    """
    if period is None:
        return angle
    turn = angle * (2 * math.pi / period)
    return torch.stack([turn.sin(), turn.cos()], -1).flatten(-2)
