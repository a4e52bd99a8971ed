"""Exact densities of few steps: gap, mass and sliced W2 over steps, methods and trainings.

`python experiments/few_steps/run.py` runs what config.yaml says and is not in results.csv yet,
then writes table.md. A flow that flow matching trained is scored under every solver; one that
likelihood trained belongs to its solver.
"""

import csv
import math
import multiprocessing
import statistics
import traceback
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

import cnf
from cnf.dynamics import numerical
from cnf.metrics.estimate import Estimate
from cnf.metrics.flows import log_prob_chunked
from cnf.random import stream
from cnf.training.origin import environment

HERE = Path(__file__).parent
PATH = HERE / "results.csv"
FLOWS = HERE.parents[1] / "runs" / "few_steps"
COLUMNS = [
    "toy", "seed", "training", "method", "steps", "explicit", "evaluations", "gap", "gap_error",
    "claimed", "folded", "mass", "sliced_w2", "floor", "optimizer_steps", "seconds", "revision",
]  # fmt: skip
DIRECTIONS = ("sample", "density")


@dataclass(frozen=True)
class Case:
    """One flow to be trained: by flow matching, likelihood, both in turn, or as a flow map."""

    toy: str
    seed: int
    training: str
    method: str = ""
    steps: int = 0
    explicit: str = ""

    @classmethod
    def of(cls, row: dict[str, str]) -> "Case":
        """The flow that a row of results.csv scores."""
        case = cls(row["toy"], int(row["seed"]), row["training"])
        if case.training in ("matching", "flow map"):
            return case
        return replace(
            case, method=row["method"], steps=int(row["steps"]), explicit=row["explicit"]
        )

    @property
    def name(self) -> str:
        first = f"{self.toy}-{self.seed}-{self.training.replace(' ', '-')}"
        return f"{first}-{self.method}-{self.steps}-{self.explicit}" if self.method else first


def cases(config: dict) -> Iterator[Case]:
    for seed in config["seeds"]:
        for toy in config["toys"]:
            yield Case(toy, seed, "matching")
            yield Case(toy, seed, "flow map")
            for solver in config["trained"]:
                for explicit in DIRECTIONS:
                    yield Case(toy, seed, "both", **solver, explicit=explicit)
                yield Case(toy, seed, "likelihood", **solver, explicit="density")


def run(case: Case, config: dict) -> list[dict]:
    torch.set_num_threads(1)
    torch.manual_seed(case.seed)
    flow, steps = trained(case, config)
    FLOWS.mkdir(parents=True, exist_ok=True)
    cnf.save(flow, FLOWS / case.name)
    solvers = {"matching": config["solvers"], "flow map": config["maps"]}.get(case.training)
    directions = DIRECTIONS if solvers else (case.explicit,)
    return [
        {
            "toy": case.toy, "seed": case.seed, "training": case.training,
            "method": each["method"], "steps": each["steps"], "explicit": explicit,
            "evaluations": cnf.Solver(**each).evaluations,
            **scores(flow, each["method"], each["steps"], explicit, case, config),
            "optimizer_steps": steps, "seconds": config["seconds"],
            "revision": environment()["revision"],
        }
        for each in solvers or [{"method": case.method, "steps": case.steps}]
        for explicit in directions
    ]  # fmt: skip


def trained(case: Case, config: dict) -> tuple[cnf.Flow, int]:
    """The flow of a case, and how many steps its training took."""
    toy, whole, steps = cnf.data.toy(case.toy), config["seconds"], 0
    coupling = config["couplings"].get(case.training)
    if case.training == "flow map":
        flow = cnf.models.cnf(2, flow_map=True, divergence_head=True)
        distillation = cnf.objectives.SelfDistillation(coupling=coupling)
        return flow, cnf.fit(flow, distillation, toy, settings(case, config, whole)).steps
    flow = cnf.models.cnf(2)
    first = {"matching": whole, "both": config["matching_seconds"], "likelihood": 0}[case.training]
    if first:
        matching = cnf.FlowMatching(coupling=coupling)
        steps += cnf.fit(flow, matching, toy, settings(case, config, first)).steps
    if case.training != "matching":
        likelihood = cnf.MaximumLikelihood(solver=_solver(case))
        steps += cnf.fit(flow, likelihood, toy, settings(case, config, whole - first)).steps
    return flow, steps


def _solver(case: Case) -> cnf.Solver:
    return cnf.Solver(case.method, steps=case.steps, discrete=True, explicit=case.explicit)


def settings(case: Case, config: dict, seconds: float) -> cnf.TrainConfig:
    return cnf.TrainConfig(
        seconds=seconds, batch_size=config["batch_size"], seed=case.seed, validations=0,
        compile=True, progress=False, device="cpu",
    )  # fmt: skip


