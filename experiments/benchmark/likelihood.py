"""A step of likelihood training with the exact trace: how long, with how many evaluations."""

import copy
from functools import partial

import torch
from contestants import (
    Ours,
    Plain,
    Zuko,
    captured_step,
    disagreement,
    evaluations_of,
    graph_gigabytes,
    plain,
    random_field,
    training_step,
)
from measure import Options, free_gigabytes, interleaved
from tables import markdown, number, spread, times
from torch import Tensor, nn

import cnf
from cnf.fields import MLPField

BATCH, TOLERANCE, STEPS = 512, 1e-5, 8
AGREEMENT = 1e-4  # nats
CASES = {
    "two layers of 128, SiLU": ((128, 128), "input"),
    "three layers of 128, SiLU": ((128, 128, 128), "input"),
    "two concatsquash layers of 128, tanh": ((128, 128), "concatsquash"),
    "three concatsquash layers of 128, tanh": ((128, 128, 128), "concatsquash"),
}
OURS = {
    "ours, backprop": {"gradient": "backprop"},
    "ours, adjoint": {"gradient": "adjoint"},
    "ours, compiled": {"gradient": "backprop", "compile": True},
}


def run(options: Options) -> dict:
    cases = {title: CASES[title] for title in list(CASES)[:: 3 if options.quick else 1]}
    found = {}
    for title, (hidden, layer) in cases.items():
        hidden = (16,) * len(hidden) if options.quick else hidden
        for dim in (2, 3) if options.quick else (2, 8, 63):
            found[f"{title}, D = {dim}"] = _case(dim, hidden, layer, options)
    return found


def _case(dim: int, hidden: tuple[int, ...], layer: str, options: Options) -> dict:
    torch.manual_seed(0)
    torch.compiler.reset()  # else the limit of recompilations would end in eager code
    field = random_field(dim, hidden, layer)
    x = torch.randn(BATCH, dim)
    differences = disagreement(field, hidden, x[:16])
    assert max(differences.values()) < AGREEMENT, differences
    modules = {name: made.to(options.device) for name, made in _modules(field, hidden).items()}
    x = x.to(options.device)
    too_large = _too_large(modules, x, options.device)
    modules = {name: module for name, module in modules.items() if name not in too_large}
    steps = {name: training_step(module, x) for name, module in modules.items()}
    fixed = modules[f"ours, rk4 {STEPS} steps"]
    if options.device == "cuda":
        steps[f"ours, rk4 {STEPS} steps, CUDA graph"] = captured_step(copy.deepcopy(fixed), x)
    spent = interleaved(steps, options)
    rows = {name: {"ms": ms} for name, ms in spent.items()}
    for name, module in modules.items():
        rows[name]["nfe"] = evaluations_of(module, x)
    return {
        "rows": rows, "left out, GB": too_large,
        "largest difference, float64 at 1e-7": differences,
    }  # fmt: skip


def _too_large(modules: dict[str, nn.Module], x: Tensor, device: str) -> dict[str, float]:
    """Peers whose graph, by its predicted size in GB, would take most of the memory."""
    with torch.no_grad():
        adaptive, _ = evaluations_of(modules["ours, backprop"], x)
    predicted = {}
    for name, module in modules.items():
        if isinstance(module, Plain) and "adjoint" not in name:
            evaluations = 4 * STEPS if "rk4" in name else adaptive + 6  # one step too far
            predicted[name] = graph_gigabytes(module, x, evaluations)
    return {name: size for name, size in predicted.items() if size > 0.7 * free_gigabytes(device)}


def _modules(field: MLPField, hidden: tuple[int, ...]) -> dict[str, nn.Module]:
    """Each contestant by name, with its own copy of the weights."""
    solver = partial(cnf.Solver, rtol=TOLERANCE, atol=TOLERANCE)

    def own() -> MLPField:
        return copy.deepcopy(field)

    found: dict[str, nn.Module] = {
        name: Ours(own(), solver(**settings)) for name, settings in OURS.items()
    }
    found["ours, one Hutchinson probe"] = Ours(
        own(), solver(gradient="backprop"), divergence="hutchinson"
    )
    if not field.layers[0].modulation.scale:
        found["zuko"] = Zuko(field, hidden, TOLERANCE)
    found["FFJORD's loop, adjoint"] = plain(own(), "odeint_adjoint", TOLERANCE)
    found["FFJORD's loop, backprop"] = plain(own(), "odeint", TOLERANCE)
    found[f"ours, rk4 {STEPS} steps"] = Ours(
        own(), cnf.Solver("rk4", steps=STEPS, gradient="backprop")
    )
    found[f"FFJORD's loop, rk4 {STEPS} steps"] = plain(own(), "odeint", steps=STEPS)
    return found


def table(found: dict) -> str:
    parts = []
    for title, case in found.items():
        rows = case["rows"]
        ours = rows["ours, backprop"]["ms"]["median"]
        lines = [
            (name, spread(row["ms"]), times(row["ms"]["median"], ours), _nfe(row.get("nfe")))
            for name, row in rows.items()
        ]
        lines += [
            (name, f"left out: {number(size)} GB", "–", "–")
            for name, size in case["left out, GB"].items()
        ]
        worst = max(case["largest difference, float64 at 1e-7"].values())
        parts.append(
            f"**{title}**: batch {BATCH}, dopri5 at {TOLERANCE:g}; log-densities agree to "
            f"{worst:.1e} nats (float64, 1e-7).\n\n"
            + markdown(("", "ms (quartiles)", "of ours", "evaluations"), lines)
        )
    return "\n\n".join(parts)


def _nfe(counts: tuple[int, int] | None) -> str:
    if counts is None:
        return "–"
    forward, backward = counts
    return f"{forward} + {backward}" if backward else str(forward)
