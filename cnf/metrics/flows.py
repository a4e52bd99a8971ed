"""How good a flow is: its likelihood, the length of its paths, what it costs.

Nothing here takes gradients. The last part is what a race measures of a flow, see `metric`.
"""

import math
import statistics
import time
from collections.abc import Callable
from functools import wraps
from itertools import repeat
from typing import Any, ParamSpec, Protocol, TypeVar

import torch
from torch import Generator, Tensor

from cnf.data.arrays import as_numbers
from cnf.dynamics import ode
from cnf.dynamics.divergence import Divergence
from cnf.dynamics.regularizers import kinetic_energy
from cnf.errors import expect_counts, expect_event, expect_finite
from cnf.flow import Flow, evaluating, require_field
from cnf.metrics.distances import wasserstein2
from cnf.metrics.estimate import Estimate
from cnf.metrics.metric import Evaluations, Score, Trial, metric
from cnf.transforms.continuous import Continuous

P = ParamSpec("P")
R = TypeVar("R")


class Density(Protocol):
    """Anything with a known log-density: a Toy, a flow, a torch distribution."""

    @property
    def log_prob(self) -> Callable[..., Tensor]: ...


def _evaluated(measure: Callable[P, R]) -> Callable[P, R]:
    """The measure of a flow, its first argument, in eval mode and without gradients."""

    @wraps(measure)
    def within(*args: P.args, **kwargs: P.kwargs) -> R:
        with evaluating(args[0] if args else kwargs["flow"]), torch.no_grad():
            return measure(*args, **kwargs)

    return within


@_evaluated
def log_prob_chunked(
    flow: Density, x: Tensor, context: Tensor | None = None, chunk: int = 10_000
) -> Tensor:
    """`flow.log_prob(x, context)` without gradients, `chunk` points at a time: nats, shape (N,).

    Args:
        flow: A flow, or anything else with a `log_prob`.
        x: Points, shape (N, *event), a tensor or an array.
        context: Condition; one with a row for every point follows its points, any other is passed
            on whole.
        chunk: Points evaluated at once.

    Raises:
        ValueError: x is a single point.
    """
    expect_counts("log_prob_chunked", chunk=chunk)
    x = as_numbers("log_prob_chunked", "x", x)
    if x.dim() <= len(getattr(flow, "event_shape", (1,))):
        raise ValueError(_no_points("log_prob_chunked", "x", x))
    context = None if context is None else as_numbers("log_prob_chunked", "context", context)
    rowwise = context is not None and context.dim() > 1 and len(context) == len(x)
    contexts = context.split(chunk) if context is not None and rowwise else repeat(context)
    parts = zip(x.split(chunk), contexts, strict=False)
    return torch.cat([flow.log_prob(*(p if context is not None else p[:1])) for p in parts])


def nll(flow: Flow, x: Tensor, context: Tensor | None = None, chunk: int = 10_000) -> Estimate:
    """Negative log-likelihood −mean log q(x) of held-out data, nats per point, with its error.

    An upper bound of it for a flow with dequantization, whose log-probability is a lower bound.
    A point where the flow's log-density is NaN makes the result NaN.

    Args:
        flow: The flow.
        x: Test data, shape (N, *event).
        context: Condition, shape (N, C) or one that broadcasts.
        chunk: Points evaluated at once.
    """
    x = _points("nll", x)
    return Estimate.of(-log_prob_chunked(flow, x, context, chunk))


def gap(flow: Flow, density: Density, x: Tensor, chunk: int = 10_000) -> Estimate:
    r"""Gap to a known density p, an estimate of KL(p‖q) in nats, with its standard error.

    .. math:: \frac1N\sum_i \log p(x_i) - \log q(x_i), \qquad x_i \sim p

    Paired: both densities at the same points, so the noise of the entropy cancels, and a far
    smaller error bar than that of NLL − entropy is left. Within its error it can be negative. A
    point where the flow's log-density is NaN makes the result NaN, one that the flow thinks
    impossible makes it infinite.

    Args:
        flow: The flow, q.
        density: The truth, p: a Toy.
        x: Points drawn from p, shape (N, D).
        chunk: Points evaluated at once.
    """
    x = _points("gap", x)
    log_q = log_prob_chunked(flow, x, chunk=chunk).double()
    log_p = log_prob_chunked(density, x, chunk=chunk).to(log_q)
    return Estimate.of(log_p - log_q)


@_evaluated
def path_energy(
    flow: Flow,
    n: int = 10_000,
    generator: Generator | None = None,
    context: Tensor | None = None,
) -> Estimate:
    r"""Energy of the paths from base to data, in squared units of the field's space.

    .. math:: E_{x_0\sim q_0}\int_0^1 \|v_t(x_t)\|^2\,dt \;\ge\; W_2^2(q_0, q_1)

    Integrated along the ODE by the flow's own solver; equality for optimal transport (Benamou and
    Brenier, 2000, https://doi.org/10.1007/s002110050002). Inside `preprocess`, where there is
    one.

    Args:
        flow: A continuous flow.
        n: Paths.
        generator: Source of their starts.
        context: Condition, shape (C,) or (n, C).

    Raises:
        TypeError: the flow is not continuous.
    """
    start = _starts("path_energy", flow, n, generator)
    return _energy_from("path_energy", flow, start, context)


