"""A barrier that holds the steps of a discrete solver one to one while likelihood trains them.

The likelihood sees the determinants of the steps at the data alone. Elsewhere a step may fold, so
that several points have one image, and log_prob is the density of one of them.
"""

import math

import torch
from torch import Tensor

from cnf.dynamics import numerical
from cnf.dynamics.preimage import per_row
from cnf.flow import Flow
from cnf.transforms.continuous import Continuous, odes_in

WEIGHT = 20.0  # nats for a step that is about to fold
LEAST = 0.05  # factor by which a step may shorten a direction, below which it costs
EVERY = 4  # one of so many rows is held, as folds have an extent
NEAR = 0.3  # scale of the noise around data
WIDE = (1.0, 12.0)  # scales of the noise around the origin, from one row to the other


def discrete_in(flow: Flow) -> list[Continuous]:
    """The ODEs of a flow whose solver's steps are the model."""
    return [ode for ode in odes_in(flow.transform) if ode.solver.discrete]


def barrier(flow: Flow, x: Tensor, context: Tensor | None, noise: Tensor) -> Tensor:
    """Mean over points of Σ max(0, 1 - σ/`LEAST`) over the steps of every discrete ODE, shape ().

    σ is the smallest singular value of a step's Jacobian, with the sign of its determinant.

    The points are around the data, or base samples, where the steps begin, and further out.

    Args:
        flow: The flow.
        x: Data, shape (N, *event).
        context: Condition, shape (N, C), or None.
        noise: Standard normal numbers, shape (N, 2, *event).
    """
    x, noise = x[::EVERY], noise[::EVERY]
    inner = None if context is None else context[::EVERY]
    inner = flow.inner_context("MaximumLikelihood", inner, (len(x),))
    inner = None if inner is None else torch.cat([inner, inner])
    costs = [
        _cost(ode, _places(flow, ode, x, noise), inner if ode.context_dim else None)
        for ode in discrete_in(flow)
    ]
    return torch.stack(costs).sum()


def _cost(ode: Continuous, points: Tensor, context: Tensor | None) -> Tensor:
    cost = points.new_zeros(len(points))
    for step in ode.steps(context):
        points, jacobian = step.with_jacobian(points)
        cost = cost + (1 - numerical.least_stretch(jacobian) / LEAST).relu()
    return cost.mean()


def _places(flow: Flow, ode: Continuous, x: Tensor, noise: Tensor) -> Tensor:
    """Where the steps of an ODE begin, shape (2N, *its event)."""
    size = math.prod(ode.field.event_shape)
    own = noise.flatten(2)[..., :size].reshape(len(noise), 2, *ode.field.event_shape)
    near, wide = own.unbind(1)
    reach = WIDE[0] * (WIDE[1] / WIDE[0]) ** torch.linspace(0, 1, len(wide)).to(wide)
    wide = per_row(reach, wide) * wide
    if ode.solver.explicit == "density" and ode is flow.transform and not flow.dequantization:
        near = flow.inside(x)[0] + NEAR * near
    return torch.cat([near, wide])
