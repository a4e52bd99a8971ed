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


def _relu(a: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(a), (a > 0).to(a)


def _elu(a: Tensor) -> tuple[Tensor, Tensor]:
    return F.elu(a), torch.exp(a.clamp(max=0))


_SELU_SCALE, _SELU_ALPHA = 1.0507009873554805, 1.6732632423543772  # Klambauer et al. (2017)


def _selu(a: Tensor) -> tuple[Tensor, Tensor]:
    tail = _SELU_ALPHA * torch.exp(a.clamp(max=0))
    return F.selu(a), _SELU_SCALE * torch.where(a > 0, 1.0, tail)


ACTIVATIONS = Registry("activation")
for _name, _function, _with_derivative in (
    ("silu", F.silu, _silu),
    ("relu", F.relu, _relu),
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
        *inner, last = self.layers
        for layer in inner:
            x = self.activation.function(layer(x))
        return last(x)

    @property
    def hidden(self) -> tuple[int, ...]:
        """Widths of the hidden layers."""
        return tuple(layer.out_features for layer in self._linears()[:-1])

    def columns(self, x: Tensor) -> Tensor:
        """(N, inputs) → (outputs, N), laid out by columns.

        Each output, and each hidden unit on the way, is one piece of memory.
        """
        *inner, last = [(layer.weight, layer.bias) for layer in self._linears()]
        h = x.T
        for weight, bias in inner:
            h = self.activation.function(_linear(h, weight, bias))
        return _linear(h, *last)

    def _linears(self) -> list[nn.Linear]:
        return list(self.layers)  # pyright: ignore


class MADE(nn.Module):
    """A masked MLP whose output i sees inputs before i only, and all of the context.

    Hidden units are sorted by how many inputs they may see, spread evenly over 1, …, D - 1 (with
    a context from 0 on).
    Source: Germain et al. (2015), https://arxiv.org/abs/1502.03509.

    Args:
        dim: D.
        size: Outputs for each input.
        hidden: Widths of the hidden layers.
        context_dim: Size of the context; 0 for none.
        activation: A name in `ACTIVATIONS`.
        zero_last: Start the last layer at zero.
        period: Of the inputs, where they are angles.
    """

    def __init__(
        self,
        dim: int,
        size: int,
        hidden: Sequence[int] = (64, 64),
        context_dim: int = 0,
        activation: str = "silu",
        zero_last: bool = False,
        period: float | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.size, self.period = dim, size, period
        self.activation = ACTIVATIONS[activation]
        least = 0 if context_dim or dim == 1 else 1
        # A unit of degree d depends on inputs k < d. The context comes before all inputs.
        inputs = torch.arange(dim).repeat_interleave(1 if period is None else 2)
        before = torch.cat([torch.full((context_dim,), -1), inputs]) + 1
        self.layers = nn.ModuleList()
        self.reaching: list[list[int]] = []  # of each layer, how many units reach output i
        for i, o in linear_sizes([len(before), *hidden]):
            degrees = least + torch.arange(o) * (dim - least) // o
            self.layers.append(MaskedLinear(i, o, degrees[:, None] >= before))
            self.reaching.append([int((degrees <= i).sum()) for i in range(dim)])
            before = degrees
        last = torch.arange(dim).repeat(size)[:, None] >= before
        self.layers.append(MaskedLinear(len(before), dim * size, last))
        if zero_last:
            zero_(self.layers[-1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The outputs of all inputs, shape (size, D, N).

        Args:
            x: Inputs, shape (N, D).
            context: Condition, shape (N, C), or None.
        """
        x = on_circle(x, self.period)
        h = x.T if context is None else torch.cat([context, x], -1).T
        *layers, last = self._masked_layers()
        for layer in layers:
            h = self.activation.function(_linear(h, layer.masked(), layer.bias))
        return _linear(h, last.masked(), last.bias).unflatten(0, (self.size, self.dim))

    def one_by_one(self, context: Tensor | None) -> Callable[[Tensor], Tensor]:
        """A function of the first i inputs, (N, i), that gives output i, (size, N)."""
        *weights, last = [(layer.masked(), layer.bias) for layer in self._masked_layers()]
        rows = last[0].unflatten(0, (self.size, self.dim)), last[1].unflatten(0, (self.size, -1))

        def following(known: Tensor) -> Tensor:
            i = known.shape[-1]
            known = on_circle(known, self.period)
            h = known.T if context is None else torch.cat([context, known], -1).T
            for (weight, bias), reaching in zip(weights, self.reaching, strict=True):
                units = reaching[i]
                h = self.activation.function(_linear(h, weight[:units, : len(h)], bias[:units]))
            return _linear(h, rows[0][:, i, : len(h)], rows[1][:, i])

        return following

    @property
    def hidden(self) -> tuple[int, ...]:
        """Widths of the hidden layers."""
        return tuple(layer.out_features for layer in self._masked_layers()[:-1])

    def _masked_layers(self) -> list["MaskedLinear"]:
        return list(self.layers)  # pyright: ignore


class MaskedLinear(nn.Linear):
    """A linear layer without the weights that the mask leaves out.

    Args:
        inputs: Size of the input's last axis.
        outputs: Size of the output's.
        mask: Which weights there are, shape (outputs, inputs).
    """

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, mask: Tensor) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.masked(), self.bias)

    def masked(self) -> Tensor:
        """The weights, 0 where the mask is."""
        return self.weight * self.mask


def on_circle(angle: Tensor, period: float | None) -> Tensor:
    """(*, D) → (*, 2D), sine and cosine of each angle; without a period, as it is.

    Args:
        angle: Shape (*, D).
        period: Of the angles; None where they are none.
    """
    if period is None:
        return angle
    turn = angle * (2 * math.pi / period)
    return torch.stack([turn.sin(), turn.cos()], -1).flatten(-2)


def _linear(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer of columns, (inputs, N) → (outputs, N)."""
    return torch.addmm(bias.unsqueeze(-1), weight, h)


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

    Raises:
        ValueError: A negative number of frequencies.
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
        """The features u, shape (size,) or (*batch, size).

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, D).
            context: Condition that broadcasts to (*batch, C), or None.
        """
        features = self.time(t.to(x.dtype))
        if context is None:
            return features
        batch = x.shape[:-1]
        return torch.cat([features.expand(*batch, -1), context.expand(*batch, -1)], -1)
