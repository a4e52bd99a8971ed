"""Convolutional vector fields for images, as in FFJORD."""

from collections.abc import Sequence

from torch import Tensor, nn

from cnf.errors import expect_choice
from cnf.fields.base import FIELDS, VectorField
from cnf.fields.concat import MODULATIONS
from cnf.nets import ACTIVATIONS, Condition, linear_sizes, zero_


@FIELDS.register("conv")
class ConvField(VectorField):
    """A stack of 3×3 convolutions whose channels are scaled and shifted by time and context.

    Its divergence has no closed form. To train it by likelihood, use Hutchinson's estimate, as the
    exact divergence takes C·H·W forward-mode directions.

    Source: Grathwohl et al. (2019), FFJORD, https://arxiv.org/abs/1810.01367.

    Args:
        shape: Shape of an image, (C, H, W).
        hidden: Channels of the hidden layers.
        context_dim: Size of the context; 0 for none.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        frequencies: Number of Fourier features of time; 0 for t alone.
        layer: How time and context modulate the layers, a name in
            `cnf.fields.concat.MODULATIONS`.
        strides: Stride of each layer, including the output layer: 1, 2 to halve height and width,
            or -2 to double them by a transposed convolution; all 1 if None. There must be as many
            2 as -2.
        zero_last: Whether v = 0 at the start, which is the identity flow.

    Raises:
        ValueError: The shape is not (C, H, W), the strides do not fit it, or layer="ignore" is
            combined with a context.
    """

    def __init__(
        self,
        shape: Sequence[int],
        hidden: Sequence[int] = (64, 64, 64),
        context_dim: int = 0,
        activation: str = "softplus",
        frequencies: int = 0,
        layer: str = "concatsquash",
        strides: Sequence[int] | None = None,
        zero_last: bool = False,
    ) -> None:
        super().__init__(shape, context_dim)
        if layer == "ignore" and context_dim:
            raise ValueError("ConvField: layer='ignore' takes no context; choose another layer")
        if len(shape) != 3:
            raise ValueError(f"ConvField: expected a shape (C, H, W), got {tuple(shape)}")
        channels, height, width = shape
        sizes = linear_sizes([channels, *hidden, channels])
        strides = [1] * len(sizes) if strides is None else list(strides)
        self._check(strides, len(sizes), height, width)
        self.condition = Condition(frequencies, context_dim)
        self.activation = ACTIVATIONS[activation]
        self.layers = nn.ModuleList(
            _convolution(i, o, stride) for (i, o), stride in zip(sizes, strides, strict=True)
        )
        self.modulations = nn.ModuleList(
            MODULATIONS[layer](self.condition.size, o) for _, o in sizes
        )
        if zero_last:
            zero_(self.layers[-1])
            zero_(self.modulations[-1])

    def extra_repr(self) -> str:
        hidden = tuple(layer.out_channels for layer in self.layers[:-1])  # pyright: ignore
        return f"{super().extra_repr()}, hidden {hidden}"

    @staticmethod
    def _check(strides: Sequence[int], layers: int, height: int, width: int) -> None:
        for stride in strides:
            expect_choice("ConvField", "stride", stride, (1, 2, -2))
        halvings = strides.count(2)
        if len(strides) != layers or halvings != strides.count(-2):
            raise ValueError(
                f"ConvField: expected {layers} strides (hidden and output layers) with as many "
                f"2 as -2, got {tuple(strides)}"
            )
        if height % 2**halvings or width % 2**halvings:
            raise ValueError(
                f"ConvField: expected an image divisible by {2**halvings} (the strides), got "
                f"{height} × {width}"
            )

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch = x.shape[:-3]
        u = self.condition(t, x.flatten(-3), context)  # (features,) or (*batch, features)
        u = u.flatten(0, -2) if u.dim() > 1 else u
        h = x.reshape(-1, *x.shape[-3:])
        for k, (layer, modulation) in enumerate(zip(self.layers, self.modulations, strict=True)):
            h = layer(h)
            scale, shift = modulation(u)
            if scale is not None:
                h = h * scale[..., None, None]
            if shift is not None:
                h = h + shift[..., None, None]
            if k < len(self.layers) - 1:
                h = self.activation.function(h)
        return h.reshape(*batch, *x.shape[-3:])


def _convolution(inputs: int, outputs: int, stride: int) -> nn.Module:
    if stride == 1:
        return nn.Conv2d(inputs, outputs, 3, padding=1)
    kind = nn.Conv2d if stride == 2 else nn.ConvTranspose2d
    return kind(inputs, outputs, 4, stride=2, padding=1)
