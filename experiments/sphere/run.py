"""Flow matching on the sphere and the torus beside circular splines and kernels.

`python experiments/sphere/run.py` runs what config.yaml says and is not in results.csv yet, then
writes table.md; with `--smoke` a little of everything, and no file.
"""

import argparse
import csv
import itertools
import statistics
from pathlib import Path
from typing import NamedTuple

import earth
import torch
import yaml

import cnf
from cnf.metrics.flows import log_prob_chunked
from cnf.training.origin import environment

HERE = Path(__file__).parent
PATH = HERE / "results.csv"
RUNS = HERE / "runs"
TORUS = "torus"
KERNELS = {"kernels": earth.kernel_log_density, "kernels and spikes": earth.spiked_log_density}
COLUMNS = [
    "data", "flow", "seed", "nll", "nll_new", "new", "validation_nll", "gap", "gap_error",
    "optimizer_steps", "concentration", "revision",
]  # fmt: skip


class Case(NamedTuple):
    """One density to be fitted."""

    data: str
    flow: str
    seed: int


def trained(case: Case, config: dict) -> tuple[cnf.Flow, int]:
    """A flow by its name in the configuration, trained on the case's data, and its steps."""
    spec = config["flows" if case.data != TORUS else TORUS][case.flow]
    torch.manual_seed(case.seed)
    flow = cnf.models.build(case.flow, **spec["options"])
    settings = cnf.TrainConfig(
        steps=config["steps"], batch_size=config["batch_size"], seed=case.seed,
        validations=config["validations"], patience=config["patience"], progress=False,
        device="cpu", compile=False,
    )  # fmt: skip
    if case.data == TORUS:
        data = {"data": earth.angles_with_known_density()}
    else:
        parts, chart = earth.split(earth.read(case.data), case.seed), earth.CHARTS[spec["chart"]]
        x, held_out = (chart(part)[0].float() for part in (parts.train, parts.validation))
        data = {"data": x, "validation": held_out}
    history = cnf.fit(flow, spec["objective"], config=settings, **data)
    RUNS.mkdir(exist_ok=True)
    cnf.save(flow, RUNS / f"{case.data}-{case.flow}-{case.seed}.safetensors")  # to draw it
    return flow, history.steps


def log_density(flow: cnf.Flow, chart: str, x: torch.Tensor) -> torch.Tensor:
    """Log-densities with respect to the area of the sphere, shape (N,), at unit vectors."""
    points, log_scale = earth.CHARTS[chart](x)
    return log_prob_chunked(flow, points.float()).double() - log_scale


def run(case: Case, config: dict) -> dict:
    torch.set_num_threads(1)
    row = {**case._asdict(), "revision": config["revision"]}
    if case.data == TORUS:
        density = earth.angles_with_known_density()
        flow, steps = trained(case, config)
        with torch.random.fork_rng():
            torch.manual_seed(10**6 + case.seed)  # torch.distributions draw from the global one
            x = density.sample((config["draws"],))
        off = density.log_prob(x) - log_prob_chunked(flow, x)
        error = off.std() / len(off) ** 0.5
        return {
            **row, "gap": f"{off.mean():.4f}", "gap_error": f"{error:.4f}",
            "optimizer_steps": steps,
        }  # fmt: skip
    parts = earth.split(earth.read(case.data), case.seed)
    if case.flow in KERNELS:
        k = earth.fitted_concentration(parts)
        row["concentration"] = f"{k:.0f}"
        validation, test = (
            KERNELS[case.flow](x, parts.train, k) for x in (parts.validation, parts.test)
        )
    else:
        flow, steps = trained(case, config)
        chart = config["flows"][case.flow]["chart"]
        validation, test = (log_density(flow, chart, x) for x in (parts.validation, parts.test))
        row["optimizer_steps"] = steps
    new = earth.is_new(parts.test, parts.train)
    return {
        **row, "nll": f"{-test.mean():.4f}", "nll_new": f"{-test[new].mean():.4f}",
        "new": f"{new.double().mean():.3f}", "validation_nll": f"{-validation.mean():.4f}",
    }  # fmt: skip


def cases(config: dict) -> list[Case]:
    """All of one seed before the next."""
    return [
        Case(data, flow, seed)
        for seed in config["seeds"]
        for data, flows in (
            *((data, [*KERNELS, *config["flows"]]) for data in config["earth"]),
            (TORUS, config[TORUS]),
        )
        for flow in flows
    ]


def table(rows: list[dict]) -> str:
    """Mean and standard deviation over the seeds: NLL (that of new places), and the gap."""

    def told(data: str, flow: str, name: str) -> str:
        values = [float(r[name]) for r in rows if (r["data"], r["flow"]) == (data, flow)]
        if not values:
            return "–"
        spread = statistics.stdev(values) if len(values) > 1 else float("nan")
        digits = 3 if name == "gap" else 2
        return f"{statistics.fmean(values):.{digits}f} ± {spread:.{digits}f}"

    names = [data for data in dict.fromkeys(r["data"] for r in rows) if data != TORUS]
    flows = dict.fromkeys(r["flow"] for r in rows if r["data"] != TORUS)
    lines = [f"| NLL | {' | '.join(names)} |", f"|---|{'---:|' * len(names)}"]
    for flow, (name, words) in itertools.product(
        flows, (("nll", ""), ("nll_new", ", new places alone"))
    ):
        cells = " | ".join(told(data, flow, name) for data in names)
        lines.append(f"| {flow}{words} | {cells} |")
    lines += ["", "| gap on the torus | |", "|---|---:|"]
    for flow in dict.fromkeys(r["flow"] for r in rows if r["data"] == TORUS):
        lines.append(f"| {flow} | {told(TORUS, flow, 'gap')} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a little of everything, no file")
    smoke = parser.parse_args().smoke
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    config["revision"] = environment()["revision"]
    if smoke:
        config |= config["smoke"]
    rows = list(csv.DictReader(PATH.open())) if PATH.exists() and not smoke else []
    done = {(r["data"], r["flow"], int(r["seed"])) for r in rows}
    for case in cases(config):
        if case in done:
            continue
        rows.append({name: str(value) for name, value in run(case, config).items()})
        print(rows[-1], flush=True)
        if not smoke:
            with PATH.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    if not smoke:
        (HERE / "table.md").write_text(table(rows) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
