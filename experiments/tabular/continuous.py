"""Continuous flows on the patches of BSDS300, by likelihood and by flow matching.

`python experiments/tabular/continuous.py "mixture, likelihood" --seconds 3600` trains one run of
continuous.yaml, scores the test part by the exact trace, and writes results-continuous.csv.
A run that was stopped goes on from its checkpoint when the same command is given again.
"""

import argparse
import csv
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from run import bsds300, gaussianized
from torch import Tensor

import cnf
from cnf.distributions import GaussianMixture
from cnf.dynamics import Hutchinson
from cnf.expectation_maximization import Mixture, log_densities
from cnf.fields import DivisiveField, Preconditioned, VectorField
from cnf.matching import Pairing
from cnf.metrics import Estimate
from cnf.objectives import Objective
from cnf.random import draw, stream
from cnf.training import History
from cnf.training.origin import environment
from cnf.transforms import Continuous, Transform

HERE = Path(__file__).parent
COLUMNS = [
    "run", "part", "rows", "nats", "error", "base_nats", "gain", "gain_error", "doubling",
    "parameters", "steps", "seconds", "core_seconds", "revision", "machine",
]  # fmt: skip
SOLVER = cnf.Solver("rk4", steps=8)
DOUBLED = 5_000  # rows on which twice the steps are tried


@dataclass
class Part:
    """Rows of a part of the data as the flow sees them.

    Attributes:
        z: White, with the lengths of normal draws, shape (N, 63).
        ladj: Log-determinant of the map from data to them, shape (N,).
    """

    z: Tensor
    ladj: Tensor


def entered(rows: Tensor, transform: Transform) -> Part:
    with torch.no_grad():
        parts = [transform.inverse(some) for some in rows.split(50_000)]
    return Part(*(torch.cat(both) for both in zip(*parts, strict=True)))


