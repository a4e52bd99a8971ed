"""What was tried for the default recipe: gap of each variant on a few densities.

`python experiments/recipes/run.py` runs what config.yaml says and is not in results.csv yet, then
writes table.md. Budgets are in steps: milliseconds are the machine's, gaps are not.
"""

import csv
import multiprocessing
import statistics
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import zip_longest
from pathlib import Path

import torch
import yaml

import cnf
from cnf.fields import MLPField, Preconditioned
from cnf.metrics.flows import Estimate, log_prob_chunked
from cnf.training.origin import environment
from cnf.transforms import Continuous, Standardize

HERE = Path(__file__).parent
COLUMNS = ["variant", "density", "gap", "gap_error", "nfe", "ms_per_step", "revision"]
TIGHT = cnf.Solver("dopri5", rtol=1e-6, atol=1e-6)


def merged(base, change):
    """`base` with `change` written over it, all the way down; lists item by item."""
    if isinstance(base, dict) and isinstance(change, dict):
        keys = dict.fromkeys([*base, *change])
        return {k: merged(base.get(k), change[k]) if k in change else base[k] for k in keys}
    if isinstance(base, list) and change and isinstance(change[0], dict):
        return [merged(a or {}, b or {}) for a, b in zip_longest(base, change)]
    return change


def run(variant: str, density: str, config: dict) -> dict:
    torch.set_num_threads(1)
    torch.manual_seed(config["seed"])
    recipe = merged(config["base"], config["variants"][variant])
    field = MLPField(2, **recipe["field"])
    field = Preconditioned(field) if recipe["preconditioned"] else field
    flow = cnf.Flow(None, Continuous(field), Standardize((2,)), event_shape=(2,))
    toy, steps, seconds = cnf.data.toy(density), 0, 0.0
    for stage in recipe["stages"]:
        options = {k: v for k, v in stage["options"].items() if v is not None}
        objective = cnf.objectives.OBJECTIVES.build({"name": stage["objective"], **options})
        settings = cnf.TrainConfig(
            **stage["config"], seed=config["seed"], validations=0, progress=False
        )
        history = cnf.fit(flow, objective, toy, settings)
        steps, seconds = steps + history.steps, seconds + history.seconds
    x = toy.sample(config["points"], torch.Generator().manual_seed(1_000 + config["seed"]))
    with cnf.dynamics.record() as stats:
        log_prob = log_prob_chunked(flow.with_solver(TIGHT), x)
    gap = Estimate.of(toy.log_prob(x).double() - log_prob.double())
    return {
        "variant": variant, "density": density, "gap": f"{gap.value:.4f}",
        "gap_error": f"{gap.error:.4f}", "nfe": round(stats.forward / stats.solves),
        "ms_per_step": f"{1e3 * seconds / steps:.2f}", "revision": environment()["revision"],
    }  # fmt: skip


def table(config: dict, rows: list[dict]) -> str:
    names = config["densities"]
    lines = ["| gap (nats) | " + " | ".join(names) + " | ms per step |"]
    lines.append("|---|" + "---:|" * (len(names) + 1))
    for variant in config["variants"]:
        mine = {row["density"]: row for row in rows if row["variant"] == variant}
        cells = [f"{float(mine[n]['gap']):.3f}" if n in mine else "–" for n in names]
        times = [float(row["ms_per_step"]) for row in mine.values()]
        cells.append(f"{statistics.median(times):.1f}" if times else "–")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    path = HERE / "results.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    done = {(row["variant"], row["density"]) for row in rows}
    todo = [(v, d) for v in config["variants"] for d in config["densities"] if (v, d) not in done]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config["processes"], mp_context=spawn) as pool:
        for future in as_completed(pool.submit(run, *pair, config) for pair in todo):
            rows.append(future.result())
            print(rows[-1], flush=True)
            with path.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    (HERE / "table.md").write_text(table(config, rows) + "\n")
    print(table(config, rows))


if __name__ == "__main__":
    main()
