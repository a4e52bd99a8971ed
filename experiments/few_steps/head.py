"""What a flow map's learned divergence claims, beside the exact density and that of the ODE.

`python experiments/few_steps/head.py` trains flow maps with a divergence head by SelfDistillation,
as head.yaml says, and writes head.md.
"""

import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import yaml
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

import cnf
from cnf.metrics.flows import log_prob_chunked
from cnf.random import stream
from cnf.training.origin import environment

HERE = Path(__file__).parent
HEADER = [
    "| density | truth | ODE | steps | estimated | over the ODE: mean | RMS | exact | folded "
    "| over the exact steps: mean | RMS | estimate, ms | exact, ms |",
    "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
]


def densities(config: dict) -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    """Of each density its name, training rows, test points and true log-density at these."""
    for name in config["toys"]:
        toy = cnf.data.toy(name)
        x = toy.sample(config["points"], stream(config["seed"], "points"))
        yield name, toy.sample(config["rows"], stream(config["seed"], "rows")), x, toy.log_prob(x)
    dim, modes = config["mixture"]["dim"], config["mixture"]["modes"]
    torch.manual_seed(config["seed"])
    factor = config["mixture"]["spread"] * torch.randn(modes, dim, dim) / dim**0.5
    covariance = factor @ factor.mT + config["mixture"]["least"] * torch.eye(dim)
    means = config["mixture"]["distance"] * torch.randn(modes, dim)
    mixture = MixtureSameFamily(
        Categorical(torch.ones(modes)), MultivariateNormal(means, covariance)
    )
    rows = torch.cat([mixture.sample((1_000,)) for _ in range(config["rows"] // 1_000)])
    x = mixture.sample((config["mixture"]["points"],))
    yield f"{modes} Gaussians, D = {dim}", rows, x, mixture.log_prob(x)


def lines(name: str, rows: Tensor, x: Tensor, true: Tensor, config: dict) -> Iterator[str]:
    """Train one flow map; a row of the table for each number of steps."""
    torch.manual_seed(config["seed"])
    flow = cnf.models.cnf(x.shape[1], flow_map=True, divergence_head=True)
    settings = cnf.TrainConfig(
        steps=config["steps"], batch_size=config["batch_size"], seed=config["seed"],
        validations=0, progress=False, device="cpu",
    )  # fmt: skip
    cnf.fit(flow, cnf.objectives.SelfDistillation(), rows, settings)
    ode = log_prob_chunked(flow.with_solver(cnf.Solver("dopri5")), x)
    for k in config["few"]:
        few = flow.eval().with_solver(cnf.Solver("flow-map", steps=k, explicit="density"))
        told, quick = timed(lambda few=few: few.log_prob(x, divergence="learned"))
        exact, slow = timed(lambda few=few: few.log_prob(x))
        folded = exact.isnan()
        cells = [
            name, f"{true.mean():.3f}", f"{ode.mean():.3f}", k, f"{told.mean():.3f}",
            *errors(told - ode), f"{exact[~folded].mean():.3f}", f"{folded.sum()} of {len(x)}",
            *errors((told - exact)[~folded]), f"{quick:.1f}", f"{slow:.1f}",
        ]  # fmt: skip
        yield "| " + " | ".join(map(str, cells)) + " |"


def errors(difference: Tensor) -> tuple[str, str]:
    return f"{difference.mean():.3f}", f"{difference.square().mean().sqrt():.3f}"


@torch.no_grad()
def timed(call: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """What it gives, and the median of three times in ms, after a first one."""
    found, times = call(), []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return found, 1e3 * statistics.median(times)


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Flow: .* rows")  # folds are counted
    config = yaml.safe_load((HERE / "head.yaml").read_text())
    table = list(HEADER)
    for density in densities(config):
        for line in lines(*density, config):
            table.append(line)
            print(line, flush=True)
    told = environment()
    table += ["", f"Seed {config['seed']}, {config['steps']} steps, one thread, "
              f"{platform.processor() or told['processor']}, torch {torch.__version__}, "
              f"revision {told['revision']}."]  # fmt: skip
    (HERE / "head.md").write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
