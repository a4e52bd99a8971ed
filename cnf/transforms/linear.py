"""Linear transforms of vectors: permutations, LU factors and orthogonal matrices."""

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
        ValueError: The order is not a permutation.
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
        return _reorder(z, self.order), z.new_zeros(z.shape[:-1])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x)
        return _reorder(x, self.restore), x.new_zeros(x.shape[:-1])


@TRANSFORMS.register("lu", example=lambda dim: LU(dim))
class LU(Transform):
    """z = P L U x + b with L unit lower and U upper triangular; log|det ∂z/∂x| = Σ log U_ii.

    Data → base is one matrix product, and base → data two triangular solves.

    Source: Kingma & Dhariwal (2018), Glow, https://arxiv.org/abs/1807.03039.

    Args:
        dim: D.
        rotated: Whether the initial matrix is a random rotation, drawn from torch's global
            generator, as in Glow; otherwise it is the identity. P is the permutation of its LU
            factorization, and is not trained.
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
    """x = Q z with an orthogonal matrix Q, which a subclass defines; log|det| = 0."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z)
        return self._multiply(self.matrix, z)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x)
        return self._multiply(lambda: self.matrix().T, x)

    def _multiply(self, matrix: Callable[[], Tensor], value: Tensor) -> tuple[Tensor, Tensor]:
        with no_autocast(value):
            return F.linear(value, matrix()), value.new_zeros(value.shape[:-1])

    @abstractmethod
    def matrix(self) -> Tensor:
        """Q, shape (D, D)."""


@TRANSFORMS.register("householder", example=lambda dim: Householder(dim, 2))
class Householder(Orthogonal):
    """An orthogonal matrix as a product of reflections I - 2 v vᵀ/‖v‖², random at the start.

    The vectors are unconstrained. torch's `parametrizations.orthogonal` has triangular ones, for
    which old files could not be read and training would take other steps.

    Source: Tomczak & Welling (2016), https://arxiv.org/abs/1611.09630.

    Args:
        dim: D.
        reflections: Number of reflections K. The determinant is (-1)^K; every orthogonal matrix is
            a product of D - 1 or D reflections, depending on the sign of its determinant.
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
    """A rotation as the matrix exponential Q = exp(A - Aᵀ), the identity at the start.

    torch's `parametrizations.orthogonal` trains one triangle of A only, so that training steps and
    files would differ; it is 1.3× slower for D = 2 and 2× slower for D = 64.

    Args:
        dim: D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(event_shape=(dim,))
        self.generator = nn.Parameter(torch.zeros(dim, dim))

    def matrix(self) -> Tensor:
        return torch.linalg.matrix_exp(self.generator - self.generator.T)


def householder_product(vectors: Tensor, columns: int | None = None) -> Tensor:
    """The first columns of a product of Householder reflections.

    Args:
        vectors: Normal vectors of the K reflections, shape (*batch, K, D).
        columns: Number of columns M; all D if None.

    Returns:
        Orthonormal columns, shape (*batch, D, M).
    """
    dim = vectors.shape[-1]
    eye = torch.eye(dim, columns or dim, dtype=vectors.dtype, device=vectors.device)
    product = eye.expand(*vectors.shape[:-2], -1, -1)
    for v in reversed(F.normalize(vectors, dim=-1).unsqueeze(-1).unbind(-3)):
        product = product - 2 * v @ (v.mT @ product)
    return product


def _reorder(value: Tensor, order: Tensor) -> Tensor:
    """The variables in another order, each contiguous in memory as in coupling layers."""
    return value.movedim(-1, 0).index_select(0, order).movedim(0, -1)
