"""Anomalies by density and by typicality: AUROC and calibrated alarms beside scikit-learn.

`python experiments/anomalies/run.py` fits what config.yaml says and results.csv lacks, one fit
after the other, then writes table.md. `--config` names another file, whose results lie beside it.
Set `CNF_DATA` to the folder that holds `uci_small/`.
"""

import argparse
import csv
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from problems import PROBLEMS, Problem
from sklearn.covariance import EllipticEnvelope
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import LocalOutlierFactor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from typicality import p_values

import cnf
from cnf.metrics import log_prob_chunked
from cnf.objectives import OBJECTIVES
from cnf.training.origin import environment

HERE = Path(__file__).parent
ALARMS = 0.05  # the p-value below which a row is called an anomaly
FEW = 1_000  # training rows below which a model's settings are those for few rows
COLUMNS = [
    "problem", "kind", "model", "seed", "rows", "columns", "normal", "anomalies", "auroc",
    "auroc_typical", "false_alarms", "alarms", "alarms_typical", "nll", "nll_held_out", "steps",
    "core_seconds", "revision",
]  # fmt: skip
Score = Callable[[Tensor], np.ndarray]  # higher is more normal: log-densities, where there are any


BASELINES: dict[str, Any] = {
    "isolation-forest": IsolationForest, "elliptic-envelope": EllipticEnvelope,
    "local-outlier-factor": LocalOutlierFactor, "gaussian": GaussianMixture,
}  # fmt: skip


def baseline(told: dict[str, Any], x: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """The scores of a baseline of standardized columns; log-densities are those of the units."""
    model = make_pipeline(StandardScaler(), BASELINES[told["baseline"]](**told["options"])).fit(x)
    shift = np.log(model[0].scale_).sum() if told.get("density") else 0.0
    return lambda rows: model.score_samples(rows) - shift


def fitted(
    told: dict[str, Any], problem: Problem, seed: int, config: dict[str, Any]
) -> tuple[Score, int | str]:
    """The score of rows, and the steps that it took. Baselines also learn from validation rows."""
    points = problem.points
    if "baseline" in told:
        rows = torch.cat([points.x, points.validation.x]).numpy()
        score = baseline(told, rows)
        return lambda x: score(x.numpy()), ""
    torch.manual_seed(seed)
    flow = cnf.models.build(told["model"], dim=points.dim, **told.get("options", {}))
    few = told.get("few", {}) if len(points.x) < FEW else {}
    settings = config["train"] | told["train"] | few | {"seed": seed}
    settings["batch_size"] = min(settings["batch_size"], len(points.x))
    objective = OBJECTIVES.build(told.get("objective", "maximum-likelihood"), "run")
    history = cnf.fit(flow, objective, points, settings)
    if history.signal:  # an interrupted fit is no result
        raise SystemExit(128 + history.signal)
    flow.eval()
    return lambda x: log_prob_chunked(flow, x).double().numpy(), history.steps


def rows_of(name: str, model: str, seed: int, config: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each kind of anomaly."""
    problem, told = PROBLEMS[name](seed), config["models"][model]
    began = time.process_time()
    score, steps = fitted(told, problem, seed, config)
    seconds, test = time.process_time() - began, problem.points.test
    held_out, normal = score(problem.held_out), score(test.x)
    low, typical = p_values(held_out, normal)
    found, density = [], told.get("density", "model" in told)
    for kind, x in problem.anomalies.items():
        odd = score(x)
        odd_low, odd_typical = p_values(held_out, odd)
        truth = np.r_[np.zeros(len(normal)), np.ones(len(odd))]
        centered = np.abs(np.r_[normal, odd] - held_out.mean())
        found.append({
            "problem": name, "kind": kind, "model": model, "seed": seed,
            "rows": len(problem.points.x), "columns": problem.points.dim, "normal": len(normal),
            "anomalies": len(odd), "auroc": roc_auc_score(truth, -np.r_[normal, odd]),
            "auroc_typical": roc_auc_score(truth, centered) if density else "",
            "false_alarms": np.mean(low <= ALARMS), "alarms": np.mean(odd_low <= ALARMS),
            "alarms_typical": np.mean(odd_typical <= ALARMS),
            "nll": -normal.mean() if density else "",
            "nll_held_out": -held_out.mean() if density else "",
            "steps": steps, "core_seconds": f"{seconds:.1f}",
        })  # fmt: skip
    return found


def table(rows: list[dict[str, str]], config: dict[str, Any]) -> str:
    """Means over seeds; of the AUROC its least and largest, too."""
    heads = ["anomalies", "model", "AUROC, density", "least – largest", "AUROC, typicality"]
    heads += ["false alarms at 5 %", "found at 5 %", "found, two-sided", "NLL", "steps"]
    heads += ["core seconds"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    kinds = dict.fromkeys((row["problem"], row["kind"]) for row in rows)
    for (name, kind), model in itertools.product(kinds, config["models"]):
        own = [r for r in rows if (r["problem"], r["kind"], r["model"]) == (name, kind, model)]
        if not own:
            continue

        def mean(key: str, digits: int = 3, own: list[dict[str, str]] = own) -> str:
            values = [float(row[key]) for row in own if row[key] != ""]
            return f"{statistics.fmean(values):,.{digits}f}" if values else "–"

        each = [float(row["auroc"]) for row in own]
        cells = [f"{name}, {kind}", model, mean("auroc"), f"{min(each):.3f} – {max(each):.3f}"]
        cells += [mean("auroc_typical"), mean("false_alarms"), mean("alarms", 2)]
        cells += [mean("alarms_typical", 2), mean("nll", 2), mean("steps", 0)]
        lines.append(f"| {' | '.join([*cells, mean('core_seconds', 0)])} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    path = parser.parse_args().config
    config, results = yaml.safe_load(path.read_text()), path.parent / "results.csv"
    torch.set_num_threads(1)
    rows = list(csv.DictReader(results.open())) if results.exists() else []
    done = {(row["problem"], row["model"], row["seed"]) for row in rows}
    revision = environment()["revision"]
    for seed, name, model in itertools.product(
        config["seeds"], config["problems"], config["models"]
    ):
        if (name, model, str(seed)) in done:
            continue
        for row in rows_of(name, model, seed, config):
            row["revision"] = revision
            rows.append({
                key: f"{row[key]:.5f}" if isinstance(row[key], float) else str(row[key])
                for key in COLUMNS
            })  # fmt: skip
            print(rows[-1], flush=True)
        with results.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    (path.parent / "table.md").write_text(table(rows, config) + "\n")
    print(table(rows, config))


if __name__ == "__main__":
    main()
