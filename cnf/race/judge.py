"""Measures every flow on the same points, in the same way."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnf import metrics
from cnf.data import Points
from cnf.dynamics.solver import Solver
from cnf.flow import Flow, evaluating
from cnf.metrics.nfe_curves import Curve, nfe_curve, sliced
from cnf.objectives import Batch
from cnf.random import seeded
from cnf.training.diagnosis import warn_of_few_steps
from cnf.transforms.continuous import Continuous, is_continuous

TIGHT = Solver("dopri5", rtol=1e-6, atol=1e-6)  # solver error far below the gaps
FEWEST = 10  # points whose distances mean something
SLOW = 1_000  # milliseconds
PATHS = 2_000  # trajectories for path energy and straightness


class Judge:
    """Scores flows against one set of test points.

    Distances and the round trip of one's own points are measured on columns standardized by the
    test points, since columns of other scales and units cannot be added; those of a known density
    as they are.

    Args:
        test: Points of the true distribution, shape (N, D), which no flow has seen; with the
            contexts and weights that they have.
        reference: Other points of it, for the floor: what a perfect model would score.
        density: The true density, if it is known.
        w2_points: Points for the exact W2, whose cost grows with their cube.
        target: Those of the test points that samples are compared with; all of them if None.
    """

    def __init__(
        self,
        test: Tensor | Points,
        reference: Tensor | Points,
        density: Any = None,
        w2_points: int = 2_000,
        target: Points | None = None,
    ) -> None:
        self.test, self.w2_points = _as_points(test), w2_points
        self.log_density = None if density is None else density.log_prob(self.test.x)
        self.target = _unweighted(self.test if target is None else target)
        self.center, self.scale = torch.zeros(()), torch.ones(())
        if density is None and len(self.target.x) > 1:
            self.center, spread = self.target.x.double().mean(0), self.target.x.double().std(0)
            self.scale = torch.where(spread > 0, spread, 1.0)
        self.floor = self.distances(_unweighted(_as_points(reference)).x[: len(self.target.x)])

    def scores(
        self, flow: Flow, seed: int = 0, say: Callable[[str], None] = lambda _: None
    ) -> dict[str, float]:
        """Every score of one flow; NaN where one does not apply. Exact trace, tight solver.

        Args:
            flow: The flow.
            seed: Of the samples.
            say: Called with what is being done.
        """
        test, target = (_placed(points, flow) for points in (self.test, self.target))
        exact = flow.with_solver(TIGHT) if is_continuous(flow.transform) else flow
        context = None if test.context is None else test.context[:1000]
        with evaluating(flow), torch.no_grad():
            say("log-likelihood")
            scores = self.likelihood(exact, test)
            say("distances between samples")
            drawn = _sampled(flow, target, seeded(seed, -8))
            scores |= self.distances(drawn.cpu())
            say("paths")
            scores |= _paths(flow, target.context)
            few, scale = test.x[:1000], self.scale.to(test.x)
            scores["round_trip"] = metrics.round_trip_error(exact, few, context, scale)
            say("cost")
            return {**scores, **_cost(flow, test)}

    def warn_of_few_steps(self, who: str, flow: Flow) -> None:
        """Warn where the flow's own fixed steps give another NLL than the tight solver's score."""
        test = _placed(self.test, flow)
        rows = Batch(test.x, test.context, weight=test.weight)
        warn_of_few_steps(who, flow, rows, whose="flow", kind="test")

    def likelihood(self, flow: Flow, test: Points) -> dict[str, float]:
        """Gap to the truth where that is known, and NLL, with standard errors."""
        log_prob = metrics.log_prob_chunked(flow, test.x, test.context).cpu()
        nll = metrics.Estimate.of(-log_prob, self.test.weight)
        scores = {"nll": nll.value, "nll_error": nll.error}
        if self.log_density is not None:
            gap = metrics.Estimate.of(self.log_density.double() - log_prob.double())
            scores = {"gap": gap.value, "gap_error": gap.error, **scores}
        return scores

    def distances(self, drawn: Tensor) -> dict[str, float]:
        """Distances between samples and the test points; NaN where these are too few."""
        if min(len(drawn), len(self.target.x)) < FEWEST:
            names = ("w2", "sliced_w2", "mmd", "energy_distance", "c2st")
            return dict.fromkeys(names, float("nan"))
        few, some = slice(self.w2_points), slice(2 * self.w2_points)
        x, y = self.standardized(drawn), self.standardized(self.target.x)
        return {
            "w2": float(metrics.wasserstein2(x[few], y[few])),
            "sliced_w2": self.sliced(drawn),
            "mmd": float(metrics.mmd(x[some], y[some])),
            "energy_distance": float(metrics.energy_distance(x[some], y[some])),
            "c2st": float(metrics.c2st(y, x)),
        }

    def sliced(self, drawn: Tensor) -> float:
        """Sliced W2 to the test points, always over the same directions."""
        return sliced(self.standardized(self.target.x), self.standardized(drawn))

    def standardized(self, x: Tensor) -> Tensor:
        """x on the columns that distances are measured on."""
        return (x.double() - self.center) / self.scale

    def few_steps(self, flow: Flow, seed: int = 0) -> Curve:
        """(Evaluations of the field, sliced W2): Euler steps, then the flow's own solver."""
        points = _placed(self.target, flow)
        return nfe_curve(
            flow,
            points.x,
            context=points.context,
            distance=self.sliced,
            seed=seed,
        )


def _as_points(x: Tensor | Points) -> Points:
    return x if isinstance(x, Points) else Points(x)


def _unweighted(points: Points) -> Points:
    """As many rows drawn by their weights; the points themselves where they have none."""
    return (
        points
        if points.weight is None
        else points.take(points.draw(len(points.x), seeded(0, -10)))
    )


def _placed(points: Points, flow: Flow) -> Points:
    """The points on a flow's device."""
    device = next(flow.parameters()).device
    return points.take(torch.arange(len(points.x), device=device))


def _sampled(flow: Flow, like: Points, generator: torch.Generator | None = None) -> Tensor:
    """A sample for each row, under its context where it has one."""
    shape = (len(like.x),) if like.context is None else ()
    return flow.sample(shape, like.context, generator=generator)


def _paths(flow: Flow, context: Tensor | None) -> dict[str, float]:
    if not isinstance(flow.transform, Continuous):
        return {"path_energy": float("nan"), "straightness": float("nan")}
    draw, context = seeded(0, -5), None if context is None else context[:PATHS]
    count = PATHS if context is None else len(context)
    return {
        "path_energy": metrics.path_energy(flow, count, draw, context).value,
        "straightness": metrics.straightness(flow, count, draw, context).value,
    }


def _cost(flow: Flow, test: Points) -> dict[str, float]:
    context = None if test.context is None else test.context[:1000]
    count = 1000 if context is None else len(context)
    evaluations = metrics.nfe(flow, count, seeded(0, -6), context)
    return {
        "parameters": sum(p.numel() for p in flow.parameters()),
        "nfe_sample": evaluations.sample,
        "nfe_log_prob": evaluations.log_prob,
        "ms_sample": _milliseconds(lambda: _sampled(flow, test)),
        "ms_log_prob": _milliseconds(lambda: flow.log_prob(test.x, test.context)),
    }


def _milliseconds(call: Callable[[], Any], repeats: int = 3) -> float:
    """Median time of a call, taken once where it is slow; the scores before have warmed it up."""
    times = []
    while len(times) < repeats and sum(times) < SLOW:
        start = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)
