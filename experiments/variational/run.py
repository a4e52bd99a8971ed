"""Variational inference by flows beside a Gaussian: evidence, effective sample size, moments.

`python experiments/variational/run.py` runs what config.yaml says and is not in results.csv yet,
then writes table.md.
"""

import csv
import itertools
import multiprocessing
import operator
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import torch
import yaml
from targets import TARGETS, Target

import cnf
from cnf.metrics import log_evidence
from cnf.random import stream
from cnf.training.origin import environment
from cnf.transforms import LU

HERE = Path(__file__).parent
PATH = HERE / "results.csv"
COLUMNS = [
    "target", "flow", "path_gradient", "seed", "elbo_gap", "evidence_error", "evidence_sigma",
    "ess", "mean_error", "std_error", "optimizer_steps", "seconds", "revision",
]  # fmt: skip


OPTIONS = {
    "cnf": {"solver": cnf.Solver("rk4", steps=8)},
    "nsf": {"bound": 10.0},  # outside of it a spline is the identity: no data tell how far to go
}


class Case(NamedTuple):
    """One flow to be trained."""

    target: str
    flow: str
    path_gradient: bool
    seed: int


def run(case: Case, config: dict) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(case.seed)
    target = TARGETS[case.target]()
    flow = built(case.flow, target.dim)
    settings = cnf.TrainConfig(
        seconds=config["seconds"], batch_size=config["batch_size"], seed=case.seed,
        progress=False, device="cpu",
    )  # fmt: skip
    objective = cnf.ReverseKL(target.log_density, path_gradient=case.path_gradient)
    history = cnf.fit(flow, objective, config=settings)
    if history.signal:  # what was cut short is no result
        raise SystemExit(128 + history.signal)
    return {
        **case._asdict(),
        **scores(flow, target, config["draws"], case.seed),
        "optimizer_steps": history.steps, "seconds": config["seconds"],
        "revision": environment()["revision"],
    }  # fmt: skip


def built(name: str, dim: int) -> cnf.Flow:
    """The flow: any model's name, or "gaussian", of any mean and covariance."""
    if name == "gaussian":
        return cnf.Flow(None, LU(dim), event_shape=(dim,))
    return cnf.models.build(name, dim=dim, **OPTIONS.get(name, {}))


def scores(flow: cnf.Flow, target: Target, draws: int, seed: int) -> dict[str, str]:
    """What the flow is off by; of moments the largest, in units of the exact deviation."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "log_evidence: one of")  # the ESS is in the table
        told = log_evidence(flow, target.log_density, draws, generator=stream(seed, "evidence"))
    x = flow.sample(draws, generator=stream(seed, "moments"))
    mean = ((x.mean(0) - target.mean) / target.std).abs().max()
    std = (x.std(0) / target.std).log().abs().max()
    return {
        "elbo_gap": f"{target.log_evidence - told.elbo:.4f}",
        "evidence_error": f"{told.value - target.log_evidence:.4f}",
        "evidence_sigma": f"{told.error:.4f}",
        "ess": f"{told.ess / draws:.4f}",
        "mean_error": f"{mean:.4f}",
        "std_error": f"{std:.4f}",
    }


def cases(config: dict) -> list[Case]:
    """All of one seed before the next; of a Gaussian the path gradient alone."""
    return [
        Case(target, flow, along, seed)
        for seed, target, flow in itertools.product(
            config["seeds"], config["targets"], config["flows"]
        )
        for along in ((True,) if flow == "gaussian" else (True, False))
    ]


def table(rows: list[dict]) -> str:
    """The mean over seeds, and the range of the ESS."""
    lines = [
        "| target | flow | gradient | log Z - ELBO | error of log Z (its σ) | ESS | least ESS | "
        "mean off | std off | steps |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    kind = operator.itemgetter("target", "flow", "path_gradient")
    for (target, flow, along), group in itertools.groupby(sorted(rows, key=kind), kind):
        own = list(group)

        def mean(name: str, own: list[dict] = own) -> float:
            return statistics.fmean(float(r[name]) for r in own)

        gradient = {"True": "path", "False": "whole"}[along]
        lines.append(
            f"| {target} | {flow} | {gradient} | {mean('elbo_gap'):.3f} | "
            f"{mean('evidence_error'):.3f} ({mean('evidence_sigma'):.3f}) | {mean('ess'):.2f} | "
            f"{min(float(r['ess']) for r in own):.2f} | {mean('mean_error'):.2f} | "
            f"{mean('std_error'):.2f} | {mean('optimizer_steps'):,.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    rows: list[dict] = list(csv.DictReader(PATH.open())) if PATH.exists() else []
    done = {(r["target"], r["flow"], r["path_gradient"], r["seed"]) for r in rows}
    todo = [case for case in cases(config) if tuple(map(str, case)) not in done]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config["processes"], mp_context=spawn) as pool:
        for future in as_completed([pool.submit(run, case, config) for case in todo]):
            rows.append({name: str(value) for name, value in future.result().items()})
            print(rows[-1], flush=True)
            with PATH.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    (HERE / "table.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
