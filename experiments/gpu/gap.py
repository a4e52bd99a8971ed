"""Training for half a minute on a density: steps taken, and the gap to the true density."""

from collections.abc import Callable

import torch
from measure import Options
from tables import markdown, number

import cnf

CASES = {
    "cnf, flow matching": ("cnf", "flow-matching", 4_096),
    "nsf, likelihood": ("nsf", "maximum-likelihood", 4_096),
}
SECONDS, DENSITY = 30.0, "pinwheel"


def questions(options: Options) -> dict[str, Callable[[], dict]]:
    return {
        f"{name}, batch {batch:,}": lambda m=model, o=objective, b=batch: measured(
            m, o, b, options
        )
        for name, (model, objective, batch) in CASES.items()
    }


def measured(model: str, objective: str, batch: int, options: Options) -> dict:
    torch.manual_seed(0)
    density, flow = cnf.data.toy(DENSITY), cnf.models.build(model, dim=2)
    config = cnf.TrainConfig(
        seconds=1.0 if options.quick else SECONDS, batch_size=batch, device=options.device,
        progress=False, validations=0,
    )  # fmt: skip
    history = cnf.fit(flow, objective, density, config)
    x = density.sample(10_000, torch.Generator().manual_seed(1)).to(options.device)
    gap = cnf.metrics.gap(flow, density, x)
    return {"steps": history.steps, "seconds": history.seconds, "gap": gap.value,
            "error": gap.error}  # fmt: skip


def table(found: dict[str, dict]) -> str:
    lines = [
        (
            name,
            number(row["seconds"]),
            f"{row['steps']:,}",
            f"{row['gap']:.4f} ± {row['error']:.4f}",
        )
        for name, row in found.items()
    ]
    return markdown((DENSITY, "seconds", "steps", "gap, nats"), lines)
