"""Conditional densities by flows: NLL, coverage and CRPS beside scikit-learn.

`python experiments/regression/run.py` fits what config.yaml says and results.csv lacks, one fit
after the other, then writes table.md. `--config` names another file, whose results lie beside it.
Set `CNF_DATA` to the folder that holds `uci_small/`.
"""

import argparse
import csv
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from baselines import BASELINES
from predictive import COVERED, Ensemble, OfFlow, Predictive, recalibrated, scores
from problems import problem

import cnf
from cnf.data import Points
from cnf.metrics.estimate import number
from cnf.objectives import OBJECTIVES
from cnf.random import stream_seed
from cnf.training.origin import environment

HERE = Path(__file__).parent
GRIDS = HERE.parents[1] / "runs" / "regression"  # densities that pictures.py draws
GRID = np.linspace(-1, 1, 161), np.linspace(-2.5, 3.5, 241)  # of the feature and of the target
COLUMNS = [
    "problem", "model", "seed", "rows", "features", "nll", "nll_error", "worst", "exact",
    *(f"covered_{100 * part:.0f}" for part in COVERED), "recalibrated_90", "width_90",
    "crps", "rmse", "validation_nll", "steps", "core_seconds", "pit", "revision",
]  # fmt: skip


def fitted(told: dict[str, Any], points: Points, seed: int, config: dict[str, Any]):
    """What makes predictive distributions of features, and the steps that it took."""
    if "baseline" in told:
        predict = BASELINES[told["baseline"]](points, seed, **told["options"])
        return lambda features: predict(features.double().numpy()), ""
    flows, steps = [], 0
    for member in range(told.get("ensemble", 1)):
        own = stream_seed(seed, "member", member)
        torch.manual_seed(own)
        sizes = {"dim": points.dim, "context": points.context.shape[1]}
        flow = cnf.models.build(told["model"], **sizes, **told["options"])
        settings = config["train"] | told["train"] | {"seed": own}
        settings["batch_size"] = min(settings["batch_size"], len(points.x))
        objective = OBJECTIVES.build(told.get("objective", "maximum-likelihood"), "run")
        history = cnf.fit(flow, objective, points, settings)
        if history.signal:  # an interrupted fit is no result
            raise SystemExit(128 + history.signal)
        steps += history.steps
        flows.append(flow.eval())

    def predict(features: torch.Tensor) -> Predictive:
        parts = [OfFlow(flow, features) for flow in flows]
        return parts[0] if len(parts) == 1 else Ensemble(parts)

    return predict, steps


def run(name: str, model: str, seed: int, config: dict[str, Any]) -> dict[str, Any]:
    points, truth = problem(name, seed)
    test, held_out = points.test, points.validation
    y, began = test.x[:, 0].double().numpy(), time.process_time()
    predict, steps = fitted(config["models"][model], points, seed, config)
    seconds = time.process_time() - began
    few = config["scored"]
    of_held_out, held_y = predict(held_out.context), held_out.x[:, 0].double().numpy()
    row = {
        "problem": name, "model": model, "seed": seed, "rows": len(points.x),
        "features": points.context.shape[1],
        **scores(predict(test.context), y, predict(test.context[:few]), few),
        "recalibrated_90":
            f"{recalibrated(of_held_out.cdf(held_y), predict(test.context).cdf(y), 0.9):.4f}",
        "validation_nll": f"{-of_held_out.log_prob(held_y).mean():.4f}",
        "steps": steps, "core_seconds": f"{seconds:.1f}",
    }  # fmt: skip
    if truth is not None:
        row["exact"] = f"{-truth.log_prob(y).mean():.4f}"
        if seed == config["seeds"][0]:
            keep_grid(predict, model)
    return row


def keep_grid(predict: Any, model: str) -> None:
    """Densities of the problem of one feature, for its picture."""
    feature, y = (part.ravel() for part in np.meshgrid(*GRID, indexing="ij"))
    density = np.exp(predict(torch.from_numpy(feature)[:, None]).log_prob(y))
    GRIDS.mkdir(parents=True, exist_ok=True)
    np.save(GRIDS / f"{model}.npy", density.reshape(*map(len, GRID)).astype(np.float32))


def table(rows: list[dict[str, str]], config: dict[str, Any]) -> str:
    """Means over seeds, of the NLL with the standard error of that mean."""
    heads = ["problem", "model", "NLL", *(f"{100 * part:.0f} %" for part in COVERED)]
    heads += ["90 % reset", "width of 90 %", "CRPS", "RMSE", "steps", "core seconds"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for name, model in itertools.product(config["problems"], config["models"]):
        own = [row for row in rows if (row["problem"], row["model"]) == (name, model)]
        if not own:
            continue
        columns = {key: [float(r[key]) for r in own if r.get(key)] for key in COLUMNS[3:-2]}
        mean = {key: statistics.fmean(each or [np.nan]) for key, each in columns.items()}
        spread = statistics.stdev(columns["nll"]) / len(own) ** 0.5 if len(own) > 1 else np.nan
        cells = [name, model, number(mean["nll"], spread)]
        cells += [f"{100 * mean[f'covered_{100 * part:.0f}']:.1f}" for part in COVERED]
        cells.append(
            "–" if np.isnan(mean["recalibrated_90"]) else f"{100 * mean['recalibrated_90']:.1f}"
        )
        cells += [f"{mean[key]:.3g}" for key in ("width_90", "crps", "rmse")]
        cells += [number(mean["steps"]), f"{mean['core_seconds']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
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
        wanted = config["models"][model].get("problems", config["problems"])
        if name not in wanted or (name, model, str(seed)) in done:
            continue
        row = run(name, model, seed, config) | {"revision": revision}
        rows.append({key: str(row.get(key, "")) for key in COLUMNS})
        print({key: row[key] for key in row if key != "pit"}, flush=True)
        with results.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    (path.parent / "table.md").write_text(table(rows, config) + "\n")
    print(table(rows, config))


if __name__ == "__main__":
    main()
