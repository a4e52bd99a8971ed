"""Four steps of RK4 as the model of 63 variables, beside the ODE at 1e-6: patches of BSDS300.

`python experiments/few_steps/large.py` trains flows by flow matching, then goes on from each in
two ways, by the ODE's likelihood ("ode") and by that of four steps ("steps"), as large.yaml says.
Each is scored on the same test rows under several solvers. Trainings that large.csv has are left
out; `python experiments/few_steps/large.py mlp-ode` runs one of them, after "mlp-matching".
Without a name it at last computes paired differences, for which log-densities are kept in runs,
and writes large.md.
"""

import csv
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import cnf
from cnf.dynamics import numerical
from cnf.fields import MLPField, Preconditioned
from cnf.metrics import Estimate, log_prob_chunked
from cnf.training.origin import environment
from cnf.transforms import Continuous

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "tabular"))  # first, as both folders have a run.py
from continuous import Part, entered, field_of, gaussianized, objective_of  # noqa: E402

PATH = HERE / "large.csv"
FLOWS = HERE.parents[1] / "runs" / "few_steps" / "large"
COLUMNS = [
    "flow", "training", "solver", "evaluations", "rows", "folded", "nats", "error", "claimed",
    "over_ode", "over_ode_error", "over_matching", "over_matching_error", "lost",
    "optimizer_steps", "core_seconds", "revision",
]  # fmt: skip
TRAININGS = ("matching", "ode", "steps")
SAMPLES = 200  # of which those that no step can be inverted for are counted
STEPS = cnf.Solver("rk4", steps=4, discrete=True, explicit="density")
ACCURATE = cnf.Solver(rtol=1e-6, atol=1e-6)


def data(config: dict[str, Any]) -> tuple[Part, Part]:
    """Training and test rows, white and with the lengths of normal draws."""
    points = cnf.data.bsds300(**config["rows"], seed=config["seed"])
    assert points.test is not None
    transform = gaussianized(points.x, ["whiten", "radial"])
    return entered(points.x, transform), entered(points.test.x, transform)


def trained(
    name: str, training: str, z: Tensor, settings: dict[str, Any], seed: int
) -> tuple[cnf.Flow, int, float]:
    """The flow, its optimizer's steps, and their seconds on one core, without compilation."""
    torch.manual_seed(seed)
    field = {
        "mlp": lambda: Preconditioned(MLPField(63, zero_last=True)),
        "divisive": lambda: field_of(preconditioned=True, zero_last=True),
    }[name]()
    flow = cnf.Flow(cnf.distributions.StandardNormal(63), Continuous(field))
    objective = {
        "matching": cnf.FlowMatching(),
        "ode": objective_of(flow.base, "likelihood", steps=4, penalty=0.01),
        "steps": cnf.MaximumLikelihood(solver=STEPS),
    }[training]
    if training != "matching":
        cnf.load(FLOWS / f"{name}-matching.safetensors", into=flow)
    clock: list[tuple[float, float]] = []
    config = cnf.TrainConfig(**settings, seed=seed, validations=0, progress=False, device="cpu")

    def tick(record: dict[str, float]) -> None:
        clock.append((record["step"], time.process_time()))
        print(name, training, {k: round(v, 4) for k, v in record.items()}, flush=True)

    history = cnf.fit(flow, objective, z, config, callbacks=[tick])
    if history.reason == "interrupted":
        raise SystemExit(f"{name}-{training}: interrupted after {history.steps} steps")
    (first, began), (last, ended) = clock[0], clock[-1]
    cnf.save(flow, FLOWS / f"{name}-{training}.safetensors")
    return flow, history.steps, history.steps * (ended - began) / (last - first)


