"""How near the likelihood step comes to the machine's matrix products, and where the rest goes."""

from collections import defaultdict

import torch
from contestants import Ours, random_field, training_step
from measure import Options, interleaved
from tables import markdown, number, spread
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils.flop_counter import FlopCounterMode

import cnf
from cnf.fields import MLPField

BATCH = 512
SIZES = ((2, 128), (8, 128), (63, 128), (8, 512))  # D, width of both hidden layers
LARGE = 2048
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear")


def run(options: Options) -> dict:
    found = {}
    for dim, width in ((2, 16), (3, 16)) if options.quick else SIZES:
        found[f"D = {dim}, width {width}"] = _case(dim, width, options)
    return found


def _case(dim: int, width: int, options: Options) -> dict:
    torch.manual_seed(0)
    field = random_field(dim, (width, width)).to(options.device)
    module = Ours(field, cnf.Solver(gradient="backprop"))
    step = training_step(module, torch.randn(BATCH, dim, device=options.device))
    with FlopCounterMode(display=False) as counter:
        step()
    large = 128 if options.quick else LARGE
    shapes = {"same": (BATCH, width, width), "large": (large, large, large)}
    pairs = {
        name: (torch.randn(m, k, device=options.device), torch.randn(k, n, device=options.device))
        for name, (m, k, n) in shapes.items()
    }
    products = {name: (lambda pair=pair: _product(*pair)) for name, pair in pairs.items()}
    spent = interleaved({"step": step, **products}, options)
    flops = {"step": counter.get_total_flops()}
    for name, (m, k, n) in shapes.items():
        flops[name] = 2 * m * k * n * REPEATS
    rates = {name: flops[name] / spent[name]["median"] / 1e6 for name in flops}  # GFLOP/s
    return {
        "ms": spent["step"], "gigaflop": flops["step"] / 1e9, "gigaflop/s": rates,
        "of same": rates["step"] / rates["same"], "of large": rates["step"] / rates["large"],
        "breakdown": _breakdown(module, step, options, spent["step"]["median"]),
    }  # fmt: skip


REPEATS = 10  # products in a row: one alone is near the clock's resolution


@torch.no_grad()
def _product(a: torch.Tensor, b: torch.Tensor) -> None:
    for _ in range(REPEATS):
        a @ b


def _breakdown(module: Ours, step, options: Options, plain_ms: float) -> dict[str, float]:
    """Self time of one profiled step by kind, in ms, and what the profiler itself added."""
    field: MLPField = module.flow.field  # pyright: ignore
    original = field.with_divergence

    def named(*arguments):
        with record_function("field"):
            return original(*arguments)

    field.with_divergence = named  # pyright: ignore
    activities = [ProfilerActivity.CPU]
    if options.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    try:
        with profile(activities=activities) as profiler, record_function("step"):
            step()
            if options.device == "cuda":
                torch.cuda.synchronize()
    finally:
        del field.with_divergence
    events = list(profiler.events())
    kinds = _by_kind(events, options.device)
    whole = max(event.cpu_time_total for event in events if event.name == "step") / 1e3
    kinds["Python and waiting"] = max(0.0, whole - sum(kinds.values()))
    return {**kinds, "profiled": whole, "unprofiled": plain_ms}


def _by_kind(events: list[FunctionEvent], device: str) -> dict[str, float]:
    """Milliseconds in torch's operations; a backward one is of where its forward was called."""
    of_field = {
        event.sequence_nr for event in events
        if event.sequence_nr >= 0 and _under(event, "field") and not _is_backward(event)
    }  # fmt: skip
    found: dict[str, float] = defaultdict(float)
    for event in events:
        if event.name in ("step", "field") or str(event.device_type) != "DeviceType.CPU":
            continue
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        found[_kind(event, of_field)] += own / 1e3
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _kind(event: FunctionEvent, of_field: set[int]) -> str:
    if event.name in PRODUCTS:
        return "matrix products"
    if _under(event, "Optimizer."):
        return "optimizer"
    backward = _ancestor(event, "autograd::engine::evaluate_function")
    if backward is not None and "AccumulateGrad" in backward.name:
        return "gradients added up"
    inside = _under(event, "field") if backward is None else backward.sequence_nr in of_field
    return "field, elementwise" if inside else "solver's arithmetic"


def _ancestor(event: FunctionEvent, prefix: str) -> FunctionEvent | None:
    found: FunctionEvent | None = event
    while found is not None and not found.name.startswith(prefix):
        found = found.cpu_parent
    return found


def _under(event: FunctionEvent, prefix: str) -> bool:
    return _ancestor(event, prefix) is not None


def _is_backward(event: FunctionEvent) -> bool:
    return _under(event, "autograd::engine::evaluate_function")


def table(found: dict) -> str:
    limits = [
        (
            name, number(row["gigaflop"]), spread(row["ms"]), number(row["gigaflop/s"]["step"]),
            number(row["gigaflop/s"]["same"]), f"{100 * row['of same']:.0f} %",
            number(row["gigaflop/s"]["large"]), f"{100 * row['of large']:.0f} %",
        )
        for name, row in found.items()
    ]  # fmt: skip
    header = (
        "", "GFLOP a step", "ms (quartiles)", "GFLOP/s", f"a bare {BATCH} × width² product",
        "reached", f"a bare {LARGE}³ product", "reached",
    )  # fmt: skip
    first = next(iter(found.values()))["breakdown"]
    kinds = [name for name in first if name not in ("profiled", "unprofiled")]
    shares = []
    for name, row in found.items():
        parts = row["breakdown"]
        share = [f"{100 * parts.get(kind, 0) / parts['profiled']:.0f} %" for kind in kinds]
        shares.append(
            (name, *share, f"{number(parts['profiled'])} ({number(parts['unprofiled'])})")
        )
    return f"{markdown(header, limits)}\n\nWhere a profiled step's time goes:\n\n" + markdown(
        ("", *kinds, "ms profiled (not)"), shares
    )
