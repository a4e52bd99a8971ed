"""Why a log-likelihood is infinite, or wrong.

Rows may be mapped outside of the base's support, and fixed steps may be too few.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from cnf.dynamics.divergence import Divergence, Hutchinson
from cnf.errors import SolverError, warn
from cnf.flow import Flow, evaluating
from cnf.objectives import Batch
from cnf.objectives.batch import weighted_mean
from cnf.transforms.continuous import Continuous, has_fixed_steps, refined

ROWS = 256  # with which fixed steps are compared with twice as many
NATS = 0.05  # of mean log-likelihood that they may differ by


def outside_of_base(flow: Flow, rows: Batch) -> str | None:
    """How many of the rows have z outside of the base's support, in words; None if none has."""
    with evaluating(flow), torch.no_grad():
        z = flow.encode(rows.x, rows.context)
        count = int((flow.base.log_prob(z) == -torch.inf).sum())
    if not count:
        return None
    if flow.base.support == "everywhere":
        return (
            f"{count} of {len(rows.x)} rows are mapped to z so far out that their log-density "
            "overflows; check the data's scale, or standardize them (preprocess='standardize')"
        )
    return (
        f"{count} of {len(rows.x)} rows are mapped to z outside of the base's support "
        f"({flow.base.support}), where their log-density is -inf; take a base without bounds, "
        "such as the standard normal (base=None)"
    )


@torch.no_grad()
def warn_of_few_steps(
    who: str,
    flow: Flow,
    rows: Batch,
    *,
    whose: str,
    kind: str,
    divergence: Divergence | None = None,
) -> bool:
    """Whether a flow's fixed steps gave another NLL than twice as many, of which it warns.

    Args:
        who: Who warns.
        flow: The flow; of one without fixed steps nothing is said.
        rows: Of which `ROWS`, evenly taken, are scored, by their weights.
        whose: Steps they are: the flow's or the loss's.
        kind: Of rows, in words.
        divergence: An estimator, with the same probes for both; None for what the flow has.
    """
    if not has_fixed_steps(flow.transform):
        return False
    rows = rows.map(lambda value: value[:: -(-len(rows.x) // ROWS)])
    with evaluating(flow):
        finer = flow.with_transform(refined(flow.transform))  # in the mode that it is made in
        now, then = (_nll(each, rows, divergence) for each in (flow, finer))
    score = f"the NLL of {len(rows.x)} {kind} rows"
    return warn_of_difference(who, flow, now, then, score, whose)


def warn_of_difference(
    who: str, module: nn.Module, now: float, then: float, score: str, whose: str = "flow"
) -> bool:
    """Whether the score `now` is not that of twice the steps, `then`, of which it warns.

    Args:
        who: Who warns.
        module: The flow, or what contains one.
        now: The score, in nats.
        then: That by twice the steps of the fixed solvers.
        score: What it is, in words.
        whose: Steps they are: the flow's or the loss's.
    """
    if now == then or abs(now - then) <= NATS:  # NaN is neither
        return False
    mine, finer = _told_apart(now, then)
    solvers = " and ".join(dict.fromkeys(str(part.solver) for part in _odes_of(module)))
    warn(
        f"{who}: {score} is {mine} nats by the {whose}'s solver ({solvers}) and "
        f"{finer} by twice the steps: the difference is the solver's error, which likelihood "
        "learns to exploit; take more steps, or an adaptive solver such as Solver('dopri5')"
    )
    return True


@torch.no_grad()
def warn_of_other_loss(
    who: str, module: nn.Module, now: float, loss: Callable[[nn.Module], float]
) -> bool:
    """Whether twice the fixed steps of its ODEs give a module another loss, of which it warns.

    It is for what has no NLL of its own, such as an autoencoder with flows inside.

    Args:
        who: Who warns.
        module: The module; of one without fixed steps nothing is said.
        now: The module's loss.
        loss: The loss of a module, with the same rows and draws each time; of one that is another
            the second time nothing is said.
    """
    solvers = [
        each for ode in _odes_of(module) for each in (ode.solver, ode.recipe.solver) if each
    ]
    if not any(solver.fixed and not solver.discrete for solver in solvers):
        return False
    finer = copy.deepcopy(module)
    for ode in _odes_of(finer):
        ode.solver = ode.solver.refined()
        if ode.recipe.solver:  # by which some objectives solve
            ode.recipe = replace(ode.recipe, solver=ode.recipe.solver.refined())
    then = loss(finer)
    if abs(now - then) > NATS and now != loss(module):
        return False
    return warn_of_difference(who, module, now, then, "the held-out loss", "module")


def _odes_of(module: nn.Module) -> list[Continuous]:
    return [part for part in module.modules() if isinstance(part, Continuous)]


def _told_apart(a: float, b: float) -> tuple[str, str]:
    """Two numbers in four significant digits, or in as many as it takes to tell them apart."""
    texts = [(f"{a:.{digits}g}", f"{b:.{digits}g}") for digits in range(4, 18)]
    return next((pair for pair in texts if pair[0] != pair[1]), texts[0])  # both may be NaN


def _nll(flow: Flow, rows: Batch, divergence: Divergence | None) -> float:
    noise, probes = (torch.Generator(rows.x.device).manual_seed(k) for k in (0, 1))  # of both
    if isinstance(divergence, Hutchinson):
        divergence = replace(divergence, generator=probes)
    try:
        log_prob = flow.log_prob(
            rows.x, rows.context, divergence=divergence, generator=noise
        ).double()
    except SolverError:  # what the finer steps meet may be infinite
        return math.inf
    return -weighted_mean(log_prob, rows.weight).item()
