"""Fields on the unit sphere."""

import torch
from torch import Tensor

from cnf.fields.base import VectorField, tangent_products
from cnf.fields.wrappers import Wrapper
from cnf.matching.paths import Geodesic


class OnSphere(Wrapper):
    r"""The tangential part of a field on the unit sphere, extended to all of :math:`R^D`.

    With r = |x|, n = x/r and :math:`P = I - n n^\top`,

    .. math:: v(t, x) = r\,P f(t, n), \quad
        \nabla\cdot v = \mathrm{tr}(P J_f(n)) - (D - 1)\,n^\top f.

    On the sphere ∇·v is the Riemannian divergence, so that a `Continuous` of this field has
    densities with respect to the sphere's area. As v is homogeneous of degree 1, and ∇·v of degree
    0, neither the direction of a solution nor its log-determinant depends on its length, which
    only the solver's error changes.

    Flow matching takes the path `Geodesic`.

    Source: Mathieu & Nickel (2020), https://arxiv.org/abs/2006.10605; Chen & Lipman (2024),
    https://arxiv.org/abs/2302.03660.

    Args:
        field: The field f of vectors; it is evaluated at unit vectors.

    Attributes:
        path: The path of flow matching.

    Raises:
        ValueError: The field is not one of vectors, of two numbers or more.
    """

    def __init__(self, field: VectorField) -> None:
        if len(field.event_shape) != 1 or field.event_shape[0] < 2:
            raise ValueError(
                "OnSphere: expected a field of vectors of 2 numbers or more, got one of "
                f"{field.event_shape}"
            )
        super().__init__(field)
        self.path = Geodesic()

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        r, n = _polar(x)
        return r * _tangential(n, self.field(t, n, context))

    def with_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity and exact divergence, by D tangents of the wrapped field.

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, D).
            context: Condition, shape (*batch, C), or None.
        """
        r, n = _polar(x)
        dim = x.shape[-1]
        eye = torch.eye(dim, dtype=x.dtype, device=x.device)
        eye = eye.reshape(dim, *[1] * (x.dim() - 1), dim)
        f, products = tangent_products(self.field, t, n, context, _tangential(n, eye))
        trace = products.movedim(0, -1).diagonal(dim1=-2, dim2=-1).sum(-1)
        return r * _tangential(n, f), trace - (dim - 1) * (n * f).sum(-1)

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
        r, n = _polar(x)
        turns = _tangential(n, tangents) / r  # of n
        f, products = tangent_products(self.field, t, n, context, turns)
        radial = (n * f).sum(-1, keepdim=True)
        changes = (turns * f + n * products).sum(-1, keepdim=True)  # of the radial part
        along = r * (products - radial * turns - changes * n)
        v = _tangential(n, f)
        return r * v, along + (tangents * n).sum(-1, keepdim=True) * v


def _polar(x: Tensor) -> tuple[Tensor, Tensor]:
    """Length, shape (*batch, 1), and direction, shape (*batch, D); 0 has neither, and no NaN."""
    r = x.square().sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
    return r, x / r


def _tangential(n: Tensor, f: Tensor) -> Tensor:
    return f - (n * f).sum(-1, keepdim=True) * n
