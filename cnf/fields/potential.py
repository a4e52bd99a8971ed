"""The gradient of a potential as a field, with a closed-form Laplacian, as in OT-Flow."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.fields.base import FIELDS, VectorField
from cnf.fields.trace import gated_product


class _GradientPass(NamedTuple):
    """Results of a forward and backward pass through the potential's network."""

    tanh: list[Tensor]  # σ' of each layer, (*batch, H)
    cotangents: list[Tensor]  # ∂φ/∂h after each layer, (*batch, H)
    gradient: Tensor  # ∂φ/∂s, (*batch, D + 1 + C)


@FIELDS.register("potential")
class PotentialField(VectorField):
    r"""The gradient v = ∇ₓφ of φ(s) = w·N(s) + ½‖A s‖² + b·s, s = [x, t, c], with ∇·v = Δφ.

    N is a residual network with h_0 = σ(K_0 s + b_0), h_i = h_{i-1} + σ(K_i h_{i-1} + b_i)/M and
    σ(a) = log(2 cosh a), whose first two derivatives are tanh and 1 - tanh². The Laplacian is

    .. math:: \sum_j σ''(a_{0j}) z_{0j} \|K_{0x,j}\|^2
        + \tfrac1M \sum_{i,j} σ''(a_{ij}) z_{ij} \|(K_i J_{i-1})_j\|^2 + \|A_x\|_F^2

    with the cotangents z and J_i = ∂h_i/∂x. A gradient field has no rotation, as is the case for
    optimal transport; `cnf.dynamics.regularizers.hjb_residual` uses `time_derivative`.

    Source: Onken et al. (2021), OT-Flow, https://arxiv.org/abs/2006.00104.

    Args:
        dim: D.
        width: Width of the layers of N.
        layers: Number of layers of N, including the first one.
        context_dim: Size of the context; 0 for none.
        rank: Number of rows of A; min(10, D + 1) if None.

    Raises:
        ValueError: The width or the number of layers is below 1.
    """

    def __init__(
        self,
        dim: int,
        width: int = 32,
        layers: int = 2,
        context_dim: int = 0,
        rank: int | None = None,
    ) -> None:
        super().__init__((dim,), context_dim)
        if min(width, layers) < 1:
            raise ValueError(
                f"PotentialField: expected width and layers >= 1, got {width} and {layers}"
            )
        self.dim = dim
        size = dim + 1 + context_dim
        rank = min(10, dim + 1) if rank is None else rank
        self.first = nn.Linear(size, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers - 1))
        self.step = 1 / max(1, layers - 1)
        self.weight = nn.Parameter(torch.ones(width))
        self.quadratic = nn.Parameter(torch.empty(rank, size))
        self.linear = nn.Parameter(torch.zeros(size))
        nn.init.xavier_uniform_(self.quadratic)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self._gradient(self._concatenated(t, x, context)).gradient[..., : self.dim]

    def time_derivative(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The time derivative ∂φ/∂t, shape (*batch,).

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
        """
        return self._gradient(self._concatenated(t, x, context)).gradient[..., self.dim]

    def potential(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The potential φ, shape (*batch,), up to a constant.

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
        """
        s = self._concatenated(t, x, context)
        h = _log_two_cosh(self.first(s))
        for layer in self.layers:
            h = h + self.step * _log_two_cosh(layer(h))
        return h @ self.weight + F.linear(s, self.quadratic).square().sum(-1) / 2 + s @ self.linear

    def with_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity, shape (*batch, D), and exact divergence in closed form, shape (*batch,).

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
        """
        tanh, cotangents, gradient = self._gradient(self._concatenated(t, x, context))
        weight_of_x = self.first.weight[:, : self.dim]
        curved = [(1 - gate * gate) * z for gate, z in zip(tanh, cotangents, strict=True)]
        div = curved[0] @ weight_of_x.square().sum(-1)
        tangents = None  # ∂h/∂x, (*batch, D, H)
        for k, layer in enumerate(self.layers):
            weight: Tensor = layer.weight  # pyright: ignore
            if tangents is None:
                entering = gated_product(weight, tanh[0], weight_of_x)
            else:
                entering = F.linear(tangents, weight)
            div = div + self.step * (curved[k + 1] * entering.square().sum(-2)).sum(-1)
            if k < len(self.layers) - 1:
                if tangents is None:
                    tangents = tanh[0].unsqueeze(-2) * weight_of_x.T
                tangents = tangents + self.step * tanh[k + 1].unsqueeze(-2) * entering
        div = div + self.quadratic[:, : self.dim].square().sum()
        return gradient[..., : self.dim], div

    def extra_repr(self) -> str:
        width, layers = self.first.out_features, 1 + len(self.layers)
        return f"{super().extra_repr()}, width {width}, {layers} layer{'s' * (layers > 1)}"

    def _concatenated(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        batch = x.shape[:-1]
        parts = [x, t.to(x.dtype).expand(batch).unsqueeze(-1)]
        if context is not None:
            parts.append(context.expand(*batch, -1))
        return torch.cat(parts, -1)

    def _gradient(self, s: Tensor) -> _GradientPass:
        a = self.first(s)
        tanh, h = [a.tanh()], None
        for layer in self.layers:
            h = _log_two_cosh(a) if h is None else h + self.step * _log_two_cosh(a)
            a = layer(h)
            tanh.append(a.tanh())
        z = self.weight.expand_as(a)
        cotangents = []
        for gate, layer in zip(reversed(tanh[1:]), reversed(self.layers), strict=True):
            cotangents.append(z)
            z = z + self.step * (gate * z) @ layer.weight  # pyright: ignore
        cotangents.append(z)
        gradient = (tanh[0] * z) @ self.first.weight + self.linear
        gradient = gradient + F.linear(s, self.quadratic) @ self.quadratic
        return _GradientPass(tanh, cotangents[::-1], gradient)


def _log_two_cosh(a: Tensor) -> Tensor:
    # Smooth at 0, unlike |a|; the threshold preserves the precision of float64.
    return a + F.softplus(-2 * a, threshold=40)
