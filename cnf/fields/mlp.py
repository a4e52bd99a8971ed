"""The default field: an MLP of time, point and context, with a closed-form divergence."""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.errors import expect_choice
from cnf.fields.base import FIELDS, VectorField
from cnf.fields.concat import LAYERS, along
from cnf.fields.trace import trace_of_chain
from cnf.matching.paths import Circular
from cnf.nets import ACTIVATIONS, Condition, linear_sizes, zero_


@FIELDS.register("mlp")
class MLPField(VectorField):
    r"""The MLP v(t, x, c) = W_L σ(… σ(W_1 x + b_1) …) + b_L, with a closed-form divergence.

    Time and context condition the layers as chosen by `layer`. With the gates g_l = σ'(a_l) of a
    row, the Jacobian is W_L diag(g_{L-1}) … diag(g_1) W_1. `cnf.fields.trace.trace_of_chain`
    computes its trace in a few matrix products: with two hidden layers there is one more product
    than in the forward pass, for any D. It uses no autograd, and is itself differentiable.

    >>> field = MLPField(dim=3, hidden=(32, 32))
    >>> v, div = field.with_divergence(torch.tensor(0.1), torch.randn(5, 3))
    >>> v.shape, div.shape
    (torch.Size([5, 3]), torch.Size([5]))

    Args:
        dim: D.
        hidden: Widths of the hidden layers, at least one.
        context_dim: Size of the context; 0 for none.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        frequencies: Number of Fourier features of time; 0 for t alone, see `TimeFeatures`.
        layer: "input" concatenates time and context with the input of the first layer. A name in
            `cnf.fields.concat.LAYERS` is the type of every layer; "ignore" uses neither time nor
            context. If a context scales the last layer, or determines weights, the divergence
            takes D matrix products instead of one.
        fourier: Number of spatial Fourier features, x → [x, sin(Bx), cos(Bx)]; the rows of B are
            drawn from N(0, fourier_scale²/D), and are trained. For the divergence they count as a
            hidden layer. Source: Tancik et al. (2020), https://arxiv.org/abs/2006.10739. With a
            period the number of harmonics of each variable, at least 1.
        fourier_scale: RMS angular frequency of B, in radians per unit of x.
        skip: Whether a linear map A x is added, with A = 0 at the start.
        zero_last: Whether v = 0 at the start, which is the identity flow.
        period: Period of the variables, if they are angles: the field is then one of the sines and
            cosines of 2πkx/period, k = 1, …, fourier, and flow matching takes the path `Circular`.

    Attributes:
        path: The path of flow matching, of a field of angles; else None.

    Raises:
        ValueError: The layer is unknown, there is no hidden layer, `fourier` is negative, the
            period is not positive or combined with `skip`, or layer="ignore" with a context.
    """

    harmonics: Tensor

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (128, 128),
        context_dim: int = 0,
        activation: str = "silu",
        frequencies: int = 4,
        layer: str = "input",
        fourier: int = 0,
        fourier_scale: float = 3.0,
        skip: bool = False,
        zero_last: bool = False,
        period: float | None = None,
    ) -> None:
        super().__init__((dim,), context_dim)
        expect_choice("MLPField", "layer", layer, ("input", *LAYERS))
        if not hidden:
            raise ValueError("MLPField: expected at least one hidden layer, got hidden=()")
        if fourier < 0:
            raise ValueError(f"MLPField: expected fourier >= 0, got {fourier}")
        if layer == "ignore" and context_dim:
            raise ValueError("MLPField: layer='ignore' takes no context; choose another layer")
        if period is not None and skip:
            raise ValueError(
                "MLPField: skip=True is not periodic, got a period too; leave one out"
            )
        self.path = None if period is None else Circular(period)  # checks the period
        self.dim, self.hidden, self.period = dim, tuple(hidden), period
        self.condition = Condition(frequencies, context_dim)
        self.activation = ACTIVATIONS[activation]
        inputs = dim + 2 * fourier
        self.waves = None
        if period is not None:  # whole numbers, which every dtype holds
            multiples = torch.arange(1.0, max(1, fourier) + 1)
            self.register_buffer(
                "harmonics", torch.kron(multiples[:, None], torch.eye(dim)), False
            )
            inputs = 2 * len(self.harmonics)
        elif fourier:
            self.waves = _frequencies(fourier, dim, fourier_scale)
        sizes = linear_sizes("MLPField", [inputs, *hidden, dim])
        kinds = [layer] * len(sizes)
        if layer == "input":
            kinds = ["concat"] + ["ignore"] * (len(sizes) - 1)
        self.layers = nn.ModuleList(
            LAYERS[kind](i, o, self.condition.size)
            for kind, (i, o) in zip(kinds, sizes, strict=True)
        )
        self.skip = nn.Parameter(torch.zeros(dim, dim)) if skip else None
        if zero_last:
            zero_(self.layers[-1])

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        waves = self._waves()
        h = x if waves is None else self._features(F.linear(x, waves), x)
        *hidden, last = self._affine_layers(t, x, context)
        for affine in hidden:
            h = self.activation.function(affine(h))
        v = last(h)
        return v if self.skip is None else v + F.linear(x, self.skip)

    def with_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity, shape (*batch, D), and exact divergence in closed form, shape (*batch,).

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
        """
        h, weights, gates = x, [], []
        if (waves := self._waves()) is not None:
            angle = F.linear(x, waves)
            h = self._features(angle, x)
            slopes = [angle.cos(), -angle.sin()]
            rows = [waves, waves]
            if self.period is None:
                rows = [torch.eye(self.dim, dtype=x.dtype, device=x.device), *rows]
                slopes = [torch.ones_like(x), *slopes]
            weights.append(torch.cat(rows))
            gates.append(torch.cat(slopes, -1))
        *hidden, last = self._affine_layers(t, x, context)
        for affine in hidden:
            h, gate = self.activation.with_derivative(affine(h))
            weights.append(affine.weight)
            gates.append(gate if affine.scale is None else gate * affine.scale)
        v = last(h)
        div = trace_of_chain([*weights, last.weight], gates, last.scale)
        if self.skip is None:
            return v, div
        return v + F.linear(x, self.skip), div + self.skip.trace()

    def with_tangents(
        self, t: Tensor, x: Tensor, context: Tensor | None, tangents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `cnf.fields.HasTangents`.

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, D).
            context: Condition, shape (*batch, C), or None.
            tangents: Shape (n, *batch, D).
        """
        h, products = x, tangents
        if (waves := self._waves()) is not None:
            angle, turned = F.linear(x, waves), F.linear(tangents, waves)
            h = self._features(angle, x)
            parts = [angle.cos() * turned, -angle.sin() * turned]
            products = torch.cat(parts if self.period is not None else [tangents, *parts], -1)
        *hidden, last = self._affine_layers(t, x, context)
        for affine in hidden:
            h, gate = self.activation.with_derivative(affine(h))
            products = gate * along(affine, products)
        v, products = last(h), along(last, products)
        if self.skip is None:
            return v, products
        return v + F.linear(x, self.skip), products + F.linear(tangents, self.skip)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, hidden {self.hidden}"

    def _waves(self) -> Tensor | None:
        """The rows of B, shape (fourier, D), or of a field of angles its harmonics."""
        return self.waves if self.period is None else self.harmonics * (2 * math.pi / self.period)

    def _features(self, angle: Tensor, x: Tensor) -> Tensor:
        """Sines and cosines of the angles, after x itself unless it is an angle."""
        waves = [angle.sin(), angle.cos()]
        return torch.cat(waves if self.period is not None else [x, *waves], -1)

    def _affine_layers(self, t: Tensor, x: Tensor, context: Tensor | None) -> Iterator:
        u = self.condition(t, x, context)
        return (layer.affine(u) for layer in self.layers)  # pyright: ignore


def _frequencies(count: int, dim: int, scale: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(count, dim) * scale / math.sqrt(dim))
