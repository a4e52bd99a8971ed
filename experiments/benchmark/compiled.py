"""The discrete flows under `torch.compile`, beside what they take without it.

As in discrete.py, for D up to 8 (an autoregressive sampler unrolls D passes, whose compilation at
64 takes minutes); `log_prob` and the sampler are what is compiled. A dash: it does not compile.
"""

import traceback
from collections.abc import Callable

import discrete
import torch
from discrete import BUILDERS, Parts
from measure import Options
from tables import markdown, number

COLUMNS = ("step", "log_prob", "sample")


def compiled(build: Callable[[str, int], Parts]) -> Callable[[str, int], Parts]:
    def parts(name: str, dim: int) -> Parts:
        flow, log_prob, sample = build(name, dim)
        return flow, torch.compile(log_prob), torch.compile(sample)

    return parts


def run(options: Options) -> dict:
    found: dict[str, dict] = {}
    for name, dim in discrete.cases(options):
        if dim > 8:
            continue
        case = found[f"{name}, D = {dim}"] = {}
        for who, build in BUILDERS.items():
            torch.compiler.reset()
            both = {"plain": build, "compiled": compiled(build)}
            try:
                case[who] = discrete.measured(both, name, dim, options)
            except Exception:
                traceback.print_exc()
                case[who] = discrete.measured({"plain": build}, name, dim, options)
    return found


def table(found: dict) -> str:
    """Of each contestant the compiled time and, in brackets, the time without."""
    parts = []
    for column in COLUMNS:
        lines = []
        for case, contestants in found.items():
            best = {
                who: min(s["median"] for s in columns[column].values())
                for who, columns in contestants.items()
            }
            cells = [_cell(columns[column]) for columns in contestants.values()]
            fastest = min(time for who, time in best.items() if who != "ours")
            lines.append((case, *cells, f"{fastest / best['ours']:.2f}"))
        header = (f"{column}, ms", *BUILDERS, "fastest peer / ours, each at its best")
        parts.append(markdown(header, lines))
    return "\n\n".join(parts)


def _cell(summaries: dict[str, dict[str, float]]) -> str:
    times = {way: number(summary["median"]) for way, summary in summaries.items()}
    return f"{times.get('compiled', '–')} ({times['plain']})"
