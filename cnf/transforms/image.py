"""Layers of image flows: squeezing, maps of each pixel, convolutional couplings."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cnf.nets import ACTIVATIONS, zero_
from cnf.transforms.base import Transform
from cnf.transforms.elementwise import Parameters, Transformer, TwoWayScheme
from cnf.transforms.recompute import Direction


class Squeeze(Transform):
    """The permutation (4C, H, W) → (C, 2H, 2W), base → data; log|det| = 0.

    Four channels become a square of four pixels.

    Source: Dinh et al. (2017), RealNVP, https://arxiv.org/abs/1605.08803.
    """

    def __init__(self) -> None:
        super().__init__(event_dims=3)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        squares = z.unflatten(-3, (-1, 2, 2)).movedim((-4, -3), (-3, -1))  # (C, H, 2, W, 2)
        return squares.flatten(-2).flatten(-3, -2), z.new_zeros(z.shape[:-3])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        squares = x.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
        z = squares.movedim((-3, -1), (-4, -3)).flatten(-5, -3)
        return z, x.new_zeros(x.shape[:-3])


class PerPixel(Transform):
    """A transform of vectors, applied to the channels of each pixel; with `LU` a 1×1 convolution.

    Args:
        transform: An unconditional transform of vectors of C numbers.

    Raises:
        ValueError: The transform is conditional, or one of images.
    """

    def __init__(self, transform: Transform) -> None:
        if transform.event_dims != 1 or transform.context_dim:
            raise ValueError(
                f"PerPixel: expected an unconditional transform of vectors, got {transform}"
            )
        super().__init__(event_dims=3)
        self.recomputable = transform.recomputable
        self.transform = transform

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._at_pixels(self.transform.forward, z)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._at_pixels(self.transform.inverse, x)

    def _at_pixels(
        self, direction: Callable[[Tensor], tuple[Tensor, Tensor]], value: Tensor
    ) -> tuple[Tensor, Tensor]:
        value, ladj = direction(value.movedim(-3, -1))
        return value.movedim(-1, -3), ladj.sum((-2, -1))

    def extra_repr(self) -> str:
        return repr(self.transform)


class OnChannels(Transform):
    """A transform of the first channels, which leaves the others unchanged.

    Args:
        transform: A transform of images.
        channels: Number of channels that it transforms.
    """

    def __init__(self, transform: Transform, channels: int) -> None:
        super().__init__(transform.event_dims, transform.context_dim)
        self.optional_context = transform.optional_context
        self.recomputable = transform.recomputable
        self.transform, self.channels = transform, channels

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._on_first(self.transform.forward, z, context)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._on_first(self.transform.inverse, x, context)

    def _on_first(
        self, direction: Direction, value: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        first, rest = value.tensor_split([self.channels], -3)
        first, ladj = direction(first, context)
        return torch.cat([first, rest], -3), ladj

    def extra_repr(self) -> str:
        return f"{self.channels} channels, {self.transform}"


class ConvCoupling(TwoWayScheme):
    """A coupling of images: the first channels and the context determine the map of the others.

    Source: Dinh et al. (2017), RealNVP, https://arxiv.org/abs/1605.08803; the conditioner is that
    of Kingma & Dhariwal (2018), Glow, https://arxiv.org/abs/1807.03039.

    Args:
        channels: Number of channels C.
        keep: Number of first channels that are left unchanged.
        transformer: The elementwise map; affine if None.
        parametrize: Function from the conditioner's output, of shape
            (transformer.size, N, C - keep, H, W), to the map's parameters;
            `transformer.parametrize` if None.
        hidden: Channels of the conditioner's two hidden layers.
        context_dim: Size of the context, which is appended as constant channels; 0 for none.
        activation: A name in `cnf.nets.ACTIVATIONS`.

    Raises:
        ValueError: `keep` is not between 1 and C - 1, or there are not two widths.
    """

    def __init__(
        self,
        channels: int,
        keep: int,
        transformer: Transformer = None,
        *,
        parametrize: Callable[[Tensor], Parameters] | None = None,
        hidden: Sequence[int] = (64, 64),
        context_dim: int = 0,
        activation: str = "relu",
    ) -> None:
        if not 0 < keep < channels:
            raise ValueError(f"ConvCoupling: expected 0 < keep < {channels}, got {keep}")
        if len(hidden) != 2:
            raise ValueError(f"ConvCoupling: expected two widths in hidden, got {tuple(hidden)}")
        super().__init__(channels, transformer, parametrize, context_dim, event_dims=3)
        self.sizes = [keep, channels - keep]
        self.activation = ACTIVATIONS[activation]
        first, second = hidden
        self.layers = nn.ModuleList(
            [
                nn.Conv2d(keep + context_dim, first, 3, padding=1),
                nn.Conv2d(first, second, 1),
                nn.Conv2d(second, self.transformer.size * self.sizes[1], 3, padding=1),
            ]
        )
        zero_(self.layers[-1])

    def _transformed(
        self,
        direction: Callable[..., tuple[Tensor, Tensor]],
        value: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        images = value.reshape(-1, *value.shape[-3:])
        kept, moved = images.split(self.sizes, 1)
        conditioning = kept
        if context is not None:
            flat = context.expand(*value.shape[:-3], -1).reshape(images.shape[0], self.context_dim)
            planes = flat[:, :, None, None].expand(-1, -1, *images.shape[-2:])
            conditioning = torch.cat([kept, planes], 1)
        raw = self._net(conditioning).unflatten(1, (self.transformer.size, -1)).movedim(1, 0)
        moved, ladj = direction(moved, *self._constrained(raw, value))
        images = torch.cat([kept, moved], 1)
        return images.reshape(value.shape), ladj.flatten(1).sum(1).reshape(value.shape[:-3])

    def extra_repr(self) -> str:
        hidden = tuple(layer.out_channels for layer in self.layers[:-1])  # pyright: ignore
        return f"{super().extra_repr()}, hidden {hidden}"

    def _net(self, x: Tensor) -> Tensor:
        *inner, last = self.layers
        for layer in inner:
            x = self.activation.function(layer(x))
        return last(x)
