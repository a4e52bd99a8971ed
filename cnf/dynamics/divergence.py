"""Divergence of a vector field along a solve: exact, estimated by random probes, or learned."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from cnf.dynamics.fixed import transformed
from cnf.errors import expect_choice
from cnf.fields.base import HasDivergence, VectorField, exact_divergence, tangent_products
from cnf.fields.trace import has_forward_mode, seconds_of_trace
from cnf.fields.wrappers import Wrapper, has_tangents
from cnf.random import draw
from cnf.registry import Registry

Velocity = Callable[[Tensor], Tensor]


class Rates(NamedTuple):
    """The result of one evaluation of a field.

    Attributes:
        velocity: Velocity, shape (*batch, *event).
        divergence: Divergence per unit time, shape (*batch,), or (*batch, channels) with an
            estimate for each probe.
        products: The products εᵀJ, or J ε, of each probe, shape (probes, *batch, *event), if they
            were computed.
    """

    velocity: Tensor
    divergence: Tensor
    products: Tensor | None = None


def hutchinson(
    v: Velocity, x: Tensor, probe: Tensor, event_dims: int = 1
) -> tuple[Tensor, Tensor]:
    r"""Velocity v(x) and trace estimate :math:`\epsilon^\top J_v(x)\,\epsilon`, one VJP per probe.

    The estimate is unbiased for :math:`E[\epsilon\epsilon^\top]=I`, and exact for a diagonal
    Jacobian with Rademacher probes.

    Source: Hutchinson (1989); for CNFs Grathwohl et al. (2019), FFJORD,
    https://arxiv.org/abs/1810.01367.

    Args:
        v: Map from (*batch, *event) to the same shape, with independent rows.
        x: Points, shape (*batch, *event).
        probe: Noise ε, shape (probes, *batch, *event), fixed for a whole ODE solve, as otherwise
            the right-hand side would not be a function of t. The estimate is the mean over probes.
        event_dims: Number of trailing axes that form the event.

    Returns:
        v(x), of x's shape, and the estimate, shape (*batch,).

    Raises:
        ValueError: probe and x differ in shape.
    """
    if probe.shape[1:] != x.shape:
        raise ValueError(
            f"hutchinson: expected probe of shape (probes, {', '.join(map(str, x.shape))}), "
            f"got {tuple(probe.shape)}"
        )
    value, products = vector_jacobian_products(v, x, probe)
    return value, (products * probe).flatten(-event_dims).sum(-1).mean(0)


def vector_jacobian_products(v: Velocity, x: Tensor, probe: Tensor) -> tuple[Tensor, Tensor]:
    """The value v(x) and εᵀJ for each ε in `probe`, shape (n, *x.shape), one VJP each."""
    if transformed():  # torch.func cannot transform autograd.grad
        value, pull = torch.func.vjp(v, x)  # pyright: ignore
        return value, torch.stack([pull(epsilon)[0] for epsilon in probe])
    graph = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.enable_grad():
        if not graph or not x.requires_grad:
            # Inside of a custom autograd function x may require a gradient without a graph.
            x = x.clone() if x.is_inference() else x.detach()
            x.requires_grad_()
        value = v(x)
        if not value.requires_grad:  # v is constant in x
            return value, torch.zeros_like(probe)
        products = [  # a loop, as vmap over a backward pass rejects custom autograd functions
            torch.autograd.grad(
                value, x, epsilon, create_graph=graph, retain_graph=True, materialize_grads=True
            )[0]
            for epsilon in probe
        ]
    stacked = torch.stack(products)
    return (value, stacked) if graph else (value.detach(), stacked.detach())


class Divergence(ABC):
    """A method to compute the divergence ∇·v along a solve.

    Attributes:
        channels: Shape of the divergence of a row: () for one value, (k,) for k estimates.
    """

    channels: tuple[int, ...]

    @abstractmethod
    def draw(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor | None:
        """Draw the probes of a solve that starts at `x`, shape (n, *x.shape), or return None.

        Args:
            x: Starting points, shape (*batch, *event).
            generator: Source of the draw.
        """

    @abstractmethod
    def rates(
        self,
        field: VectorField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None,
        probe: Tensor | None,
    ) -> Rates:
        """Velocity and divergence at (t, x), with the probes of the solve.

        Args:
            field: The vector field.
            t: Time, shape ().
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
            probe: What `draw` returned.
        """


DIVERGENCES = Registry("divergence", Divergence)


@DIVERGENCES.register("auto")
@DIVERGENCES.register("exact")
@dataclass(frozen=True)
class Exact(Divergence):
    """The exact divergence: the field's closed form, else D tangents in one forward-mode pass.

    `cnf.dynamics.explain` tells which of them applies to a field, and its cost.
    """

    channels = ()

    def draw(self, x: Tensor, generator: torch.Generator | None = None) -> None:
        return None

    def rates(
        self,
        field: VectorField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None,
        probe: Tensor | None,
    ) -> Rates:
        return Rates(*exact_divergence(field, t, x, context))


@DIVERGENCES.register("hutchinson")
@dataclass(frozen=True)
class Hutchinson(Divergence):
    r"""Hutchinson's estimate with probes that are drawn once per solve; see `hutchinson`.

    With a sketch it is Hutch++: the columns of Q are an orthonormal basis of the products of
    `sketch` further probes, the trace over their span is exact, and the probes estimate the rest,

    .. math:: \mathrm{tr}\,Q^\top J Q + g^\top (I - QQ^\top) J (I - QQ^\top)\, g

    which is unbiased for any Q, and exact if the span contains the whole row space. There is no
    gradient through Q.

    Source: Meyer et al. (2021), https://arxiv.org/abs/2010.09649.

    Where a solver's steps are the model (discrete=True) the probes estimate the power series of
    each step's log-determinant (Chen et al., 2019, https://arxiv.org/abs/1906.02735): unbiased for
    steps near the identity, NaN for others. How many terms are taken is drawn from the generator,
    also where probes are given. A sketch is refused there.

    Args:
        probes: Number of estimates, each with a log-density channel of its own; their mean is the
            result, and their spread gives its error.
        noise: "rademacher", which has the smaller variance, or "gaussian".
        generator: Source of the draws; None for torch's global generator.
        probe: The probes, shape (sketch + probes, *batch, *event); they are drawn if None.
        sketch: Number of directions with an exact trace, each of which costs two VJPs.

    Raises:
        ValueError: The noise is unknown, there is no probe, or the sketch is negative.
    """

    probes: int = 1
    noise: Literal["rademacher", "gaussian"] = "rademacher"
    generator: torch.Generator | None = None
    probe: Tensor | None = None
    sketch: int = 0

    def __post_init__(self) -> None:
        expect_choice("Hutchinson", "noise", self.noise, ("rademacher", "gaussian"))
        for name, least in (("probes", 1), ("sketch", 0)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"Hutchinson: expected {name} >= {least}, got {getattr(self, name)}"
                )

    @property
    def channels(self) -> tuple[int]:  # pyright: ignore
        """One for each probe: (probes,)."""
        return (self.probes if self.probe is None else len(self.probe) - self.sketch,)

    def draw(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The probes, which were given or are drawn, shape (sketch + probes, *x.shape).

        Raises:
            ValueError: Probes that were given do not have x's shape.
        """
        if self.probe is not None:
            if self.probe.shape[1:] != x.shape:
                raise ValueError(
                    f"Hutchinson: expected probe of shape (n, {', '.join(map(str, x.shape))}), "
                    f"got {tuple(self.probe.shape)}"
                )
            return self.probe
        generator = generator or self.generator
        shape = (self.sketch + self.probes, *x.shape)
        if self.noise == "gaussian":
            return draw(torch.randn, shape, generator, like=x)
        return draw(partial(torch.randint, 0, 2), shape, generator, like=x) * 2 - 1

    def rates(
        self,
        field: VectorField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None,
        probe: Tensor | None,
    ) -> Rates:
        assert probe is not None

        def velocity(y: Tensor) -> Tensor:
            return field(_trackable(t), y, None if context is None else _trackable(context))

        start = x.dim() - len(field.event_shape) + 1  # first axis of the event in a probe
        sketched = self.sketch
        if sketched:
            with torch.no_grad():
                span = _orthonormal(
                    vector_jacobian_products(velocity, x, probe[:sketched])[1], start
                )
                probe = torch.cat([span, _orthogonal_part(probe[sketched:], span, start)])
            sketched = len(span)
        if has_tangents(field) and not sketched:
            v, products = tangent_products(field, t, x, context, probe)
        else:
            v, products = vector_jacobian_products(velocity, x, probe)
        quadratic_forms = (products * probe).flatten(start).sum(-1)  # (n, *batch)
        estimates = quadratic_forms[sketched:] + quadratic_forms[:sketched].sum(0)
        return Rates(v, estimates.movedim(0, -1), None if sketched else products)


