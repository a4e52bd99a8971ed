"""Discrete flows beside zuko, nflows, normflows and flowjax: gradient, log_prob, sampling.

Four layers of nets with two hidden layers of 64 (ReLU), 8 bins, 1,024 rows, weights drawn at
random; torch's flows as they are and, for D up to 8, with `log_prob` and the sampler compiled (an
autoregressive sampler unrolls D passes, whose compilation at 64 takes minutes), flowjax's jitted.
normflows' splines come with residual nets only: one block, that is one product of 64 × 64 more.
"""

import math
from collections.abc import Callable
from typing import Any

import normflows
import torch
import zuko
from measure import Options, cores, interleaved, running
from nflows import distributions, flows, transforms
from tables import markdown, number
from torch import Tensor, nn

import cnf

LAYERS, HIDDEN, BINS, BOUND, ROWS = 4, (64, 64), 8, 5.0, 1024
MODELS = ("realnvp", "nsf", "nsf-ar", "maf")
PEERS = ("zuko", "nflows", "normflows", "flowjax")
COLUMNS = ("gradient", "log_prob", "sample")
ABOUT = ("parameters", "differences")
COMPILED_TO = 8  # variables
# These select rows by a mask or write into a tensor in place, variable by variable: compilation
# leaves them in pieces, takes minutes and gained a third at the most.
IN_PIECES = {"nflows": ("nsf", "nsf-ar"), "normflows": ("nsf", "nsf-ar", "maf")}
# normflows' maf is turned around: it samples in one pass, as our `iaf`.
TURNED = {("maf", "sample", "normflows")}
AGREEMENT = 1e-4  # of log-densities, relative to |log p| where that is above 1
Parts = tuple[nn.Module, Callable[[Tensor], Tensor], Callable[[int], Any]]


def ours(name: str, dim: int) -> Parts:
    between = {"realnvp": None, "nsf": None, "nsf-ar": "reverse", "maf": "reverse"}[name]
    options: dict[str, Any] = {"bins": BINS, "bound": BOUND} if "nsf" in name else {}
    flow = cnf.models.build(
        name, dim=dim, hidden=HIDDEN, layers=LAYERS, activation="relu", between=between,
        preprocess=None, **options,
    )  # fmt: skip
    return flow, flow.log_prob, flow.sample


def of_zuko(name: str, dim: int) -> Parts:
    shared: dict[str, Any] = {"transforms": LAYERS, "hidden_features": HIDDEN}
    if name == "nsf":
        shapes = [(BINS,), (BINS,), (BINS - 1,)]
        spline = zuko.transforms.MonotonicRQSTransform
        flow = zuko.flows.RealNVP(dim, univariate=spline, shapes=shapes, **shared)
    elif name == "nsf-ar":
        flow = zuko.flows.NSF(dim, bins=BINS, **shared)
    else:
        flow = {"realnvp": zuko.flows.RealNVP, "maf": zuko.flows.MAF}[name](dim, **shared)
    return flow, lambda x: flow().log_prob(x), lambda n: flow().sample((n,))


class Net(nn.Sequential):
    """The same MLP, called as nflows calls its nets."""

    def __init__(self, inputs: int, outputs: int) -> None:
        first, second = HIDDEN
        super().__init__(
            nn.Linear(inputs, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(),
            nn.Linear(second, outputs),
        )  # fmt: skip

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return super().forward(x)


def of_nflows(name: str, dim: int) -> Parts:
    made = {"hidden_features": HIDDEN[0], "num_blocks": 1, "use_residual_blocks": False}
    spline = {"num_bins": BINS, "tails": "linear", "tail_bound": BOUND}
    layers = []
    for k in range(LAYERS):
        mask = (torch.arange(dim) % 2 == k % 2).float()
        if name == "realnvp":
            layers.append(transforms.AffineCouplingTransform(mask, Net))
        elif name == "nsf":
            layers.append(
                transforms.PiecewiseRationalQuadraticCouplingTransform(mask, Net, **spline)
            )
        elif name == "maf":
            layers.append(transforms.MaskedAffineAutoregressiveTransform(dim, **made))
        else:
            layers.append(
                transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                    dim, **made, **spline
                )
            )
        if name in ("maf", "nsf-ar"):
            layers.append(transforms.ReversePermutation(dim))
    flow = flows.Flow(transforms.CompositeTransform(layers), distributions.StandardNormal([dim]))
    return flow, flow.log_prob, flow.sample


