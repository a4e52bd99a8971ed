"""Straight paths: what couplings, reflow and grids give to few steps, by the exact density.

`python experiments/few_steps/straight.py` runs what straight.yaml says and is not in straight.csv
yet, then writes straight.md.
"""

import csv
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
import yaml
from run import mass, sliced

import cnf
from cnf.dynamics import numerical
from cnf.metrics.estimate import Estimate
from cnf.metrics.flows import log_prob_chunked
from cnf.random import stream
from cnf.sampling import learned_grid, likeliest_grid
from cnf.training import reflow
from cnf.training.origin import environment

HERE = Path(__file__).parent
PATH = HERE / "straight.csv"
COLUMNS = [
    "toy", "seed", "training", "method", "steps", "grid", "times", "gap", "gap_error", "folded",
    "mass", "sliced_w2", "floor", "optimizer_steps", "preparing", "pairing", "seconds", "revision",
]  # fmt: skip
ODE = "dopri5"


def run(toy: str, seed: int, training: str, budget: int, config: dict) -> list[dict]:
    """Train one flow, and reflow it if that is wanted, and score both under every solver."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    flow, density = cnf.models.cnf(2), cnf.data.toy(toy)
    settings = cnf.TrainConfig(
        steps=budget, batch_size=config["batch_size"], seed=seed,
        validations=0, compile=True, progress=False, device="cpu",
    )  # fmt: skip
    coupling = config["trainings"][training]
    history = cnf.fit(flow, cnf.FlowMatching(coupling=coupling), density, settings)
    rows = list(scores(flow, toy, seed, training, history, config))
    if training == config["reflow"] and budget == config["few"]:
        histories = reflow(flow, settings, n=config["reflow_pairs"])
        rows += scores(flow, toy, seed, "reflow", histories[0], config)
    return rows


def scores(
    flow: cnf.Flow, toy: str, seed: int, training: str, history: cnf.training.History, config: dict
) -> Iterator[dict]:
    """The ODE itself, equal steps, and grids that were optimized by distance and likelihood."""
    told = {
        "toy": toy, "seed": seed, "training": training, "optimizer_steps": history.steps,
        "preparing": f"{history.preparing:.1f}", "pairing": f"{history.pairing:.1f}",
        "seconds": f"{history.seconds:.1f}", "revision": environment()["revision"],
    }  # fmt: skip
    yield told | score(flow, ODE, None, "", toy, seed, config)
    for method, counts in config["steps"].items():
        for steps in counts:
            yield told | score(flow, method, equal(steps), "equal", toy, seed, config)
    if training not in config["grids"] or history.steps != config["few"]:
        return
    x = cnf.data.toy(toy).sample(config["grid_points"], stream(seed, "grid"))
    for method, counts in config["grid_steps"].items():
        for steps in counts:
            if steps not in config["steps"][method]:
                yield told | score(flow, method, equal(steps), "equal", toy, seed, config)
            near = learned_grid(
                flow, steps, method, points=config["base_points"], generator=stream(seed, "base")
            )
            yield told | score(flow, method, near, "learned", toy, seed, config)
            likely = likeliest_grid(flow, x, steps, method, explicit="density")
            yield told | score(flow, method, likely, "likeliest", toy, seed, config)


def equal(steps: int) -> tuple[float, ...]:
    return tuple(k / steps for k in range(steps + 1))


def score(
    flow: cnf.Flow, method: str, times: tuple[float, ...] | None, grid: str, toy: str, seed: int,
    config: dict,
) -> dict:  # fmt: skip
    """The exact gap, the share of folds and the mass of steps whose density is explicit.

    The samples are those of the same steps from the base to the data.
    """
    density = cnf.data.toy(toy)
    x = density.sample(config["points"], stream(seed, "points"))
    plain = cnf.Solver(method, grid=times)
    exact = flow.with_solver(plain)
    if times is not None:
        exact = flow.with_solver(cnf.Solver(method, grid=times, discrete=True, explicit="density"))
    with numerical.watched():
        gaps = density.log_prob(x) - log_prob_chunked(exact, x)
        whole = None if times is None else mass(exact, x, side=200)
    w2, floor = sliced(flow.with_solver(plain), density, config, seed)
    gap = Estimate.of(gaps[~gaps.isnan()])
    return {
        "method": method, "steps": "" if times is None else len(times) - 1, "grid": grid,
        "times": "" if times is None else " ".join(f"{t:.4f}" for t in times),
        "gap": f"{gap.value:.4f}", "gap_error": f"{gap.error:.4f}",
        "folded": int(gaps.isnan().sum()), "mass": "" if whole is None else f"{whole:.4f}",
        "sliced_w2": f"{w2:.4f}", "floor": f"{floor:.4f}",
    }  # fmt: skip


def tables(config: dict, rows: list[dict]) -> str:
    """Of each density and seed a table of trainings, and one of grids."""
    parts = []
    for toy in config["toys"]:
        for seed in config["seeds"]:
            own = [r for r in rows if (r["toy"], int(r["seed"])) == (toy, seed)]
            parts += [f"## {toy}, seed {seed}", trainings(config, own), grids(config, own)]
    return "\n\n".join(parts)


def trainings(config: dict, rows: list[dict]) -> str:
    solvers = [(m, str(k)) for m, counts in config["steps"].items() for k in counts]
    exact = [("midpoint", "2"), ("rk4", "1")]
    heads = [f"W2 / floor: {ODE}", *(f"{m} × {k}" for m, k in solvers)]
    heads += [f"exact gap (folded, mass): {m} × {k}" for m, k in exact]
    lines = [
        "| optimizer steps | pairs | gap | " + " | ".join(heads) + " |",
        "|---:|---|---:|" + "---:|" * len(heads),
    ]
    kinds = dict.fromkeys((int(r["optimizer_steps"]), r["training"]) for r in rows)
    for budget, training in sorted(kinds):
        own = {
            (r["method"], r["steps"]): r
            for r in rows
            if (int(r["optimizer_steps"]), r["training"]) == (budget, training)
            and r["grid"] in ("", "equal")
        }
        ode = own[ODE, ""]
        cells = [_far(ode), *(_far(own[each]) for each in solvers)]
        cells += [_exact(own[each], config) for each in exact]
        gap = f"{float(ode['gap']):.3f} ± {float(ode['gap_error']):.3f}"
        lines.append(f"| {budget:,} | {training} | {gap} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def grids(config: dict, rows: list[dict]) -> str:
    kinds = [(m, str(k)) for m, counts in config["grid_steps"].items() for k in counts]
    names = ("equal", "learned", "likeliest")
    heads = [f"{name}: exact gap (folded, mass), W2 / floor" for name in names]
    lines = [
        "| pairs | steps | " + " | ".join(heads) + " |", "|---|---|" + "---:|" * len(names)
    ]  # fmt: skip
    few = [r for r in rows if int(r["optimizer_steps"]) == config["few"]]
    for training in config["grids"]:
        for kind in kinds:
            own = {
                r["grid"]: r
                for r in few
                if r["training"] == training and (r["method"], r["steps"]) == kind
            }
            if not own:  # still to be trained
                continue
            cells = [f"{_exact(own[name], config)}, {_far(own[name])}" for name in names]
            lines.append(f"| {training} | {kind[0]} × {kind[1]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _far(row: dict) -> str:
    return f"{float(row['sliced_w2']) / float(row['floor']):.1f}"


def _exact(row: dict, config: dict) -> str:
    folded = int(row["folded"]) / config["points"]
    return f"{float(row['gap']):.3f} ({folded:.1%}, {float(row['mass']):.3f})"


def main() -> None:
    config = yaml.safe_load((HERE / "straight.yaml").read_text())
    rows = list(csv.DictReader(PATH.open())) if PATH.exists() else []
    done = {(r["toy"], int(r["seed"]), r["training"], int(r["optimizer_steps"])) for r in rows}
    cases = [
        (toy, seed, training, budget)
        for seed in config["seeds"]
        for budget, names in config["optimizer_steps"].items()
        for training in names
        for toy in config["toys"]
    ]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config["processes"], mp_context=spawn) as pool:
        todo = (pool.submit(run, *case, config) for case in cases if case not in done)
        for future in as_completed(todo):
            rows += [{k: str(v) for k, v in row.items()} for row in future.result()]
            print(rows[-1], flush=True)
            with PATH.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    text = tables(config, rows)
    (HERE / "straight.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