@_evaluated
def normalized_path_energy(
    flow: Flow, x0: Tensor, x1: Tensor, context: Tensor | None = None
) -> Estimate:
    r"""NPE, how far the paths are from optimal transport, without unit; 0 for optimal transport.

    .. math:: \Big|\,E\int_0^1 \|v_t(x_t)\|^2 dt - W_2^2(q_0,q_1)\Big| \,/\, W_2^2(q_0,q_1)

    Tong et al. (2024), https://arxiv.org/abs/2302.00482: read it beside a distance, since a flow
    that does not reach the data can score well. The error is that of the energy alone, not of the
    W2² between the two sets.

    Args:
        flow: A continuous flow.
        x0: Source samples, shape (N, D): where the paths start.
        x1: Target samples, shape (M, D), in data space.
        context: Condition, shape (C,) or (N, C).

    Raises:
        TypeError: the flow is not continuous.
        ValueError: source and target are the same set, so that there is nothing to normalize by.
    """
    x0, x1 = (_points("normalized_path_energy", x, f"x{k}") for k, x in enumerate((x0, x1)))
    expect_event("normalized_path_energy", "x0", x0, flow.event_shape)
    energy = _energy_from("normalized_path_energy", flow, x0, context)
    # The energy is measured where the field lives, and so must the optimum be.
    optimum = wasserstein2(x0, flow.inside(x1)[0]) ** 2
    if optimum == 0:
        raise ValueError("normalized_path_energy: expected x0 and x1 to differ, got W2 = 0")
    return Estimate(abs(energy.value - optimum) / optimum, energy.error / optimum)


@_evaluated
def straightness(
    flow: Flow,
    n: int = 10_000,
    generator: Generator | None = None,
    context: Tensor | None = None,
    steps: int = 100,
) -> Estimate:
    r"""How far the flow's paths are from straight, in squared units of the field's space.

    .. math:: S = E_{x_0\sim q_0}\int_0^1 \|(x_1 - x_0) - v_t(x_t)\|^2\,dt

    Zero iff every path is straight and of constant speed, and then one Euler step samples
    exactly. Liu et al. (2023), https://arxiv.org/abs/2209.03003. Trapezoid rule on a uniform
    grid: error O(steps⁻²), O(steps⁻¹) for a field that jumps in time (stacked blocks). Says
    nothing about where the paths end.

    Args:
        flow: A continuous flow.
        n: Paths.
        generator: Source of their starts.
        context: Condition, shape (C,) or (n, C).
        steps: Intervals of the time grid.

    Raises:
        TypeError: the flow is not continuous.
    """
    expect_counts("straightness", steps=steps)
    start = _starts("straightness", flow, n, generator)
    transform, context = _continuous_part("straightness", flow, start, context)
    times = torch.linspace(0, 1, steps + 1, dtype=start.dtype, device=start.device)
    path = transform.trajectory(start, times.tolist(), context)
    line = path[-1] - path[0]
    bends = [
        (line - transform.field(t, x, context)).square().flatten(1).sum(-1)
        for t, x in zip(times, path, strict=True)
    ]
    return Estimate.of(torch.trapezoid(torch.stack(bends), times, dim=0))


@_evaluated
def nfe(
    flow: Flow,
    n: int = 1000,
    generator: Generator | None = None,
    context: Tensor | None = None,
    divergence: str | Divergence | None = None,
) -> Evaluations:
    """Evaluations of the vector field that one `sample` and one `log_prob` of n points take.

    An adaptive solver takes one step size for the whole batch, so the counts depend on n.

    Args:
        flow: The flow.
        n: Points.
        generator: Source of the base samples.
        context: Condition, shape (C,) or (n, C).
        divergence: As of `Flow.log_prob`.
    """
    start = _starts("nfe", flow, n, generator)
    with ode.record() as sampling:
        x = flow.decode(start, context)
    with ode.record() as scoring:
        flow.log_prob(x, context, divergence=divergence)
    return Evaluations(sampling.forward, scoring.forward)


@_evaluated
def round_trip_error(
    flow: Flow, x: Tensor, context: Tensor | None = None, scale: Tensor | float = 1.0
) -> float:
    """Largest |decode(encode(x)) − x| / scale over all coordinates, or NaN.

    Args:
        flow: The flow.
        x: Points, shape (N, *event).
        context: Their contexts, shape (N, C).
        scale: The unit of each coordinate, which broadcasts to x; that of the data if 1.
    """
    x = _points("round_trip_error", x)
    back = flow.decode(flow.encode(x, context), context)
    return ((back - x) / scale).abs().max().item()


def _points(who: str, x: Any, name: str = "x") -> Tensor:
    """Points as a tensor, from an array or a table too."""
    x = as_numbers(who, name, x)
    if x.numel() == 0 or x.dim() < 2:
        raise ValueError(_no_points(who, name, x))
    expect_finite(who, name, x)
    return x