def scores(
    flow: cnf.Flow, method: str, steps: int, explicit: str, case: Case, config: dict
) -> dict:
    """The gap of the steps, the one that is claimed without their determinant, and the mass."""
    toy = cnf.data.toy(case.toy)
    exact = flow.with_solver(cnf.Solver(method, steps=steps, discrete=True, explicit=explicit))
    x = toy.sample(config["points"], stream(case.seed, "points"))
    with numerical.watched():
        gaps = toy.log_prob(x) - log_prob_chunked(exact, x)
        whole = mass(exact, x)
        distances = sliced(exact, toy, config, case.seed)
    plain = flow.with_solver(cnf.Solver(method, steps=steps))
    divergence = "learned" if case.training == "flow map" else None
    with torch.no_grad():  # by the integral of the trace, or of what a flow map's head has learned
        claimed = (toy.log_prob(x) - plain.eval().log_prob(x, divergence=divergence)).mean()
    folded = gaps.isnan()
    gap = Estimate.of(gaps[~folded])
    return {
        "gap": f"{gap.value:.4f}", "gap_error": f"{gap.error:.4f}", "claimed": f"{claimed:.4f}",
        "folded": int(folded.sum()), "mass": f"{whole:.5f}",
        "sliced_w2": f"{distances[0]:.4f}", "floor": f"{distances[1]:.4f}",
    }  # fmt: skip


def mass(flow: cnf.Flow, x: torch.Tensor, side: int = 400) -> float:
    """The density's integral over the data's box and half as much on each side."""
    low, high = x.amin(0), x.amax(0)
    low, high = low - 0.5 * (high - low), high + 0.5 * (high - low)
    middles = (torch.arange(side) + 0.5) / side
    points = low + (high - low) * torch.cartesian_prod(middles, middles)
    density = log_prob_chunked(flow, points).double().exp().nan_to_num(0.0)
    return float(density.mean() * (high - low).double().prod())


def sliced(flow: cnf.Flow, toy: cnf.data.Toy, config: dict, seed: int) -> tuple[float, float]:
    """Mean sliced W2 of samples to draws of the density, and of such draws to each other."""
    generator, found = stream(seed, "draws of sliced W2"), []
    for _ in range(config["pairs"]):
        true, other = (toy.sample(config["points"], generator) for _ in range(2))
        with torch.no_grad():
            drawn = flow.sample(config["points"], generator=generator)
        drawn = drawn[drawn.isfinite().all(1)]
        if not len(drawn):
            return math.nan, math.nan
        found.append([cnf.metrics.sliced_wasserstein2(each, true, 200) for each in (drawn, other)])
    ours, floors = zip(*found, strict=True)
    return statistics.fmean(ours), statistics.fmean(floors)


def table(config: dict, rows: list[dict]) -> str:
    """Mean gap over the seeds of each row, and the worst mass and share of folded points."""
    kinds = dict.fromkeys(
        (r["evaluations"], r["method"], r["steps"], r["training"], r["explicit"]) for r in rows
    )
    names = config["toys"]
    lines = [
        "| evaluations | steps | training | explicit | " + " | ".join(names)
        + " | mass | folded | W2 / floor |",
        "|---:|---|---|---|" + "---:|" * (len(names) + 3),
    ]  # fmt: skip
    for kind in sorted(kinds, key=lambda k: (int(k[0]), k[1], k[2], k[3], k[4])):
        evaluations, method, steps, training, explicit = kind
        own = [
            r for r in rows
            if (r["evaluations"], r["method"], r["steps"], r["training"], r["explicit"]) == kind
        ]  # fmt: skip
        cells = [_cell([r for r in own if r["toy"] == name]) for name in names]
        worst = max((float(r["mass"]) for r in own), key=lambda value: abs(value - 1))
        folded = max(int(r["folded"]) for r in own) / config["points"]
        far = statistics.fmean(float(r["sliced_w2"]) / float(r["floor"]) for r in own)
        lines.append(
            f"| {evaluations} | {method} × {steps} | {training} | {explicit} | "
            + " | ".join(cells) + f" | {worst:.4f} | {folded:.2%} | {far:.1f} |"
        )  # fmt: skip
    return "\n".join(lines)


def _cell(rows: list[dict]) -> str:
    if not rows:
        return "–"
    exact, claimed = (statistics.fmean(float(r[key]) for r in rows) for key in ("gap", "claimed"))
    return f"{exact:.3f} ({claimed:.2f})"


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    rows = list(csv.DictReader(PATH.open())) if PATH.exists() else []
    done = {Case.of(row) for row in rows}
    todo = [case for case in cases(config) if case not in done]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config["processes"], mp_context=spawn) as pool:
        futures = {pool.submit(run, case, config): case for case in todo}
        for future in as_completed(futures):
            if error := future.exception():  # the others go on; run it again for those that failed
                traceback.print_exception(error)
                continue
            rows += future.result()
            print(f"{futures[future].name}: gap {rows[-1]['gap']}", flush=True)
            with PATH.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    text = table(config, [{k: str(v) for k, v in row.items()} for row in rows])
    (HERE / "table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
