"""Divergence of a vector field: exact, or estimated by random probes."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from cnf.errors import expect_choice
from cnf.fields.base import HasDivergence, VectorField
from cnf.registry import Registry

DIVERGENCES = Registry("divergence")

Velocity = Callable[[Tensor], Tensor]
WithDivergence = Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]

EXACT_LIMIT = 1024  # directions; above, D forward-mode passes per evaluation are out of reach


def trace_of_jacobian(v: Velocity, x: Tensor, event_dims: int = 1) -> tuple[Tensor, Tensor]:
    """v(x) and the exact trace of its Jacobian, by D tangents in one batched forward-mode pass.

    Args:
        v: Map from (*batch, *event) to the same shape, rows independent.
        x: Points, shape (*batch, *event).
        event_dims: How many trailing axes form the event.
    Returns:
        v(x), of x's shape, and tr ∂v/∂x, shape (*batch,).
    """
    event = x.shape[x.dim() - event_dims :]
    basis = torch.eye(math.prod(event), dtype=x.dtype, device=x.device).reshape(-1, *event)

    def push(direction: Tensor) -> tuple[Tensor, Tensor]:
        pushed = torch.func.jvp(v, (x,), (direction.expand_as(x),))
        return pushed[0], (pushed[1] * direction).flatten(-event_dims).sum(-1)

    values, diagonal = torch.func.vmap(push, randomness="same")(basis)
    return values[0], diagonal.sum(0)


def hutchinson(
    v: Velocity, x: Tensor, probe: Tensor, event_dims: int = 1
) -> tuple[Tensor, Tensor]:
    r"""v(x) and the trace estimate :math:`\epsilon^\top J_v(x)\,\epsilon`, a VJP for each probe.

    Unbiased for :math:`E[\epsilon\epsilon^\top]=I`; exact for a diagonal Jacobian with Rademacher
    probes.
    Source: Hutchinson (1989); for CNFs Grathwohl et al. (2019), FFJORD,
    https://arxiv.org/abs/1810.01367.

    Args:
        v: Map from (*batch, *event) to the same shape, rows independent.
        x: Points, shape (*batch, *event).
        probe: Noise, shape (probes, *batch, *event), fixed for the whole ODE solve (else the
            right-hand side is not a function of t); the estimate is the mean over probes.
        event_dims: How many trailing axes form the event.
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
    graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Without a graph x may still carry one that the solver's own function hides.
        x = x if graph and x.requires_grad else x.detach().requires_grad_()
        value = v(x)
        estimates = []
        for (
            epsilon
        ) in probe:  # a loop: vmap over a backward pass refuses custom autograd functions
            (product,) = torch.autograd.grad(
                value, x, epsilon, create_graph=graph, retain_graph=True
            )
            estimates.append((product * epsilon).flatten(-event_dims).sum(-1))
    estimate = torch.stack(estimates).mean(0)
    return (value, estimate) if graph else (value.detach(), estimate.detach())


class Divergence(ABC):
    """A way to have ∇·v along a solve."""

    @abstractmethod
    def bind(self, field: VectorField, x: Tensor) -> WithDivergence:
        """The function (t, x, context) → (velocity, divergence) of one solve that starts at `x`.

        What is random is drawn here, once per solve.
        """


@DIVERGENCES.register("exact")
@dataclass(frozen=True)
class Exact(Divergence):
    """The field's own closed form where it has one, else D tangents in one forward-mode pass."""

    def bind(self, field: VectorField, x: Tensor) -> WithDivergence:
        if isinstance(field, HasDivergence):
            return field.with_divergence
        size = math.prod(field.event_shape)
        if size > EXACT_LIMIT:
            raise ValueError(
                f"log_prob: the exact divergence of {type(field).__name__} takes {size} "
                f"forward-mode directions per evaluation (limit {EXACT_LIMIT}); "
                "ask for an estimate: log_prob(x, divergence=Hutchinson(probes=8))"
            )
        dims = len(field.event_shape)
        return lambda t, x, context: trace_of_jacobian(lambda y: field(t, y, context), x, dims)


@DIVERGENCES.register("hutchinson")
@dataclass(frozen=True)
class Hutchinson(Divergence):
    """Hutchinson's estimate, see `hutchinson`; its probes are drawn once per solve.

    Args:
        probes: How many probes are averaged.
        noise: "rademacher" (least variance) or "gaussian".
        generator: Where the probes come from; torch's default generator if None.
        probe: The probes themselves, shape (probes, *batch, *event), instead of drawing them.
    """

    probes: int = 1
    noise: Literal["rademacher", "gaussian"] = "rademacher"
    generator: torch.Generator | None = None
    probe: Tensor | None = None

    def __post_init__(self) -> None:
        expect_choice("Hutchinson", "noise", self.noise, ("rademacher", "gaussian"))
        if self.probes < 1:
            raise ValueError(f"Hutchinson: expected probes >= 1, got {self.probes}")

    def draw(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Probes for points `x`: shape (probes, *x.shape)."""
        shape = (self.probes, *x.shape)
        device = x.device if generator is None else generator.device
        if self.noise == "gaussian":
            probe = torch.randn(shape, generator=generator, device=device, dtype=x.dtype)
        else:
            bits = torch.randint(0, 2, shape, generator=generator, device=device)
            probe = bits.to(x.dtype) * 2 - 1
        return probe.to(x.device)

    def bind(self, field: VectorField, x: Tensor) -> WithDivergence:
        probe = self.draw(x, self.generator) if self.probe is None else self.probe
        dims = len(field.event_shape)
        return lambda t, x, context: hutchinson(lambda y: field(t, y, context), x, probe, dims)


def as_divergence(divergence: "str | Mapping[str, Any] | Divergence") -> Divergence:
    """A `Divergence` from itself, its name, or {"name": …, **fields} (as a config file says)."""
    if isinstance(divergence, Divergence):
        return divergence
    settings = {"name": divergence} if isinstance(divergence, str) else dict(divergence)
    return DIVERGENCES[settings.pop("name")](**settings)
