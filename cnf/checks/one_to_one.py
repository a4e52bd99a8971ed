"""The check that the steps of a solver, where they are the model, map points one to one."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from cnf.checks.case import Case, NotApplicable, Outcome
from cnf.dynamics import numerical
from cnf.dynamics.numerical import NumericalStep
from cnf.dynamics.preimage import preimage
from cnf.transforms.continuous import Continuous, ends_of_odes, odes_in

MOST_POINTS = 512  # on the side of the data and on that of the base, at each width
FEWEST_POINTS = 64  # there, in many dimensions
COLUMNS = 2_048  # of the Jacobians of all points, beyond which there are fewer points
FAR = {"twice as far out": 2.0, "four times as far out": 4.0}
STARTS = 3  # of the search for a second preimage
APART = 1e-3  # of the points' spread, beyond which two preimages are two

NEAR_REMEDY = (
    "there a step of the solver is not one to one, so that log_prob is NaN, or the density of one "
    "preimage of several; take more steps, or train by likelihood with this solver"
)
FAR_REMEDY = (
    "there a step of the solver is not one to one; where no sample comes this matters little: "
    "look at mass, and train by likelihood with this solver for longer"
)


def near(case: Case) -> Outcome:
    """No step of a discrete solver folds on data and on base samples."""
    return _outcome(case, "data and base samples", 1.0, NEAR_REMEDY)


def far(case: Case) -> list[Outcome]:
    """Nor does one around them."""
    return [_outcome(case, where, width, FAR_REMEDY) for where, width in FAR.items()]


def _outcome(case: Case, where: str, width: float, remedy: str) -> Outcome:
    if not any(part.solver.discrete for part in odes_in(case.flow.transform)):
        raise NotApplicable("no solver's steps are the model")
    folded = [found for points in _sides(case, width) for found in points]
    bad, count = int(torch.cat(folded).sum()), sum(map(len, folded))
    words = f"{bad} of {count} points fold" if bad else f"no fold found on {count} points"
    return Outcome(bad, 0, f"{words}, {where}", remedy)


def _sides(case: Case, width: float) -> Iterator[list[Tensor]]:
    """Which points fold in each ODE, of those around data and of those around base samples."""
    flow = case.double
    x, _, context = case.rows(flow)
    count = max(FEWEST_POINTS, min(MOST_POINTS, COLUMNS // math.prod(flow.event_shape)))
    rows = torch.randint(len(x), (count,), generator=case.generator).to(x.device)
    context = None if context is None else context[rows]
    y, z = flow.inside(x[rows])[0], flow.base.sample((count,), case.generator).to(flow.dtype)
    with numerical.watched():
        for points in (y, flow.transform(z, context)[0]):
            ends = ends_of_odes(flow.transform, points, context)
            yield [
                _folded(part, own, context, width, case.generator)
                for part, own in zip(odes_in(flow.transform), ends, strict=True)
                if part.solver.discrete
            ]


def _folded(
    ode: Continuous,
    ends: tuple[Tensor, Tensor],
    context: Tensor | None,
    width: float,
    generator: torch.Generator,
) -> Tensor:
    """Which points fold, of those around the end where the steps are explicit, shape (N,)."""
    at_data, at_base = ends
    start = at_base if ode.solver.explicit == "sample" else at_data
    found = start.flatten(1).isfinite().all(1)  # others were lost on the way there
    if context is not None:
        context = context[found] if ode.context_dim else None
    folded = ~found
    points = _around(start[found], width, generator)
    folded[found] = _folds(ode.steps(context), points, generator)
    return folded


def _around(points: Tensor, width: float, generator: torch.Generator) -> Tensor:
    """The points, moved a little, and so many times as far from their mean."""
    center, spread = points.mean(0), points.std(0)
    noise = torch.randn(points.shape, generator=generator, dtype=points.dtype)
    return center + width * (points - center) + 0.3 * (width - 1) * spread * noise.to(points)


def _folds(steps: list[NumericalStep], x: Tensor, generator: torch.Generator) -> Tensor:
    """Whether some step is not one to one at a point, or another point has the same image."""
    folded = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    for step in steps:
        image, jacobian = step.with_jacobian(x)
        folded |= numerical.log_det(jacobian).isnan() & x.flatten(1).isfinite().all(1)
        for _ in range(STARTS):
            start = x[torch.randperm(len(x), generator=generator).to(x.device)]
            other, missed, _ = preimage(step, image, start)
            apart = (other - x).flatten(1).norm(dim=1) > APART * x.std()
            folded |= apart & ~missed
        x = image
    return folded
