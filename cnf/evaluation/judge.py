"""Measures every flow on the same points, in the same way."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cnf.dynamics.solver import Solver
from cnf.evaluation import metrics
from cnf.evaluation.few_steps import Curve, nfe_curve
from cnf.flow import Flow
from cnf.training.stream import seeded
from cnf.transforms.continuous import Continuous, is_continuous

TIGHT = Solver("dopri5", rtol=1e-6, atol=1e-6)  # solver error far below the gaps
FEW_STEPS = (1, 2, 4, 8, 16, 32)
SLOW = 1_000  # milliseconds
PATHS = 2_000  # trajectories for path energy and straightness


class Judge:
    """Scores flows against one set of test points.

    Args:
        test: Points of the true distribution, shape (N, D), which no flow has seen.
        reference: Other points of it, for the floor: what a perfect model would score.
        density: The true density, if it is known.
        w2_points: Points for the exact W2, whose cost grows with their cube.
    """

    def __init__(
        self, test: Tensor, reference: Tensor, density: Any = None, w2_points: int = 2_000
    ) -> None:
        self.test, self.w2_points = test, w2_points
        self.log_density = None if density is None else density.log_prob(test)
        self.floor = self.distances(reference[: len(test)])

    def scores(self, flow: Flow, seed: int = 0) -> dict[str, float]:
        """Every score of one flow; NaN where one does not apply. Exact trace, tight solver."""
        flow.eval()
        test = self.test.to(next(flow.parameters()).device)
        exact = flow.with_solver(TIGHT) if is_continuous(flow.transform) else flow
        with torch.no_grad():
            drawn = flow.sample((len(test),), generator=seeded(seed, -8))
            return {
                **self.likelihood(exact, test),
                **self.distances(drawn.cpu()),
                **_paths(flow),
                "round_trip": metrics.round_trip_error(exact, test[:1000]),
                **_cost(flow, test),
            }

    def likelihood(self, flow: Flow, test: Tensor) -> dict[str, float]:
        """Gap to the truth where that is known, and NLL, with standard errors."""
        log_prob = metrics.log_prob_chunked(flow, test).cpu()
        nll = metrics.Estimate.of(-log_prob)
        scores = {"nll": nll.value, "nll_error": nll.error}
        if self.log_density is not None:
            gap = metrics.Estimate.of(self.log_density.double() - log_prob.double())
            scores = {"gap": gap.value, "gap_error": gap.error, **scores}
        return scores

    def distances(self, drawn: Tensor) -> dict[str, float]:
        """Distances between samples and the test points."""
        few, some = slice(self.w2_points), slice(2 * self.w2_points)
        return {
            "w2": float(metrics.wasserstein2(drawn[few], self.test[few])),
            "sliced_w2": self.sliced(drawn),
            "mmd": float(metrics.mmd(drawn[some], self.test[some])),
            "energy_distance": float(metrics.energy_distance(drawn[some], self.test[some])),
            "c2st": float(metrics.c2st(self.test, drawn)),
        }

    def sliced(self, drawn: Tensor) -> float:
        """Sliced W2 to the test points, always over the same directions."""
        draw = seeded(0, -7)
        return float(metrics.sliced_wasserstein2(drawn, self.test, 200, generator=draw))

    def few_steps(self, flow: Flow, seed: int = 0) -> Curve:
        """(Evaluations of the field, sliced W2): Euler steps, then the flow's own solver."""
        return nfe_curve(flow, self.test, steps=FEW_STEPS, distance=self.sliced, seed=seed)


def _paths(flow: Flow) -> dict[str, float]:
    if not isinstance(flow.transform, Continuous):
        return {"path_energy": float("nan"), "straightness": float("nan")}
    draw = seeded(0, -5)
    return {
        "path_energy": metrics.path_energy(flow, PATHS, draw).value,
        "straightness": metrics.straightness(flow, PATHS, draw).value,
    }


def _cost(flow: Flow, test: Tensor) -> dict[str, float]:
    evaluations = metrics.nfe(flow, n=1000, generator=seeded(0, -6))
    return {
        "parameters": sum(p.numel() for p in flow.parameters()),
        "nfe_sample": evaluations.sample,
        "nfe_log_prob": evaluations.log_prob,
        "ms_sample": _milliseconds(lambda: flow.sample((len(test),))),
        "ms_log_prob": _milliseconds(lambda: flow.log_prob(test)),
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
