"""Planar, Sylvester and radial flows, with both directions.

With a context the parameters are affine functions of it, as amortized posteriors need.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.precision import no_autocast
from cnf.transforms.base import TRANSFORMS, Transform
from cnf.transforms.linear import householder_product
from cnf.transforms.roots import tanh_root

INVERSE_SOFTPLUS_OF_ONE = math.log(math.expm1(1))  # the x with softplus(x) = 1
MARGIN = 8  # distance from the constraint in units of eps, so that determinants stay positive


class Amortized(nn.Module):
    """Parameter vectors: trained ones or, with a context, affine functions of it.

    Args:
        sizes: Sizes of the vectors.
        context_dim: Size of the context; 0 for none.
        scale: Standard deviation of the initial biases, and of what a context of unit scale adds
            to them at the start, whatever its size.
    """

    def __init__(self, sizes: Sequence[int], context_dim: int = 0, scale: float = 0.1) -> None:
        super().__init__()
        self.sizes = list(sizes)
        self.bias = nn.Parameter(scale * torch.randn(sum(sizes)))
        self.weight = None
        if context_dim:
            size = scale / math.sqrt(context_dim)
            self.weight = nn.Parameter(size * torch.randn(sum(sizes), context_dim))

    def forward(self, context: Tensor | None) -> tuple[Tensor, ...]:
        """One vector for each size, shape (*batch, size), or (size,) without a context."""
        whole = self.bias
        if self.weight is not None:
            assert context is not None
            with no_autocast(context):
                whole = F.linear(context.to(self.weight), self.weight, self.bias)
        return whole.split(self.sizes, -1)


@TRANSFORMS.register(
    "planar", example=lambda dim, context_dim=0: Planar(dim, context_dim=context_dim)
)
class Planar(Transform):
    """x = z + û tanh(wᵀz + b), log|det| = log(1 + wᵀû (1 - tanh²)).

    The constraint wᵀû > -1, which makes it invertible, is satisfied by û = u + (m - wᵀu)·w/‖w‖²
    with m = softplus(wᵀu + log(e - 1)) - 1. In the paper m is not shifted by log(e - 1), and is
    -0.31 at wᵀu = 0: for a small w, û would be long and the map far from the identity. The inverse
    solves for wᵀz + b, the root of an increasing function of one variable.

    Source: Rezende & Mohamed (2015), https://arxiv.org/abs/1505.05770, appendix A.

    Args:
        dim: D.
        context_dim: Size of the context; 0 for none.
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__(context_dim=context_dim, event_shape=(dim,))
        self.numbers = Amortized([dim, dim, 1], context_dim)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z, context)
        u, w, b, along = self._constrained(context)
        tanh = torch.tanh((w * z).sum(-1) + b)
        return z + u * tanh.unsqueeze(-1), (along * (1 - tanh * tanh)).log1p()

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x, context)
        u, w, b, along = self._constrained(context)
        tanh = torch.tanh(tanh_root((w * x).sum(-1) + b, along))
        return x - u * tanh.unsqueeze(-1), -(along * (1 - tanh * tanh)).log1p()

    def _constrained(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The vectors û and w, the offset b and the product wᵀû."""
        u, w, b = self.numbers(context)
        product = (w * u).sum(-1, keepdim=True)
        along = _above_minus_one(product)
        squared = (w * w).sum(-1, keepdim=True).clamp(min=torch.finfo(w.dtype).tiny)
        return u + (along - product) * w / squared, w, b.squeeze(-1), along.squeeze(-1)


@TRANSFORMS.register(
    "sylvester", example=lambda dim, context_dim=0: Sylvester(dim, 2, context_dim=context_dim)
)
class Sylvester(Transform):
    """x = z + Q R tanh(S Qᵀz + b), which is M planar flows along the orthonormal columns of Q.

    R and S are upper triangular with diagonals within ±1, so that the Jacobian determinant
    Π(1 + R_ii S_ii (1 - tanh²_i)) is positive. The inverse solves for M roots one by one.

    Source: van den Berg et al. (2018), https://arxiv.org/abs/1803.05649.

    Args:
        dim: D.
        rank: Number of columns M, at most D.
        context_dim: Size of the context; 0 for none.

    Raises:
        ValueError: The rank is below 1 or above D.
    """

    def __init__(self, dim: int, rank: int, context_dim: int = 0) -> None:
        if not 1 <= rank <= dim:
            raise ValueError(f"Sylvester: expected 1 <= rank <= {dim}, got {rank}")
        super().__init__(context_dim=context_dim, event_shape=(dim,))
        self.dim, self.rank = dim, rank
        self.vectors = Amortized([rank * dim], context_dim, scale=1.0)
        self.numbers = Amortized([rank * rank, rank * rank, rank], context_dim)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z, context)
        with no_autocast(z):
            q, r, s, b = self._constrained(context)
            tanh = torch.tanh(_matvec(s, _matvec(q.mT, z)) + b)
            return z + _matvec(q, _matvec(r, tanh)), _sylvester_ladj(r, s, tanh)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x, context)
        with no_autocast(x):
            q, r, s, b = self._constrained(context)
            tanh = self._solve(_matvec(q.mT, x), r, s, b)
            return x - _matvec(q, _matvec(r, tanh)), -_sylvester_ladj(r, s, tanh)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, rank {self.rank}"

    def _solve(self, target: Tensor, r: Tensor, s: Tensor, b: Tensor) -> Tensor:
        """tanh(S y + b) at the root y of y + R tanh(S y + b) = target, by back substitution."""
        found: dict[int, tuple[Tensor, Tensor]] = {}  # i → y_i and tanh((S y + b)_i)
        for i in reversed(range(self.rank)):
            shift, offset = target[..., i], b[..., i]
            for j, (y_j, tanh_j) in found.items():
                shift, offset = shift - r[..., i, j] * tanh_j, offset + s[..., i, j] * y_j
            r_ii, s_ii = r[..., i, i], s[..., i, i]
            tanh_i = torch.tanh(tanh_root(s_ii * shift + offset, r_ii * s_ii))
            found[i] = shift - r_ii * tanh_i, tanh_i
        return torch.stack([found[i][1] for i in range(self.rank)], -1)

    def _constrained(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Q of shape (*, D, M), R and S of shape (*, M, M), and b of shape (*, M)."""
        (vectors,), (r, s, b) = self.vectors(context), self.numbers(context)
        q = householder_product(vectors.unflatten(-1, (self.rank, self.dim)), self.rank)
        return q, _triangular(r, self.rank), _triangular(s, self.rank), b


@TRANSFORMS.register(
    "radial", example=lambda dim, context_dim=0: Radial(dim, context_dim=context_dim)
)
class Radial(Transform):
    """x = z + β (z - c)/(α + r) with r = ‖z - c‖, α > 0 and β > -α.

    log|det| = (D - 1) log(1 + βh) + log(1 + βh - βrh²) with h = 1/(α + r). The inverse solves a
    quadratic equation for r.

    Source: Rezende & Mohamed (2015), https://arxiv.org/abs/1505.05770, appendix A.

    Args:
        dim: D.
        context_dim: Size of the context; 0 for none.
    """

    def __init__(self, dim: int, context_dim: int = 0) -> None:
        super().__init__(context_dim=context_dim, event_shape=(dim,))
        self.numbers = Amortized([dim, 1, 1], context_dim)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z, context)
        center, alpha, beta = self._constrained(context)
        away = z - center
        r = _norm(away)
        return z + beta * away / (alpha + r), self._ladj(r, alpha, beta, z.shape[-1])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x, context)
        center, alpha, beta = self._constrained(context)
        away = x - center
        far = _norm(away)
        p, size = alpha + beta - far, alpha + beta + far  # r² + p r = α ‖x - c‖
        root = size * ((p / size).square() + 4 * (alpha / size) * (far / size)).sqrt()
        r = torch.where(p > 0, 2 * alpha * far / (p.abs() + root), (root - p) / 2)
        z = center + away / (1 + beta / (alpha + r))
        return z, -self._ladj(r, alpha, beta, x.shape[-1])

    def _constrained(self, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        center, alpha, beta = self.numbers(context)
        alpha = F.softplus(alpha)
        beta = torch.maximum(F.softplus(beta) - alpha, -_largest_below_one(alpha) * alpha)
        return center, alpha, beta

    def _ladj(self, r: Tensor, alpha: Tensor, beta: Tensor, dim: int) -> Tensor:
        h = 1 / (alpha + r)
        outward = (beta * alpha * h * h).log1p()  # 1 + βh - βrh² = 1 + βαh²
        return ((dim - 1) * (beta * h).log1p() + outward).squeeze(-1)


def _above_minus_one(x: Tensor) -> Tensor:
    """softplus(x + log(e - 1)) - 1: increasing, above -1, and 0 at 0, without cancellation."""
    small = torch.log1p((1 - math.exp(-1)) * torch.expm1(x.clamp(max=1)))
    return torch.where(x < 1, small, F.softplus(x + INVERSE_SOFTPLUS_OF_ONE) - 1).clamp(
        min=-_largest_below_one(x)
    )


def _largest_below_one(like: Tensor) -> float:
    """A number below 1 by a margin that rounding does not consume, in the dtype of `like`."""
    return 1 - MARGIN * torch.finfo(like.dtype).eps


def _norm(vector: Tensor) -> Tensor:
    """Euclidean norm, (*, D) → (*, 1), without overflow or underflow of the squares."""
    size = vector.detach().abs().amax(-1, keepdim=True).clamp(min=torch.finfo(vector.dtype).tiny)
    return size * torch.linalg.vector_norm(vector / size, dim=-1, keepdim=True)


def _sylvester_ladj(r: Tensor, s: Tensor, tanh: Tensor) -> Tensor:
    products = (r * s).diagonal(dim1=-2, dim2=-1)
    return (products * (1 - tanh * tanh)).log1p().sum(-1)


def _matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _triangular(raw: Tensor, size: int) -> Tensor:
    """(*, size²) → upper triangular matrices, (*, size, size), with diagonals within ±1."""
    square = raw.unflatten(-1, (size, size))
    diagonal = _largest_below_one(raw) * square.diagonal(dim1=-2, dim2=-1).tanh()
    return square.triu(1) + torch.diag_embed(diagonal)
