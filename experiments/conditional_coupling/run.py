"""What a coupling that does not see the label costs a conditional model: C2OT's moons.

`python experiments/conditional_coupling/run.py` runs what config.yaml says and is not in
results.csv yet, then writes table.md. Numbers are W2 squared, as in the paper.
"""

import argparse
import csv
import math
import multiprocessing
import statistics
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import yaml
from torch import Tensor

import cnf
from cnf.fields import ResidualField
from cnf.matching import COUPLINGS
from cnf.metrics.distances import wasserstein2
from cnf.random import stream
from cnf.training.origin import environment
from cnf.transforms import Continuous

HERE = Path(__file__).parent
PATH = HERE / "results.csv"
COLUMNS = ["coupling", "seed", "euler_1", "adaptive", "nfe", "train_seconds", "revision"]
# Table 1 of the paper: W2² by one Euler step, and by the adaptive solver, ten seeds.
PUBLISHED = {
    "independent": (2.573, 0.059),
    "minibatch-ot": (0.483, 0.462),
    "conditional-ot": (0.048, 0.018),
}


def gaussians(n: int, generator: torch.Generator) -> Tensor:
    """Eight centers at radius 5; covariance √0.1·I, as torchcfm's tutorials draw them."""
    angle = torch.randint(8, (n,), generator=generator) * math.pi / 4
    centers = 5 * torch.stack([angle.cos(), angle.sin()], -1)
    return centers + 0.1**0.25 * torch.randn(n, 2, generator=generator)


def moons(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """torchdyn's moons × 3 - 1, whose noise is uniform on [0, 0.2] and alike in both coordinates,
    and the label of each, -1 or 1."""
    angle = math.pi * torch.rand(n, generator=generator)
    upper = torch.stack([angle.cos(), angle.sin()], -1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], -1)
    second = torch.randint(2, (n, 1), generator=generator)
    x = torch.where(second == 1, lower, upper) + 0.2 * torch.rand(n, 1, generator=generator)
    return 3 * x - 1, 2.0 * second - 1


class Paired:
    """Batches whose pairs were made among several times as many rows."""

    def __init__(self, coupling: str, seed: int, config: dict) -> None:
        self.coupling, self.seed, self.config = COUPLINGS.build(coupling), seed, config

    def __iter__(self) -> Iterator[cnf.Batch]:
        size, wanted = self.config["coupling_size"], self.config["batch_size"]
        for k in range(self.config["steps"] * wanted // size):
            generator = stream(self.seed, "step", k)
            x0 = gaussians(size, generator)
            x1, label = moons(size, generator)
            j = self.coupling(x0, x1, label, generator).j
            x1, label = (x1, label) if j is None else (x1[j], label[j])
            for part in range(0, size, wanted):
                rows = slice(part, part + wanted)
                yield cnf.Batch(x1[rows], label[rows], x0=x0[rows])


class Gaussians(cnf.distributions.Base):
    """The source as a base; its density is not asked for."""

    has_density = False

    def log_prob(self, z):
        raise ValueError("log_prob: not of this source")

    def sample(self, sample_shape=(), generator=None):
        n = math.prod(sample_shape)
        return gaussians(n, generator or torch.default_generator).reshape(*sample_shape, 2)


def run(coupling: str, seed: int, config: dict) -> None:
    torch.set_num_threads(1)
    if coupling == "floor":
        floor(seed, config)
        return
    warnings.filterwarnings("ignore", ".* pairs without looking at the context")
    torch.manual_seed(seed)
    hidden = [config["width"]] * config["blocks"]
    field = ResidualField(2, hidden, context_dim=1, activation="silu", frequencies=0)
    flow = cnf.Flow(Gaussians((2,)), Continuous(field, cnf.Solver(rtol=1e-4, atol=1e-4)))
    settings = cnf.TrainConfig(
        steps=config["steps"], batch_size=config["batch_size"], lr=config["lr"], seed=seed,
        schedule="constant", warmup=0.0, clip=None, ema=None, validations=0, progress=False,
        device="cpu",
    )  # fmt: skip
    if coupling == "semidiscrete":
        rows, labels = moons(config["table_rows"], stream(seed, "table"))
        history = cnf.fit(
            flow, cnf.FlowMatching(coupling=coupling), rows, settings, context=labels
        )
    else:
        history = cnf.fit(flow, cnf.FlowMatching(), Paired(coupling, seed, config), settings)
    generator = stream(seed, "pairs")
    x0, (x1, label) = gaussians(config["points"], generator), moons(config["points"], generator)
    with torch.no_grad(), cnf.dynamics.record() as stats:
        adaptive = flow.decode(x0, label)
    with torch.no_grad():
        one = flow.with_solver(cnf.Solver("euler", steps=1)).decode(x0, label)
    row = {
        "coupling": coupling, "seed": seed, "euler_1": f"{wasserstein2(one, x1) ** 2:.4f}",
        "adaptive": f"{wasserstein2(adaptive, x1) ** 2:.4f}", "nfe": stats.forward,
        "train_seconds": f"{history.seconds:.1f}", "revision": environment()["revision"],
    }  # fmt: skip
    write(row)


def floor(seed: int, config: dict) -> None:
    """What true samples score in a model's place, from draws of their own."""
    x1, _ = moons(config["points"], stream(seed, "test"))
    other, _ = moons(config["points"], stream(seed, "floor"))
    squared = f"{wasserstein2(other, x1) ** 2:.4f}"
    write(
        {
            "coupling": "floor",
            "seed": seed,
            "euler_1": squared,
            "adaptive": squared,
            "nfe": 0,
            "train_seconds": 0,
            "revision": environment()["revision"],
        }  # fmt: skip
    )


def write(row: dict) -> None:
    with PATH.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)
    print(row, flush=True)


def table(config: dict, rows: list[dict[str, str]]) -> str:
    lines = [
        "| W2² | 1 Euler step | published | adaptive | published | evaluations |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for coupling in config["couplings"]:
        mine = [row for row in rows if row["coupling"] == coupling]
        one, adaptive = (spread([float(row[c]) for row in mine]) for c in ("euler_1", "adaptive"))
        known = PUBLISHED.get(coupling)
        first, second = ("–", "–") if known is None else (f"{v:.3f}" for v in known)
        nfe = round(statistics.median(int(row["nfe"]) for row in mine)) if mine else "–"
        lines.append(f"| {coupling} | {one} | {first} | {adaptive} | {second} | {nfe} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def rows() -> list[dict[str, str]]:
    return list(csv.DictReader(PATH.open()))


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="only write the table again")
    only_table = parser.parse_args().table
    if not PATH.exists():
        PATH.write_text(",".join(COLUMNS) + "\n")
    done = {(row["coupling"], int(row["seed"])) for row in rows()}
    todo = [(c, s) for s in config["seeds"] for c in config["couplings"] if (c, s) not in done]
    if todo and not only_table:
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(config["processes"], mp_context=spawn) as pool:
            list(pool.map(run, *zip(*todo, strict=True), [config] * len(todo)))
    (HERE / "table.md").write_text(table(config, rows()) + "\n")
    print(table(config, rows()))


if __name__ == "__main__":
    main()
