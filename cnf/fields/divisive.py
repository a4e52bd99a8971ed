"""A field with divisive normalization, for data whose scale varies from place to place."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.errors import expect_choice, expect_counts
from cnf.fields.base import FIELDS, VectorField
from cnf.fields.concat import LAYERS
from cnf.nets import ACTIVATIONS, Condition, linear_sizes, zero_

LEAST = 1e-3  # initial weight of an energy: softplus never gives 0


class _Features(NamedTuple):
    """Responses of the filters and the energies that scale them.

    Attributes:
        a: Responses, shape (*batch, F).
        energy: Energies s of their surroundings, shape (*batch, F).
        rate: 1/√s, shape (*batch, F).
    """

    a: Tensor
    energy: Tensor
    rate: Tensor

    @property
    def inputs(self) -> Tensor:
        """The network's inputs, shape (*batch, 2F)."""
        return torch.cat([self.a * self.rate, self.energy.log()], -1)


@FIELDS.register("divisive")
class DivisiveField(VectorField):
    r"""Filters whose responses are scaled by gains that depend on the energies around them.

    .. math:: a = A x, \quad s = \epsilon + H a^2, \quad
        (g, w) = \mathrm{MLP}(a / \sqrt{s}, \log s, t, c), \quad v = A^\top (g a + w \sqrt{s})

    with H > 0 and all products elementwise. The network is given responses in units of their
    surroundings, and the logarithms of these units. A local change of scale, which an MLP of x has
    to learn case by case, is then a shift of its inputs. It is meant for whitened patches of
    natural pictures.

    Likelihood under few fixed steps exploits the solver's error by a velocity that alternates
    between the solver's times; a field without time (layer="ignore") resists it longer.

    Source: Schwartz and Simoncelli (2001), https://doi.org/10.1038/90526, and Ballé et al. (2016),
    https://arxiv.org/abs/1511.06281, for divisive normalization.

    >>> field = DivisiveField(dim=3, hidden=(32, 32))
    >>> field(torch.tensor(0.1), torch.randn(5, 3)).shape
    torch.Size([5, 3])

    Args:
        dim: D.
        hidden: Widths of the network's hidden layers, at least one.
        context_dim: Size of the context; 0 for none.
        filters: Number of filters F, at least D; D if None. A begins with the unit matrix, whose
            rows are followed by random orthogonal ones.
        pools: Initial weights H, shape (F, F), which are at least 0: row i says whose energies
            make the surroundings of filter i. If None, half of its own and half of the mean.
        floor: Energy ε, above 0, in units of the squared responses.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        frequencies: Number of Fourier features of time; 0 for t alone.
        layer: "input" joins time and context to the network's inputs, "ignore" uses neither.
        zero_last: Whether v = 0 at the start, which is the identity flow.

    Raises:
        ValueError: A number is out of its range, there is no hidden layer, `pools` has another
            shape, or layer="ignore" is combined with a context.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (128, 128),
        context_dim: int = 0,
        filters: int | None = None,
        pools: Tensor | None = None,
        floor: float = 0.3,
        activation: str = "silu",
        frequencies: int = 4,
        layer: str = "input",
        zero_last: bool = False,
    ) -> None:
        super().__init__((dim,), context_dim)
        filters = dim if filters is None else filters
        expect_counts("DivisiveField", dim, filters=filters)
        expect_choice("DivisiveField", "layer", layer, ("input", "ignore"))
        if not hidden:
            raise ValueError("DivisiveField: expected at least one hidden layer, got hidden=()")
        if floor <= 0:
            raise ValueError(f"DivisiveField: expected floor > 0, got {floor}")
        if layer == "ignore" and context_dim:
            raise ValueError("DivisiveField: layer='ignore' takes no context; take 'input'")
        self.hidden, self.floor = tuple(hidden), floor
        self.condition = Condition(frequencies, context_dim)
        self.activation = ACTIVATIONS[activation]
        self.filters = nn.Parameter(_filters(filters, dim))
        self.pools = nn.Parameter(_raw_pools(filters, pools))
        sizes = linear_sizes("DivisiveField", [2 * filters, *hidden, 2 * filters])
        kinds = ["concat" if layer == "input" else "ignore"] + ["ignore"] * len(hidden)
        self.layers = nn.ModuleList(
            LAYERS[kind](i, o, self.condition.size)
            for kind, (i, o) in zip(kinds, sizes, strict=True)
        )
        if zero_last:
            zero_(self.layers[-1])

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        found = self._features(x)
        *hidden, last = self._affine_layers(t, x, context)
        h = found.inputs
        for affine in hidden:
            h = self.activation.function(affine(h))
        gain, shift = last(h).chunk(2, -1)
        return (found.a * gain + found.energy * found.rate * shift) @ self.filters

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
        found = self._features(x)
        a, rate, root = found.a, found.rate, found.energy * found.rate
        da = F.linear(tangents, self.filters)
        dlog = 2 * F.linear(a * da, F.softplus(self.pools)) / found.energy
        h = found.inputs
        dh = torch.cat([rate * (da - 0.5 * a * dlog), dlog], -1)
        *hidden, last = self._affine_layers(t, x, context)
        for affine in hidden:
            h, gate = self.activation.with_derivative(affine(h))
            dh = F.linear(dh, affine.weight) * gate
        gain, shift = last(h).chunk(2, -1)
        dgain, dshift = F.linear(dh, last.weight).chunk(2, -1)
        product = a * dgain + da * gain + root * (dshift + 0.5 * dlog * shift)
        return (a * gain + root * shift) @ self.filters, product @ self.filters

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {len(self.filters)} filters, hidden {self.hidden}"

    def _features(self, x: Tensor) -> _Features:
        a = F.linear(x, self.filters)
        energy = F.linear(a.square(), F.softplus(self.pools)) + self.floor
        return _Features(a, energy, energy.rsqrt())

    def _affine_layers(self, t: Tensor, x: Tensor, context: Tensor | None) -> Iterator:
        u = self.condition(t, x, context)
        return (layer.affine(u) for layer in self.layers)  # pyright: ignore


def _filters(count: int, dim: int) -> Tensor:
    """The unit matrix and random orthogonal rows, shape (count, dim)."""
    sizes = [min(dim, count - done) for done in range(dim, count, dim)]
    return torch.cat([torch.eye(dim), *(nn.init.orthogonal_(torch.empty(n, dim)) for n in sizes)])


def _raw_pools(count: int, pools: Tensor | None) -> Tensor:
    """Numbers whose softplus is the given weights, or the default ones."""
    if pools is None:
        pools = 0.5 * torch.eye(count) + 0.5 / count
    if pools.shape != (count, count) or (pools < 0).any():
        raise ValueError(
            f"DivisiveField: expected pools of shape {(count, count)}, at least 0, got "
            f"{tuple(pools.shape)} with a minimum of {pools.min():g}"
        )
    pools = pools.to(torch.get_default_dtype()).clamp(min=LEAST)
    return pools + (-torch.expm1(-pools)).log()  # log(e^p - 1), which does not overflow
