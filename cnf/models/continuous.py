"""Continuous models: a vector field, a solver, and defaults for training by likelihood."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cnf.distributions import Base
from cnf.dynamics.solver import Solver
from cnf.errors import expect_counts, expect_not_negative, expect_positive
from cnf.fields import (
    ConvField,
    EndTime,
    FlowMap,
    MLPField,
    NullContext,
    Piecewise,
    PotentialField,
    Preconditioned,
    VectorField,
)
from cnf.flow import Flow
from cnf.models.build import MODELS, Dequantize, Preprocess, assembled
from cnf.models.scales import Part, at_scales
from cnf.transforms.base import Transform
from cnf.transforms.continuous import Continuous, Recipe

TIGHT = {"rtol": 1e-6, "atol": 1e-6}  # by default, of samples and densities


@MODELS.register("cnf")
def cnf(
    dim: int | None = None,
    *,
    context: int = 0,
    hidden: Sequence[int] = (64, 64, 64, 64),
    layers: int = 1,
    activation: str = "silu",
    frequencies: int = 4,
    fourier: int | None = None,
    solver: Solver | Mapping[str, Any] | str | None = None,
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
    shape: Sequence[int] | None = None,
    null_context: bool = False,
    flow_map: bool = False,
    divergence_head: bool = False,
) -> Flow:
    """Continuous normalizing flow: a time-conditioned MLP with its exact closed-form trace.

    The field is preconditioned for standardized data, see `cnf.fields.Preconditioned`.

    Args:
        dim: Number of variables D.
        context: Size of the context; 0 for none.
        hidden: Widths of the field's hidden layers (channels, for images).
        layers: Number of blocks, each with a field of its own.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        frequencies: Number of Fourier frequencies of time.
        fourier: Number of Fourier features of x, which sharp densities need. If None, 32 for
            D <= 4 and 0 above, where the exact trace would take D more products.
        solver: A `Solver` or its arguments; by default dopri5 at 1e-6, and 1e-5 while likelihood
            trains it.
        preprocess: A name in `cnf.transforms.PREPROCESSING`, a mapping with a "name" and options,
            an instance, or a list of these, applied to the data in this order; fitted at the first
            `cnf.fit`. None for none.
        context_preprocess: "standardize", fitted likewise to the context, or None.
        dequantization: "uniform" or "variational", a mapping with such a "name" and options, or an
            instance, for whole numbers such as pixels; None for real numbers.
        shape: Shape (C, H, W) of images, instead of dim, for a convolutional field.
        null_context: Whether a learned vector replaces a missing context, as guidance requires.
        flow_map: Whether the field also gives average velocities, which `SelfDistillation`,
            `MeanFlow` or `Shortcut` trains, and the default solver takes 4 steps of them, whose
            density is exact. See `FlowMap`.
        divergence_head: Whether a flow map has a second network for its average divergence, by
            which `log_prob(x, divergence="learned")` estimates the density without tangents.

    Returns:
        A `Flow` whose `field` is the vector field.

    Raises:
        ValueError: Not exactly one of dim and shape is given, a size is below 1, a name is
            unknown, a flow map has several layers, or a head is asked for without a flow map.
    """
    if flow_map and layers > 1:
        raise ValueError(f"cnf: expected one layer of a flow map, got layers={layers}")
    if divergence_head and not flow_map:
        raise ValueError("cnf: expected flow_map=True where divergence_head=True, got False")
    conditions = context + flow_map  # one for the length of a step

    def block() -> VectorField:
        if shape is not None:
            return ConvField(shape, hidden, conditions, activation, frequencies)
        assert dim is not None
        waves = (32 if dim <= 4 else 0) if fourier is None else fourier
        return MLPField(dim, hidden, conditions, activation, frequencies, fourier=waves)

    field = Preconditioned(_blocks(block, layers))
    if flow_map:
        field = FlowMap(field, block() if divergence_head else None)
        default, recipe = {"method": "flow-map", "steps": 4}, Recipe()
    else:
        default = TIGHT
        recipe = Recipe(solver=Solver() if solver is None else None)
    solver = Solver.of(solver or default)
    return of_field(
        field, solver, preprocess, context_preprocess, dequantization, recipe, null_context
    )


@MODELS.register("ffjord")
def ffjord(
    dim: int | None = None,
    *,
    context: int = 0,
    hidden: Sequence[int] = (64, 64, 64),
    layers: int | None = None,
    activation: str | None = None,
    end_time: float | None = None,
    solver: Solver | Mapping[str, Any] | str | None = None,
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
    shape: Sequence[int] | None = None,
    scales: int | None = None,
    null_context: bool = False,
) -> Flow:
    """FFJORD: concatsquash layers, a trained end time, dopri5 at 1e-5 with the adjoint.

    The defaults are those of the paper for 2-D densities, except that data are standardized, and
    for images: at each scale but the last, two blocks, a squeeze, two more, and half of the
    channels are factored out; the fields are convolutions with softplus, to each of which t is
    joined as a channel. Likelihood training uses one Hutchinson probe for each ODE, evaluation the
    exact trace, which takes C·H·W directions for images: an estimate is asked for by
    `log_prob(x, divergence=Hutchinson(probes=8))`.

    Source: Grathwohl et al. (2019), FFJORD, https://arxiv.org/abs/1810.01367.

    Args:
        dim: Number of variables D.
        context: Size of the context; 0 for none.
        hidden: Widths of the field's hidden layers (channels, for images).
        layers: Number of blocks, each with a field of its own: 1 for vectors and 2 for images if
            None. Of images, in each ODE: before and after each squeeze, and at the last scale.
        activation: A name in `cnf.nets.ACTIVATIONS`; "tanh" for vectors and "softplus" for images
            if None.
        end_time: End time of each block's ODE at the start of training; it is trained. 0.5 for
            vectors and 1 for images if None.
        solver: A `Solver` or its arguments; by default dopri5 at 1e-5 with the adjoint.
        preprocess: A name in `cnf.transforms.PREPROCESSING`, a mapping with a "name" and options,
            an instance, or a list of these, applied to the data in this order; fitted at the first
            `cnf.fit`. None for none.
        context_preprocess: "standardize", fitted likewise to the context, or None.
        dequantization: "uniform" or "variational", a mapping with such a "name" and options, or an
            instance, for whole numbers such as pixels; None for real numbers.
        shape: Shape (C, H, W) of images, instead of dim, for convolutional fields.
        scales: Number of scales, for images; as many as leave no side below 4 pixels if None (28,
            14 and 7 pixels: 3). With 1 the flow has one `field`, as `FlowMatching` needs; with
            several, `MultiscaleMatching` trains them without solving an ODE.
        null_context: Whether a learned vector replaces a missing context, as guidance requires.

    Returns:
        A `Flow` whose `field` is the vector field; with several scales there is no single one.

    Raises:
        ValueError: Not exactly one of dim and shape is given, a size is below 1, the end time is
            not above 0, a name is unknown, or height and width cannot be halved so often.
    """
    if end_time is None:
        end_time = 0.5 if shape is None else 1.0
    expect_positive("ffjord", end_time=end_time)

    def block(event: Sequence[int]) -> VectorField:
        return EndTime(_ffjord_field(event, hidden, context, activation), end_time)

    layers = _layers(layers, shape)
    solver = Solver.of(solver or {"gradient": "adjoint"})
    recipe = Recipe(divergence="hutchinson")
    ode = _stack(block, layers, solver, recipe, null_context)
    transform, event = _of_points_or_images("ffjord", dim, shape, scales, ode)
    return assembled(transform, event, preprocess, context_preprocess, dequantization)


@MODELS.register("rnode")
def rnode(
    dim: int | None = None,
    *,
    context: int = 0,
    hidden: Sequence[int] = (64, 64, 64),
    layers: int | None = None,
    activation: str | None = None,
    kinetic: float = 0.01,
    jacobian: float = 0.01,
    solver: Solver | Mapping[str, Any] | str | None = None,
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
    shape: Sequence[int] | None = None,
    scales: int | None = None,
    null_context: bool = False,
) -> Flow:
    """RNODE: FFJORD regularized to straight paths, such that few fixed steps suffice to train.

    Likelihood training penalizes the kinetic energy and the Jacobian's Frobenius norm, which is
    estimated from the same product as the trace, and uses RK4 with steps of 1/4 unless a solver is
    given. Evaluation uses the exact trace and dopri5 at 1e-5.
    The penalties of images are summed over the ODEs of all scales. No end time is trained.

    Source: Finlay et al. (2020), RNODE, https://arxiv.org/abs/2002.02798.

    Args:
        dim: Number of variables D.
        context: Size of the context; 0 for none.
        hidden: Widths of the field's hidden layers (channels, for images).
        layers: Number of blocks, each with a field of its own: 1 for vectors and 2 for images if
            None. Of images, in each ODE: before and after each squeeze, and at the last scale.
        activation: A name in `cnf.nets.ACTIVATIONS`; "tanh" for vectors and "softplus" for images
            if None.
        kinetic: Weight of the penalty ∫‖v‖² dt, added to the NLL in nats.
        jacobian: Weight of the penalty ∫‖∂v/∂x‖² dt.
        solver: A `Solver` or its arguments, for training and evaluation.
        preprocess: A name in `cnf.transforms.PREPROCESSING`, a mapping with a "name" and options,
            an instance, or a list of these, applied to the data in this order; fitted at the first
            `cnf.fit`. None for none.
        context_preprocess: "standardize", fitted likewise to the context, or None.
        dequantization: "uniform" or "variational", a mapping with such a "name" and options, or an
            instance, for whole numbers such as pixels; None for real numbers.
        shape: Shape (C, H, W) of images, instead of dim, for convolutional fields.
        scales: Number of scales, for images; as many as leave no side below 4 pixels if None (28,
            14 and 7 pixels: 3). With 1 the flow has one `field`, as `FlowMatching` needs; with
            several, `MultiscaleMatching` trains them without solving an ODE.
        null_context: Whether a learned vector replaces a missing context, as guidance requires.

    Returns:
        A `Flow` whose `field` is the vector field; with several scales there is no single one.

    Raises:
        ValueError: Not exactly one of dim and shape is given, a size is below 1, a weight below 0,
            a name is unknown, or height and width cannot be halved so often.
    """

    def block(event: Sequence[int]) -> VectorField:
        return _ffjord_field(event, hidden, context, activation)

    expect_not_negative("rnode", kinetic=kinetic, jacobian=jacobian)
    layers = _layers(layers, shape)
    recipe = Recipe(
        "hutchinson",
        {name: w for name, w in (("kinetic", kinetic), ("jacobian", jacobian)) if w},
        Solver("rk4", steps=4 * layers) if solver is None else None,
    )
    ode = _stack(block, layers, Solver.of(solver), recipe, null_context)
    transform, event = _of_points_or_images("rnode", dim, shape, scales, ode)
    return assembled(transform, event, preprocess, context_preprocess, dequantization)


@MODELS.register("otflow")
def otflow(
    dim: int,
    *,
    context: int = 0,
    hidden: Sequence[int] = (32, 32),
    transport: float = 0.01,
    hjb: float = 0.05,
    solver: Solver | Mapping[str, Any] | str | None = None,
    preprocess: Preprocess = "standardize",
    context_preprocess: str | None = "standardize",
    dequantization: Dequantize = None,
    null_context: bool = False,
) -> Flow:
    """OT-Flow: the gradient field of a potential, trained with transport and HJB penalties.

    The trace is the Laplacian of the potential in closed form. Unless a solver is given,
    likelihood training uses 8 steps of RK4, and evaluation 16. The default learning rate is 0.1.

    Source: Onken et al. (2021), OT-Flow, https://arxiv.org/abs/2006.00104.

    Args:
        dim: Number of variables D.
        context: Size of the context; 0 for none.
        hidden: Widths of the potential's layers, all equal.
        transport: Weight of the penalty ½∫‖v‖² dt, added to the NLL in nats; 1/100 corresponds to
            the paper's α = (1, 100, 5).
        hjb: Weight of the Hamilton-Jacobi-Bellman residual, 5/100 in the paper.
        solver: A `Solver` or its arguments, for training and evaluation.
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
        ValueError: Hidden layers differ in width, a size is below 1, a weight below 0, or a name
            is unknown.
    """
    expect_not_negative("otflow", transport=transport, hjb=hjb)
    if len(set(hidden)) != 1:
        raise ValueError(f"otflow: expected hidden layers of one width, got {tuple(hidden)}")
    field = PotentialField(dim, hidden[0], len(hidden), context)
    recipe = Recipe(
        "exact",
        {name: w for name, w in (("kinetic", transport / 2), ("hjb", hjb)) if w},
        Solver("rk4", steps=8) if solver is None else None,
        lr=0.1,
    )
    solver = Solver.of(solver or {"method": "rk4", "steps": 16})
    return of_field(
        field, solver, preprocess, context_preprocess, dequantization, recipe, null_context
    )


def of_field(
    field: VectorField,
    solver: Solver,
    preprocess: Preprocess,
    context_preprocess: str | None,
    dequantization: Dequantize,
    recipe: Recipe,
    null_context: bool,
    base: Base | None = None,
) -> Flow:
    """The flow of a field, from the standard normal distribution where no base is given.

    Args:
        field: The vector field.
        solver: How its ODE is solved.
        preprocess: As of `assembled`, like the next two.
        context_preprocess: See there.
        dequantization: See there.
        recipe: Defaults for training by likelihood.
        null_context: Whether a learned vector replaces a missing context.
        base: The base distribution.
    """
    transform = Continuous(NullContext(field) if null_context else field, solver, recipe=recipe)
    return assembled(
        transform, field.event_shape, preprocess, context_preprocess, dequantization, base
    )


def _blocks(block: Callable[[], VectorField], layers: int) -> VectorField:
    expect_counts("models", layers=layers)
    return block() if layers == 1 else Piecewise([block() for _ in range(layers)])


def _layers(layers: int | None, shape: Sequence[int] | None) -> int:
    if layers is not None:
        return layers
    return 1 if shape is None else 2


def _stack(
    block: Callable[[Sequence[int]], VectorField],
    layers: int,
    solver: Solver,
    recipe: Recipe,
    null_context: bool,
) -> Part:
    """What makes the `Continuous` of some blocks for points of a shape."""

    def ode(event: Sequence[int]) -> Continuous:
        field = _blocks(lambda: block(event), layers)
        field = NullContext(field) if null_context else field
        return Continuous(field, solver, recipe=recipe)

    return ode


def _of_points_or_images(
    who: str, dim: int | None, shape: Sequence[int] | None, scales: int | None, ode: Part
) -> tuple[Transform, Sequence[int]]:
    """The transform, and the shape of an event: one ODE for points, several scales for images."""
    if shape is not None:
        return at_scales(who, shape, scales, ode), tuple(shape)
    assert dim is not None
    if scales is not None:
        raise ValueError(f"{who}: scales are those of an image: expected shape=…, got dim={dim}")
    return ode((dim,)), (dim,)


def _ffjord_field(
    event: Sequence[int], hidden: Sequence[int], context: int, activation: str | None
) -> VectorField:
    if len(event) == 1:
        return MLPField(event[0], hidden, context, activation or "tanh", 0, layer="concatsquash")
    return ConvField(event, hidden, context, activation or "softplus", layer="concat")