def of_normflows(name: str, dim: int) -> Parts:
    layers: list[nn.Module] = []
    for k in range(LAYERS):
        spline = {"num_bins": BINS, "tail_bound": BOUND, "reverse_mask": bool(k % 2)}
        if name == "realnvp":
            net = normflows.nets.MLP([(dim + 1) // 2, *HIDDEN, 2 * (dim // 2)])
            layers.append(normflows.flows.AffineCouplingBlock(net))
        elif name == "nsf":
            layers.append(
                normflows.flows.CoupledRationalQuadraticSpline(dim, 1, HIDDEN[0], **spline)
            )
        elif name == "maf":
            layers.append(normflows.flows.MaskedAffineAutoregressive(dim, HIDDEN[0], num_blocks=1))
        else:
            del spline["reverse_mask"]
            layers.append(
                normflows.flows.AutoregressiveRationalQuadraticSpline(dim, 1, HIDDEN[0], **spline)
            )
        if name != "nsf":
            layers.append(normflows.flows.Permute(dim, mode="swap"))
    base = normflows.distributions.DiagGaussian(dim, trainable=False)
    flow = normflows.NormalizingFlow(base, layers)
    return flow, flow.log_prob, lambda n: flow.sample(n)[0]


BUILDERS = {"ours": ours, "zuko": of_zuko, "nflows": of_nflows, "normflows": of_normflows}


def built(build: Callable[[str, int], Parts], name: str, dim: int) -> Parts:
    """A flow with random weights; ours and some of the peers' start with zeros in a layer."""
    torch.manual_seed(0)
    parts = build(name, dim)
    with torch.no_grad():
        for weights in parts[0].parameters():
            weights.add_(0.1 * torch.randn_like(weights))
    return parts


def compiled(parts: Parts) -> Parts:
    flow, log_prob, sample = parts
    return flow, torch.compile(log_prob), torch.compile(sample)


def contestants(name: str, dim: int) -> dict[str, Parts]:
    """Each flow of torch as it is and, where that is to be had, compiled, with equal weights."""
    found = {}
    for who, build in BUILDERS.items():
        found[who] = built(build, name, dim)
        if dim <= COMPILED_TO and name not in IN_PIECES.get(who, ()):
            found[f"{who}, compiled"] = compiled(built(build, name, dim))
    return found


def in_flowjax(name: str, dim: int) -> Any:
    """flowjax's flow with nets and splines of the same sizes."""
    import flowjax_flows

    return flowjax_flows.built(name, dim, HIDDEN, LAYERS, BINS, BOUND)


def start_jax(options: Options) -> None:
    """JAX with as many threads as torch has. Questions without flowjax do not need it."""
    with cores(options.threads):
        import jax

        jax.devices()  # starts its threads


def run(options: Options) -> dict:
    start_jax(options)
    return {f"{name}, D = {dim}": _case(name, dim, options) for name, dim in cases(options)}


def cases(options: Options) -> list[tuple[str, int]]:
    names, dims = (("realnvp", "nsf-ar"), (2,)) if options.quick else (MODELS, (2, 8, 64))
    return [(name, dim) for name in names for dim in dims]


def _case(name: str, dim: int, options: Options) -> dict[str, dict]:
    """Column → who → summary, or why there is none."""
    import flowjax_flows

    torch.compiler.reset()  # else the limit of recompilations would end in eager code
    x = torch.randn(32 if options.quick else ROWS, dim, generator=torch.Generator().manual_seed(0))
    flows = contestants(name, dim)
    flow = in_flowjax(name, dim)
    calls = {who: _calls(parts, x) for who, parts in flows.items()}
    calls["flowjax, compiled"] = flowjax_flows.calls(flow, x)
    found = {
        column: measured({who: each[column] for who, each in calls.items()}, options)
        for column in COLUMNS
    }
    found["parameters"] = {who: parameters(parts[0]) for who, parts in flows.items()}
    found["parameters"]["flowjax"] = flowjax_flows.parameters(flow)
    found["differences"] = _differences(name, flows, x, found["log_prob"])
    return found


def measured(
    calls: dict[str, Callable[[], object]], options: Options, warmups: int = 2
) -> dict[str, dict]:
    """`summary` of each call that runs, on as many cores as threads; {"fails": why} of others."""
    works, fails = running(calls)
    with cores(options.threads):
        found = interleaved(works, options, warmups)
    return found | {who: {"fails": why} for who, why in fails.items()}


def parameters(flow: nn.Module) -> int:
    return sum(weights.numel() for weights in flow.parameters() if weights.requires_grad)


def _calls(parts: Parts, x: Tensor) -> dict[str, Callable[[], object]]:
    flow, log_prob, sample = parts

    def gradient() -> None:
        flow.zero_grad()
        (-log_prob(x).mean()).backward()

    return {
        "gradient": gradient,
        "log_prob": torch.no_grad()(lambda: log_prob(x)),
        "sample": torch.no_grad()(lambda: sample(len(x))),
    }


@torch.no_grad()
def _differences(
    name: str, flows: dict[str, Parts], x: Tensor, log_probs: dict[str, dict]
) -> dict[str, float]:
    """The largest difference in log-density, relative to |log p| where that is above 1.

    Of each compiled flow to itself, and of flowjax's with our weights to ours in float64.
    """
    import flowjax_flows

    found = {
        who: _difference(log_prob(x), flows[who.removesuffix(", compiled")][1](x))
        for who, (_, log_prob, _) in flows.items()
        if who.endswith(", compiled") and "fails" not in log_probs[who]
    }
    flow = built(ours, name, x.shape[1])[0].double()
    with flowjax_flows.jax.enable_x64(True):
        theirs = in_flowjax(name, x.shape[1])
        found["flowjax"] = flowjax_flows.disagreement(theirs, flow, name, x[:64].double())
    for who, difference in found.items():
        assert difference < AGREEMENT, (name, who, difference)
    return found


def _difference(log_p: Tensor, reference: Tensor) -> float:
    return ((log_p - reference) / reference.abs().clamp(min=1)).abs().max().item()


def table(found: dict) -> str:
    """Compiled (flowjax: jitted) and, in brackets, plain; a dash: not compiled."""
    parts = []
    cases = {case: dict(columns) for case, columns in found.items()}
    about = {case: [columns.pop(key, {}) for key in ABOUT] for case, columns in cases.items()}
    for column in next(iter(cases.values())):
        header = (f"{column}, ms: compiled (plain)", "ours", *PEERS, "fastest peer / ours")
        lines = []
        for case, columns in cases.items():
            times = columns[column]
            rivals = [who for who in PEERS if (case.split(",")[0], column, who) not in TURNED]
            fastest = min(best(times, who) for who in rivals)
            cells = [cell(times, who) for who in ("ours", *PEERS)]
            lines.append((case, *cells, f"{fastest / best(times, 'ours'):.2f}"))
        parts.append(markdown(header, lines))
    header = ("parameters", "ours", *PEERS, "flowjax's log_prob with our weights, float64")
    lines = [
        (case, *(sizes.get(who, "–") for who in ("ours", *PEERS)), f"{differs['flowjax']:.0e}")
        for case, (sizes, differs) in about.items()
        if differs
    ]
    return "\n\n".join([*parts, markdown(header, lines)] if lines else parts)


def best(times: dict[str, dict], who: str) -> float:
    """The least median of a contestant's, compiled or not; infinite where nothing ran."""
    found = (times.get(way, {}).get("median", math.inf) for way in (who, f"{who}, compiled"))
    return min(found)


def cell(times: dict[str, dict], who: str, unit: float = 1.0) -> str:
    """Compiled and, in brackets, plain, in units of so many ms."""
    compiled, plain = (_in_units(times.get(way), unit) for way in (f"{who}, compiled", who))
    return compiled if plain == "–" else f"{compiled} ({plain})"


def _in_units(summary: dict | None, unit: float) -> str:
    if summary is None:
        return "–"
    return number(summary["median"] / unit) if "median" in summary else "fails"
