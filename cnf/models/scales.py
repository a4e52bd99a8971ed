"""Continuous flows of images at several scales, as in FFJORD."""

from collections.abc import Callable, Sequence

from cnf.errors import expect_counts
from cnf.transforms.base import Compose, Inverse, Transform
from cnf.transforms.continuous import Continuous
from cnf.transforms.image import OnChannels, Squeeze

SMALLEST = 4  # pixels of a side at the last scale

Ode = Callable[[Sequence[int]], Continuous]


def at_scales(who: str, shape: Sequence[int], scales: int | None, ode: Ode) -> Transform:
    """A continuous flow of images with a `Continuous`, or two, at each scale.

    From data to base: at every scale but the last, an ODE, a squeeze to half of the height and
    width, another ODE, and half of the channels are factored out; at the last, one ODE. With one
    scale it is a single `Continuous`.

    Source: Grathwohl et al. (2019), FFJORD, https://arxiv.org/abs/1810.01367, and its code.

    Args:
        who: Name of the model, for messages.
        shape: Shape of an image, (C, H, W).
        scales: Number of scales; None for as many as leave no side below 4 pixels.
        ode: Makes the ODE of images of a shape.

    Raises:
        ValueError: The shape is not that of an image, or height and width cannot be halved so
            often.
    """
    expect_counts(who, scales=scales)
    if len(shape) != 3:
        raise ValueError(f"{who}: expected a shape (C, H, W), got {tuple(shape)}")
    if scales is None:
        scales = max(1, (min(shape[1:]) // SMALLEST).bit_length())
    factor = 2 ** (scales - 1)
    if any(size % factor for size in shape[1:]):
        halved = max(k for k in range(scales) if not any(size % 2**k for size in shape[1:]))
        raise ValueError(
            f"{who}: expected height and width divisible by {factor} for {scales} scales, got "
            f"{shape[1]} × {shape[2]}; take scales={halved + 1}, or pad or crop the images"
        )
    return _scale(tuple(shape), scales, ode)


def _scale(shape: Sequence[int], scales: int, ode: Ode) -> Transform:
    """The flow at one scale, those of smaller images inside it on half of the channels."""
    if scales == 1:
        return ode(shape)
    channels, height, width = shape
    kept = 2 * channels  # of the four times as many after the squeeze
    half = (height // 2, width // 2)
    inner = _scale((kept, *half), scales - 1, ode)
    within = [OnChannels(inner, kept), ode((4 * channels, *half))]
    return Compose([Inverse(Squeeze()), *within, Squeeze(), ode(shape)])
