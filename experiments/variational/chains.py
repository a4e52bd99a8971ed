"""Moments by long chains of the No-U-Turn sampler (Pyro's), beside the exact ones.

`python experiments/variational/chains.py` runs what config.yaml says and writes chains.md.
"""

import time
from pathlib import Path

import pyro
import torch
import yaml
from pyro.infer.mcmc import MCMC, NUTS
from targets import TARGETS, Target

from cnf.random import stream_seed

HERE = Path(__file__).parent


def chains(target: Target, config: dict, seed: int) -> tuple[dict[str, torch.Tensor], float]:
    """Pyro's diagnostics of x with its moments, and process seconds.

    Source: Hoffman & Gelman (2014), https://arxiv.org/abs/1111.4246.
    """
    pyro.set_rng_seed(seed)
    kernel = NUTS(
        potential_fn=lambda parameters: -target.log_density(parameters["x"][None])[0],
        target_accept_prob=config["accept"], jit_compile=True, ignore_jit_warnings=True,
    )  # fmt: skip
    sampler = MCMC(
        kernel, config["draws"], config["warmup"], num_chains=config["count"],
        initial_params={"x": torch.randn(config["count"], target.dim)}, disable_progbar=True,
    )  # fmt: skip
    start = time.process_time()
    sampler.run()
    x = sampler.get_samples(group_by_chain=True)["x"]
    told = sampler.diagnostics()["x"]
    pooled = x.flatten(0, 1)
    return {**told, "mean": pooled.mean(0), "std": pooled.std(0)}, time.process_time() - start


def row(name: str, config: dict) -> str:
    target = TARGETS[name]()
    found, seconds = chains(target, config, stream_seed(0, f"chains of {name}"))
    mean = ((found["mean"] - target.mean) / target.std).abs().max()
    std = (found["std"] / target.std).log().abs().max()
    return (
        f"| {name} | {mean:.3f} | {std:.3f} | {found['r_hat'].max():.3f} | "
        f"{found['n_eff'].min():,.0f} | {seconds:.0f} |"
    )


def main() -> None:
    torch.set_num_threads(1)
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    lines = [
        "| target | mean off | std off | largest R-hat | least effective draws | seconds |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name in config["targets"]:
        lines.append(row(name, config["chains"]))
        print(lines[-1], flush=True)
        (HERE / "chains.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
