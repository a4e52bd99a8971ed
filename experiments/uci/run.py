"""Test NLLs on small tables: flows of every kind, trained for the same seconds, over five seeds.

`python experiments/uci/run.py --jobs 14 --limit 540` fits what config.yaml says and results.csv
lacks, each fit in a process on one core, and begins none after 540 seconds; started again it goes
on. `--set`, `--model`, `--seed` and `--seconds` choose less. Then it writes table.md.

On a machine that is busy or slower, `--paced` gives a fit not the seconds, but the steps that fits
of its model on its set take in them by results.csv.
"""

import argparse
import csv
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import tables
import torch
import yaml
from torch import Tensor

import cnf
from cnf.data import Points
from cnf.data.table_sets import TABLE_SETS
from cnf.distributions import GaussianMixture
from cnf.dynamics import Solver
from cnf.metrics import log_prob_chunked
from cnf.objectives import OBJECTIVES
from cnf.random import stream
from cnf.training.origin import environment
from cnf.transforms import PREPROCESSING
from cnf.transforms.continuous import is_continuous

HERE = Path(__file__).parent
TIGHT = Solver("dopri5", rtol=1e-6, atol=1e-6)  # of test scores
FEW = 1_000  # training rows that are scored, to see what is learned by heart
COLUMNS = [
    "set", "model", "seed", "rows", "dim", "nll", "worst", "train_nll", "steps", "seconds",
    "core_seconds", "parameters", "ended", "revision", "machine",
]  # fmt: skip


class Job(NamedTuple):
    """One fit: of a model on a set, whose rows the seed splits as it draws first weights."""

    set: str
    model: str
    seed: int


