"""Continuous models of images by networks that only images have."""

from collections.abc import Mapping, Sequence
from typing import Any

from cnf.dynamics.solver import Solver
from cnf.fields import NullContext, Preconditioned, UNetField
from cnf.flow import Flow
from cnf.models.build import MODELS, Dequantize, Preprocess, assembled
from cnf.transforms.continuous import Continuous, Recipe


@MODELS.register("unet")
def unet(
    shape: Sequence[int],
    *,
    context: int = 0,
    width: int = 32,
    scales: Sequence[int] = (1, 2, 2),
    blocks: int = 2,
    attention: int = 16,
    frequencies: int = 8,
    solver: Solver | Mapping[str, Any] | str | None = None,
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
    null_context: bool = False,
) -> Flow:
    """Continuous normalizing flow of images by a small U-Net, for training by flow matching.

    The field is preconditioned for standardized data, see `cnf.fields.Preconditioned`, and starts
    as the flow of a Gaussian. Likelihood training uses one Hutchinson probe. The exact trace of
    `log_prob` takes C·H·W tangents for each evaluation, of which the call tells the time if it is
    long; `log_prob(x, divergence=Hutchinson(probes=8))` estimates it.

    Source: see `cnf.fields.UNetField`.

    Args:
        shape: Shape of an image, (C, H, W); H and W are divisible by 2^(scales - 1).
        context: Size of the context; 0 for none.
        width: Channels at full resolution, a multiple of 4.
        scales: Channels at each scale, as multiples of `width`.
        blocks: Number of residual blocks at each scale.
        attention: Largest height and width in pixels at which blocks are followed by
            self-attention; 0 for none.
        frequencies: Number of Fourier frequencies of time.
        solver: A `Solver` or its arguments; by default dopri5 at 1e-5.
        preprocess: A name in `cnf.transforms.PREPROCESSING`, a mapping with a "name" and options,
            an instance, or a list of these, applied to the data in this order; fitted at the first
            `cnf.fit`. None for none.
        context_preprocess: "standardize", fitted likewise to the context, or None.
        dequantization: "uniform" or "variational", a mapping with such a "name" and options, or an
            instance, for whole numbers such as pixels; None for real numbers.
        null_context: Whether a learned vector replaces a missing context, as guidance requires.

    Returns:
        A `Flow` whose `field` is the vector field.

    Raises:
        ValueError: A size does not fit, or a name is unknown.
    """
    net = UNetField(shape, width, context, scales, blocks, attention, frequencies)
    field = Preconditioned(net)
    transform = Continuous(
        NullContext(field) if null_context else field,
        Solver.of(solver),
        recipe=Recipe(divergence="hutchinson"),
    )
    return assembled(transform, field.event_shape, preprocess, context_preprocess, dequantization)
