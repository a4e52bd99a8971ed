"""Small networks: MLPs, MADE, and features of time, with activations and their derivatives."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cnf.errors import expect_positive, is_count
from cnf.registry import Registry


@dataclass(frozen=True)
class Activation:
    """An elementwise nonlinearity σ.

    Attributes:
        function: Function that returns σ(a).
        with_derivative: Function that returns σ(a) and σ'(a), which share computations; both are
            differentiable.
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
    """Pairs (inputs, outputs) of consecutive layers; raise ValueError for a bad width."""
    for size in sizes:
        if not is_count(size) or size < 1:
            raise ValueError(f"MLP: expected every width >= 1, got {tuple(sizes)}")
    return list(zip(sizes[:-1], sizes[1:], strict=True))


class MLP(nn.Module):
    """A multilayer perceptron (*, inputs) → (*, outputs).

    Args:
        inputs: Size of the last axis of the input.
        outputs: Size of the last axis of the output.
        hidden: Widths of the hidden layers.
        activation: A name in `ACTIVATIONS`.
        zero_last: Initialize the last layer to zero, so that a flow starts as the identity.
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
        """The transposed output (outputs, N) of an input (N, inputs).

        The N values of each output and of each hidden unit are contiguous in memory.
        """
        *inner, last = [(layer.weight, layer.bias) for layer in self._linears()]
        h = x.T
        for weight, bias in inner:
            h = self.activation.function(_linear(h, weight, bias))
        return _linear(h, *last)

    def _linears(self) -> list[nn.Linear]:
        return list(self.layers)  # pyright: ignore


class ResidualConvNet(nn.Module):
    """A residual network of convolutions, (N, inputs, H, W) → (N, outputs, H, W).

    A 3×3 convolution, blocks h + W₂ ∗ σ(W₁ ∗ σ(h)) of two 3×3 convolutions, and a 1×1 convolution
    of σ(h), which is zero at the start. There is no normalization.

    Source: He et al. (2016), https://arxiv.org/abs/1603.05027; as a conditioner, Dinh et al.
    (2017), RealNVP, https://arxiv.org/abs/1605.08803.

    >>> ResidualConvNet(2, 6, hidden=(8, 8, 8))(torch.zeros(5, 2, 7, 7)).shape
    torch.Size([5, 6, 7, 7])

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        hidden: Channels of each block, all equal.
        activation: A name in `ACTIVATIONS`.

    Raises:
        ValueError: Blocks differ in their channels, or there is none.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        hidden: Sequence[int] = (64, 64),
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if len(set(hidden)) != 1:
            raise ValueError(
                "ResidualConvNet: expected blocks of one width, such as hidden=(64, 64), got "
                f"{tuple(hidden)}"
            )
        self.hidden, width = tuple(hidden), hidden[0]
        linear_sizes([inputs, width, outputs])
        self.activation = ACTIVATIONS[activation]
        self.first = nn.Conv2d(inputs, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2)) for _ in hidden
        )
        self.last = nn.Conv2d(width, outputs, 1)
        zero_(self.last)

    def forward(self, x: Tensor) -> Tensor:
        sigma, h = self.activation.function, self.first(x)
        for first, second in self.blocks:  # pyright: ignore
            h = h + second(sigma(first(sigma(h))))
        return self.last(sigma(h))


