"""Quality of samples against the evaluations of the field that they take."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from cnf.dynamics import record
from cnf.dynamics.solver import FLOW_MAP, Solver
from cnf.flow import Flow, evaluating
from cnf.metrics.distances import sliced
from cnf.random import stream
from cnf.transforms.continuous import is_continuous, solvers_in

STEPS = (1, 2, 4, 8, 16, 32)
Curve = list[tuple[int, float]]  # (evaluations, distance), the flow's own solver last


@torch.no_grad()
def nfe_curve(
    flow: Flow,
    target: Tensor,
    *,
    steps: Sequence[int] = STEPS,
    method: str | None = None,
    context: Tensor | None = None,
    distance: Callable[[Tensor], float] | None = None,
    seed: int = 0,
) -> Curve:
    """How far samples are from the target, by so many steps and by the flow's own solver.

    Args:
        flow: A flow; of a discrete one the curve has one point, at 0 evaluations.
        target: True samples, shape (N, *event); as many are drawn.
        steps: Steps of `method`.
        method: A one-step method, such as "heun2"; if None, "flow-map" of a flow whose own solver
            takes steps of a flow map, and "euler" of others.
        context: Condition of each sample, shape (N, C).
        distance: Of samples (N, *event) from the target; sliced W2 over 200 directions if None.
        seed: Of the base samples, the same for each point.
    """
    distance = distance or partial(sliced, target.cpu())
    if method is None:
        maps = any(solver.method == FLOW_MAP for solver in solvers_in(flow.transform))
        method = FLOW_MAP if maps else "euler"
    flows = [
        flow.with_solver(Solver(method, steps=n)) for n in steps if is_continuous(flow.transform)
    ]
    curve = []
    for stepped in [*flows, flow]:
        z = flow.base.sample((len(target),), stream(seed, "samples in few steps"))
        with evaluating(flow), record() as stats:
            drawn = stepped.decode(z, context)
        curve.append((stats.forward, distance(drawn.cpu())))
    return curve


def nfe_table(curves: Mapping[str, Curve]) -> str:
    """Markdown: a row for each curve, a column for each number of evaluations.

    Args:
        curves: By title, over the same steps.
    """
    evaluations = [nfe for nfe, _ in next(iter(curves.values()))[:-1]]
    lines = [
        ["", *map(str, evaluations), "own solver"],
        ["---", *["---:"] * (len(evaluations) + 1)],
    ]
    for title, curve in curves.items():
        *few, (own, last) = curve
        lines.append([title, *(f"{value:.3f}" for _, value in few), f"{last:.3f} ({own})"])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