def scores(
    flow: cnf.Flow, name: str, training: str, solver: cnf.Solver, test: Part
) -> dict[str, Any]:
    """Mean log-density, and the one that the trace claims.

    Rows without a density are counted and left out; "lost" are samples that are not finite.
    """
    x, under = test.z.double(), flow.with_solver(solver)
    with numerical.watched(), torch.no_grad():
        log_prob = claimed = log_prob_chunked(under, x) + test.ladj
        drawn = under.sample(SAMPLES, generator=torch.Generator().manual_seed(0))
    if solver.discrete:
        trace = flow.with_solver(cnf.Solver(solver.method, steps=solver.steps))
        claimed = log_prob_chunked(trace, x) + test.ladj
    torch.save(log_prob, kept(name, training, str(solver)))
    has, lost = log_prob.isfinite(), ~drawn.isfinite().all(1)
    mean = Estimate.of(log_prob[has])
    return {
        "flow": name, "training": training, "solver": str(solver),
        "evaluations": solver.evaluations, "rows": len(x), "folded": int((~has).sum()),
        "nats": f"{mean.value:.3f}", "error": f"{mean.error:.3f}",
        "claimed": f"{claimed[has].mean():.3f}", "lost": int(lost.sum()),
    }  # fmt: skip


def kept(name: str, training: str, solver: str) -> Path:
    """The file of the log-densities of the test rows."""
    return FLOWS / f"{name}-{training}, {solver}.pt"


def paired(row: dict[str, str]) -> dict[str, str]:
    """The row with its mean differences to ODEs at 1e-6, over rows that have both densities."""
    found = torch.load(kept(row["flow"], row["training"], row["solver"]))
    for other in ("ode", "matching"):
        difference = found - torch.load(kept(row["flow"], other, str(ACCURATE)))
        value, error = Estimate.of(difference[difference.isfinite()])
        row |= {f"over_{other}": f"{value:.4f}", f"over_{other}_error": f"{error:.4f}"}
    return row


def table(rows: list[dict[str, str]]) -> str:
    lines = [
        "| field | training | scored under | nats | claimed | over matching's ODE "
        "| over ode's ODE | folded | core s |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        differences = [
            f"{float(row[f'over_{other}']):+.3f} ± {float(row[f'over_{other}_error']):.3f}"
            for other in ("matching", "ode")
        ]
        share = int(row["folded"]) / int(row["rows"])
        cells = [
            row["flow"], row["training"], row["solver"], row["nats"], row["claimed"], *differences,
            f"{share:.1%}", row["core_seconds"],
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run(todo: list[tuple[str, str]], config: dict[str, Any]) -> None:
    revision = environment()["revision"]
    train, test = data(config)
    FLOWS.mkdir(parents=True, exist_ok=True)
    for name, training in todo:
        settings = config["flows"][name][training]
        flow, steps, seconds = trained(name, training, train.z, settings, config["seed"])
        about = {
            "optimizer_steps": steps, "core_seconds": f"{seconds:.0f}", "revision": revision,
        }  # fmt: skip
        flow = flow.double()
        found = [
            scores(flow, name, training, cnf.Solver(**each), test) | about
            for each in config["scored"]
        ]
        write(found, "a" if PATH.exists() else "w")


def write(rows: list[dict[str, Any]], mode: str) -> None:
    with PATH.open(mode, newline="") as file:  # one short write: processes do not mix
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if mode == "w":
            writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    torch.set_num_threads(1)
    config, names = yaml.safe_load((HERE / "large.yaml").read_text()), sys.argv[1:]
    rows = list(csv.DictReader(PATH.open())) if PATH.exists() else []
    done = {(row["flow"], row["training"]) for row in rows}
    todo = [
        (name, training)
        for name in config["flows"]
        for training in TRAININGS
        if (name, training) not in done and (not names or f"{name}-{training}" in names)
    ]
    if todo:
        run(todo, config)
    if not names:
        rows = [paired(row) for row in csv.DictReader(PATH.open())]
        write(rows, "w")
        (HERE / "large.md").write_text(table(rows))


if __name__ == "__main__":
    main()
