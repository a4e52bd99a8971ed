"""Continuous models of unit vectors and of angles."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from cnf.distributions import Base, UniformAngles, UniformSphere
from cnf.dynamics.solver import Solver
from cnf.errors import is_count
from cnf.fields import MLPField, OnSphere, VectorField
from cnf.flow import Flow
from cnf.models.build import MODELS
from cnf.models.continuous import TIGHT, of_field
from cnf.transforms.base import Transform
from cnf.transforms.continuous import Recipe
from cnf.transforms.manifolds import UnitVectors, WrappedAngles


@MODELS.register("sphere")
def sphere(
    ambient: int = 3,
    *,
    context: int = 0,
    hidden: Sequence[int] = (64, 64, 64, 64),
    activation: str = "silu",
    frequencies: int = 4,
    fourier: int = 32,
    fourier_scale: float = 5.0,
    solver: Solver | Mapping[str, Any] | str | None = None,
    context_preprocess: str | None = "standardize",
    null_context: bool = False,
) -> Flow:
    r"""Continuous flow on the unit sphere, from the uniform distribution.

    Data are unit vectors; densities are with respect to the sphere's area, so that the uniform one
    has a log-density of -log 4π where D = 3. `FlowMatching` takes geodesic paths,
    `MaximumLikelihood` the Riemannian divergence; see `cnf.fields.OnSphere`. Samples are off the
    sphere by the solver's error. A solver whose steps are the model (discrete=True) is not for
    this flow, as its steps leave the sphere.

    Source: Chen & Lipman (2024), https://arxiv.org/abs/2302.03660.

    >>> flow = sphere()
    >>> x = flow.sample(5)
    >>> flow.log_prob(x).shape
    torch.Size([5])

    Args:
        ambient: Number of coordinates D of a unit vector; 3 for the surface of a ball.
        context: Size of the context; 0 for none.
        hidden: Widths of the field's hidden layers.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        frequencies: Number of Fourier frequencies of time.
        fourier: Number of Fourier features of x, which sharp densities need.
        fourier_scale: RMS angular frequency of these at the start, in radians per unit of x:
            details of a size of 1/fourier_scale are learned fast.
        solver: A `Solver` or its arguments; by default dopri5 at 1e-6, and 1e-5 while likelihood
            trains it.
        context_preprocess: "standardize", fitted to the context at the first `cnf.fit`, or None.
        null_context: Whether a learned vector replaces a missing context, as guidance requires.

    Returns:
        A `Flow` whose `field` is the vector field.

    Raises:
        ValueError: A size is too small (circles are tori of one angle), or a name is unknown.
    """
    _expect_size("sphere", "ambient", ambient, 3, "; a circle is cnf.models.torus(1)")
    net = MLPField(
        ambient,
        hidden,
        context,
        activation,
        frequencies,
        fourier=fourier,
        fourier_scale=fourier_scale,
    )
    return _continuous(
        OnSphere(net), UniformSphere(ambient), UnitVectors(ambient), solver, context_preprocess,
        null_context,
    )  # fmt: skip


@MODELS.register("torus")
def torus(
    angles: int,
    *,
    period: float = 2 * math.pi,
    context: int = 0,
    hidden: Sequence[int] = (64, 64, 64, 64),
    activation: str = "silu",
    frequencies: int = 4,
    fourier: int = 4,
    solver: Solver | Mapping[str, Any] | str | None = None,
    context_preprocess: str | None = "standardize",
    null_context: bool = False,
) -> Flow:
    """Continuous flow of angles, by a periodic field from the uniform distribution.

    `FlowMatching` takes the shorter way around each circle. The discrete flows of angles are
    `nsf` and `nsf_ar` with a period.

    Source: Chen & Lipman (2024), https://arxiv.org/abs/2302.03660.

    >>> torus(2).sample(5).abs().max() <= math.pi
    tensor(True)

    Args:
        angles: Number of angles D.
        period: Length of each circle; samples are in [-period/2, period/2), data any numbers.
        context: Size of the context; 0 for none.
        hidden: Widths of the field's hidden layers.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        frequencies: Number of Fourier frequencies of time.
        fourier: Number of harmonics of each angle, which sharp densities need.
        solver: A `Solver` or its arguments; by default dopri5 at 1e-6, and 1e-5 while likelihood
            trains it.
        context_preprocess: "standardize", fitted to the context at the first `cnf.fit`, or None.
        null_context: Whether a learned vector replaces a missing context, as guidance requires.

    Returns:
        A `Flow` whose `field` is the vector field.

    Raises:
        ValueError: A size is too small, the period is not positive, or a name is unknown.
    """
    _expect_size("torus", "angles", angles, 1)
    net = MLPField(
        angles, hidden, context, activation, frequencies, fourier=fourier, period=period
    )
    return _continuous(
        net, UniformAngles(angles, period), WrappedAngles(angles, period), solver,
        context_preprocess, null_context,
    )  # fmt: skip


def _expect_size(who: str, name: str, size: Any, least: int, hint: str = "") -> None:
    if not is_count(size) or size < least:
        raise ValueError(
            f"{who}: expected {name} to be a whole number >= {least}, got {size!r}{hint}"
        )


def _continuous(
    field: VectorField,
    base: Base,
    preprocess: Transform,
    solver: Solver | Mapping[str, Any] | str | None,
    context_preprocess: str | None,
    null_context: bool,
) -> Flow:
    recipe = Recipe(solver=Solver() if solver is None else None)
    solver = Solver.of(solver or TIGHT)
    return of_field(
        field, solver, preprocess, context_preprocess, None, recipe, null_context, base
    )
