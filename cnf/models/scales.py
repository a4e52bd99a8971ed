"""Flows of images at several scales: as in RealNVP and FFJORD, and as in Glow."""

from collections.abc import Callable, Sequence

from cnf.errors import expect_counts
from cnf.transforms.base import Compose, Inverse, Transform
from cnf.transforms.image import OnChannels, PerPixel, Squeeze
from cnf.transforms.linear import LU
from cnf.transforms.normalization import ActNorm

SMALLEST = 4  # pixels of a side at the last scale

Part = Callable[[Sequence[int]], Transform]  # from the shape of an image
Halves = Callable[[int, int], Transform]  # from the numbers of channels and of those kept


def at_scales(
    who: str,
    shape: Sequence[int],
    scales: int | None,
    before: Part,
    after: Part | None = None,
    last: Part | None = None,
) -> Transform:
    """A flow of images with one part, or two, at each scale.

    From data to base: at every scale but the last, a part, a squeeze to half of the height and
    width, another part, and half of the channels are factored out; at the last, one part.

    Source: Dinh et al. (2017), RealNVP, https://arxiv.org/abs/1605.08803; with ODEs for parts,
    Grathwohl et al. (2019), FFJORD, https://arxiv.org/abs/1810.01367, and its code.

    Args:
        who: Name of the model, for messages.
        shape: Shape of an image, (C, H, W).
        scales: Number of scales; None for as many as leave no side below 4 pixels.
        before: Makes the part before a squeeze, of images of a shape.
        after: Makes the part after it; `before` if None.
        last: Makes the part of the last scale; `before` if None.

    Raises:
        ValueError: The shape is not that of an image, or height and width cannot be halved so
            often.
    """
    expect_counts(who, scales=scales)
    _expect_image(who, shape)
    if scales is None:
        scales = max(1, (min(shape[1:]) // SMALLEST).bit_length())
    _expect_halves(who, shape, "scales", scales, squeezes=scales - 1)
    after, last = after or before, last or before

    def scale(shape: Sequence[int], left: int) -> Transform:
        """The flow at one scale, those of smaller images inside it on half of the channels."""
        if left == 1:
            return last(shape)
        channels, height, width = shape
        kept = 2 * channels  # of the four times as many after the squeeze
        half = (height // 2, width // 2)
        inner = OnChannels(scale((kept, *half), left - 1), kept)
        parts = [inner, after((4 * channels, *half)), Squeeze(), before(shape)]
        return Compose([Inverse(Squeeze()), *parts])

    return scale(tuple(shape), scales)


def at_levels(
    who: str,
    shape: Sequence[int],
    levels: int | None,
    layers: int,
    coupling: Halves,
    prior: Halves,
) -> Transform:
    """A flow of images by Glow's steps of actnorm, 1×1 convolution and coupling.

    From data to base, each level squeezes the image, applies its steps, and factors out half of
    the channels, which are modeled given the other half; that half goes on to the next level.

    Source: Kingma & Dhariwal (2018), Glow, https://arxiv.org/abs/1807.03039.

    Args:
        who: Name of the model, for messages.
        shape: Shape of an image, (C, H, W).
        levels: Number of levels; 2 if None.
        layers: Number of steps in each.
        coupling: Makes the coupling of a step, from the numbers of channels and of those kept.
        prior: Likewise what models the channels that are factored out.

    Raises:
        ValueError: The shape is not that of an image, or height and width cannot be halved so
            often.
    """
    levels = 2 if levels is None else levels
    expect_counts(who, levels=levels, layers=layers)
    _expect_image(who, shape)
    _expect_halves(who, shape, "levels", levels, squeezes=levels)

    def level(shape: Sequence[int], left: int) -> Transform:
        """One level, those of smaller images inside it on half of the channels."""
        channels, height, width = 4 * shape[0], shape[1] // 2, shape[2] // 2
        kept = channels // 2
        steps: list[Transform] = [Inverse(Squeeze())]
        if left > 1:
            inner = OnChannels(level((kept, height, width), left - 1), kept)
            steps += [inner, prior(channels, kept)]
        for _ in range(layers):
            rotation = PerPixel(LU(channels, rotated=True))
            steps += [coupling(channels, kept), rotation, ActNorm((channels, height, width))]
        return Compose([*steps, Squeeze()])

    return level(shape, levels)


def _expect_image(who: str, shape: Sequence[int]) -> None:
    if len(shape) != 3:
        raise ValueError(f"{who}: expected a shape (C, H, W), got {tuple(shape)}")


def _expect_halves(who: str, shape: Sequence[int], name: str, count: int, squeezes: int) -> None:
    """Raise ValueError unless height and width can be halved by every squeeze.

    Args:
        who: Name of the model, for the message.
        shape: Shape of an image, (C, H, W).
        name: The option that says how often the image is squeezed, "scales" or "levels".
        count: Its value.
        squeezes: How often that is.
    """
    possible = max(k for k in range(squeezes + 1) if not any(size % 2**k for size in shape[1:]))
    if possible == squeezes:
        return
    fewer = count - squeezes + possible
    remedy = f"take {name}={fewer}, or " if fewer else ""
    raise ValueError(
        f"{who}: expected height and width divisible by {2**squeezes} for {count} {name}, got "
        f"{shape[1]} × {shape[2]}; {remedy}pad or crop the images"
    )