@DIVERGENCES.register("learned")
@dataclass(frozen=True)
class Learned(Divergence):
    """The average divergence that the head of a `FlowMap` has learned: an estimate, and biased.

    The steps of `Solver("flow-map", steps=K)` are taken in the direction that is asked for, none
    is inverted, and a step of length h adds h times the average to the log-determinant: K
    evaluations of map and head, and no tangents. The head learns the divergence along the ODE's
    paths, so that the density is the ODE's, not that of the few steps, and nothing bounds its
    error: it may claim more than the truth, and more steps need not help. A head that was trained
    before the map was trained further no longer fits it. Compare a few rows with `Exact`, which
    stays the default. Other solvers, but for discrete ones, integrate the head's
    divergence at one time.

    Source: Ai et al. (2026), F2D2, https://arxiv.org/abs/2512.02636.
    """

    channels = ()

    def draw(self, x: Tensor, generator: torch.Generator | None = None) -> None:
        return None

    def rates(
        self,
        field: VectorField,
        t: Tensor,
        x: Tensor,
        context: Tensor | None,
        probe: Tensor | None,
    ) -> Rates:
        return Rates(field(t, x, context), field.average_divergence(t, x, context))


def is_exact(divergence: str | Divergence | None) -> bool:
    """Whether it is the exact divergence, by name or as an instance."""
    return divergence is not None and isinstance(DIVERGENCES.build(divergence), Exact)


