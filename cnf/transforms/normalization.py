"""Normalization by statistics: of all data, of the first batch, or of every batch."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cnf.precision import COARSE, widest
from cnf.transforms.base import TRANSFORMS, Transform


@TRANSFORMS.register("standardize", example=lambda dim: Standardize((dim,)))
class Standardize(Transform):
    """x = z·scale + loc, whose inverse standardizes data to mean 0 and variance 1; not trained.

    Each variable has its own location and scale. For images each channel has, as statistics of
    single pixels would turn small variations of nearly constant border pixels into outliers.

    Before it is fitted, the transform is the identity. Only the first call of `fit` sets location
    and scale, so that the weights of a flow keep their meaning when it is trained again
    (fine-tuning).

    Location and scale are float64 for a flow of any dtype, and remain so under `float()` and
    `half()`: in float32 a location of 10⁸ would have an error of up to 4. The result has the dtype
    of the argument. On a device without float64 (MPS) they are float32, and data whose distinct
    values would then be equal are refused.

    Args:
        event_shape: Shape of one x: (D,), or (C, H, W).

    Attributes:
        dtype: float64 if it was fitted to float64 data, else float32; stored in checkpoints.
        unresolved: Indices of the columns whose distinct values would be equal in float32; empty
            before it is fitted.
    """

    loc: Tensor
    scale: Tensor
    fitted: Tensor

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__(event_shape=event_shape)
        shape, self.places = _by_channel(self.event_shape)
        zeros = torch.zeros(shape)
        zeros = zeros.to(widest(zeros.device))
        self.register_buffer("loc", zeros)
        self.register_buffer("scale", torch.ones_like(zeros))
        self.register_buffer("fitted", torch.tensor(False))
        self.dtype, self.unresolved = torch.float32, ()
        self.register_load_state_dict_pre_hook(_default_dtype)
        self.register_load_state_dict_post_hook(_find_unresolved)

    def fit(self, x: Tensor) -> None:
        """Set location and scale from data x, shape (N, *event), unless they are set already."""
        if self.fitted:
            return
        rows = x.to(self.loc.dtype)
        over = [0, *range(2, x.dim())]
        scale = self.scale
        if x.shape[0] > 1:  # a constant column has scale 1
            scale = torch.where(rows.amax(over) > rows.amin(over), rows.std(over), 1.0)
        self.settle(rows.mean(over), scale, x.dtype)

    def settle(self, loc: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        """Set location and scale to given statistics, and mark the transform as fitted.

        Args:
            loc: Location of each column or channel.
            scale: Scale, of the same shape.
            dtype: Dtype of the data.

        Raises:
            ValueError: The squares of a column overflow or underflow.
        """
        lost = (loc.isinf() | scale.isinf() | (scale == 0)).flatten()
        if lost.any():
            raise ValueError(
                f"Standardize: columns {lost.nonzero().flatten().tolist()} are too large or too "
                f"small for their squares to be held in {loc.dtype}; rescale them"
            )
        self.loc.copy_(loc.view_as(self.loc))
        self.scale.copy_(scale.view_as(self.loc))
        self.dtype = torch.float64 if dtype == torch.float64 else torch.float32
        self.fitted.fill_(True)
        _find_unresolved(self)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z)
        return (z * self.scale + self.loc).to(z.dtype), self._ladj(z)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x)
        return ((x - self.loc) / self.scale).to(x.dtype), -self._ladj(x)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {'' if self.fitted else 'not '}fitted"

    def get_extra_state(self) -> Tensor:
        """An empty tensor of the data's dtype, which is thus stored in checkpoints."""
        return torch.empty(0, dtype=self.dtype)

    def set_extra_state(self, state: Tensor) -> None:
        self.dtype = state.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Standardize":
        self.fitted = fn(self.fitted)
        device = self.fitted.device
        dtype = widest(device)
        if dtype == torch.float32 and self.unresolved:
            raise ValueError(
                f"Standardize: columns {list(self.unresolved)} need float64, which {device.type} "
                "does not have; subtract a constant from them, or stay on the CPU"
            )
        for name in ("loc", "scale"):
            value = self._buffers[name]
            assert value is not None
            moved = torch.empty_like if value.is_meta else torch.Tensor.to
            self._buffers[name] = moved(value, device=device, dtype=dtype)
        return self

    def _ladj(self, value: Tensor) -> Tensor:
        ladj = (self.places * self.scale.log().sum()).to(value.dtype)
        return ladj.expand(value.shape[: value.dim() - self.event_dims])


