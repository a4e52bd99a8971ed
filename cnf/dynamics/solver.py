"""The settings with which an ODE is solved and differentiated."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any

from cnf.errors import UnknownNameError, expect_choice, expect_counts, expect_positive
from cnf.printing import named
from cnf.registry import expect_options, options_of

ADAPTIVE = ("adaptive_heun", "bosh3", "dopri5", "dopri8", "fehlberg2", "scipy_solver")
STAGES = {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}  # evaluations per step
MULTISTEP = ("explicit_adams", "implicit_adams")
FLOW_MAP = "flow-map"
MAPS = {**STAGES, FLOW_MAP: 1}  # those whose steps are maps
FIXED = (*STAGES, *MULTISTEP)
ENDS = 1e-6  # distance in time from an end of the interval that rounding in float32 may lose
GRADIENTS = ("auto", "adjoint", "backprop", "checkpoint")


@dataclass(frozen=True)
class Solver:
    """The settings with which an ODE is solved and differentiated.

    >>> Solver("rk4", steps=8, gradient="backprop").steps
    8

    Args:
        method: A method of torchdiffeq: adaptive (dopri5, dopri8, bosh3, adaptive_heun, fehlberg2;
            scipy_solver, SciPy's LSODA for stiff fields, on the CPU) or fixed-step (euler,
            midpoint, heun2, heun3, rk4, explicit_adams, implicit_adams). "flow-map" takes the
            steps of a `cnf.fields.FlowMap`, which are always the model, as with `discrete`.
        rtol: Relative tolerance of the adaptive methods.
        atol: Absolute tolerance of the adaptive methods.
        steps: Number of equal steps of a fixed-step method over the whole interval; required for
            these methods (unless there is a grid), and refused for others.
        grid: Times of unequal steps, increasing from 0 to 1, as `cnf.sampling` computes them; not
            for Adams methods.
        gradient: "backprop" differentiates the operations of the solver. It is the fastest, gives
            the exact gradient of the numerical solution, for the steps that were taken, and
            derivatives of any order (one where discrete steps are inverted); its memory grows with
            the number of evaluations.
            "checkpoint" does so for one segment at a time: it stores the graph of a single segment
            and makes every evaluation twice; an adaptive method restarts in each segment.
            "adjoint" solves the adjoint ODE backwards: its memory does not depend on the number of
            evaluations, and it gives first derivatives only.
            "auto" is backprop until the graph exceeds `memory`, then checkpoint for fixed-step
            methods and adjoint for adaptive ones.
        adjoint_rtol: Relative tolerance of the backward solve; `rtol` if None.
        adjoint_atol: Absolute tolerance of the backward solve; `atol` if None.
        adjoint_norm: The norm of the error in the backward solve: "seminorm" excludes the
            gradients of the parameters, on which the dynamics do not depend (Kidger et al. 2021,
            https://arxiv.org/abs/2009.09457); "full" includes them.
        norm: The error that the tolerances bound: "rms" is over all rows, so that a row's result
            depends on the other rows, within the tolerance; "rows" is that of the worst row.
        memory: Memory in GiB that "auto" may use for the graph of a solve.
        segments: Number of segments of "checkpoint".
        compile: Whether `torch.compile` compiles the dynamics (velocity, divergence and
            integrands together); the solver's loop is not compiled.
        max_nfe: Largest number of evaluations of the dynamics in a solve, and again in its
            backward solve, before a `SolverError`.
        discrete: Whether the steps of a fixed-step method are the model: log-densities are then
            those of what the steps compute, exactly, at any number of steps.
        explicit: With `discrete`, the direction that takes the steps as they are: "sample" or
            "density". The other one inverts each of them.

    Raises:
        ValueError: A method or gradient is unknown, a tolerance is not positive, or steps are
            missing or not applicable.
    """

    method: str = "dopri5"
    rtol: float = 1e-5
    atol: float = 1e-5
    steps: int | None = None
    grid: tuple[float, ...] | None = None
    gradient: str = "auto"
    adjoint_rtol: float | None = None
    adjoint_atol: float | None = None
    adjoint_norm: str = "seminorm"
    norm: str = "rms"
    memory: float = 2.0
    segments: int = 8
    compile: bool = False
    max_nfe: int = 10_000
    discrete: bool = False
    explicit: str = "sample"

    def __post_init__(self) -> None:
        if self.method == FLOW_MAP:
            object.__setattr__(self, "discrete", True)
        known = (*ADAPTIVE, *FIXED, FLOW_MAP)
        if self.method not in known:
            raise UnknownNameError("Solver method", self.method, known)
        if self.grid is not None:
            self._set_grid()
        expect_choice("Solver", "gradient", self.gradient, GRADIENTS)
        expect_choice("Solver", "adjoint_norm", self.adjoint_norm, ("seminorm", "full"))
        expect_choice("Solver", "norm", self.norm, ("rms", "rows"))
        expect_positive(
            "Solver", rtol=self.rtol, atol=self.atol, memory=self.memory,
            adjoint_rtol=self.adjoint_rtol, adjoint_atol=self.adjoint_atol,
        )  # fmt: skip
        expect_counts("Solver", steps=self.steps, segments=self.segments, max_nfe=self.max_nfe)
        if self.fixed and self.steps is None:
            raise ValueError(f"Solver: {self.method} has no step-size control; set steps=…")
        if not self.fixed and self.steps is not None:
            raise ValueError(
                f"Solver: {self.method} chooses its own steps; drop steps={self.steps}, "
                f"or take a fixed-step method: {', '.join(FIXED)}"
            )
        if self.method == "scipy_solver" and self.gradient in ("backprop", "checkpoint"):
            raise ValueError(
                f"Solver: expected gradient to be 'adjoint' or 'auto' for scipy_solver, which has "
                f"no graph to differentiate, got {self.gradient!r}"
            )

        expect_choice("Solver", "explicit", self.explicit, ("sample", "density"))
        if self.discrete:
            self._expect_steps()
        elif self.explicit != "sample":
            raise ValueError(
                f"Solver: expected discrete=True with explicit={self.explicit!r}, as any other "
                "solver takes its steps in both directions"
            )

    def _expect_steps(self) -> None:
        if self.method not in MAPS:
            raise ValueError(
                f"Solver: expected one of {', '.join(MAPS)} where discrete=True, whose steps "
                f"are maps, got {self.method}"
            )
        if self.gradient not in ("auto", "backprop"):
            raise ValueError(
                "Solver: expected gradient to be 'auto' or 'backprop' where discrete=True, got "
                f"{self.gradient!r}"
            )

    def _set_grid(self) -> None:
        try:
            grid = tuple(float(t) for t in self.grid)  # pyright: ignore
        except (TypeError, ValueError):
            raise ValueError(
                f"Solver: expected grid to be times ascending from 0 to 1, got {self.grid!r}"
            ) from None
        rises = all(a < b for a, b in pairwise(grid))
        if self.method not in MAPS or len(grid) < 2 or not rises or grid[0] or grid[-1] != 1:
            raise ValueError(
                f"Solver: expected a grid ascending from 0 to 1 and one of {', '.join(MAPS)}, "
                f"got {grid} and {self.method}"
            )
        if min(b - a for a, b in pairwise(grid)) <= 2 * ENDS:
            raise ValueError(f"Solver: expected steps of a grid above {2 * ENDS:g}, got {grid}")
        if self.steps not in (None, len(grid) - 1):
            raise ValueError(
                f"Solver: expected steps={len(grid) - 1} or None for a grid of that many steps, "
                f"got {self.steps}"
            )
        object.__setattr__(self, "grid", grid)
        object.__setattr__(self, "steps", len(grid) - 1)

    @property
    def fixed(self) -> bool:
        """Whether the number of steps is fixed."""
        return self.method in (*FIXED, FLOW_MAP)

    @property
    def has_error_control(self) -> bool:
        """Whether torchdiffeq controls the error of each step, and so notices NaN."""
        return not self.fixed and self.method != "scipy_solver"

    @property
    def evaluations(self) -> int | None:
        """Number of evaluations of a solve, if it is known beforehand."""
        if self.steps is None or self.method not in MAPS:
            return None
        return self.steps * MAPS[self.method]

    def grid_between(self, t0: float, t1: float) -> list[float]:
        """The grid's times strictly inside (t0, t1), in the order of the solve.

        Args:
            t0: Start of the solve.
            t1: End of the solve.
        """
        low, high = min(t0, t1) + ENDS, max(t0, t1) - ENDS
        found = [t for t in self.grid or () if low < t < high]
        return found if t0 < t1 else found[::-1]

    def stops(self, t0: float, t1: float) -> list[float]:
        """Ends of the steps of a fixed-step method, or of the segments of an adaptive one.

        Args:
            t0: Start of the solve.
            t1: End of the solve.
        """
        if self.grid is not None:
            return [t0, *self.grid_between(t0, t1), t1]
        count = self.steps or self.segments
        return [t0 + (t1 - t0) * k / count for k in range(count)] + [t1]

    @classmethod
    def of(cls, spec: "Solver | Mapping[str, Any] | str | None") -> "Solver":
        """A solver from a solver, its arguments, a method or None.

        A mapping of arguments is what a config file holds; a string is the name of an adaptive
        method; None is the default.
        """
        if isinstance(spec, Solver):
            return spec
        if spec is not None and not isinstance(spec, str | Mapping):
            raise TypeError(
                "Solver: expected a Solver, a mapping of its arguments or the name of an adaptive "
                f"method, got {spec!r}; write cnf.Solver('rk4', steps=16)"
            )
        arguments: dict[str, Any] = {"method": spec} if isinstance(spec, str) else dict(spec or {})
        expect_options("Solver", arguments, options_of(cls))
        return cls(**arguments)

    def refined(self) -> "Solver":
        """The solver with 1/100 of the tolerances, or twice the number of steps.

        A discrete one is the model itself, and stays.
        """
        return self if self.discrete else self.finer()

    def finer(self) -> "Solver":
        """As `refined`, also of a discrete solver, which then is another model."""
        if self.grid is not None:
            middles = [0.5 * (a + b) for a, b in pairwise(self.grid)]
            return replace(self, grid=tuple(sorted((*self.grid, *middles))), steps=None)
        if self.steps is not None:
            return replace(self, steps=2 * self.steps)
        return replace(self, rtol=self.rtol / 100, atol=self.atol / 100)

    def __repr__(self) -> str:
        """The call that creates the solver, without arguments that have their default."""
        given = ((f.name, getattr(self, f.name), f.default) for f in fields(self))
        changed = [f"{name}={value!r}" for name, value, default in given if value != default]
        return named(self, *changed)

    def __str__(self) -> str:
        if self.fixed:
            unequal = " on a grid" if self.grid else ""
            exact = f", exact, explicit for {self.explicit}" if self.discrete else ""
            return f"{self.method}, {self.steps} steps{unequal}{exact}"
        return f"{self.method}, rtol={self.rtol:g}, atol={self.atol:g}"