def probes_of(divergence: str | Divergence | None) -> Tensor | None:
    """The given probes, which are for all rows at once; None if each solve draws its own."""
    return divergence.probe if isinstance(divergence, Hutchinson) else None


def number_of_probes(divergence: Divergence) -> int:
    """How many probes a solve takes, whether given or drawn; 0 where it takes none."""
    if not isinstance(divergence, Hutchinson):
        return 0
    given = divergence.probe
    return divergence.sketch + divergence.probes if given is None else len(given)


@DIVERGENCES.register("hutch++")
def hutch_plus_plus(probes: int = 2, sketch: int = 2, **settings: Any) -> Hutchinson:
    """Hutch++, which is `Hutchinson` with a sketch.

    Args:
        probes: Number of probes, see `Hutchinson`.
        sketch: Number of directions with an exact trace, see `Hutchinson`.
        settings: Other arguments of `Hutchinson`.
    """
    return Hutchinson(probes=probes, sketch=sketch, **settings)


def _trackable(tensor: Tensor) -> Tensor:
    """The tensor, or a copy if it was created in inference mode, as autograd rejects those."""
    if transformed() or not tensor.is_inference():
        return tensor
    return tensor.clone()


def _orthonormal(vectors: Tensor, start: int) -> Tensor:
    """An orthonormal basis of the span of n vectors per row, shape (min(n, D), *batch, *event)."""
    columns = vectors.flatten(start).movedim(0, -1)  # (*batch, D, n)
    basis = torch.linalg.qr(columns).Q.movedim(-1, 0)
    return basis.reshape(len(basis), *vectors.shape[1:])


def _orthogonal_part(probe: Tensor, span: Tensor, start: int) -> Tensor:
    """The part of each probe that is orthogonal to the span."""
    flat, basis = probe.flatten(start), span.flatten(start)
    inside = torch.einsum("n...d,m...d->nm...", flat, basis)
    return (flat - torch.einsum("nm...,m...d->n...d", inside, basis)).reshape(probe.shape)


def traced_field(field: VectorField) -> VectorField | None:
    """The field whose exact divergence takes D tangents or products; None if in closed form.

    Args:
        field: The field, possibly wrapped.
    """
    inner = innermost(field)
    return None if isinstance(inner, HasDivergence) else inner


def seconds_of_exact(field: VectorField, rows: int) -> float:
    """How long an evaluation with the exact divergence takes by D tangents, without gradients.

    Some of the tangents of some of the rows are timed.

    Args:
        field: A field without a closed form, as `traced_field` returns it.
        rows: Number of rows.
    """
    like = next(field.parameters())
    t, dims = like.new_tensor(0.5), len(field.event_shape)
    x = like.new_zeros(rows, *field.event_shape)
    context = like.new_zeros(field.context_dim) if field.context_dim else None
    return seconds_of_trace(lambda y: field(t, y, context), x, dims, field)


def innermost(field: VectorField) -> VectorField:
    """The field that others wrap, of the first block.

    Args:
        field: A field, possibly wrapped.
    """
    field = field.block(0)
    while isinstance(field, Wrapper):
        field = field.field.block(0)
    return field


def explain(field: VectorField, rows: int = 256) -> str:
    """How the exact divergence of a field is computed, and what it costs.

    >>> from cnf.fields import Adapter, MLPField
    >>> field = MLPField(2, (128, 128))
    >>> explain(field)
    'MLPField: its own closed form; v and ∇·v take 2.0 × the products of v alone'
    >>> explain(Adapter(field, (2,))).split(";")[0]
    'Adapter: 2 tangents in forward mode'

    Args:
        field: The field; it is evaluated at `rows` points.
        rows: Number of points; the cost per row of a closed form decreases with it.
    """
    from torch.utils.flop_counter import FlopCounterMode  # slow to import

    outer, field = field.block(0), innermost(field)
    like = next(field.parameters())
    x = torch.zeros(rows, *field.event_shape, dtype=like.dtype, device=like.device)
    context = x.new_zeros(rows, field.context_dim) if field.context_dim else None
    how = "its own closed form"
    if not isinstance(field, HasDivergence):
        size, at = math.prod(field.event_shape), x.new_tensor(0.5)
        forward = has_forward_mode(field, lambda y: field(at, y, context), x)
        how = f"{size} tangents in forward mode" if forward else f"{size} products in reverse mode"
    flops = []
    for call in (outer, partial(exact_divergence, outer)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call(x.new_tensor(0.5), x, context)
        flops.append(counter.get_total_flops())
    ratio = flops[1] / max(1, flops[0])
    return f"{type(field).__name__}: {how}; v and ∇·v take {ratio:.1f} × the products of v alone"


AFFORDABLE = 128  # directions of the exact divergence for each evaluation, where many are made


def exact_directions(field: VectorField) -> int:
    """How many directions the exact divergence of a field takes; 0 for a closed form."""
    traced = traced_field(field)
    return 0 if traced is None else math.prod(traced.event_shape)
