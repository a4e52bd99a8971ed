"""How an ODE is solved: the settings of a solve."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cnf.errors import UnknownNameError, expect_choice, expect_positive

ADAPTIVE = ("adaptive_heun", "bosh3", "dopri5", "dopri8", "fehlberg2")
FIXED = ("euler", "heun2", "heun3", "midpoint", "rk4")
GRADIENTS = ("adjoint", "backprop")


@dataclass(frozen=True)
class Solver:
    """How an ODE is solved and differentiated.

    >>> Solver("rk4", steps=8, gradient="backprop").steps
    8

    Args:
        method: Adaptive (dopri5, dopri8, bosh3, adaptive_heun, fehlberg2) or fixed-step (euler,
            midpoint, heun2, heun3, rk4, explicit_adams, implicit_adams).
        rtol: Relative tolerance of the adaptive methods.
        atol: Absolute tolerance of the adaptive methods.
        steps: Steps of a fixed-step method over the whole interval; required there, refused
            elsewhere.
        gradient: "adjoint" solves the adjoint ODE backwards (memory flat in the number of
            evaluations; first derivatives only), "backprop" differentiates the solver's own
            operations (memory grows with evaluations; exact gradient of what was computed, any
            order).
        adjoint_rtol: Relative tolerance of the backward solve; `rtol` if None.
        adjoint_atol: Absolute tolerance of the backward solve; `atol` if None.
        max_nfe: Evaluations of the dynamics allowed in one solve, and again in its backward solve,
            before a `SolverError`.
    Raises:
        ValueError: An unknown method or gradient, a tolerance that is not positive, steps missing
            or out of place.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int | None = None
    gradient: str = "adjoint"
    adjoint_rtol: float | None = None
    adjoint_atol: float | None = None
    max_nfe: int = 10_000

    def __post_init__(self) -> None:
        if self.method not in ADAPTIVE + FIXED:
            raise UnknownNameError("Solver method", self.method, ADAPTIVE + FIXED)
        expect_choice("Solver", "gradient", self.gradient, GRADIENTS)
        expect_positive(
            "Solver", rtol=self.rtol, atol=self.atol, max_nfe=self.max_nfe, steps=self.steps,
            adjoint_rtol=self.adjoint_rtol, adjoint_atol=self.adjoint_atol,
        )  # fmt: skip
        if self.steps is not None and self.steps != int(self.steps):
            raise ValueError(f"Solver: expected steps to be a whole number, got {self.steps!r}")
        if self.fixed and self.steps is None:
            raise ValueError(f"Solver: {self.method} has no step-size control; give it steps=…")
        if not self.fixed and self.steps is not None:
            raise ValueError(
                f"Solver: {self.method} chooses its own steps; drop steps={self.steps}, "
                f"or take a fixed-step method: {', '.join(FIXED)}"
            )

    @property
    def fixed(self) -> bool:
        """Whether the steps are set beforehand."""
        return self.method in FIXED

    def __str__(self) -> str:
        if self.fixed:
            return f"{self.method}, {self.steps} steps"
        return f"{self.method}, rtol={self.rtol:g}, atol={self.atol:g}"


def as_solver(solver: "Solver | Mapping[str, Any] | None") -> Solver:
    """A `Solver` as it is, or one from its arguments (as a config file holds them)."""
    return solver if isinstance(solver, Solver) else Solver(**(solver or {}))
