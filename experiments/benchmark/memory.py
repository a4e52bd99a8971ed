"""Peak memory and time of a training step by gradient mode: when to use which."""

import torch
from contestants import Ours, evaluations_of, random_field, training_step
from measure import Options, Peak, fresh, summary, timed
from tables import markdown, number, spread

import cnf

DIM, HIDDEN, BATCH = 8, (128, 128), 1024
MODES = ("backprop", "checkpoint", "adjoint")
BOUND = 1.2  # the adjoint's peak at the tightest tolerance over that at the loosest
SOLVERS = {
    **{f"dopri5, {tol:g}": {"rtol": tol, "atol": tol} for tol in (1e-3, 1e-5, 1e-8)},
    **{f"rk4, {steps} steps": {"method": "rk4", "steps": steps} for steps in (8, 32, 128)},
}


def run(options: Options) -> dict:
    found = {}
    for title, settings in SOLVERS.items():
        for mode in MODES:
            solver = {**settings, "gradient": mode}
            found[f"{title}, {mode}"] = fresh(options, _measure, solver, options)
    return found


def _measure(settings: dict, options: Options) -> dict:
    torch.manual_seed(0)
    hidden, batch = ((16, 16), 64) if options.quick else (HIDDEN, BATCH)
    module = Ours(random_field(DIM, hidden), cnf.Solver(**settings)).double().to(options.device)
    x = torch.randn(batch, DIM, dtype=torch.float64, device=options.device)
    training_step(module, x[:8])()
    step = training_step(module, x)
    peak = Peak(options.device)
    first = timed(step, options.device)
    growth = peak.growth()
    repeats = min(options.repeats, 1 + int(1e3 * options.limit / 4 / first))
    spent = [timed(step, options.device) for _ in range(repeats)]
    return {"peak MB": growth, "ms": summary(spent), "nfe": evaluations_of(module, x)}


def growth_of_adjoint(found: dict) -> float:
    """The adjoint's peak at the tightest tolerance over that at the loosest."""
    return found["dopri5, 1e-08, adjoint"]["peak MB"] / found["dopri5, 0.001, adjoint"]["peak MB"]


def table(found: dict) -> str:
    lines = [
        (name, row["failed"], "", "")
        if "failed" in row
        else (name, number(row["peak MB"]), spread(row["ms"]), "{} + {}".format(*row["nfe"]))
        for name, row in found.items()
    ]
    ratio = growth_of_adjoint(found)
    return markdown(("", "peak MB", "ms (quartiles)", "evaluations"), lines) + (
        f"\n\nD = {DIM}, two layers of {HIDDEN[0]}, batch {BATCH:,}, float64. The adjoint's peak "
        f"at 1e-8 is {ratio:.2f} × that at 1e-3 (claim: at most {BOUND}): "
        f"{'kept' if ratio <= BOUND else 'BROKEN'}."
    )
