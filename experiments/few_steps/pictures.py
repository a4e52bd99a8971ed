"""Densities of few steps: what the trace claims, and what the steps have.

`python experiments/few_steps/pictures.py` draws the flows that run.py trained into pictures/.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

import cnf
from cnf.metrics.flows import log_prob_chunked
from cnf.plotting import plot_densities

HERE = Path(__file__).parent
FLOWS = HERE.parents[1] / "runs" / "few_steps"


@dataclass
class Claimed:
    """The density that the integral of the trace over few steps claims."""

    flow: cnf.Flow

    def log_prob(self, x: torch.Tensor) -> torch.Tensor:
        return log_prob_chunked(self.flow, x.float())


def draw(toy: str) -> None:
    matched = cnf.load(FLOWS / f"{toy}-0-matching")
    halves = {"method": "midpoint", "steps": 2}
    trained = {
        f"Likelihood, RK4 × {steps}": cnf.load(FLOWS / f"{toy}-0-likelihood-rk4-{steps}-density")
        for steps in (1, 2, 4)
    }
    flows = {
        "Midpoint × 2, claimed": Claimed(matched.with_solver(cnf.Solver(**halves))),
        "Midpoint × 2, exact": matched.with_solver(
            cnf.Solver(**halves, discrete=True, explicit="density")
        ),
        **trained,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Flow: .* rows")  # folds far out are blank
        figure = plot_densities(cnf.data.toy(toy), flows)
    path = HERE / "pictures" / f"{toy}.webp"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    print(path)


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    for toy in config["toys"]:
        draw(toy)


if __name__ == "__main__":
    main()
