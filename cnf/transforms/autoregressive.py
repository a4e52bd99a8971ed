"""Autoregressive layers: the map of each variable depends on the variables before it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cnf.nets import MADE, running_rms
from cnf.transforms.base import TRANSFORMS
from cnf.transforms.elementwise import Parameters, Scheme, Transformer


@TRANSFORMS.register(
    "autoregressive",
    example=lambda dim, context_dim=0: Autoregressive(dim, hidden=(8,), context_dim=context_dim),
)
class Autoregressive(Scheme):
    """x_i = m(z_i; θ_i(x_1, …, x_{i-1}, c)): triangular Jacobian, log|det| = Σ_i log m'.

    Data → base is one pass of the conditioner (MAF). Base → data takes one pass for each variable,
    which computes the parameters of that variable only. Its `Inverse` exchanges the two costs
    (IAF).

    With divisive normalization, x_i = r_{i-1}·m(z_i; θ_i), where r_{i-1} is the `running_rms` of
    the variables before, and θ_i is a function of their ratios to such sizes and of the sizes'
    logarithms. It is meant for data with a mean of 0 whose amplitude varies between rows, such as
    whitened patches of pictures: what the net learns at one amplitude holds at others.

    Source: Papamakarios et al. (2017), https://arxiv.org/abs/1705.07057; Kingma et al. (2016),
    https://arxiv.org/abs/1606.04934.

    Args:
        dim: D.
        transformer: The elementwise map m; affine if None.
        parametrize: Function from the conditioner's output, of shape (transformer.size, D, N) or
            (transformer.size, N), to the map's parameters; `transformer.parametrize` if None.
        hidden: Widths of the hidden layers of the conditioner θ, a `MADE`.
        context_dim: Size of the context; 0 for none.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        period: Period of the variables, if they are angles: the conditioner's inputs are then
            their sines and cosines.
        divisive: The constant ε of divisive normalization, an energy well below the variables'
            variance; None for none.
        residual: Whether a hidden layer that is as wide as the one before it adds its output to
            its input.
    """

    def __init__(
        self,
        dim: int,
        transformer: Transformer = None,
        *,
        parametrize: Callable[[Tensor], Parameters] | None = None,
        hidden: Sequence[int] = (64, 64),
        context_dim: int = 0,
        activation: str = "silu",
        period: float | None = None,
        divisive: float | None = None,
        residual: bool = False,
    ) -> None:
        super().__init__(dim, transformer, parametrize, context_dim)
        self.divisive = divisive
        self.net = MADE(
            dim, self.transformer.size, hidden, context_dim, activation, zero_last=True,
            period=period, divisive=divisive, residual=residual,
        )  # fmt: skip

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z, context)
        columns, context = self._columns(z, context)
        raw_after = self.net.one_by_one(context)
        x, parts = columns.T[:, :0], []
        for z_i in columns:
            x_i, ladj = self.transformer.forward(z_i, *self._constrained(raw_after(x), z))
            if self.divisive is not None:
                size = running_rms(x.T, self.divisive)[-1]
                x_i, ladj = x_i * size, ladj + size.log()
            x = torch.cat([x, x_i.unsqueeze(-1)], -1)
            parts.append(ladj)
        return self._rows(x.T, torch.stack(parts), z)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x, context)
        columns, context = self._columns(x, context)
        parameters = self._constrained(self.net(columns.T, context), x)
        if self.divisive is None:
            return self._rows(*self.transformer.inverse(columns, *parameters), x)
        sizes = running_rms(columns[:-1], self.divisive)
        z, ladj = self.transformer.inverse(columns / sizes, *parameters)
        return self._rows(z, ladj - sizes.log(), x)
