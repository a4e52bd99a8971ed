"""Masked networks, each of whose outputs depends on the inputs before it only."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.errors import expect_positive
from cnf.nets.activations import ACTIVATIONS
from cnf.nets.features import on_circle
from cnf.nets.mlp import linear_of_columns, linear_sizes, zero_


class MADE(nn.Module):
    """A masked MLP whose output i depends only on the inputs before i, and on the context.

    Hidden units are sorted by their degrees, the number of inputs that they may depend on, which
    are evenly spaced over 1, …, D - 1 (from 0 on with a context).

    With divisive normalization a unit of degree d in the first layer is a function of x_1/r_d, …,
    x_d/r_d and log r_d, where r_d is the `running_rms` of these inputs. The other layers do not
    change.

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
        residual: Whether a hidden layer that is as wide as the one before it adds its output to
            its input.

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
        sizes = linear_sizes("MADE", [len(before), *hidden, dim * size])
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
        return linear_of_columns(h, *last).unflatten(0, (self.size, self.dim))

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
            return linear_of_columns(h, rows[0][:, i, : len(h)], rows[1][:, i])

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
            value = self.activation.function(linear_of_columns(h, weight[:, : len(h)], bias))
            h = h + value if adds else value
        return h

    def _first(self, x: Tensor, context: Tensor | None, weight: Tensor, bias: Tensor) -> Tensor:
        """What the first hidden layer applies its activation to, shape (units, N)."""
        if self.divisive is None:
            h = self._inputs(x, context)
            return linear_of_columns(h, weight[:, : len(h)], bias)
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


def running_rms(x: Tensor, epsilon: float) -> Tensor:
    r"""Root mean squares r_0, …, r_i of the first 0, …, i numbers of each column, (i + 1, N).

    .. math:: r_0 = 1, \qquad r_d^2 = \frac{\epsilon + x_1^2 + \cdots + x_d^2}{1 + d}

    Divisive normalization divides by such sizes, so that natural signals of different amplitude
    look alike. Source: Lyu and Simoncelli (2008), Nonlinear image
    representation using divisive normalization, https://doi.org/10.1109/CVPR.2008.4587821.

    Args:
        x: Numbers, shape (i, N).
        epsilon: Energy ε > 0, which keeps sizes away from 0.
    """
    count = torch.arange(2, len(x) + 2, dtype=x.dtype, device=x.device).unsqueeze(-1)
    rms = ((epsilon + x.square().cumsum(0)) / count).sqrt()
    return torch.cat([x.new_ones(1, x.shape[1]), rms])
