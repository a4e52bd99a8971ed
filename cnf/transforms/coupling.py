"""Coupling layers: one part of the vector, and the context, set the map of the other part."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from cnf.nets import MLP
from cnf.transforms.base import TRANSFORMS, Transform
from cnf.transforms.elementwise import Affine, ElementwiseMap, bounded_affine


@TRANSFORMS.register(
    "coupling", example=lambda dim, context_dim=0: Coupling(dim, context_dim=context_dim)
)
class Coupling(Transform):
    """x_a = z_a, x_b = m(z_b; θ(z_a, c)): triangular Jacobian, log|det| = Σ_b log m'.

    Source: Dinh et al. (2017), RealNVP, https://arxiv.org/abs/1605.08803.

    Args:
        dim: D, two or more (with D = 1 there is no part to condition on but the context, which
            must then be there).
        keep: Indices of the part a that passes unchanged; the even ones by default.
        map: The elementwise map m.
        parametrise: Makes the map's parameters from what the net gives, (*, size) → (*, size).
        hidden: Widths of the net θ.
        context_dim: Size of the context; 0 for none.
        activation: A name in `cnf.nets.ACTIVATIONS`.
    """

    order: Tensor
    restore: Tensor

    def __init__(
        self,
        dim: int,
        keep: Sequence[int] | None = None,
        map: ElementwiseMap | None = None,
        parametrise: Callable[[Tensor], Tensor] = bounded_affine,
        hidden: Sequence[int] = (64, 64),
        context_dim: int = 0,
        activation: str = "silu",
    ) -> None:
        super().__init__(event_dims=1, context_dim=context_dim)
        kept = list(range(0, dim, 2)) if keep is None else list(keep)
        if dim == 1:
            kept = []
        moved = [index for index in range(dim) if index not in kept]
        unknown = len(set(kept)) < len(kept) or not set(kept) <= set(range(dim))
        if unknown or not moved or not (kept or context_dim):
            raise ValueError(
                f"Coupling: expected some of {dim} dimensions to move and some to stay "
                f"(or a context), got keep={tuple(kept)}"
            )
        self.map = map or Affine()
        self.parametrise = parametrise
        self.split = [len(kept), len(moved)]
        self.register_buffer("order", torch.tensor(kept + moved), persistent=False)
        self.register_buffer("restore", torch.argsort(self.order), persistent=False)
        self.net = MLP(
            len(kept) + context_dim, len(moved) * self.map.size, hidden, activation, zero_last=True
        )

    def _parameters_for(self, kept: Tensor, context: Tensor | None) -> Tensor:
        if context is not None:
            kept = torch.cat([kept, context.expand(*kept.shape[:-1], self.context_dim)], -1)
        return self.parametrise(self.net(kept).unflatten(-1, (self.split[1], self.map.size)))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, moved = z[..., self.order].split(self.split, -1)
        moved, ladj = self.map.forward(moved, self._parameters_for(kept, context))
        return torch.cat([kept, moved], -1)[..., self.restore], ladj.sum(-1)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, moved = x[..., self.order].split(self.split, -1)
        moved, ladj = self.map.inverse(moved, self._parameters_for(kept, context))
        return torch.cat([kept, moved], -1)[..., self.restore], ladj.sum(-1)