def surroundings(filters: int, width: float = 1.2) -> Tensor:
    """Initial weights of energies: of the 63 first filters those of near pixels.

    Whitening by Cholesky factors leaves a pixel what those before it, row by row, do not tell, so
    that number i has a place in the patch.

    Args:
        filters: Number of filters.
        width: Standard deviation of the weights, in pixels.
    """
    number = torch.arange(63)
    place = torch.stack([number // 8, number % 8], 1).float()
    near = torch.exp(-0.5 * torch.cdist(place, place).square() / width**2)
    pools = 0.5 * torch.eye(filters) + 0.5 / filters
    pools[:63, :63] = near / near.sum(1, keepdim=True)
    return pools


def field_of(preconditioned: bool = False, **options: Any) -> VectorField:
    pools = surroundings(options.get("filters", 63))
    field = DivisiveField(63, pools=pools, **options)
    return Preconditioned(field) if preconditioned else field


def base_of(z: Tensor, told: dict[str, int] | None, seed: int, device: str) -> Any:
    """The mixture fitted to z by EM, or a standard normal."""
    if told is None:
        return cnf.distributions.StandardNormal(63)
    return GaussianMixture.fit(z.to(device), **told, generator=stream(seed, "mixture")).cpu()


@dataclass(frozen=True)
class ByComponent:
    """Pairs of one component each: short paths, by a permutation of the batch.

    A component is drawn for each base sample and data point, given where it is; those that find no
    partner are paired with each other.

    Attributes:
        base: The mixture that the flow begins with.
    """

    base: GaussianMixture

    def __call__(
        self, x0: Tensor, x1: Tensor, context: Tensor | None, generator: torch.Generator | None
    ) -> Pairing:
        first, second = (self._drawn(x, generator) for x in (x0, x1))
        common = torch.minimum(*(self._counts(each) for each in (first, second)))
        return Pairing(self._order(first, common), self._order(second, common))

    def _drawn(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """A component for each row, by its probability given the row."""
        base = self.base.to(x.device)
        logits = log_densities(x, Mixture(base.weights, base.means, base.scales))
        uniform = draw(torch.rand, logits.shape, generator, like=logits)
        return (logits - (-uniform.log()).log()).argmax(-1)

    def _counts(self, component: Tensor) -> Tensor:
        one = torch.ones_like(component)
        return torch.zeros_like(self.base.weights, dtype=one.dtype).index_add(0, component, one)

    def _order(self, component: Tensor, common: Tensor) -> Tensor:
        """Rows sorted by component, as many of each as are common, then the others."""
        order = component.argsort(stable=True)
        sorted_ = component[order]
        counts = self._counts(component)
        rank = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[sorted_]
        return order[(rank >= common[sorted_]).to(torch.uint8).argsort(stable=True)]


def objective_of(
    base: Any, name: str, steps: int = 2, penalty: float = 0.0, by_component: bool = False
) -> Objective:
    """Flow matching, or likelihood by Hutchinson's estimate under few steps.

    Args:
        base: Of the flow.
        name: "flow-matching" or "likelihood".
        steps: Of RK4, in training.
        penalty: Weight of the kinetic energy and of the Jacobian's norm.
        by_component: Whether pairs are of one component of the base each.
    """
    if name == "flow-matching":
        return cnf.FlowMatching(coupling=ByComponent(base) if by_component else "independent")
    penalties = {"kinetic": penalty, "jacobian": penalty} if penalty else None
    solver = cnf.Solver("rk4", steps=steps, gradient="backprop")
    return cnf.MaximumLikelihood("hutchinson", penalties, solver)


def trained(
    flow: cnf.Flow, train: Part, validation: Part, objective: dict[str, Any], **settings: Any
) -> History:
    config = cnf.TrainConfig(
        **settings, ema=0.999, validations=10, patience=10, validation_divergence="hutchinson",
        resume="auto", progress=False,
    )  # fmt: skip
    history = cnf.fit(
        flow,
        objective_of(flow.base, **objective),
        train.z,
        config,
        validation=validation.z[:5_000],
    )
    if history.reason == "interrupted":
        raise SystemExit(f"interrupted after {history.steps} steps")
    return history


def curve(history: History) -> list[str]:
    """Step and NLL of held-out rows inside of preprocessing, in words."""
    names = {name for record in history.records for name in record if name.startswith("val")}
    return [f"{r['step']}: {r[n]:.3f}" for r in history.records for n in names if n in r]


def exact_log_prob(flow: cnf.Flow, z: Tensor) -> Tensor:
    """Log-density by the exact trace, of many rows at once.

    The probes are the D unit vectors times √D: the mean of Hutchinson's estimates is the trace.
    """
    unit = math.sqrt(z.shape[1]) * torch.eye(z.shape[1], device=z.device)
    return flow.log_prob(z, divergence=Hutchinson(probe=unit.unsqueeze(1).expand(-1, *z.shape)))


def scored(flow: cnf.Flow, part: Part, chunk: int = 2_000) -> tuple[Tensor, Tensor, Tensor]:
    """Log-likelihoods, those of the base alone, and those of some rows by twice the steps."""

    def of_rows(log_prob: Callable[[Tensor], Tensor], rows: int) -> Tensor:
        z = part.z[:rows].split(chunk)
        found = torch.cat([log_prob(some.to(flow.device)).cpu() for some in z])
        return found.double() + part.ladj[:rows]

    finer = flow.with_solver(SOLVER.refined())
    with torch.no_grad():
        log_prob = of_rows(partial(exact_log_prob, flow), len(part.z))
        base = of_rows(flow.base.log_prob, len(part.z))
        return log_prob, base, of_rows(partial(exact_log_prob, finer), DOUBLED)


def keep(result: dict[str, Any], path: Path) -> None:
    begun = path.exists()
    with path.open("a", newline="") as file:  # one short write: processes do not mix
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not begun:
            writer.writeheader()
        writer.writerow(result)


def main() -> None:
    config = yaml.safe_load((HERE / "continuous.yaml").read_text())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", choices=config["runs"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seconds", type=float, default=3600.0, help="of training")
    parser.add_argument("--rows", type=int, default=250_000, help="of each part, to score")
    parser.add_argument("--folder", type=Path, default=HERE, help="of results")
    parser.add_argument("--checkpoints", type=Path, default=Path("/tmp/continuous"))
    given = parser.parse_args()
    torch.set_num_threads(1 if given.device == "cpu" else 3)
    run(given, config["runs"][given.run], config["seed"])


def run(given: argparse.Namespace, told: dict[str, Any], seed: int) -> None:
    began, cores, about = time.perf_counter(), time.process_time(), environment()

    def say(*words: object) -> None:
        print(f"{time.perf_counter() - began:.0f} s, {given.run}:", *words, flush=True)

    points = bsds300(seed)
    assert points.validation is not None and points.test is not None
    transform = gaussianized(points.x, ["whiten", "radial"])
    train, validation, test = (
        entered(rows, transform)
        for rows in (points.x, points.validation.x[: given.rows], points.test.x[: given.rows])
    )
    torch.manual_seed(seed)
    base = base_of(train.z, told.get("base"), seed, given.device)
    flow = cnf.Flow(base, Continuous(field_of(**told["field"]), SOLVER))
    say("base ready")
    if "begin" in told:
        cnf.load(given.checkpoints / told["begin"], into=flow)
    torch.set_float32_matmul_precision("high")  # in training alone
    history = trained(
        flow, train, validation, told["objective"], **told["training"], seed=seed,
        seconds=given.seconds, device=given.device, folder=given.checkpoints / given.run,
    )  # fmt: skip
    torch.set_float32_matmul_precision("highest")
    seconds = time.process_time() - cores
    say(history.steps, "steps; validation", *curve(history))
    flow.to(given.device)
    for name, part in (("validation", validation), ("test", test)):
        log_prob, alone, fine = scored(flow, part)
        doubling = (fine - log_prob[: len(fine)]).mean().item()
        nats, gain = Estimate.of(log_prob), Estimate.of(log_prob - alone)
        result = {
            "run": given.run, "part": name, "rows": len(log_prob),
            "nats": f"{nats.value:.3f}", "error": f"{nats.error:.3f}",
            "base_nats": f"{alone.mean().item():.3f}",
            "gain": f"{gain.value:.4f}", "gain_error": f"{gain.error:.4f}",
            "doubling": f"{doubling:.5f}",
            "parameters": sum(p.numel() for p in flow.parameters()), "steps": history.steps,
            "seconds": f"{history.seconds:.0f}", "core_seconds": f"{seconds:.0f}",
            "revision": about["revision"], "machine": about["gpu"] or about["processor"],
        }  # fmt: skip
        keep(result, given.folder / "results-continuous.csv")
        torch.save(log_prob.float(), given.folder / f"{given.run}-{name}.pt")
        say(result)


if __name__ == "__main__":
    main()
