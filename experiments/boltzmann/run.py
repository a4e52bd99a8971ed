"""Boltzmann generators: flows trained by an energy, by examples, and by both, then reweighted.

`python experiments/boltzmann/run.py` runs what config.yaml says and is not in results.csv yet,
then writes table.md; the flows of the first seed go to runs/boltzmann, for pictures.py. With
`--smoke` it makes a few steps of each, and keeps nothing.
"""

import csv
import itertools
import math
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from sklearn import mixture
from systems import SYSTEMS, System, metropolis
from torch import Tensor

import cnf
from cnf.distributions import GaussianMixture
from cnf.metrics import LogEvidence, log_evidence
from cnf.objectives import ImportanceWeighted, Joint
from cnf.random import stream
from cnf.training.origin import environment
from cnf.transforms import LU
from cnf.transforms.continuous import odes_in

HERE = Path(__file__).parent
FLOWS = HERE.parent.parent / "runs" / "boltzmann"
COLUMNS = [
    "system", "model", "training", "seed", "drawn", "difference", "difference_sigma",
    "evidence_error", "evidence_sigma", "ess", "steps", "revision",
]  # fmt: skip
DRAWS = 8  # of an importance-weighted bound
SOLVER = cnf.Solver("dopri5", rtol=1e-5, atol=1e-5)  # of what is measured


class Case(NamedTuple):
    """One flow to be trained, or a baseline."""

    system: str
    model: str
    training: str
    seed: int


def run(case: Case, config: dict, folder: Path) -> dict:
    torch.manual_seed(case.seed)
    system = SYSTEMS[case.system]()
    width = config["systems"][case.system]["width"]
    path = metropolis(
        system, width=width, generator=stream(case.seed, "examples"), **config["chains"]
    )
    if case.model == "metropolis":  # as many energies as training by energy
        steps = config["steps"] * config["batch_size"] // config["chains"]["chains"]
        path = metropolis(
            system, config["chains"]["chains"], steps, width, stream(case.seed, "chains")
        )
        found = by_visits(system, path)
    else:
        flow = trained(case, system, path.flatten(0, 1), config)
        if case.seed == config["seeds"][0] and flow.spec:
            folder.mkdir(parents=True, exist_ok=True)
            cnf.save(flow, folder / f"{case.system}-{case.model}-{case.training}.pt")
        found = by_weights(system, flow, config["draws"], case.seed)
    return {
        **case._asdict(), **{name: f"{value:.4f}" for name, value in found.items()},
        "steps": config["steps"], "revision": environment()["revision"],
    }  # fmt: skip


def trained(case: Case, system: System, examples: Tensor, config: dict) -> cnf.Flow:
    """The flow under an accurate solver; "mixture" is scikit-learn's of two Gaussians."""
    if case.model == "mixture":
        found = mixture.GaussianMixture(2, random_state=case.seed).fit(examples.numpy())
        means, covariances, weights = (
            torch.from_numpy(each).float()
            for each in (found.means_, found.covariances_, found.weights_)
        )
        base = GaussianMixture(means, torch.linalg.cholesky(covariances), weights)
        return cnf.Flow(base, LU(2))  # which is the identity before training
    own = config["models"][case.model]
    flow = cnf.models.build(case.model, dim=2, **own["options"])
    energy, draws = cnf.ReverseKL(system.log_density), 1
    objective: Any = {"energy": energy, "examples": own["examples"]}.get(case.training)
    if case.training == "importance":
        objective, draws = ImportanceWeighted(system.log_density, draws=DRAWS), DRAWS
    if case.training == "both":
        objective = Joint((own["examples"], energy), (1.0, 1.0))
    settings = cnf.TrainConfig(
        steps=config["steps"], batch_size=config["batch_size"] // draws, seed=case.seed,
        validations=0, compile=False, progress=False, device="cpu",
    )  # fmt: skip
    data = examples if case.training in ("examples", "both") else None
    cnf.fit(flow, objective, data, settings)
    return flow.with_solver(SOLVER) if odes_in(flow.transform) else flow


