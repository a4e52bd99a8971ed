"""Linear transforms of vectors: permutations, triangular factors, orthogonal matrices."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.precision import no_autocast
from cnf.transforms.base import TRANSFORMS, Transform


@TRANSFORMS.register("permutation", example=lambda dim: Permutation(dim))
class Permutation(Transform):
    """x_i = z_order[i]; log|det| = 0.

    Args:
        dim: D.
        order: A permutation of 0, …, D - 1; the reversed order if None.

    Raises:
        ValueError: An order that is no permutation.
    """

    order: Tensor
    restore: Tensor

    def __init__(self, dim: int, order: Sequence[int] | None = None) -> None:
        super().__init__(event_shape=(dim,))
        order = range(dim)[::-1] if order is None else order
        if sorted(order) != list(range(dim)):
            raise ValueError(f"Permutation: expected each of 0, …, {dim - 1} once, got {order}")
        self.register_buffer("order", torch.tensor([*order]))
        self.register_buffer("restore", torch.argsort(self.order))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z)
        return _picked(z, self.order), z.new_zeros(z.shape[:-1])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x)
        return _picked(x, self.restore), x.new_zeros(x.shape[:-1])


@TRANSFORMS.register("lu", example=lambda dim: LU(dim))
class LU(Transform):
    """z = P L U x + b with L unit lower and U upper triangular; log|det ∂z/∂x| = Σ log U_ii.

    Data → base is one product, base → data two triangular solves.
    Source: Kingma & Dhariwal (2018), Glow, https://arxiv.org/abs/1807.03039.

    Args:
        dim: D.
        rotated: Start at a random rotation (drawn from torch's generator), as Glow does, instead
            of the identity; P is that rotation's pivoting.
    """

    order: Tensor
    restore: Tensor
    signs: Tensor

    def __init__(self, dim: int, rotated: bool = False) -> None:
        super().__init__(event_shape=(dim,))
        start = torch.linalg.qr(torch.randn(dim, dim))[0] if rotated else torch.eye(dim)
        pivots, lower, upper = torch.linalg.lu(start)
        self.register_buffer("order", pivots.argmax(1))
        self.register_buffer("restore", torch.argsort(self.order))
        self.register_buffer("signs", upper.diagonal().sign())
        self.lower, self.upper = nn.Parameter(lower.tril(-1)), nn.Parameter(upper.triu(1))
        self.log_diagonal = nn.Parameter(upper.diagonal().abs().log())
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z)
        columns = (z - self.bias).reshape(-1, z.shape[-1]).T[self.restore]
        lower, upper = self._factors()
        columns = torch.linalg.solve_triangular(lower, columns, upper=False, unitriangular=True)
        columns = torch.linalg.solve_triangular(upper, columns, upper=True)
        return columns.T.reshape(z.shape), -self.log_diagonal.sum().expand(z.shape[:-1])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x)
        with no_autocast(x):
            lower, upper = self._factors()
            z = F.linear(x, (lower @ upper)[self.order], self.bias)
        return z, self.log_diagonal.sum().expand(x.shape[:-1])

    def _factors(self) -> tuple[Tensor, Tensor]:
        eye = torch.eye(len(self.bias), dtype=self.bias.dtype, device=self.bias.device)
        diagonal = torch.diag(self.signs * self.log_diagonal.exp())
        return self.lower.tril(-1) + eye, self.upper.triu(1) + diagonal


class Orthogonal(Transform):
    """x = Q z with an orthogonal Q; log|det| = 0. Subclasses say which Q."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z)
        return self._times(self.matrix, z)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x)
        return self._times(lambda: self.matrix().T, x)

    def _times(self, matrix: Callable[[], Tensor], value: Tensor) -> tuple[Tensor, Tensor]:
        with no_autocast(value):
            return F.linear(value, matrix()), value.new_zeros(value.shape[:-1])

    @abstractmethod
    def matrix(self) -> Tensor:
        """Q, shape (D, D)."""


@TRANSFORMS.register("householder", example=lambda dim: Householder(dim, 2))
class Householder(Orthogonal):
    """Q as a product of reflections I - 2 v vᵀ/‖v‖²; it starts at random.

    The vectors are any; those of torch's `parametrizations.orthogonal` are triangular, and could
    neither be read from old files nor be trained by the same steps.
    Source: Tomczak & Welling (2016), https://arxiv.org/abs/1611.09630.

    Args:
        dim: D.
        reflections: How many, K: the determinant is (-1)^K, and D - 1 or D of them reach every
            orthogonal matrix with that one.
    """

    def __init__(self, dim: int, reflections: int) -> None:
        super().__init__(event_shape=(dim,))
        self.vectors = nn.Parameter(torch.randn(reflections, dim))

    def matrix(self) -> Tensor:
        return householder_product(self.vectors)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {len(self.vectors)} reflections"


@TRANSFORMS.register("rotation", example=lambda dim: Rotation(dim))
class Rotation(Orthogonal):
    """Q = exp(A - Aᵀ), a rotation; it starts at the identity.

    torch's `parametrizations.orthogonal` trains half of A only, so that steps and files would
    differ, and is 1.3 times slower for D = 2 and twice for D = 64.

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(event_shape=(dim,))
        self.generator = nn.Parameter(torch.zeros(dim, dim))

    def matrix(self) -> Tensor:
        return torch.linalg.matrix_exp(self.generator - self.generator.T)


def householder_product(vectors: Tensor, columns: int | None = None) -> Tensor:
    """The first columns of a product of reflections along K vectors.

    Args:
        vectors: Shape (*batch, K, D).
        columns: M; None for all D.

    Returns:
        Orthonormal columns, shape (*batch, D, M).
    """
    dim = vectors.shape[-1]
    eye = torch.eye(dim, columns or dim, dtype=vectors.dtype, device=vectors.device)
    product = eye.expand(*vectors.shape[:-2], -1, -1)
    for v in reversed(F.normalize(vectors, dim=-1).unsqueeze(-1).unbind(-3)):
        product = product - 2 * v @ (v.mT @ product)
    return product


def _picked(value: Tensor, order: Tensor) -> Tensor:
    """Variables in another order, each in one piece of memory, as the layers beside lay them."""
    return value.movedim(-1, 0).index_select(0, order).movedim(0, -1)
