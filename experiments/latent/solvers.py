"""What the solver leaves of a continuous flow's round trip, in gray levels of real numbers.

`python experiments/latent/solvers.py` takes the flow of SEED that run.py has trained, and writes
what solvers.md lacks; "dopri5 at 1e-5" does a part of it.
"""

import sys

import torch
import yaml
from run import HERE, folder
from spaces import Latent, pictures

import cnf
from cnf.metrics.estimate import number
from cnf.random import stream

NAME, SEED, COUNT = "u-net-flow-matching-0", 0, 100
SOLVERS = {f"rk4, {steps} steps": cnf.Solver("rk4", steps=steps) for steps in (8, 16, 32)}
SOLVERS["dopri5 at 1e-5"] = cnf.Solver("dopri5", rtol=1e-5, atol=1e-5)
HEAD = [
    "| solver | largest error of a picture: median | 90 % below | worst | above 1 |",
    "|---|---:|---:|---:|---:|",
]


def main() -> None:
    torch.set_num_threads(1)
    path, written = HERE / "config.yaml", HERE / "solvers.md"
    data = pictures(yaml.safe_load(path.read_text()))
    latent = Latent(cnf.load(folder(path) / NAME))
    order = torch.randperm(len(data.test.x), generator=stream(SEED, "round trip"))  # run.py's
    x = latent.noisy(data.test.x[order[:COUNT]], stream(SEED, "noise"))
    lines = written.read_text().splitlines() if written.exists() else HEAD
    for name in sys.argv[1:] or SOLVERS:
        if any(line.startswith(f"| {name} |") for line in lines):
            continue
        flow = latent.real.with_solver(SOLVERS[name])
        with torch.no_grad():
            back = torch.cat([flow.decode(flow.encode(part)) for part in x.split(50)])
        error = (back - x).abs().flatten(1).amax(1)
        told = [number(e.item()) for e in (error.median(), error.quantile(0.9), error.max())]
        told.append(f"{(error > 1).double().mean():.0%}")
        lines = [*lines, f"| {name} | {' | '.join(told)} |"]
        print(lines[-1], flush=True)
        written.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
