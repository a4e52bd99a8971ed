"""The checks of the density: it integrates to one, and the log-determinants are right."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.checks.case import NATS, Case, NotApplicable, Outcome, reference
from cnf.checks.one_probe import OneProbe
from cnf.distributions import UniformAngles
from cnf.flow import Flow
from cnf.metrics.flows import log_prob_chunked
from cnf.transforms.base import Compose, Transform
from cnf.transforms.continuous import Continuous

JACOBIAN_LIMIT = 256  # columns; above, the full Jacobian is out of reach
ROWS, COLUMNS = 6, 128  # rows whose Jacobians are computed, and columns of all, beyond 2 rows


def mass(case: Case) -> Outcome:
    """∫p = 1, on a grid that is fine where the density is."""
    size = math.prod(case.flow.event_shape)
    if case.flow.event_shape != (size,) or size > 2:
        raise NotApplicable("a grid is out of reach in more than 2 dimensions")
    context = None if case.context is None else case.context[0].to(reference(case.flow))
    samples = case.flow.sample(4096, context, generator=case.generator)
    samples = samples[samples.isfinite().all(-1)]
    total, spread = _integral(
        lambda x: log_prob_chunked(case.flow, x, context, chunk=2000),
        samples,
        _wide(case, samples),
    )
    if spread > NATS:
        raise NotApplicable(f"the density is too sharp for a grid (∫p = {total:.3g}±{spread:.1g})")
    remedy = (
        "the log-determinant of some transform is missing or has the wrong sign, or the solver "
        "is far too coarse; see the checks below"
    )
    error = abs(total - 1)
    words = f"log_prob integrates to {total:.4g}{'' if error <= NATS else ', not 1'}"
    return Outcome(error, NATS, words, remedy)


def _wide(case: Case, samples: Tensor) -> Tensor:
    """The samples spread by half again, inside the support that preprocessing may bound.

    Of angles, whose density repeats, the ends of one period.
    """
    y, _ = case.flow.inside(samples)
    wide = y.mean(0) + 1.5 * (y - y.mean(0))
    if isinstance(case.flow.base, UniformAngles):
        half = torch.full_like(y[0], case.flow.base.period / 2)
        wide = torch.stack([-half, half])
    return case.flow.outside(wide)[0]


def _integral(
    log_prob: Callable[[Tensor], Tensor], samples: Tensor, wide: Tensor
) -> tuple[float, float]:
    """∫exp(log_prob) over the box of `wide`, and its error.

    The error is the difference between the two halves of a checkerboard. Coarse cells are refined
    where mass or a sample lies, and next to them.
    """
    dim = samples.shape[1]
    side = 48 if dim == 2 else 512
    box = torch.cat([samples, wide])
    low, width = box.amin(0), (box.amax(0) - box.amin(0)) / side
    index = torch.cartesian_prod(*dim * [torch.arange(side, device=low.device)]).reshape(-1, dim)

    def masses(points: Tensor, parts: int) -> Tensor:
        density = log_prob(points.to(samples)).double().exp()
        # outside the support a density may be NaN; on the data that is another check's
        return density.nan_to_num(nan=0.0, posinf=math.inf) * (width.double() / parts).prod()

    coarse = masses(low + (index + 0.5) * width, 1).reshape(dim * [side])
    busy = coarse > 1e-5
    cells = ((samples - low) / width).long().clamp(0, side - 1)
    busy[tuple(cells.unbind(-1))] = True
    pool = F.max_pool2d if dim == 2 else F.max_pool1d
    busy = pool(busy.float()[None, None], 3, 1, 1)[0, 0].bool()
    chosen = index[busy.flatten()]
    total = spread = math.nan
    for budget in (12_000, 48_000):  # the second only for a density too sharp for the first
        parts = max(2, 2 * int((budget / len(chosen)) ** (1 / dim) / 2))  # even, for the halves
        inner = torch.cartesian_prod(*dim * [torch.arange(parts, device=low.device)])
        inner = inner.reshape(-1, dim)
        points = low + (chosen[:, None] + (inner + 0.5) / parts) * width
        fine = masses(points.flatten(0, 1), parts).reshape(len(chosen), -1)
        halves = [fine[:, inner.sum(-1) % 2 == parity].sum().item() for parity in (0, 1)]
        total = sum(halves) + coarse[~busy].sum().item()
        spread = abs(halves[0] - halves[1])
        near = samples[:256]
        change = (log_prob(near + width / parts) - log_prob(near)).abs()
        steep = (~(change < 3)).double().mean().item()
        # both halves miss the same ridge; an edge of the support is steep for a few samples only
        spread = spread if steep < 0.1 else max(spread, steep)
        if spread < NATS / 2:
            break
    return total, spread if math.isfinite(total) else 0.0


def log_determinant(case: Case) -> list[Outcome]:
    """The ladj is log|det| of the Jacobian, both ways, in the flow and with its own solver.

    The Jacobian is taken by central differences of the map itself: an inverse found by iteration
    has no graph to differentiate, and a field that hides its input from autograd would deceive
    autograd and the trace alike.
    """
    size = math.prod(case.flow.event_shape)
    if size > JACOBIAN_LIMIT:
        raise NotApplicable(f"a Jacobian of {size} columns is out of reach; check a smaller flow")
    if any(isinstance(part.divergence, OneProbe) for part in case.continuous):
        raise NotApplicable("the trace is estimated here; check the model at a smaller size")
    outcomes = []
    for flow in dict.fromkeys([case.exact, case.double] if case.continuous else [case.exact]):
        x, z, context = case.rows(flow, max(2, min(ROWS, COLUMNS // size)))
        whole = _whole(flow)
        unmoved = flow.transform(z, context)[1].abs().max() <= 1e-3
        for way, function, value in (("encode", whole.inverse, x), ("decode", whole, z)):
            ladj, true = _ladj_and_truth(function, value, context)
            error = (ladj - true).abs().mean().item()
            tolerance = 1e-3 if flow is case.exact else NATS  # exact: solver 1e-8, differences
            remedy = "right with a tight solver: the flow's own is too coarse; take more steps"
            if flow is case.exact and not error <= tolerance:
                # a map that stretches by 1e8 has a Jacobian that is singular in float64; its
                # parts have not, and where they and their sum are right, so is the whole
                remedy = _culprit(flow, x, context)
                error = error if remedy else 0.0
            words = f"the log-determinant of {way} is off by {error:.2g} nats"
            if unmoved and error <= tolerance:
                words += "; it is 0, where a wrong sign would not show: check again once trained"
            outcomes.append(Outcome(error, tolerance, words, remedy))
    return outcomes


def _ladj_and_truth(
    function: Callable[..., tuple[Tensor, Tensor]], value: Tensor, context: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The log-determinant claimed, and that of the Jacobian by central differences: (N,) each.

    Of several steps, each row takes the one that agrees best: a wide one bridges what an iterated
    inverse leaves, a short one follows a wild map. A wrong claim agrees with none.
    """
    ladj = function(value, context)[1]
    truths = [_slogdet(function, value, context, step) for step in (1e-4, 1e-6, 1e-8)]
    true = torch.stack(truths)
    best = (true - ladj).abs().nan_to_num(nan=math.inf).argmin(0, keepdim=True)
    return ladj, true.gather(0, best)[0]


