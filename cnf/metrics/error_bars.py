"""log p(x) with error bars: what the trace's estimate and the ODE's solver leave uncertain."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from cnf.dynamics import ode
from cnf.dynamics.divergence import (
    DIVERGENCES,
    Divergence,
    Hutchinson,
    Learned,
    number_of_probes,
)
from cnf.dynamics.solver import Solver
from cnf.errors import expect_tensor, optional, warn
from cnf.flow import Flow, evaluating
from cnf.random import device_of
from cnf.training.diagnosis import NATS, warn_of_difference
from cnf.transforms.continuous import (
    Continuous,
    has_fixed_steps,
    is_continuous,
    odes_in,
)


class LogProb(NamedTuple):
    """A log-density and its errors, in nats.

    Attributes:
        value: log p(x), shape (*batch,).
        trace_error: Half-width of the confidence interval that the spread over probes gives, shape
            (*batch,); zeros where the divergence is exact, None where one probe shows no spread,
            or where the divergence is learned, whose error is not known.
        solver_error: |difference| to a solve in float64 with 1/100 of the tolerances (twice the
            steps, for a fixed-step method or a learned divergence), with the same probes, shape
            (*batch,).
        nfe: Evaluations of the field for `value`.
    """

    value: Tensor
    trace_error: Tensor | None
    solver_error: Tensor
    nfe: int


@torch.no_grad()
def log_prob_with_error(
    flow: Flow,
    x: Tensor,
    context: Tensor | None = None,
    *,
    divergence: str | Divergence | None = None,
    confidence: float = 0.95,
    generator: Generator | None = None,
) -> LogProb:
    """The log-density of any flow, without gradients, with the errors of estimate and solver.

    The interval takes the estimates as normally distributed, and is too narrow for few probes in
    few dimensions: with D = 2 random signs give only two values, which two probes share in half
    of the rows. Take 16 probes or more there, or the exact divergence.

    It warns where the mean of a fixed-step solver, or of a learned divergence in few steps, is off
    by more than `fit` allows, 0.05 nats.

    >>> import cnf
    >>> flow = cnf.models.build("cnf", dim=2, hidden=(16, 16))
    >>> told = log_prob_with_error(flow, torch.zeros(3, 2))
    >>> told.trace_error.tolist(), bool((told.solver_error < 1e-3).all())
    ([0.0, 0.0, 0.0], True)

    Args:
        flow: The flow; one without an ODE has no such errors, only rounding.
        x: Data, shape (*batch, *event).
        context: As in `Flow.log_prob`.
        divergence: An estimator, such as `Hutchinson(probes=32)`; None for the flow's own.
        confidence: Of the interval, Student's t over the probes.
        generator: Source of the probes and of the dequantization's draw.

    Raises:
        ValueError: The confidence is not between 0 and 1.
    """
    if not 0 < confidence < 1:
        raise ValueError(
            f"log_prob_with_error: expected confidence between 0 and 1, got {confidence}"
        )
    expect_tensor("log_prob_with_error", "x", x)
    divergence = _fixed(flow, x, divergence, generator)
    seed = 0
    if flow.dequantization is not None or isinstance(divergence, Hutchinson):
        source = generator or getattr(divergence, "generator", None)
        where = device_of(source)
        seed = int(torch.randint(2**62, (), generator=source, device=where).item())
    if flow.dequantization is not None:
        flow = _with_draw(flow, x, seed)
    with evaluating(flow), ode.record() as stats:
        value, estimates = _scored(flow, x, context, divergence, seed)
    nfe = stats.forward
    learned = isinstance(divergence, Learned)
    finer = _reference(flow, Solver.finer if learned else Solver.refined)
    reference, _ = _scored(
        finer, x.double(), None if context is None else context.double(),
        divergence if divergence is None else _doubled(divergence), seed,
    )  # fmt: skip
    told = value.isfinite()
    now, then = (-found[told].double().mean().item() for found in (value, reference))
    if has_fixed_steps(flow.transform) and told.any():
        warn_of_difference("log_prob_with_error", flow, now, then, f"the NLL of {told.sum()} rows")
    if learned and abs(now - then) > NATS:
        warn(
            f"log_prob_with_error: by the learned divergence the NLL of {told.sum()} rows is "
            f"{now:.4g} nats, and {then:.4g} in twice the steps: do not compare models by it, or "
            "score by the exact one"
        )
    # Minus infinity, of a row at infinity or outside of the support, is exact.
    solver_error = torch.where(value == reference, 0.0, (reference - value).abs())
    solver_error = solver_error.to(value.dtype)
    trace_error = None if learned else _half_width(value, estimates, confidence)
    return LogProb(value, trace_error, solver_error, nfe)


class _Drawn(nn.Module):
    """A dequantization whose draw is made already.

    Args:
        y: Points of the cells, shape (*batch, *event).
        log_weight: -log q of the noise, shape (*batch,), or a number.
    """

    def __init__(self, y: Tensor, log_weight: Tensor | float) -> None:
        super().__init__()
        self.y, self.log_weight = y, log_weight

    def encode(
        self, x: Tensor, generator: Generator | None = None
    ) -> tuple[Tensor, Tensor | float]:
        told = self.log_weight
        return self.y.to(x.dtype), told.to(x.dtype) if isinstance(told, Tensor) else told


def _with_draw(flow: Flow, x: Tensor, seed: int) -> Flow:
    """The flow with one draw of its noise, so that float32 and float64 score the same point.

    One seed draws other numbers in each of the two.
    """
    assert flow.dequantization is not None
    dtype = torch.promote_types(torch.promote_types(x.dtype, flow.dtype), torch.float32)
    whole = x.to(dtype).nan_to_num(0.0, 0.0, 0.0)
    generator = torch.Generator(x.device).manual_seed(seed)
    with evaluating(flow):
        drawn = _Drawn(*flow.dequantization.encode(whole, generator))
    return flow.with_dequantization(drawn)  # pyright: ignore[reportArgumentType]


def _fixed(
    flow: Flow, x: Tensor, divergence: str | Divergence | None, generator: Generator | None
) -> Divergence | None:
    """The divergence with its probes drawn, so that both solves have the same."""
    if not is_continuous(flow.transform):
        return None
    divergence = divergence or odes_in(flow.transform)[0].divergence
    built: Divergence = DIVERGENCES.build(divergence or "exact")
    if isinstance(built, Hutchinson):
        return replace(built, probe=built.draw(x.to(flow.dtype), generator))
    return built


def _doubled(divergence: Divergence) -> Divergence:
    if isinstance(divergence, Hutchinson) and divergence.probe is not None:
        return replace(divergence, probe=divergence.probe.double())
    return divergence


def _scored(
    flow: Flow, x: Tensor, context: Tensor | None, divergence: Divergence | None, seed: int
) -> tuple[Tensor, Tensor | None]:
    """The log-density, and, where it is estimated, each probe's, shape (probes, *batch)."""
    generator = torch.Generator(x.device).manual_seed(seed)
    if divergence is None or not number_of_probes(divergence):
        return flow.log_prob(x, context, divergence=divergence, generator=generator), None
    assert isinstance(divergence, Hutchinson)
    # The steps of a discrete solver draw numbers of terms, the same in the reference.
    terms = torch.Generator(x.device).manual_seed(seed)
    value, solved = flow.log_prob_and_integral(
        x, context, divergence=replace(divergence, generator=terms), generator=generator
    )
    return value, solved.estimates


def _reference(flow: Flow, refined: Callable[[Solver], Solver]) -> Flow:
    """The flow in float64, every solver refined, also of a base."""
    flow = copy.deepcopy(flow).double().eval()
    for part in flow.modules():
        if isinstance(part, Continuous):
            part.solver = refined(part.solver)
    return flow


def _half_width(value: Tensor, estimates: Tensor | None, confidence: float) -> Tensor | None:
    if estimates is None:
        return torch.zeros_like(value)
    probes = len(estimates)
    if probes == 1:
        return None
    student = optional("scipy.stats", "evaluation").t
    quantile = float(student.ppf((1 + confidence) / 2, probes - 1))
    return quantile * estimates.std(0) / probes**0.5
