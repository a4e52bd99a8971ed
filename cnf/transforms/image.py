"""Layers of image flows: squeezing, maps of each pixel, convolutional couplings."""

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cnf.nets import ACTIVATIONS, zero_
from cnf.printing import joined
from cnf.transforms.base import Transform
from cnf.transforms.coupling import built_conditioner, conditioner_output
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


class _ImageCoupling(TwoWayScheme):
    """A coupling of images: a network of convolutions determines the map of what changes.

    Args:
        channels: Number of channels C.
        kept: Number of channels that the conditioner is given.
        moved: Number of channels whose map it determines.
        transformer: This and the arguments after it are those of `ConvCoupling`.
    """

    def __init__(
        self,
        channels: int,
        kept: int,
        moved: int,
        transformer: Transformer,
        parametrize: Callable[[Tensor], Parameters] | None,
        hidden: Sequence[int],
        context_dim: int,
        activation: str,
        conditioner: Callable[[int, int], nn.Module] | None,
    ) -> None:
        super().__init__(channels, transformer, parametrize, context_dim, event_dims=3)
        self.activation = ACTIVATIONS[activation]
        who = type(self).__name__
        inputs, self.outputs = kept + context_dim, self.transformer.size * moved
        self.layers, self.conditioner = nn.ModuleList(), None
        if conditioner is not None:
            self.conditioner = built_conditioner(who, conditioner, inputs, self.outputs)
            return
        if len(hidden) != 2:
            raise ValueError(f"{who}: expected two widths in hidden, got {tuple(hidden)}")
        first, second = hidden
        self.layers.append(nn.Conv2d(inputs, first, 3, padding=1))
        self.layers.append(nn.Conv2d(first, second, 1))
        self.layers.append(nn.Conv2d(second, self.outputs, 3, padding=1))
        zero_(self.layers[-1])

    def _transformed(
        self,
        direction: Callable[..., tuple[Tensor, Tensor]],
        value: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        images = value.reshape(-1, *value.shape[-3:])
        if context is not None:
            context = context.expand(*value.shape[:-3], -1).reshape(
                images.shape[0], self.context_dim
            )
        images, ladj = self._of_images(direction, images, context)
        return images.reshape(value.shape), ladj.flatten(1).sum(1).reshape(value.shape[:-3])

    @abstractmethod
    def _of_images(
        self,
        direction: Callable[..., tuple[Tensor, Tensor]],
        images: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The images (N, C, H, W) under the map, and the log-slopes of the pixels that change.

        Args:
            direction: The map's `forward` or `inverse`.
            images: Shape (N, C, H, W).
            context: Shape (N, context_dim), or None.
        """

    def _conditioned(self, kept: Tensor, context: Tensor | None) -> Parameters:
        """The map's parameters given what is kept, and the context as constant planes."""
        if context is not None:
            planes = context[:, :, None, None].expand(-1, -1, *kept.shape[-2:])
            kept = torch.cat([kept, planes], 1)
        raw = self._net(kept).unflatten(1, (self.transformer.size, -1)).movedim(1, 0)
        return self._constrained(raw, kept)

    def _net(self, x: Tensor) -> Tensor:
        if self.conditioner is not None:
            return conditioner_output(type(self).__name__, self.conditioner, x, self.outputs)
        *inner, last = self.layers
        for layer in inner:
            x = self.activation.function(layer(x))
        return last(x)

    def extra_repr(self) -> str:
        hidden = getattr(self.conditioner, "hidden", None)
        if self.conditioner is None:
            hidden = tuple(layer.out_channels for layer in self.layers[:-1])  # pyright: ignore
        return joined(super().extra_repr(), f"hidden {hidden}" if hidden else "")


class ConvCoupling(_ImageCoupling):
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
        conditioner: Function from the numbers of input and output channels to a network
            (N, inputs, H, W) → (N, outputs, H, W), such as `cnf.nets.ResidualConvNet`; it replaces
            that of `hidden` and `activation`. If its last layer is zero at the start, the coupling
            is the identity at the start.

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
        conditioner: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        if not 0 < keep < channels:
            raise ValueError(f"ConvCoupling: expected 0 < keep < {channels}, got {keep}")
        moved = channels - keep
        super().__init__(
            channels, keep, moved, transformer, parametrize, hidden, context_dim, activation,
            conditioner,
        )  # fmt: skip
        self.sizes = [keep, moved]

    def _of_images(
        self,
        direction: Callable[..., tuple[Tensor, Tensor]],
        images: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        kept, moved = images.split(self.sizes, 1)
        moved, ladj = direction(moved, *self._conditioned(kept, context))
        return torch.cat([kept, moved], 1), ladj


class CheckerboardCoupling(_ImageCoupling):
    """A coupling of images: every other pixel and the context determine the map of the rest.

    The conditioner is given the image with zeros at the pixels that change.

    Source: Dinh et al. (2017), RealNVP, https://arxiv.org/abs/1605.08803.

    Args:
        channels: Number of channels C.
        odd: Whether pixels (i, j) with odd i + j are left unchanged, else those with even i + j.
        transformer: The elementwise map; affine if None.
        parametrize: Function from the conditioner's output, of shape
            (transformer.size, N, C, H, W), to the map's parameters; `transformer.parametrize` if
            None.
        hidden: Channels of the conditioner's two hidden layers.
        context_dim: Size of the context, which is appended as constant channels; 0 for none.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        conditioner: A function that makes another network, see `ConvCoupling`.

    Raises:
        ValueError: There are not two widths.
    """

    def __init__(
        self,
        channels: int,
        odd: bool = False,
        transformer: Transformer = None,
        *,
        parametrize: Callable[[Tensor], Parameters] | None = None,
        hidden: Sequence[int] = (64, 64),
        context_dim: int = 0,
        activation: str = "relu",
        conditioner: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        super().__init__(
            channels, channels, channels, transformer, parametrize, hidden, context_dim,
            activation, conditioner,
        )  # fmt: skip
        self.odd = odd

    def _of_images(
        self,
        direction: Callable[..., tuple[Tensor, Tensor]],
        images: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        height, width = (torch.arange(n, device=images.device) for n in images.shape[-2:])
        kept = (height[:, None] + width) % 2 == self.odd
        parameters = self._conditioned(images * kept, context)
        moved, ladj = direction(images, *parameters)
        return torch.where(kept, images, moved), torch.where(kept, 0.0, ladj)

    def extra_repr(self) -> str:
        return joined(super().extra_repr(), "odd kept" if self.odd else "even kept")
