"""A small U-Net as a vector field for images."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.errors import expect_counts
from cnf.fields.base import FIELDS, VectorField
from cnf.nets import Condition, attention_kernel, zero_


@FIELDS.register(
    "unet",
    example=lambda context_dim=0: UNetField((1, 4, 4), 4, context_dim, (1, 2), 1, frequencies=1),
)
class UNetField(VectorField):
    """A U-Net of residual blocks with group normalization, conditioned by FiLM in every block.

    An embedding of time and context scales and shifts the channels of every residual block. At
    low resolution each block is followed by self-attention. Between two scales, a strided
    convolution halves height and width on the way down, and on the way up nearest neighbors
    double them. The output of each block on the way down is an input of one on the way up.

    Its divergence has no closed form: the exact one takes C·H·W tangents in forward mode. It has
    second derivatives, so that likelihood can train it with Hutchinson's estimate.

    Source: Ronneberger et al. (2015), https://arxiv.org/abs/1505.04597; this form, Ho et al.
    (2020), https://arxiv.org/abs/2006.11239; FiLM, Perez et al. (2018),
    https://arxiv.org/abs/1709.07871, as in Dhariwal & Nichol (2021),
    https://arxiv.org/abs/2105.05233.

    >>> field = UNetField((1, 28, 28), width=8, context_dim=10)
    >>> field(torch.tensor(0.5), torch.zeros(5, 1, 28, 28), torch.zeros(5, 10)).shape
    torch.Size([5, 1, 28, 28])

    Args:
        shape: Shape of an image, (C, H, W).
        width: Channels at full resolution, a multiple of 4.
        context_dim: Size of the context; 0 for none.
        scales: Channels at each scale, as multiples of `width`. Each scale after the first has
            half the height and width of the one before.
        blocks: Number of residual blocks at each scale on the way down; there is one more on the
            way up.
        attention: Largest height and width in pixels at which blocks are followed by
            self-attention; 0 for none.
        frequencies: Number of Fourier features of time; 0 for t alone.
        zero_last: Whether v = 0 at the start, which is the identity flow.

    Raises:
        ValueError: The shape is not (C, H, W), height or width is not divisible by
            2^(scales - 1), or a size is out of range.
    """

    def __init__(
        self,
        shape: Sequence[int],
        width: int = 32,
        context_dim: int = 0,
        scales: Sequence[int] = (1, 2, 2),
        blocks: int = 2,
        attention: int = 16,
        frequencies: int = 8,
        zero_last: bool = True,
    ) -> None:
        super().__init__(shape, context_dim)
        _check(self.event_shape, width, scales, blocks)
        channels, *size = self.event_shape
        self.width, self.scales = width, tuple(scales)
        self.condition = Condition(frequencies, context_dim)
        self.embed = _Embedding(self.condition.size, 4 * width)
        self.first = nn.Conv2d(channels, width, 3, padding=1)

        def block(inputs: int, outputs: int, k: int) -> nn.Module:
            attends = max(size) / 2**k <= attention
            return _Block(inputs, outputs, self.embed.size, attends)

        widths, last = [width * scale for scale in scales], len(scales) - 1
        skips, at = [width], width  # channels of what the way up gets, and of the present tensor
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for k, wide in enumerate(widths):
            for _ in range(blocks):
                self.down.append(block(at, wide, k))
                skips.append(at := wide)
            if k < last:
                self.down.append(nn.Conv2d(wide, wide, 3, stride=2, padding=1))
                skips.append(wide)
        self.middle = nn.ModuleList([block(at, at, last), block(at, at, last)])
        for k, wide in reversed(list(enumerate(widths))):
            for _ in range(blocks + 1):
                self.up.append(block(at + skips.pop(), wide, k))
                at = wide
            if k:
                self.up.append(_Doubled(wide))
        self.norm = _group_norm(at)
        self.last = nn.Conv2d(at, channels, 3, padding=1)
        if zero_last:
            zero_(self.last)

    def extra_repr(self) -> str:
        widths = tuple(self.width * scale for scale in self.scales)
        return f"{super().extra_repr()}, channels {widths}"

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        batch, event = x.shape[:-3], x.shape[-3:]
        u = self.condition(t, x.flatten(-3), context)  # (features,) or (*batch, features)
        u = self.embed(u.flatten(0, -2) if u.dim() > 1 else u)
        with attention_kernel(x):
            v = self._velocity(x.reshape(-1, *event), u)
        return v.reshape(*batch, *event)

    def _velocity(self, x: Tensor, u: Tensor) -> Tensor:
        h = self.first(x)
        skips = [h]
        for layer in self.down:
            h = layer(h, u) if isinstance(layer, _Block) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, u)
        for layer in self.up:
            h = layer(torch.cat([h, skips.pop()], 1), u) if isinstance(layer, _Block) else layer(h)
        return self.last(F.silu(self.norm(h)))


def _check(shape: Sequence[int], width: int, scales: Sequence[int], blocks: int) -> None:
    if len(shape) != 3:
        raise ValueError(f"UNetField: expected a shape (C, H, W), got {tuple(shape)}")
    expect_counts("UNetField", width=width, blocks=blocks)
    if width % 4:
        raise ValueError(f"UNetField: expected width to be a multiple of 4, got {width}")
    if not isinstance(scales, Sequence):
        raise ValueError(
            "UNetField: expected scales to be the channels at each scale as multiples of width, "
            f"such as (1, 2) for two scales, got {scales!r}"
        )
    if not scales:
        raise ValueError("UNetField: expected at least one scale, got scales=()")
    expect_counts("UNetField", **{f"scales[{k}]": scale for k, scale in enumerate(scales)})
    divisor = 2 ** (len(scales) - 1)
    if any(side % divisor for side in shape[1:]):
        raise ValueError(
            f"UNetField: expected height and width divisible by {divisor} (2^(scales - 1) for "
            f"{len(scales)} scales), got {shape[1]} × {shape[2]}; pad the images, or take fewer "
            f"scales, such as scales={tuple(scales[: _most_scales(shape)])}"
        )


def _most_scales(shape: Sequence[int]) -> int:
    """How many times height and width can be halved, plus one."""
    sides = math.gcd(*shape[1:])
    return (sides & -sides).bit_length()


class _Embedding(nn.Module):
    """The embedding of time and context that all blocks share, (*, inputs) → (*, size)."""

    def __init__(self, inputs: int, size: int) -> None:
        super().__init__()
        self.size = size
        self.first, self.second = nn.Linear(inputs, size), nn.Linear(size, size)

    def forward(self, u: Tensor) -> Tensor:
        return F.silu(self.second(F.silu(self.first(u))))


class _Block(nn.Module):
    """A residual block whose second normalization is scaled and shifted by the embedding (FiLM).

    Args:
        inputs: Channels of the input.
        outputs: Channels of the output.
        embedding: Size of the embedding of time and context.
        attends: Whether self-attention follows.
    """

    def __init__(self, inputs: int, outputs: int, embedding: int, attends: bool) -> None:
        super().__init__()
        self.norm = _group_norm(inputs)
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * outputs)
        self.film_norm = _group_norm(outputs)
        self.residual = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        self.attention = _Attention(outputs) if attends else nn.Identity()

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        """Map features (N, C, H, W), given the embedding of all rows or of each, (N, E)."""
        h = self.convolution(F.silu(self.norm(x)))
        scale, shift = self.film(u)[..., None, None].chunk(2, -3)
        h = torch.addcmul(shift, self.film_norm(h), 1 + scale)
        return self.attention(self.shortcut(x) + self.residual(F.silu(h)))


class _Attention(nn.Module):
    """Self-attention among the pixels of an image, added to it; heads have about 32 channels.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.heads = math.gcd(channels, max(1, channels // 32))
        self.norm = _group_norm(channels)
        self.queries_keys_values = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.queries_keys_values(self.norm(x)).flatten(-2)
        tokens = tokens.unflatten(-2, (3, self.heads, -1)).transpose(-1, -2)  # (N, 3, H, HW, C/H)
        found = F.scaled_dot_product_attention(*tokens.unbind(-4))
        return x + self.out(found.transpose(-1, -2).reshape(x.shape))


class _Doubled(nn.Module):
    """Twice the height and width by nearest neighbors, and a convolution.

    Args:
        channels: Channels of input and output.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _group_norm(channels: int) -> nn.GroupNorm:
    """Normalization of at most 32 groups, each of at least four channels."""
    return nn.GroupNorm(math.gcd(32, max(1, channels // 4)), channels)
