"""The flow of a vector field, as a transform."""

import copy
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from cnf.dynamics import ode
from cnf.dynamics.divergence import Divergence, as_divergence
from cnf.dynamics.regularizers import Integrand
from cnf.errors import expect_choice
from cnf.fields.base import VectorField
from cnf.transforms.base import TRANSFORMS, Transform


class Integral(NamedTuple):
    """A solved trajectory.

    Attributes:
        value: The end point, shape (*batch, *event).
        ladj: log|det| of the direction solved, shape (*batch,), in nats; NaN where no divergence
            was asked for.
        integrals: One (*batch,) tensor for each integrand, ∫ over [0, 1] whatever the direction.
        nfe: Evaluations of the field.
    """

    value: Tensor
    ladj: Tensor
    integrals: tuple[Tensor, ...]
    nfe: int


@TRANSFORMS.register("continuous")
class Continuous(Transform):
    r"""z at t = 0 carried to x at t = 1 by dx/dt = v(t, x, c).

    :math:`\log|\det \partial x/\partial z| = \int_0^1 \nabla\cdot v(t, x_t)\,dt`; the inverse runs
    the same ODE from 1 to 0.
    Source: Chen et al. (2018), Neural Ordinary Differential Equations,
    https://arxiv.org/abs/1806.07366.

    Args:
        field: The velocity.
        solver: Method, tolerances and gradient mode; dopri5 at 1e-5 with the adjoint by default.
        divergence: How ∇·v is had: "exact" (default), a `Divergence`, or None for no
            log-determinant (it is NaN then).
    """

    def __init__(
        self,
        field: VectorField,
        solver: ode.Solver | None = None,
        divergence: str | Divergence | None = "exact",
    ) -> None:
        super().__init__(len(field.event_shape), field.context_dim)
        self.field = field
        self.solver = solver or ode.Solver()
        self.divergence = divergence

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.integrate(z, context, towards="data", divergence=self.divergence)[:2]

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.integrate(x, context, towards="base", divergence=self.divergence)[:2]

    def integrate(
        self,
        value: Tensor,
        context: Tensor | None = None,
        *,
        towards: Literal["data", "base"],
        divergence: str | Divergence | None = "exact",
        integrands: Sequence[Integrand] = (),
    ) -> Integral:
        """Solve from one end to the other, with log-determinant and integrals along the way.

        Args:
            value: Starting points, shape (*batch, *event).
            context: Condition, shape (*batch, context_dim).
            towards: "data" runs t from 0 to 1, "base" from 1 to 0.
            divergence: As in the constructor.
            integrands: Functions (t, x, v) → (*batch,), integrated over time beside the state.
        """
        expect_choice("Continuous.integrate", "towards", towards, ("data", "base"))
        t0, t1 = (0.0, 1.0) if towards == "data" else (1.0, 0.0)
        batch = value.shape[: value.dim() - self.event_dims]
        velocity = (
            None if divergence is None else as_divergence(divergence).bind(self.field, value)
        )

        def dynamics(t: Tensor, state: ode.State) -> ode.State:
            x = state[0]
            if velocity is None:
                rates = (self.field(t, x, context).to(x.dtype),)
            else:
                v, div = velocity(t, x, context)
                rates = (v.to(x.dtype), div.to(x.dtype))  # the field may compute in bfloat16
            return (*rates, *(integrand(t, x, rates[0]) for integrand in integrands))

        channels = len(integrands) + (velocity is not None)
        state = (value, *(value.new_zeros(batch) for _ in range(channels)))
        state, nfe = ode.solve(dynamics, state, t0, t1, self.solver, self._params(context))
        ladj = value.new_full(batch, float("nan")) if velocity is None else state[1]
        integrals = tuple((t1 - t0) * total for total in state[len(state) - len(integrands) :])
        return Integral(state[0], ladj, integrals, nfe)

    def trajectory(
        self, value: Tensor, times: Sequence[float], context: Tensor | None = None
    ) -> Tensor:
        """The ODE at `times` (monotone), from `value` at times[0]: (times, *batch, *event)."""

        def dynamics(t: Tensor, state: ode.State) -> ode.State:
            return (self.field(t, state[0], context).to(state[0].dtype),)

        (path,), _ = ode.solve_path(dynamics, (value,), times, self.solver, self._params(context))
        return path

    def _params(self, context: Tensor | None) -> list[Tensor]:
        # The context too: an adjoint that is not told of it gives it no gradient, silently.
        return [*self.field.parameters(), *([] if context is None else [context])]


def reconfigured(transform: Transform, **settings: Any) -> Transform:
    """The same transform and weights, with solver=… or divergence=… in every `Continuous`."""

    def copied(module: nn.Module) -> nn.Module:
        if not isinstance(module, Transform | nn.ModuleList):
            return module
        clone = copy.copy(module)
        if isinstance(clone, Continuous):
            for name, value in settings.items():
                setattr(clone, name, value)
        else:
            clone._modules = {name: copied(child) for name, child in module._modules.items()}  # pyright: ignore
        return clone

    result = copied(transform)
    assert isinstance(result, Transform)
    return result


def is_continuous(transform: nn.Module) -> bool:
    """Whether a `Continuous` stands anywhere in it."""
    return any(isinstance(module, Continuous) for module in transform.modules())
