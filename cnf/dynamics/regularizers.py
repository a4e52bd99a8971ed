"""Per-sample quantities integrated along a trajectory: costs, penalties, diagnostics."""

from collections.abc import Callable

from torch import Tensor

from cnf.registry import Registry

REGULARIZERS = Registry("regularizer")

Integrand = Callable[[Tensor, Tensor, Tensor], Tensor]


@REGULARIZERS.register("kinetic")
def kinetic_energy(t: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """‖v‖², shape (*batch,): over a trajectory, the cost of Benamou and Brenier (2000).

    Source: Finlay et al. (2020), RNODE, https://arxiv.org/abs/2002.02798.

    Args:
        t: Time, shape ().
        x: Points, shape (*batch, D).
        v: Velocity there, shape (*batch, D).
    """
    return (v * v).sum(-1)
