"""Normalization by statistics of the first batch, or of every batch."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cnf.transforms.base import TRANSFORMS, Transform


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
        shape, self.places = by_channel(event_shape)
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


def by_channel(event_shape: int | Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Shape (D,), or (C, 1, 1) for images, and the number of pixels that share a statistic."""
    channels, *places = (event_shape,) if isinstance(event_shape, int) else event_shape
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