def _no_points(who: str, name: str, x: Tensor) -> str:
    hint = f"; of a single point give {name}[None]" if x.dim() == 1 else ""
    shape = tuple(x.shape)
    return f"{who}: expected {name} of shape (N, *event), at least one point, got {shape}{hint}"


def _starts(who: str, flow: Flow, n: int, generator: Generator | None) -> Tensor:
    expect_counts(who, n=n)
    return flow.base.sample((n,), generator=generator)


def _continuous_part(
    who: str, flow: Flow, start: Tensor, context: Tensor | None
) -> tuple[Continuous, Tensor | None]:
    """The flow's inner, continuous part, and the context checked as in the flow's own calls."""
    return require_field(who, flow), flow.inner_context(who, context, start.shape[:1])


def _energy_from(who: str, flow: Flow, start: Tensor, context: Tensor | None) -> Estimate:
    transform, context = _continuous_part(who, flow, start, context)
    solved = transform.integrate(
        start, context, towards="data", divergence=None, integrands=(kinetic_energy,)
    )
    return Estimate.of(solved.integrals[0])


PATHS = 2_000  # for path energy and straightness
COUNT = 1_000  # points of what is slow, or counted only
PICTURES = 100  # of either, where points are pictures
SLOW = 1_000  # milliseconds


@metric(
    "flow",
    Score(
        "gap", "Gap", "Mean of log p − log q at test points: an estimate of KL", "nats",
        terminal="gap\n(nats)", contest="gap to the true density",
    ),
)  # fmt: skip
def _gap(trial: Trial) -> Estimate | None:
    if trial.log_p is None:
        return None
    return Estimate.of(trial.log_p.double() - trial.log_q.double())


@metric(
    "flow",
    Score(
        "nll", "NLL", "Mean negative log-likelihood of held-out points", "nats",
        terminal="NLL\n(nats)", contest="held-out NLL",
    ),
)  # fmt: skip
def _nll(trial: Trial) -> Estimate:
    return Estimate.of(-trial.log_q, trial.test.weight)


@metric(
    "flow",
    Score("path_energy", "Path energy", "Energy of the paths from base to data", lower=None),
)
def _path_energy(trial: Trial) -> float:
    return _of_paths(path_energy, trial)


@metric("flow", Score("straightness", "Straightness", "0 is straight at constant speed"))
def _straightness(trial: Trial) -> float:
    return _of_paths(straightness, trial)


def _of_paths(measure: Callable[..., Estimate], trial: Trial) -> float:
    if not isinstance(trial.flow.transform, Continuous):
        return math.nan
    most = PATHS if trial.test.x.dim() == 2 else PICTURES
    context = None if trial.context is None else trial.context[:most]
    count = most if context is None else len(context)
    return measure(trial.flow, count, trial.generator, context).value


@metric(
    "flow",
    Score("round_trip", "Round trip", "Largest |decode(encode(x)) − x|", note="max error"),
)
def _round_trip(trial: Trial) -> float:
    x, context = trial.test.x[:COUNT], trial.test.context
    context = None if context is None else context[:COUNT]
    return round_trip_error(trial.exact, x, context, trial.scale.to(x.device))


@metric(
    "flow",
    Score("parameters", "Parameters", "Numbers that are trained", note="count", lower=None),
)
def _parameters(trial: Trial) -> int:
    return sum(p.numel() for p in trial.flow.parameters())


@metric(
    "flow",
    Score(
        "nfe_sample", "NFE, sampling", "Evaluations of the field; 0: no ODE", note="count",
        terminal="NFE",
    ),
)  # fmt: skip
def _nfe_sample(trial: Trial) -> int:
    return trial.evaluations.sample


@metric(
    "flow",
    Score("nfe_log_prob", "NFE, log_prob", "Evaluations of the field; 0: no ODE", note="count"),
)
def _nfe_log_prob(trial: Trial) -> int:
    return trial.evaluations.log_prob


@metric(
    "flow",
    Score(
        "ms_sample", "Sampling", "Time to draw samples", "ms", "/ {test_points}",
        terminal="sample\n(ms)", contest="speed of sampling",
        cost="draws samples {} slower than {}", margin=0.1,
    ),
)  # fmt: skip
def _ms_sample(trial: Trial) -> float:
    context = trial.test.context
    shape = (len(trial.test.x),) if context is None else ()
    return _milliseconds(lambda: trial.flow.sample(shape, context))


@metric(
    "flow",
    Score(
        "ms_log_prob", "log_prob", "Time to evaluate the density", "ms", "/ {test_points}",
        terminal="log_prob\n(ms)", contest="speed of log_prob",
        cost="evaluates densities {} slower than {}", margin=0.1,
    ),
)  # fmt: skip
def _ms_log_prob(trial: Trial) -> float:
    x, context, divergence = trial.test.x, trial.test.context, trial.divergence
    return _milliseconds(lambda: trial.flow.log_prob(x, context, divergence=divergence))


def _milliseconds(call: Callable[[], Any], repeats: int = 3) -> float:
    """Median time of a call, taken once where it is slow; the scores before have warmed it up."""
    times = []
    while len(times) < repeats and sum(times) < SLOW:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
