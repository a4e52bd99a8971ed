"""The exact log-density of 100,000 points without gradients: seconds and memory."""

import copy
from collections.abc import Callable
from itertools import cycle
from typing import Any

import torch
from contestants import Ours, Zuko, disagreement, evaluations_of, plain, random_field
from measure import Options, Peak, fresh, interleaved, timed
from tables import markdown, number, spread, times
from torch import Tensor, nn

import cnf
from cnf.fields import MLPField
from cnf.metrics.flows import log_prob_chunked

POINTS, CHUNK, HIDDEN, TOLERANCE = 100_000, 10_000, (128, 128), 1e-5
MEMORY_BOUND = 1_000  # MB
NAMES = ("ours", "ours, compiled", "zuko", "FFJORD's loop")


def run(options: Options) -> dict:
    dims = (2, 3) if options.quick else (2, 8, 63)
    return {f"D = {dim}": _case(dim, options) for dim in dims}


def _case(dim: int, options: Options) -> dict:
    torch.compiler.reset()
    field, chunks = _setting(dim, options)
    modules = {name: _made(name, field).to(options.device).eval() for name in NAMES}
    calls = {name: _walk(module, chunks) for name, module in modules.items()}
    with torch.no_grad():  # which warms them up too
        counts = {name: evaluations_of(made, chunks[0])[0] for name, made in modules.items()}
    spent = interleaved(calls, options, warmups=0)
    rows = {}
    for name in NAMES:
        scale = 1e-3 * POINTS / len(chunks[0])
        seconds = {key: scale * spent[name][key] for key in ("median", "low", "high")}
        timed_points = min(POINTS, spent[name]["runs"] * len(chunks[0]))
        rows[name] = {
            "seconds": {**seconds, "runs": spent[name]["runs"]}, "nfe": counts[name],
            "points timed": timed_points,
            **fresh(options, _memory, dim, name, timed_points, options),
        }  # fmt: skip
    return {"rows": rows, "largest difference, float64 at 1e-7": disagreement(
        field.cpu(), HIDDEN, chunks[0][:16].cpu()
    )}  # fmt: skip


def _setting(dim: int, options: Options) -> tuple[MLPField, tuple[Tensor, ...]]:
    """The field and the points, in chunks; the same in every process."""
    torch.manual_seed(0)
    field = random_field(dim, HIDDEN)
    points, chunk = (2_000, 200) if options.quick else (POINTS, CHUNK)
    x = torch.randn(points, dim, generator=torch.Generator().manual_seed(1))
    return field, x.to(options.device).split(chunk)


def _made(name: str, field: MLPField) -> nn.Module:
    field = copy.deepcopy(field)
    if name == "zuko":
        return Zuko(field, HIDDEN, TOLERANCE)
    if name == "FFJORD's loop":
        return plain(field, "odeint", TOLERANCE)
    solver = cnf.Solver(rtol=TOLERANCE, atol=TOLERANCE, compile="compiled" in name)
    return Ours(field, solver)


def _walk(module: Any, chunks: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """A call that scores the next chunk."""
    ahead = cycle(chunks)
    return lambda: log_prob_chunked(module, next(ahead), chunk=CHUNK)


def _memory(dim: int, name: str, points: int, options: Options) -> dict[str, float]:
    """Growth of memory while `points` points are scored, in a process of its own."""
    field, chunks = _setting(dim, options)
    module: Any = _made(name, field).to(options.device).eval()
    if "compiled" in name:  # else the compiler's memory would be counted
        log_prob_chunked(module, torch.cat([chunks[0], chunks[0]]), chunk=len(chunks[0]))
    else:
        log_prob_chunked(module, chunks[0][:100])
    x = torch.cat(chunks)[:points]
    peak = Peak(options.device)
    milliseconds = timed(lambda: log_prob_chunked(module, x, chunk=len(chunks[0])), options.device)
    return {"peak MB": peak.growth(), "seconds in its own process": 1e-3 * milliseconds}


def table(found: dict) -> str:
    lines = []
    for title, case in found.items():
        ours = case["rows"]["ours"]["seconds"]["median"]
        for name, row in case["rows"].items():
            note = "" if row["points timed"] == POINTS else f" ({row['points timed']:,} timed)"
            lines.append(
                (
                    f"{title}, {name}",
                    spread(row["seconds"]) + note,
                    times(row["seconds"]["median"], ours),
                    row["nfe"],
                    number(row.get("peak MB")),
                )  # fmt: skip
            )
    largest = max(case["rows"]["ours"].get("peak MB", 0.0) for case in found.values())
    header = ("", f"s for {POINTS:,} points (quartiles)", "of ours", "evaluations", "peak MB")
    return markdown(header, lines) + (
        f"\n\nOurs takes at most {number(largest)} MB (bound {MEMORY_BOUND:,}): "
        f"{'kept' if largest <= MEMORY_BOUND else 'BROKEN'}."
    )
