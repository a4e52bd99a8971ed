"""The table of what a race measures of every flow, and how it shows it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

from torch import Generator, Tensor

from cnf.data import Points
from cnf.flow import Flow
from cnf.registry import Registry

METRICS = Registry("metric")
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Score:
    """A number of a race, and how the terminal, the page and the verdict show it.

    Args:
        key: Its name in `Entry.scores` and results.csv.
        label: Head of its column.
        about: What it is, in a sentence.
        unit: Of the number.
        note: What stands under the label after the unit; {test_points} and {w2_points} are filled
            in.
        lower: Whether less is better; None where neither is.
        terminal: Head of its column in a terminal, which has room for few; no column if empty.
        contest: What being best at it is called in the verdict; no contest if empty.
        cost: How the verdict says that the winner pays here, {} times more than {} does.
        margin: Relative difference that the noise of measuring makes: below it is a tie.
    """

    key: str
    label: str
    about: str
    unit: str = ""
    note: str = ""
    lower: bool | None = True
    terminal: str = ""
    contest: str = ""
    cost: str = ""
    margin: float = 0.0


class Evaluations(NamedTuple):
    """Evaluations of the vector field in one call; 0 for a flow that solves no ODE."""

    sample: int
    log_prob: int


@dataclass(frozen=True)
class Trial:
    """A flow in eval mode, and the points that a race measures it at.

    Attributes:
        flow: With its own solver.
        exact: The same weights under a tight solver; the flow itself where it solves no ODE.
        test: Held-out points with their contexts and weights, on the flow's device.
        log_q: Their log-density by the exact flow, shape (N,), on the CPU.
        log_p: Their true log-density, likewise; None where it is not known.
        true: Held-out points that samples are compared with, shape (M, D), in float64 on the CPU;
            one's own points are standardized.
        drawn: As many samples of the flow, likewise.
        context: Of the samples, shape (M, C), or None.
        scale: The unit of each column, which broadcasts to x.
        evaluations: Of the field, in one `sample` and one `log_prob` of 1,000 points.
        generator: Source of the starts of paths, from which metrics draw in turn.
        divergence: The estimator of the trace that `log_q` is computed with; None for none.
    """

    flow: Flow
    exact: Flow
    test: Points
    log_q: Tensor
    log_p: Tensor | None
    true: Tensor
    drawn: Tensor
    context: Tensor | None
    scale: Tensor
    evaluations: Evaluations
    generator: Generator
    divergence: str | None = None


@dataclass(frozen=True)
class Metric:
    """A score, and the function that measures it: an entry of `METRICS`, made by `metric`.

    Attributes:
        score: The score.
        needs: "samples" or "flow".
        function: What measures it.
        points: Of sets of samples, at most so many times the race's `w2_points`; all if None.
        dims: Most dimensions of samples that it is measured in; any if None.
    """

    score: Score
    needs: Literal["samples", "flow"]
    function: Callable[..., Any]
    points: int | None = None
    dims: int | None = None

    @property
    def about(self) -> str:
        """What it is, in a sentence."""
        return f"{self.score.about}."


def metric(
    needs: Literal["samples", "flow"],
    score: Score,
    points: int | None = None,
    dims: int | None = None,
) -> Callable[[F], F]:
    """Decorator that has every race measure what a function returns, and show it.

    `@metric("samples", Score("shift", "Shift", "Distance between the two means"))` above
    `shift(x, y)` is all that it takes: the page, results.csv and `cnf evaluate` show it.

    Args:
        needs: "samples" for a function of true samples, shape (N, D), and the flow's, shape
            (M, D), in float64 on the CPU, one's own points standardized; "flow" for one of a
            `Trial`. It returns a number, NaN where it does not apply to the flow, or an
            `Estimate`; of a flow also None, where it does not apply to the race.
        score: Its name, and how it is shown.
        points: Compare at most so many times the race's `w2_points` samples; all if None.
        dims: Most dimensions of samples that it is measured in; any if None.
    """

    def add(function: F) -> F:
        METRICS.register(score.key)(Metric(score, needs, function, points, dims))
        return function

    return add
