"""RNODE and OT-Flow beside FFJORD: seconds of training to FFJORD's NLL, and cost of inference."""

import torch
from measure import Options, interleaved
from tables import markdown, number, spread

import cnf
from cnf.data.toys import toy
from cnf.dynamics import record
from cnf.flow import Flow

TOYS, MODELS = ("pinwheel", "8gaussians"), ("ffjord", "rnode", "otflow")
SECONDS, POINTS, VALIDATIONS = 120.0, 10_000, 20
PAPERS = "published: RNODE 2.8 × on images, OT-Flow 8 × in training and 24 × in inference"


def run(options: Options) -> dict:
    return {name: _case(name, options) for name in TOYS[: 1 if options.quick else None]}


def _case(name: str, options: Options) -> dict:
    flows, curves = {}, {}
    for model in MODELS:
        flows[model], curves[model] = _trained(model, name, options)
    target = curves["ffjord"][-1][1]
    x = toy(name).sample(100 if options.quick else POINTS, torch.Generator().manual_seed(1))
    x = x.to(options.device)
    costs = _inference(flows, x, options)
    rows = {
        model: {
            "seconds to target": _first(curves[model], target),
            "final nll": curves[model][-1][1], "curve": curves[model], **costs[model],
        }
        for model in MODELS
    }  # fmt: skip
    return {"rows": rows, "target nll": target, "entropy": toy(name).entropy}


def _trained(model: str, name: str, options: Options) -> tuple[Flow, list[tuple[float, float]]]:
    """The flow, and its held-out NLL against seconds of training."""
    torch.manual_seed(0)
    options = {} if model == "otflow" else {"preprocess": None}  # the papers' settings for toys
    flow = cnf.models.build(model, dim=2, **options)
    config = cnf.TrainConfig(
        seconds=1.0 if options.quick else SECONDS, validations=VALIDATIONS,
        validation_rows=200 if options.quick else POINTS, device=options.device, progress=False,
    )  # fmt: skip
    history = cnf.fit(flow, cnf.MaximumLikelihood(), toy(name), config)
    curve = [(r["seconds"], r["val_nll"]) for r in history.records if "val_nll" in r]
    return flow.to(options.device), curve


def _first(curve: list[tuple[float, float]], target: float) -> float | None:
    """When the NLL first was no worse than the target, between validations by a line."""
    before = None
    for seconds, nll in curve:
        if nll <= target:
            if before is None or nll == before[1]:
                return seconds
            part = (before[1] - target) / (before[1] - nll)
            return before[0] + part * (seconds - before[0])
        before = (seconds, nll)
    return None


@torch.no_grad()
def _inference(flows: dict[str, Flow], x: torch.Tensor, options: Options) -> dict[str, dict]:
    """Milliseconds and evaluations of the log-density of all of x at once."""
    calls = {name: (lambda flow=flow: flow.log_prob(x)) for name, flow in flows.items()}
    with torch.no_grad():
        spent = interleaved(calls, options)
    found = {}
    for name, flow in flows.items():
        with record() as stats:
            flow.log_prob(x)
        found[name] = {"ms": spent[name], "nfe": stats.forward}
    return found


def table(found: dict) -> str:
    lines = []
    for name, case in found.items():
        reference = case["rows"]["ffjord"]
        for model, row in case["rows"].items():
            seconds, base = row["seconds to target"], reference["seconds to target"]
            faster = None if seconds is None else base / seconds
            cheaper = reference["ms"]["median"] / row["ms"]["median"]
            lines.append(
                (
                    f"{name}, {model}",
                    number(row["final nll"], 4),
                    _or(seconds, "not reached"),
                    _or(faster, "–"),
                    spread(row["ms"]),
                    row["nfe"],
                    number(cheaper),
                )  # fmt: skip
            )
    header = (
        "", "NLL at the end", "s to FFJORD's", "× faster", f"ms for {POINTS:,} points",
        "evaluations", "× cheaper",
    )  # fmt: skip
    return markdown(header, lines) + (
        f"\n\nThe same {SECONDS:.0f} s of training each, presets as they are; {PAPERS}."
    )


def _or(value: float | None, otherwise: str) -> str:
    return otherwise if value is None else number(value)