def models(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is said of each model, and of the variants of some under "model, variant"."""
    found = dict(config["models"])
    for variant, told in config["variants"].items():
        for model in told["models"]:
            found[f"{model}, {variant}"] = {
                **found[model], "sets": told["sets"], "train": told["train"]
            }  # fmt: skip
    return found


def jobs(config: dict[str, Any]) -> Iterator[Job]:
    """All fits, those of the first seed first; of one seed, what is listed first."""
    for seed in range(config["seeds"]):
        for model, told in models(config).items():
            if seed < told.get("seeds", config["seeds"]):
                yield from (Job(name, model, seed) for name in told.get("sets", config["sets"]))


def split(name: str, seed: int) -> Points:
    """The rows of a set in an order by seed: eight tenths to train on, in standard units.

    A tenth of all rows is the test, a tenth of the others is for validation; units are means and
    standard deviations of the training rows.
    """
    table = TABLE_SETS[name]()
    rows = torch.cat([part.x.double() for part in (table, table.validation, table.test)])
    rows = rows[torch.randperm(len(rows), generator=stream(seed, "split"))]
    rest = len(rows) - len(rows) // 10
    train, validation, test = rows.tensor_split([rest - rest // 10, rest])
    loc, scale = train.mean(0), train.std(0)
    points = Points((train - loc) / scale, name)
    points.validation = Points((validation - loc) / scale, name)
    points.test = Points((test - loc) / scale, name)
    return points


def gaussian(
    points: Points, seed: int, told: dict[str, Any], config: dict[str, Any]
) -> tuple[cnf.Flow, dict[str, Any]]:
    """The normal distribution with mean and covariance of the training rows."""
    whiten = PREPROCESSING.build("whiten", "run", {"event_shape": points.dim})
    whiten.fit(points.x)
    return cnf.Flow(None, whiten, event_shape=(points.dim,)), {}


def mixture(
    points: Points, seed: int, told: dict[str, Any], config: dict[str, Any]
) -> tuple[cnf.Flow, dict[str, Any]]:
    """Of mixtures with full covariances, by EM, the one that validation likes best."""
    assert points.validation is not None
    white, _ = gaussian(points, seed, told, config)
    z, began = white.encode(points.x), time.perf_counter()
    found: dict[int, tuple[float, cnf.Flow]] = {}
    for components in (number for number in told["components"] if number * points.dim < len(z)):
        draws = stream(seed, "mixture", components)
        base = GaussianMixture.fit(z, components, steps=told["steps"], generator=draws)
        flow = cnf.Flow(base, white.transform)
        found[components] = nll(flow, points.validation.x), flow
    best = min(found, key=lambda components: found[components][0])
    seconds = f"{time.perf_counter() - began:.1f}"
    return found[best][1], {
        "steps": told["steps"], "seconds": seconds, "ended": f"{best} components"
    }  # fmt: skip


def budget(seconds: float, told: dict[str, Any]) -> dict[str, float]:
    """The budget of a stage: seconds, or steps where it is told how many there are in a second."""
    if "pace" not in told:
        return {"seconds": seconds}
    return {"steps": max(1, round(seconds * told["pace"]))}


def trained(
    points: Points, seed: int, told: dict[str, Any], config: dict[str, Any]
) -> tuple[cnf.Flow, dict[str, Any]]:
    """A model of the library after its stages; steps and seconds are those of all together."""
    torch.manual_seed(seed)
    flow = cnf.models.build(
        told["model"], dim=points.dim, preprocess="whiten", **told.get("options", {})
    )
    steps, seconds, ended = 0, 0.0, ""
    for stage in told.get("stages", [{}]):
        settings = config["train"] | stage.get("train", {}) | told.get("train", {})
        settings["batch_size"] = min(settings["batch_size"], len(points.x))
        settings |= budget(config["seconds"] * stage.get("share", 1.0), told)
        objective = OBJECTIVES.build(stage.get("objective", "maximum-likelihood"), "run")
        history = cnf.fit(flow, objective, points, settings | {"seed": seed})
        steps, seconds, ended = steps + history.steps, seconds + history.seconds, history.reason
    return flow, {"steps": steps, "seconds": f"{seconds:.1f}", "ended": ended}


KINDS: dict[str, Callable[..., tuple[cnf.Flow, dict[str, Any]]]] = {
    "gaussian": gaussian, "mixture": mixture, "flow": trained,
}  # fmt: skip


def nll(flow: cnf.Flow, rows: Tensor) -> float:
    return float(nlls(flow, rows).mean())


@torch.no_grad()
def nlls(flow: cnf.Flow, rows: Tensor) -> Tensor:
    exact = flow.with_solver(TIGHT) if is_continuous(flow.transform) else flow
    return -log_prob_chunked(exact.eval(), rows, chunk=2_000).double()


def fitted(
    job: Job, told: dict[str, Any], config: dict[str, Any], until: float
) -> dict[str, Any] | None:
    """The row of a fit, of one that failed too; None after the time by which it must begin."""
    if time.time() > until:
        return None
    torch.set_num_threads(1)
    points = split(job.set, job.seed)
    assert points.test is not None
    row: dict[str, Any] = {**job._asdict(), "rows": len(points.x), "dim": points.dim}
    began = time.process_time()
    try:
        flow, how = KINDS[told.get("kind", "flow")](points, job.seed, told, config)
        row |= {"core_seconds": f"{time.process_time() - began:.1f}", **how}
        each = nlls(flow, points.test.x)
        row |= {"nll": f"{each.mean():.4f}", "worst": f"{each.max():.1f}"}
        row |= {"train_nll": f"{nll(flow, points.x[:FEW]):.4f}", "parameters": numbers(flow)}
    except Exception as error:  # it must not cost the others theirs
        row |= {"nll": "nan", "ended": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return row


def numbers(flow: cnf.Flow) -> int:
    """Of what gradients or EM have fitted; whitening is not counted."""
    base, free = flow.base, sum(p.numel() for p in flow.parameters())
    if isinstance(base, GaussianMixture):
        components, dim = base.means.shape
        free += components * (1 + dim + dim * (dim + 1) // 2) - 1
    return free


def paced(job: Job, told: dict[str, Any], known: list[dict[str, str]]) -> dict[str, Any]:
    """What is told of a model, with the steps in a second that fits of other seeds took.

    Not of one with several stages, whose steps differ.
    """
    mine = [row for row in known if (row["set"], row["model"]) == job[:2] and row["steps"]]
    if told.get("kind") or len(told.get("stages", [{}])) > 1 or not mine:
        return told
    steps, seconds = (sum(float(row[name]) for row in mine) for name in ("steps", "seconds"))
    return told | {"pace": steps / seconds}


def rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open())) if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2, help="processes, one core each")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--folder", type=Path, default=HERE, help="where results.csv lies")
    parser.add_argument("--set", nargs="+")
    parser.add_argument("--model", nargs="+")
    parser.add_argument("--seed", nargs="+", type=int)
    parser.add_argument("--seconds", type=float, help="of a fit, for a trial")
    parser.add_argument("--paced", action="store_true", help="steps instead of seconds")
    given, until = parser.parse_args(), time.time()
    until += given.limit
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    config["seconds"] = given.seconds or config["seconds"]
    path = given.folder / "results.csv"
    given.folder.mkdir(parents=True, exist_ok=True)
    known, tell = rows(path), models(config)
    done = {Job(row["set"], row["model"], int(row["seed"])) for row in known}
    chosen = [set(one or ()) for one in (given.set, given.model, given.seed)]
    todo = [
        job for job in jobs(config)
        if job not in done
        and all(part in few or not few for part, few in zip(job, chosen, strict=True))
    ]  # fmt: skip
    told = [paced(job, tell[job.model], known) if given.paced else tell[job.model] for job in todo]
    about = environment()
    where = {"revision": about["revision"], "machine": f"{about['processor']}, one core"}
    begun = path.exists()
    pool = ProcessPoolExecutor(given.jobs, get_context("spawn"))
    with pool, path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not begun:
            writer.writeheader()
        fits = [
            pool.submit(fitted, job, tell, config, until)
            for job, tell in zip(todo, told, strict=True)
        ]  # fmt: skip
        for future in as_completed(fits):
            if (row := future.result()) is not None:
                writer.writerow(row | where)
                file.flush()
                print(*(row.get(key, "") for key in COLUMNS[:-2]), flush=True)
    (given.folder / "table.md").write_text(tables.written(config, rows(path)))


if __name__ == "__main__":
    main()