class MADE(nn.Module):
    """A masked MLP whose output i depends only on the inputs before i, and on the context.

    Hidden units are sorted by their degrees, the number of inputs that they may depend on, which
    are evenly spaced over 1, …, D - 1 (from 0 on with a context).

    With divisive normalization a unit of degree d in the first layer is a function of x_1/r_d, …,
    x_d/r_d and log r_d, where r_d is the `running_rms` of these inputs. Other layers are as ever.

    Source: Germain et al. (2015), https://arxiv.org/abs/1502.03509.

    Args:
        dim: Number of inputs D.
        size: Number of outputs for each input.
        hidden: Widths of the hidden layers.
        context_dim: Size of the context; 0 for none.
        activation: A name in `ACTIVATIONS`.
        zero_last: Initialize the last layer to zero.
        period: Period of the inputs, if they are angles.
        divisive: The constant ε of divisive normalization; None for none.
        residual: Whether each hidden layer with as many units as the one before adds to it.

    Raises:
        ValueError: A width is below 1; ε is not above 0, or there is a period or no hidden layer.
    """

    degrees: Tensor  # of the first hidden layer, with divisive normalization

    def __init__(
        self,
        dim: int,
        size: int,
        hidden: Sequence[int] = (64, 64),
        context_dim: int = 0,
        activation: str = "silu",
        zero_last: bool = False,
        period: float | None = None,
        divisive: float | None = None,
        residual: bool = False,
    ) -> None:
        super().__init__()
        expect_positive("MADE", divisive=divisive)
        if divisive is not None and (period is not None or not hidden):
            raise ValueError(
                "MADE: expected a hidden layer and no period (angles have no size) for divisive "
                f"normalization, got hidden={tuple(hidden)} and period={period}"
            )
        self.dim, self.size, self.period, self.divisive = dim, size, period, divisive
        self.activation = ACTIVATIONS[activation]
        least = 0 if context_dim or dim == 1 else 1
        # A unit of degree d depends on inputs k < d. The context comes before all inputs.
        inputs = torch.arange(dim).repeat_interleave(1 if period is None else 2)
        before = torch.cat([torch.full((context_dim,), -1), inputs]) + 1
        sizes = linear_sizes([len(before), *hidden, dim * size])
        degrees = [least + torch.arange(width) * (dim - least) // width for width in hidden]
        self.layers = nn.ModuleList()
        for (i, o), after in zip(sizes, [*degrees, torch.arange(dim).repeat(size)], strict=True):
            self.layers.append(MaskedLinear(i, o, after[:, None] >= before))
            before = after
        # How many units of each hidden layer output i depends on; which, from the second, add.
        self.reaching = [[int((each <= i).sum()) for i in range(dim)] for each in degrees]
        self.adds = [residual and i == o for i, o in sizes[1:-1]]
        if divisive is not None:
            self.register_buffer("degrees", degrees[0], persistent=False)
            self.log_size = nn.Parameter(torch.empty(len(degrees[0]), 1).uniform_(-0.5, 0.5))
        if zero_last:
            zero_(self.layers[-1])

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Outputs, shape (size, D, N).

        Args:
            x: Inputs, shape (N, D).
            context: Condition, shape (N, C), or None.
        """
        *hidden, last = self._weights()
        h = self._units(x, context, hidden)
        return _linear(h, *last).unflatten(0, (self.size, self.dim))

    def one_by_one(self, context: Tensor | None) -> Callable[[Tensor], Tensor]:
        """A function from the first i inputs, shape (N, i), to output i, shape (size, N).

        It applies the masks to the weights once, and computes only what output i depends on.
        """
        *hidden, last = self._weights()
        rows = last[0].unflatten(0, (self.size, self.dim)), last[1].unflatten(0, (self.size, -1))

        def following(known: Tensor) -> Tensor:
            i = known.shape[-1]
            counts = [units[i] for units in self.reaching]
            needed = [(w[:n], b[:n]) for (w, b), n in zip(hidden, counts, strict=True)]
            h = self._units(known, context, needed)
            return _linear(h, rows[0][:, i, : len(h)], rows[1][:, i])

        return following

    @property
    def hidden(self) -> tuple[int, ...]:
        """Widths of the hidden layers."""
        return tuple(layer.out_features for layer in self._masked_layers()[:-1])

    def _units(
        self, x: Tensor, context: Tensor | None, weights: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """The last hidden layer, shape (units, N); the inputs themselves without one.

        Args:
            x: Inputs, all or the first few, shape (N, i).
            context: Condition, shape (N, C), or None.
            weights: Weight and bias of each hidden layer's units that these inputs determine.
        """
        if not weights:
            return self._inputs(x, context)
        first, *others = weights
        h = self.activation.function(self._first(x, context, *first))
        for (weight, bias), adds in zip(others, self.adds, strict=True):
            value = self.activation.function(_linear(h, weight[:, : len(h)], bias))
            h = h + value if adds else value
        return h

    def _first(self, x: Tensor, context: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        """What the first hidden layer applies its activation to, shape (units, N)."""
        if self.divisive is None:
            h = self._inputs(x, context)
            return _linear(h, weight[:, : len(h)], bias)
        of_context, of_x = weight.tensor_split([weight.shape[1] - self.dim], 1)
        rms = running_rms(x.T, self.divisive)
        degrees = self.degrees[: len(weight)]
        ratios = (of_x[:, : x.shape[-1]] @ x.T) / rms[degrees]
        shift = bias.unsqueeze(-1)
        if context is not None:
            shift = shift + of_context @ context.T
        return ratios + self.log_size[: len(weight)] * rms.log()[degrees] + shift

    def _inputs(self, x: Tensor, context: Tensor | None) -> Tensor:
        x = on_circle(x, self.period)
        return x.T if context is None else torch.cat([context, x], -1).T

    def _weights(self) -> list[tuple[Tensor, Tensor]]:
        """Weight and bias of each layer, the mask applied."""
        return [(layer.masked(), layer.bias) for layer in self._masked_layers()]

    def _masked_layers(self) -> list["MaskedLinear"]:
        return list(self.layers)  # pyright: ignore


def running_rms(x: Tensor, epsilon: float) -> Tensor:
    r"""Sizes r_0, …, r_i of the first numbers of each column, shape (i + 1, N).

    .. math:: r_0 = 1, \qquad r_d^2 = \frac{\epsilon + x_1^2 + \cdots + x_d^2}{1 + d}

    Divisive normalization divides by such sizes: what natural signals have in common at all
    amplitudes is then seen as one. Source: Lyu and Simoncelli (2008), Nonlinear image
    representation using divisive normalization, https://doi.org/10.1109/CVPR.2008.4587821.

    Args:
        x: Numbers, shape (i, N).
        epsilon: Energy ε, below which sizes no longer tell numbers apart.
    """
    count = torch.arange(2, len(x) + 2, dtype=x.dtype, device=x.device).unsqueeze(-1)
    rms = ((epsilon + x.square().cumsum(0)) / count).sqrt()
    return torch.cat([x.new_ones(1, x.shape[1]), rms])


class MaskedLinear(nn.Linear):
    """A linear layer whose weights are multiplied by a mask.

    Args:
        inputs: Size of the last axis of the input.
        outputs: Size of the last axis of the output.
        mask: True for the weights that are kept, shape (outputs, inputs).
    """

    mask: Tensor

    def __init__(self, inputs: int, outputs: int, mask: Tensor) -> None:
        super().__init__(inputs, outputs)
        self.register_buffer("mask", mask.to(self.weight.dtype), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.masked(), self.bias)

    def masked(self) -> Tensor:
        """The weight times the mask, shape (outputs, inputs)."""
        return self.weight * self.mask


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


def _linear(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear layer on columns, (inputs, N) → (outputs, N)."""
    return torch.addmm(bias.unsqueeze(-1), weight, h)


def zero_(layer: nn.Module) -> None:
    """Set a linear layer's weight and bias to zero, in place."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


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


def attention_kernel(x: Tensor) -> AbstractContextManager[object]:
    """A context manager for attention in a network of x, which x may be differentiated through.

    Only torch's plain kernel has the second derivative that the gradient of a divergence takes;
    the fused ones are taken where x needs no gradient, as in flow matching.

    Args:
        x: The input of the network.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return sdpa_kernel(SDPBackend.MATH)
    return nullcontext()