def _default_dtype(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Insert the dtype float32, which files of version 0.1 lack."""
    state.setdefault(f"{prefix}_extra_state", torch.empty(0, dtype=torch.float32))


def _find_unresolved(module: nn.Module, _: object = None) -> None:
    """Set `unresolved`, once, so that no call has to synchronize with a GPU."""
    assert isinstance(module, Standardize)
    rounding = torch.finfo(torch.float32).eps / 4 * module.loc.abs()  # RMS rounding error
    coarse = (rounding > COARSE * module.scale).flatten()
    module.unresolved = tuple(coarse.nonzero().flatten().tolist())


@TRANSFORMS.register("actnorm", example=lambda dim: ActNorm((dim,)))
class ActNorm(Transform):
    """x = z·exp(s) + m with trained s and m for each channel, initialized from data.

    The first batch that its inverse maps inside `initializing` sets s and m, such that z has mean
    0 and variance 1. Before that it is the identity. If s or m is not zero, because it was
    trained, they are not set again.

    Source: Kingma & Dhariwal (2018), Glow, https://arxiv.org/abs/1807.03039.

    Args:
        event_shape: Shape of one x: (D,), or (C, H, W) with one s and m for each of C channels.
    """

    initialized: Tensor

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__(event_shape=event_shape)
        shape, self.places = _by_channel(self.event_shape)
        self.loc = nn.Parameter(torch.zeros(shape))
        self.log_scale = nn.Parameter(torch.zeros(shape))
        self.register_buffer("initialized", torch.tensor(False))
        self.initializing = False
        self.register_load_state_dict_pre_hook(_rename_seen)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z)
        return torch.addcmul(self.loc, z, self.log_scale.exp()), self._ladj(z)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x)
        if self.initializing and not (self.initialized | self.loc.any() | self.log_scale.any()):
            self._initialize(x.detach())
        return (x - self.loc) * (-self.log_scale).exp(), -self._ladj(x)

    @torch.no_grad()
    def _initialize(self, x: Tensor) -> None:
        channels = x.reshape(-1, self.loc.shape[0], self.places).transpose(0, 1).flatten(1)
        if channels.shape[1] < 2:
            return
        self.loc.copy_(channels.mean(1).view_as(self.loc))
        scale = channels.std(1, correction=0)
        varies = channels.amax(1) > channels.amin(1)
        self.log_scale.copy_(torch.where(varies, scale, 1.0).log().view_as(self.loc))
        self.initialized.fill_(True)

    def _ladj(self, value: Tensor) -> Tensor:
        batch = value.shape[: value.dim() - self.event_dims]
        return (self.places * self.log_scale.sum()).expand(batch)


def _rename_seen(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Rename the entry `seen` of files of version 0.1 to `initialized`."""
    if f"{prefix}seen" in state:
        state[f"{prefix}initialized"] = state.pop(f"{prefix}seen")


@TRANSFORMS.register("batchnorm", example=lambda dim: BatchNorm(dim).eval())
class BatchNorm(Transform):
    """z = exp(g)·(x - mean)/√(variance + ε) + b, with the statistics of the batch.

    In eval mode data → base uses the running statistics, and base → data always does. Therefore
    the two directions are inverses of each other in eval mode only.

    Source: Dinh et al. (2017), RealNVP, https://arxiv.org/abs/1605.08803.

    Args:
        dim: D.
        momentum: Weight of a batch in the running statistics, in (0, 1].
        eps: ε, which is added to the variance.
    """

    recomputable = False
    mean: Tensor
    variance: Tensor

    def __init__(self, dim: int, momentum: float = 0.1, eps: float = 1e-5) -> None:
        super().__init__(event_shape=(dim,))
        self.momentum, self.eps = momentum, eps
        self.gain, self.shift = (nn.Parameter(torch.zeros(dim)) for _ in range(2))
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z)
        log_scale = self._log_scale(self.variance)
        x = (z - self.shift) * log_scale.exp() + self.mean
        return x, log_scale.sum().expand(z.shape[:-1])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x)
        mean, variance = self.mean, self.variance
        rows = x.reshape(-1, x.shape[-1])
        if self.training and rows.shape[0] > 1:
            variance, mean = torch.var_mean(rows, 0, correction=0)
            if torch.is_grad_enabled():  # without gradients it is not a training step
                with torch.no_grad():
                    unbiased = variance * (rows.shape[0] / (rows.shape[0] - 1))
                    self.mean.lerp_(mean, self.momentum)
                    self.variance.lerp_(unbiased, self.momentum)
        log_scale = self._log_scale(variance)
        z = (x - mean) * (-log_scale).exp() + self.shift
        return z, -log_scale.sum().expand(x.shape[:-1])

    def _log_scale(self, variance: Tensor) -> Tensor:
        return 0.5 * (variance + self.eps).log() - self.gain


def _by_channel(event_shape: tuple[int, ...] | None) -> tuple[tuple[int, ...], int]:
    """Shape (D,), or (C, 1, 1) for images, and the number of pixels that share a statistic."""
    assert event_shape is not None
    channels, *places = event_shape
    return (channels, *[1] * len(places)), math.prod(places)


@contextmanager
def initializing(module: nn.Module) -> Iterator[bool]:
    """Let the data that are mapped by `inverse` initialize each `ActNorm` that is not initialized.

    The context manager returns whether there is any.
    """
    actnorms = (part for part in module.modules() if isinstance(part, ActNorm))
    fresh = [part for part in actnorms if not part.initialized]
    for part in fresh:
        part.initializing = True
    try:
        yield bool(fresh)
    finally:
        for part in fresh:
            part.initializing = False