def _slogdet(
    function: Callable[..., tuple[Tensor, Tensor]],
    value: Tensor,
    context: Tensor | None,
    relative: float,
) -> Tensor:
    n, size = len(value), value[0].numel()
    spread = value.flatten(1).std(0, correction=0)
    step = relative * torch.where(spread > 0, spread, 1.0)
    shift = step.diag().reshape(size, 1, *value.shape[1:])
    around = torch.cat([value + shift, value - shift]).flatten(0, 1)
    wide = None if context is None else context.repeat(2 * size, 1)
    up, down = function(around, wide)[0].reshape(2, size, n, -1)
    jacobian = ((up - down).movedim(0, -1)) / (2 * step)
    return torch.linalg.slogdet(jacobian).logabsdet


def _culprit(flow: Flow, x: Tensor, context: Tensor | None) -> str:
    """Which part's log-determinant is wrong, and how; empty where all are right, and their sum."""
    whole, first, sums = _whole(flow), x, [torch.zeros(()), torch.zeros(())]
    parts = [*_parts(flow.transform), *_parts(flow.preprocess)]
    for number, part in reversed(list(enumerate(parts, 1))):
        given = context if part.context_dim else None
        z = part.inverse(x, given)[0]
        ways = (("inverse", part.inverse, x), ("forward", part, z))
        for index, (way, function, value) in enumerate(ways):
            ladj, true = _ladj_and_truth(function, value, given)
            sums[index] = sums[index].to(ladj) + ladj
            if (ladj - true).abs().mean() <= 1e-3:
                continue
            how = "is wrong"
            if (ladj + true).abs().mean() < 1e-2 * true.abs().mean():
                how = "has the wrong sign"
            elif ladj.abs().max() == 0:
                how = "is missing"
            name = type(part).__name__
            inner = f" of {type(part.field).__name__}" if isinstance(part, Continuous) else ""
            return f"that of {name}.{way}{inner} (part {number} of {len(parts)}) {how}"
        x = z
    claims = whole.inverse(first, context)[1], whole(x, context)[1]
    if all((a - b).abs().mean() <= 1e-3 for a, b in zip(claims, sums, strict=True)):
        return ""
    return "every part's own is right: one is left out of the sum, or counted twice"


def _whole(flow: Flow) -> Transform:
    """The map from base to data, for a flow whose data are of its own dtype."""
    parts = [flow.transform, flow.preprocess]
    return Compose([part for part in parts if part is not None])


def _parts(transform: nn.Module | None) -> list[Transform]:
    if isinstance(transform, Compose):
        return [part for child in transform.transforms for part in _parts(child)]
    return [transform] if isinstance(transform, Transform) else []
