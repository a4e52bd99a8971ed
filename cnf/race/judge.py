"""Measures every flow on the same points, in the same way."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cnf.data import Images, Points
from cnf.dynamics.solver import Solver
from cnf.errors import expect_counts, warn
from cnf.flow import Flow, evaluating
from cnf.metrics import Estimate, Metric, Trial, log_prob_chunked, nfe
from cnf.metrics.code_length import log_prob_of_draws
from cnf.metrics.distances import sliced
from cnf.metrics.flows import COUNT, PICTURES
from cnf.metrics.nfe_curves import Curve, nfe_curve
from cnf.objectives import Batch
from cnf.race.results import race_metrics
from cnf.random import preserved, reseed, stream
from cnf.training.diagnosis import warn_of_few_steps
from cnf.transforms.continuous import has_discrete_steps, is_continuous

TIGHT = Solver("dopri5", rtol=1e-6, atol=1e-6)  # solver error far below the gaps
FEWEST = 10  # points whose distances mean something


class Judge:
    """Scores flows against one set of test points.

    Distances and the round trip of one's own points are measured on columns standardized by the
    test points, since columns of other scales and units cannot be added; those of a known density
    as they are; of pictures on pixels from 0 to 1. The trace of a continuous flow of pictures is
    Hutchinson's estimate, since the exact one takes a product with the Jacobian for each pixel.

    Args:
        test: Points of the true distribution, shape (N, D), which no flow has seen; with the
            contexts and weights that they have.
        reference: Other points of it, for the floor: what a perfect model would score.
        density: The true density, if it is known.
        w2_points: Points for the exact W2, whose cost grows with their cube.
        target: Those of the test points that samples are compared with; all of them if None.
        draws: Noise that is drawn for each picture, see `cnf.metrics.bits_per_dim`.
    """

    def __init__(
        self,
        test: Tensor | Points,
        reference: Tensor | Points,
        density: Any = None,
        w2_points: int = 2_000,
        target: Points | None = None,
        draws: int = 1,
    ) -> None:
        self.test, self.w2_points, self.draws = _as_points(test), w2_points, draws
        self.pictures = isinstance(self.test, Images)
        expect_counts("evaluate", draws=draws)
        self.log_density = None if density is None else density.log_prob(self.test.x)
        self.target = _unweighted(self.test if target is None else target)
        self.center, self.scale = torch.zeros(()), torch.ones(())
        if isinstance(self.test, Images):
            self.scale = torch.tensor(self.test.levels - 1.0)
        elif density is None and len(self.target.x) > 1:
            self.center, spread = self.target.x.double().mean(0), self.target.x.double().std(0)
            self.scale = torch.where(spread > 0, spread, 1.0)
        other = self.standardized(_unweighted(_as_points(reference)).x[: len(self.target.x)])
        self.floor = {
            metric.score.key: self._tried(metric, partial(self.distance, metric, other))[
                metric.score.key
            ]
            for metric in race_metrics()
            if metric.needs == "samples"
        }

    def scores(
        self, flow: Flow, seed: int = 0, say: Callable[[str], None] = lambda _: None
    ) -> dict[str, float]:
        """Every score of one flow; NaN where one does not apply. Exact trace, tight solver.

        Args:
            flow: The flow.
            seed: Of the samples.
            say: Called with what is being done.
        """
        return self.judge(flow, seed, say)[0]

    def judge(
        self, flow: Flow, seed: int = 0, say: Callable[[str], None] = lambda _: None
    ) -> tuple[dict[str, float], Tensor]:
        """What `scores` gives, and log q at the test points, shape (N,).

        Args:
            flow: The flow.
            seed: Of the samples.
            say: Called with what is being done.
        """
        scores: dict[str, float] = {}
        with evaluating(flow), torch.no_grad(), preserved(flow.device):
            reseed(seed, flow.device)  # of an estimate of the trace
            say("log-likelihood")
            trial = self.trial(flow, seed)
            for metric in race_metrics():
                say(metric.score.label)
                scores |= self.measure(metric, trial)
        return scores, trial.log_q.cpu()

    def trial(self, flow: Flow, seed: int = 0) -> Trial:
        """What flow and points are to a metric.

        Args:
            flow: The flow.
            seed: Of the samples.
        """
        test, target = (_placed(points, flow) for points in (self.test, self.target))
        exact = flow
        if is_continuous(flow.transform) and not has_discrete_steps(flow.transform):
            exact = flow.with_solver(TIGHT)
        divergence = self.divergence(flow)
        if divergence is not None and self.draws > 1:
            raise ValueError(
                "evaluate: expected one draw of the noise for a continuous flow of pictures, got "
                f"{self.draws}: the noise of its trace would make their bound too good"
            )
        if self.pictures:
            log_q = log_prob_of_draws(
                exact, test.x, test.context, draws=self.draws, divergence=divergence,
                generator=stream(0, "noise of test pictures"),
            )  # fmt: skip
        else:
            log_q = log_prob_chunked(exact, test.x, test.context).cpu()
        shape = (len(target.x),) if target.context is None else ()
        drawn = flow.sample(shape, target.context, generator=stream(seed, "samples")).cpu()
        true, drawn = self.standardized(self.target.x), self.standardized(drawn)
        most = PICTURES if self.pictures else COUNT
        context = None if test.context is None else test.context[:most]
        count = most if context is None else len(context)
        evaluations = nfe(flow, count, stream(0, "evaluations"), context, divergence)
        return Trial(
            flow, exact, test, log_q, self.log_density, true, drawn, target.context, self.scale,
            evaluations, stream(0, "metrics"), divergence,
        )  # fmt: skip

    def about(self, flow: Flow) -> str:
        """How one's own points are scored, in sentences.

        Args:
            flow: Which is scored.
        """
        if not self.pictures:
            return " Distances are measured on standardized columns."
        trace = "" if self.divergence(flow) is None else ", with traces estimated by one probe"
        return (
            f" NLL and bits/dim are upper bounds{trace}. Distances are measured on pixels from 0 "
            "to 1."
        )

    def divergence(self, flow: Flow) -> str | None:
        """The estimator of the trace that a flow is scored with; None for the exact one.

        Args:
            flow: The flow.
        """
        return "hutchinson" if self.pictures and is_continuous(flow.transform) else None

    def measure(self, metric: Metric, trial: Trial) -> dict[str, float]:
        """A score by its key, and its error, where there is one, by key_error.

        Args:
            metric: Of `METRICS`.
            trial: What `trial` gives.
        """
        if metric.needs == "samples":
            return self._tried(metric, partial(self.distance, metric, trial.drawn))
        return self._tried(metric, partial(metric.function, trial))

    def _tried(self, metric: Metric, call: Callable[[], Any]) -> dict[str, float]:
        """What a metric gives; NaN and a warning where it fails, which must not end the race."""
        try:
            return _scored(metric, call())
        except Exception as error:
            key = metric.score.key
            warn(f"compare: the metric {key!r} failed: {type(error).__name__}: {error}")
            return {key: math.nan}

    def distance(self, metric: Metric, drawn: Tensor) -> float | Estimate:
        """The distance of standardized samples to the test points; NaN where either are too few.

        Args:
            metric: One that needs samples.
            drawn: Samples, shape (M, D).
        """
        true = self.standardized(self.target.x)
        if min(len(drawn), len(true)) < FEWEST or true.shape[1] > (metric.dims or math.inf):
            return math.nan
        count = None if metric.points is None else metric.points * self.w2_points
        return metric.function(true[:count], drawn[:count])

    def warn_of_few_steps(self, who: str, flow: Flow) -> None:
        """Warn where the flow's own fixed steps give another NLL than the tight solver's score."""
        if self.divergence(flow) is not None:
            return  # the noise of an estimate is no error of the steps
        test = _placed(self.test, flow)
        rows = Batch(test.x, test.context, weight=test.weight)
        warn_of_few_steps(who, flow, rows, whose="flow", kind="test")

    def sliced(self, drawn: Tensor) -> float:
        """Sliced W2 to the test points, always over the same directions."""
        return sliced(self.standardized(self.target.x), self.standardized(drawn))

    def standardized(self, x: Tensor) -> Tensor:
        """Points on the columns that distances are measured on, shape (N, D)."""
        return ((x.double() - self.center) / self.scale).flatten(1)

    def few_steps(self, flow: Flow, seed: int = 0) -> Curve:
        """(Evaluations of the field, sliced W2): few steps, then the flow's own solver."""
        points = _placed(self.target, flow)
        if self.pictures:
            points = points.take(torch.arange(len(points.x), device=flow.device)[:PICTURES])
        return nfe_curve(flow, points.x, context=points.context, distance=self.sliced, seed=seed)


def draw_test_points(density: Any, n: int) -> tuple[Tensor, Tensor]:
    """The draws from a known density that flows are scored on, and as many for the floor.

    Args:
        density: The density.
        n: How many.
    """
    return density.sample(n, stream(0, "test")), density.sample(n, stream(0, "floor"))


def _scored(metric: Metric, found: Any) -> dict[str, float]:
    """What a metric gave, as `Judge.measure` returns it."""
    if isinstance(found, Estimate):
        return {metric.score.key: found.value, f"{metric.score.key}_error": found.error}
    return {} if found is None else {metric.score.key: float(found)}


def _as_points(x: Tensor | Points) -> Points:
    return x if isinstance(x, Points) else Points(x)


def _unweighted(points: Points) -> Points:
    """As many rows drawn by their weights; the points themselves where they have none."""
    if points.weight is None:
        return points
    return points.take(points.draw(len(points.x), stream(0, "rows by weight")))


def _placed(points: Points, flow: Flow) -> Points:
    """The points on a flow's device."""
    return points.take(torch.arange(len(points.x), device=flow.device))
