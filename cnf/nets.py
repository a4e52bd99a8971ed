"""Small networks: activations with their derivative, MLPs, time features."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.registry import Registry


@dataclass(frozen=True)
class Activation:
    """An elementwise nonlinearity σ.

    Attributes:
        function: a → σ(a).
        with_derivative: a → (σ(a), σ'(a)), sharing what the two have in common; differentiable.
    """

    function: Callable[[Tensor], Tensor]
    with_derivative: Callable[[Tensor], tuple[Tensor, Tensor]]


def _silu(a: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(a)
    value = a * gate
    return value, gate * (1 + a - value)


def _tanh(a: Tensor) -> tuple[Tensor, Tensor]:
    value = torch.tanh(a)
    return value, 1 - value * value


def _softplus(a: Tensor) -> tuple[Tensor, Tensor]:
    return F.softplus(a), torch.sigmoid(a)


def _elu(a: Tensor) -> tuple[Tensor, Tensor]:
    return F.elu(a), torch.exp(a.clamp(max=0))


_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772  # Klambauer et al. (2017)


def _selu(a: Tensor) -> tuple[Tensor, Tensor]:
    tail = _SELU_ALPHA * torch.exp(a.clamp(max=0))
    return F.selu(a), _SELU_SCALE * torch.where(a > 0, 1.0, tail)


ACTIVATIONS = Registry("activation")
for _name, _function, _with_derivative in (
    ("silu", F.silu, _silu),
    ("tanh", torch.tanh, _tanh),
    ("softplus", F.softplus, _softplus),
    ("elu", F.elu, _elu),
    ("selu", F.selu, _selu),
):
    ACTIVATIONS.register(_name)(Activation(_function, _with_derivative))


def linear_sizes(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive (in, out) pairs; a width below one is a ValueError."""
    for size in sizes:
        if size < 1:
            raise ValueError(f"MLP: expected every width >= 1, got {tuple(sizes)}")
    return list(zip(sizes[:-1], sizes[1:], strict=True))


class MLP(nn.Module):
    """Multilayer perceptron (*, inputs) → (*, outputs).

    Args:
        inputs: Size of the last axis of the input.
        outputs: Size of the last axis of the output.
        hidden: Widths of the hidden layers.
        activation: A name in `ACTIVATIONS`.
        zero_last: Start the last layer at zero, so that the output starts at zero (identity
            flows).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: Sequence[int] = (64, 64),
        activation: str = "silu",
        zero_last: bool = False,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(i, o) for i, o in linear_sizes([inputs, *hidden, outputs])
        )
        self.activation = ACTIVATIONS[activation]
        if zero_last:
            zero_(self.layers[-1])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = self.activation.function(layer(x))
        return self.layers[-1](x)


def zero_(layer: nn.Module) -> None:
    """Set a linear layer's weight and bias to zero, in place."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class TimeFeatures(nn.Module):
    """Features of time: t, then sin(kπt) and cos(kπt) for k = 1, …, frequencies.

    With no frequencies it is plain time; with some, a small net can change fast in t.

    >>> TimeFeatures(frequencies=1)(torch.tensor(0.5)).tolist()
    [0.5, 1.0, -4.371138828673793e-08]

    Args:
        frequencies: How many sine and cosine pairs.
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
        """t: (*batch,) → (*batch, size)."""
        t = t.unsqueeze(-1)
        if self.size == 1:
            return t
        angle = t * self.multiples
        return torch.cat([t, torch.sin(angle), torch.cos(angle)], -1)


class Condition(nn.Module):
    """What a layer depends on beside its input: u = [τ(t), c].

    In an ODE solve all rows share t: without a context u is then one vector, not a batch of them.

    Args:
        frequencies: As of `TimeFeatures`.
        context_dim: Size of the context; 0 for none.
    """

    def __init__(self, frequencies: int, context_dim: int = 0) -> None:
        super().__init__()
        self.time = TimeFeatures(frequencies)
        self.size = self.time.size + context_dim

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """t: () or (*batch,), x: (*batch, D), c: what broadcasts → (size,) or (*batch, size)."""
        features = self.time(t.to(x.dtype))
        if context is None:
            return features
        batch = x.shape[:-1]
        return torch.cat([features.expand(*batch, -1), context.expand(*batch, -1)], -1)