def by_weights(system: System, flow: cnf.Flow, draws: int, seed: int) -> dict[str, float]:
    """Free energies by importance weights; NaN where no draw is in one of the basins."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "log_evidence: one of")  # the error tells
        whole = log_evidence(flow, system.log_density, draws, generator=stream(seed, "whole"))
        first, second = (in_basin(system, flow, k, draws, seed) for k in (0, 1))
    x = flow.sample(draws, generator=stream(seed, "share"))
    return {
        "drawn": (system.coordinate(x) >= system.split).double().mean().item(),
        "difference": float(first.value - second.value),
        "difference_sigma": math.hypot(first.error, second.error),  # the draws are independent
        "evidence_error": float(whole.value - system.log_evidence()),
        "evidence_sigma": float(whole.error),
        "ess": float(whole.ess) / draws,
    }


def in_basin(system: System, flow: cnf.Flow, basin: int, draws: int, seed: int) -> LogEvidence:
    """The log of the integral over a basin, NaN where no draw is in it."""
    try:
        return log_evidence(
            flow, system.log_density_in(basin), draws, generator=stream(seed, f"basin {basin}")
        )
    except ValueError as error:
        if "got none" not in str(error):
            raise
        return LogEvidence(*torch.full((4,), math.nan))


def by_visits(system: System, path: Tensor) -> dict[str, float]:
    """Free-energy difference by the time in each basin, with the error between chains."""
    share = (system.coordinate(path) >= system.split).double().mean(0)
    mean, error = share.mean(), share.std() / math.sqrt(len(share))
    return {
        "drawn": mean.item(), "difference": (1 / mean - 1).log().item(),
        "difference_sigma": (error / (mean * (1 - mean))).item(),
        **dict.fromkeys(("evidence_error", "evidence_sigma", "ess"), math.nan),
    }  # fmt: skip


def cases(config: dict) -> list[Case]:
    """All of one seed before the next."""
    contestants = [
        *itertools.product(config["models"], config["trainings"]),
        ("mixture", "examples"), ("metropolis", "energy"),
    ]  # fmt: skip
    return [
        Case(system, *contestant, seed)
        for seed, system in itertools.product(config["seeds"], config["systems"])
        for contestant in contestants
    ]


def table(rows: list[dict], config: dict) -> str:
    """Of each contestant the errors of all seeds, and the means of what they claim."""
    lines = [
        "| system | model | trained by | second basin | ΔF - exact, of each seed | its σ | "
        "log Z - exact (its σ) | ESS |",
        "|---|---|---|---:|---|---:|---:|---:|",
    ]
    kinds = dict.fromkeys(case[:3] for case in cases(config))
    for system, model, training in sorted(
        kinds, key=lambda k: list(config["systems"]).index(k[0])
    ):
        own = [
            r
            for r in rows
            if (r["system"], r["model"], r["training"]) == (system, model, training)
        ]
        exact = SYSTEMS[system]().difference()

        def mean(name: str, own: list[dict] = own) -> float:
            told = [float(r[name]) for r in own if not math.isnan(float(r[name]))]
            return sum(told) / len(told) if told else math.nan

        errors = (float(r["difference"]) - exact for r in own)
        each = ", ".join("none" if math.isnan(e) else f"{e:+.3f}" for e in errors)
        flow = model in config["models"] or model == "mixture"
        evidence = f"{mean('evidence_error'):+.3f} ({mean('evidence_sigma'):.3f})" if flow else "–"
        sigma = "–" if math.isnan(mean("difference_sigma")) else f"{mean('difference_sigma'):.3f}"
        lines.append(
            f"| {system} | {model} | {training} | {mean('drawn'):.1%} | {each} | {sigma} | "
            f"{evidence} | {mean('ess'):.2f} |".replace("| nan |", "| – |")
        )
    return "\n".join(lines)


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    smoke = "--smoke" in sys.argv
    config |= config["smoke"] if smoke else {}
    folder = Path(tempfile.mkdtemp()) if smoke else HERE
    torch.set_num_threads(1)
    path = folder / "results.csv"
    rows: list[dict] = list(csv.DictReader(path.open())) if path.exists() else []
    done = {(r["system"], r["model"], r["training"], r["seed"]) for r in rows}
    for case in cases(config):
        if tuple(map(str, case)) in done:
            continue
        row = run(case, config, folder if smoke else FLOWS)
        rows.append({name: str(value) for name, value in row.items()})
        print(rows[-1], flush=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    (folder / "table.md").write_text(table(rows, config) + "\n")
    print(table(rows, config))


if __name__ == "__main__":
    main()
