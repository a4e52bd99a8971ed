"""Maps from the data to numbers near a standard normal's, fitted once and not trained."""

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.errors import abbreviated, expect_shape
from cnf.precision import COARSE, widest
from cnf.random import stream
from cnf.registry import Registry
from cnf.transforms.base import TRANSFORMS, Transform
from cnf.transforms.normalization import by_channel
from cnf.transforms.splines import Curve
from cnf.transforms.squashing import Sigmoid

PREPROCESSING = Registry("preprocessing", Transform)
KNOTS = 32


class Preprocessing(Transform):
    """A transform whose numbers are fitted to data: base → data, like every transform.

    Until it is fitted it is the identity. `fit` sets it once; a second call changes nothing, so
    that training a flow again (fine-tuning) keeps the meaning of its weights.

    Its numbers are float64 whatever the dtype of the flow, and stay so under `float()` and
    `half()`; the result has the dtype of the argument. A device without float64 (MPS) holds them
    in float32.

    Args:
        event_shape: Shape of one x.
        numbers: Its buffers, by name, as they make the identity.

    Attributes:
        dtype: float64 where it was fitted to float64 data, else float32; kept in checkpoints.
        unresolved: The columns whose values float32 would merge, known once it is fitted.
    """

    fitted: Tensor

    def __init__(self, event_shape: int | Sequence[int], **numbers: Tensor) -> None:
        super().__init__(event_shape=event_shape)
        self.numbers = tuple(numbers)
        for name, value in numbers.items():
            self.register_buffer(name, value.to(widest(value.device)))
        self.register_buffer("fitted", torch.tensor(False))
        self.dtype, self.unresolved = torch.float32, ()
        self.register_load_state_dict_pre_hook(_default_dtype)
        self.register_load_state_dict_post_hook(_find_unresolved)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Set it for good from data x, unless it is set.

        Args:
            x: Data, shape (N, *event).

        Raises:
            ValueError: The data are too few or too degenerate.
        """
        if self.fitted:
            return
        self.settle(self._fit(x.to(next(self.buffers()).dtype)), x.dtype)

    @torch.no_grad()
    def settle(self, numbers: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Set its numbers to given ones, and mark the transform as fitted.

        Args:
            numbers: A value for each buffer that is fitted.
            dtype: Dtype of the data.

        Raises:
            ValueError: The squares of a column overflow or underflow.
        """
        loc, scale = self._columns(numbers)
        lost = (loc.isinf() | scale.isinf() | (scale == 0)).flatten()
        if lost.any():
            raise ValueError(
                f"{type(self).__name__}: columns {lost.nonzero().flatten().tolist()} are too "
                f"large or too small for their squares to be held in {loc.dtype}; rescale them"
            )
        for name, value in numbers.items():
            buffer = getattr(self, name)
            buffer.copy_(value.view_as(buffer))
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.fitted.fill_(True)
        self._resolve()

    @abstractmethod
    def _fit(self, x: Tensor) -> dict[str, Tensor]:
        """The numbers for data x, of the buffers' dtype."""

    @abstractmethod
    def _columns(self, numbers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Location and scale of each column whose values the numbers tell apart."""

    def _resolve(self) -> None:
        """Find what float32 would merge, once, so that no call has to synchronize with a GPU."""
        loc, scale = self._columns({name: getattr(self, name) for name in self.numbers})
        rounding = torch.finfo(torch.float32).eps / 4 * loc.abs()  # RMS rounding error
        coarse = (rounding > COARSE * scale).flatten()
        self.unresolved = tuple(coarse.nonzero().flatten().tolist())

    @property
    def spec(self) -> str | None:
        """Its name in `PREPROCESSING`, by which `cnf.load` builds it again; None without one."""
        return PREPROCESSING.name_of(self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {'' if self.fitted else 'not '}fitted"

    def get_extra_state(self) -> Tensor:
        """An empty tensor, whose dtype is what is kept."""
        return torch.empty(0, dtype=self.dtype)

    def set_extra_state(self, state: Tensor) -> None:
        self.dtype = state.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Preprocessing":
        self.fitted = fn(self.fitted)
        device = self.fitted.device
        dtype = widest(device)
        if dtype == torch.float32 and self.unresolved:
            raise ValueError(
                f"{type(self).__name__}: columns {list(self.unresolved)} need float64, which "
                f"{device.type} does not have; subtract a constant from them, or stay on the CPU"
            )
        for name in self.numbers:
            value: Any = self._buffers[name]
            moved = torch.empty_like if value.is_meta else torch.Tensor.to
            self._buffers[name] = moved(value, device=device, dtype=dtype)
        return self


def _default_dtype(module: Any, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Insert the dtype float32, which files of version 0.1 lack."""
    state.setdefault(f"{prefix}_extra_state", torch.empty(0, dtype=torch.float32))


def _find_unresolved(module: Any, _: object) -> None:
    module._resolve()


@PREPROCESSING.register("standardize")
@TRANSFORMS.register("standardize", example=lambda dim: Standardize((dim,)))
class Standardize(Preprocessing):
    """x = z·scale + loc, whose inverse standardizes data to mean 0 and variance 1; not trained.

    Each variable has its own location and scale. For images each channel has, as statistics of
    single pixels would turn small variations of nearly constant border pixels into outliers. In
    float32 a location of 10⁸ would have an error of up to 4.

    Args:
        event_shape: Shape of one x: (D,), or (C, H, W).
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        shape, places = by_channel(expect_shape("Standardize", event_shape, "event_shape"))
        super().__init__(event_shape, loc=torch.zeros(shape), scale=torch.ones(shape))
        self.places = places

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z)
        return (z * self.scale + self.loc).to(z.dtype), self._ladj(z)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x)
        return ((x - self.loc) / self.scale).to(x.dtype), -self._ladj(x)

    def _fit(self, x: Tensor) -> dict[str, Tensor]:
        over, scale = [0, *range(2, x.dim())], self.scale
        if len(x) > 1:  # a constant column has scale 1
            scale = torch.where(x.amax(over) > x.amin(over), x.std(over), 1.0)
        return {"loc": x.mean(over), "scale": scale}

    def _columns(self, numbers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return numbers["loc"], numbers["scale"]

    def _ladj(self, value: Tensor) -> Tensor:
        ladj = (self.places * self.scale.log().sum()).to(value.dtype)
        return ladj.expand(value.shape[: value.dim() - self.event_dims])


@PREPROCESSING.register("whiten")
@TRANSFORMS.register("whiten", example=lambda dim: _fitted(Whiten(dim)))
class Whiten(Preprocessing):
    """x = L·z + m with LLᵀ the covariance of the data: the inverse makes it the unit matrix.

    L is the Cholesky factor, lower triangular, so that z_i depends on x_1, …, x_i alone: the order
    of an autoregressive model stays as it is. Images are flattened.

    Args:
        event_shape: Shape of one x.
    """

    loc: Tensor
    factor: Tensor

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        size = math.prod([event_shape] if isinstance(event_shape, int) else event_shape)
        super().__init__(event_shape, loc=torch.zeros(size), factor=torch.eye(size))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z)
        x = z.flatten(-self.event_dims).to(self.loc.dtype) @ self.factor.T + self.loc
        return x.to(z.dtype).view_as(z), self._ladj(z)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x)
        centered = x.flatten(-self.event_dims).to(self.loc.dtype) - self.loc
        rows = centered.reshape(-1, len(self.loc))
        z = torch.linalg.solve_triangular(self.factor, rows.T, upper=False).T
        return z.to(x.dtype).reshape(x.shape), -self._ladj(x)

    def _fit(self, x: Tensor) -> dict[str, Tensor]:
        rows = x.flatten(1)
        if len(rows) <= rows.shape[1]:
            raise ValueError(
                f"Whiten: expected more rows than the {rows.shape[1]} numbers of each, got "
                f"{len(rows)}; take preprocess='standardize'"
            )
        factor, failed = torch.linalg.cholesky_ex(torch.cov(rows.T).reshape(2 * rows.shape[1:]))
        narrow = factor.diagonal() < 1e-7 * rows.std(0)
        if failed or narrow.any():
            first = [int(failed) - 1] if failed else narrow.nonzero().flatten().tolist()
            raise ValueError(
                f"Whiten: columns {abbreviated(first)} are constant, or linear combinations of "
                "the columns before; drop them, add noise, or take preprocess='standardize'"
            )
        return {"loc": rows.mean(0), "factor": factor}

    def _columns(self, numbers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return numbers["loc"], numbers["factor"].diagonal()

    def _ladj(self, value: Tensor) -> Tensor:
        ladj = self.factor.diagonal().log().sum().to(value.dtype)
        return ladj.expand(value.shape[: value.dim() - self.event_dims])


@PREPROCESSING.register("radial")
@TRANSFORMS.register(
    "radial-gaussianization", example=lambda dim: _fitted(RadialGaussianization(dim))
)
class RadialGaussianization(Preprocessing):
    r"""A monotone map of the length |x|, fitted so that the inverse makes it a standard normal's.

    Directions stay. log|z| is a rational-quadratic spline of log|x| through 32 quantiles of the
    data and of the χ distribution; beyond them it goes on as a straight line, so that a power-law
    tail becomes a power of the normal's, and near 0 z is proportional to x. For data that are
    whitened and have heavy tails, such as patches of natural pictures.

    .. math:: \log|\det \partial z/\partial x|
        = D (\log|z| - \log|x|) + \log \frac{d \log|z|}{d \log|x|}

    Source: Lyu and Simoncelli (2009), Nonlinear extraction of independent components of natural
    images using radial Gaussianization, https://doi.org/10.1162/neco.2009.03-08-716.

    Args:
        event_shape: Shape of one x.
    """

    place: Tensor
    sizes: Tensor
    slopes: Tensor

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__(
            event_shape,
            place=torch.tensor([[0.0, 1.0], [0.0, 1.0]]),  # center, half width; of log|x|, log|z|
            sizes=torch.full((2, KNOTS - 1), 2 / (KNOTS - 1), dtype=torch.float64),
            slopes=torch.ones(KNOTS),
        )

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z)
        return self._mapped(z, CURVE.root, self.place.flip(0))

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x)
        return self._mapped(x, CURVE.value, self.place)

    def _mapped(
        self, value: Tensor, curve: Callable[..., tuple[Tensor, Tensor]], place: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The value with another length, by the curve of its logarithm from place 0 to place 1."""
        (center, width), (new_center, new_width) = place
        axes = tuple(range(-self.event_dims, 0))
        square = value.to(place.dtype).square().sum(axes)
        before = 0.5 * square.clamp(min=torch.finfo(place.dtype).tiny).log()
        u = (before - center) / width
        inside = u.clamp(-1, 1)
        batch = u.shape
        v, log_slope = curve(
            inside,
            self.sizes.reshape(*self.sizes.shape, *[1] * len(batch)).expand(-1, -1, *batch),
            self.slopes.reshape(-1, *[1] * len(batch)).expand(-1, *batch),
        )
        after = (v + (u - inside) * log_slope.exp()) * new_width + new_center
        after = after.clamp(max=math.log(torch.finfo(value.dtype).max) - 1)  # a finite length
        change = after - before
        dim = math.prod(value.shape[-self.event_dims :])
        ladj = dim * change + log_slope + (new_width / width).log()
        scale = change.exp().to(value.dtype).reshape(*batch, *[1] * self.event_dims)
        return value * scale, ladj.to(value.dtype)

    def _fit(self, x: Tensor) -> dict[str, Tensor]:
        from scipy import interpolate, special

        lengths, dim = x.flatten(1).norm(dim=1).cpu().numpy(), x[0].numel()
        if len(lengths) < 10 * KNOTS:
            raise ValueError(
                f"RadialGaussianization: expected {10 * KNOTS} rows or more, whose lengths it is "
                f"fitted to, got {len(lengths)}; take preprocess='whiten'"
            )
        ends = np.log(len(lengths) / 10)  # ten rows lie beyond each of the ends
        share = special.expit(np.linspace(-ends, ends, KNOTS))
        u = np.log(np.quantile(lengths, share))
        v = 0.5 * np.log(2 * special.gammaincinv(dim / 2, share))
        if not (np.isfinite(u).all() and (np.diff(u) > 0).all()):
            raise ValueError(
                "RadialGaussianization: expected rows of different lengths above 0, got many of "
                "one; take preprocess='whiten', or add noise"
            )
        slopes = interpolate.PchipInterpolator(u, v).derivative()(u)
        slopes[0], slopes[-1] = 1.0, (v[-1] - v[-2]) / (u[-1] - u[-2])
        place = torch.tensor([[(a[0] + a[-1]) / 2, (a[-1] - a[0]) / 2] for a in (u, v)])
        (_, width), (_, new_width) = place
        return {
            "place": place,
            "sizes": torch.from_numpy(np.stack([np.diff(u), np.diff(v)])) / place[:, 1:],
            "slopes": torch.from_numpy(slopes) * width / new_width,
        }

    def _columns(self, numbers: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        return numbers["place"].new_zeros(0), numbers["place"].new_ones(0)  # data without a mean


CURVE = Curve(KNOTS - 1, 1.0, 1e-9)


@PREPROCESSING.register("logit")
def logit(
    event_shape: int | Sequence[int], *, alpha: float = 1e-6, levels: float = 1.0
) -> Transform:
    """The map onto [0, levels] whose inverse is z = log u - log(1 - u), u = α + (1 - 2α)·x/levels.

    Source: Papamakarios et al. (2017), MAF, https://arxiv.org/abs/1705.07057: α = 1e-6 for MNIST
    and 0.05 for CIFAR-10.

    Args:
        event_shape: Shape of one x.
        alpha: Keeps the ends at a finite distance; at least 0 and below 1/2.
        levels: Upper end of x: 256 for dequantized pixels of 8 bits.

    Raises:
        ValueError: `alpha` is out of range.
    """
    if not 0 <= alpha < 0.5:
        raise ValueError(f"logit: expected 0 <= alpha < 1/2, got {alpha}")
    low = -levels * alpha / (1 - 2 * alpha)
    part = Sigmoid(low, levels - low, 1 if isinstance(event_shape, int) else len(event_shape))
    part.spec = {"name": "logit", "alpha": alpha, "levels": levels}
    return part


def _fitted(part: Preprocessing) -> Preprocessing:
    """An example, fitted to skewed data."""
    shape = (20 * KNOTS, *(part.event_shape or ()))
    part.fit(torch.randn(shape, generator=stream(0, "example of preprocessing")).exp())
    return part
