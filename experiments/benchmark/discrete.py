"""Discrete flows beside zuko, nflows and normflows: a training step, log_prob, sampling.

Four layers of nets with two hidden layers of 64 (ReLU), 8 bins, 1,024 rows. normflows' splines
come with residual nets only: one block, that is one product of 64 × 64 more.
"""

from collections.abc import Callable
from typing import Any

import normflows
import torch
import zuko
from measure import Options, interleaved
from nflows import distributions, flows, transforms
from tables import markdown, number
from torch import Tensor, nn

import cnf

LAYERS, HIDDEN, BINS, BOUND, ROWS = 4, (64, 64), 8, 5.0, 1024
MODELS = ("realnvp", "nsf", "nsf-ar", "maf")
PEERS = ("zuko", "nflows", "normflows")
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


def run(options: Options) -> dict:
    return {
        f"{name}, D = {dim}": measured(BUILDERS, name, dim, options)
        for name, dim in cases(options)
    }


def cases(options: Options) -> list[tuple[str, int]]:
    names, dims = (("realnvp", "nsf-ar"), (2,)) if options.quick else (MODELS, (2, 8, 64))
    return [(name, dim) for name in names for dim in dims]


def measured(
    builders: dict[str, Callable[[str, int], Parts]], name: str, dim: int, options: Options
) -> dict[str, dict]:
    """Column → who → summary."""
    rows = 32 if options.quick else ROWS
    x = torch.randn(rows, dim, generator=torch.Generator().manual_seed(0))
    calls: dict[str, dict[str, Callable[[], object]]] = {"step": {}, "log_prob": {}, "sample": {}}
    for who, build in builders.items():
        torch.manual_seed(0)
        flow, log_prob, sample = build(name, dim)
        calls["step"][who] = _step(flow, log_prob, x)
        calls["log_prob"][who] = torch.no_grad()(lambda f=log_prob: f(x))
        calls["sample"][who] = torch.no_grad()(lambda f=sample: f(rows))
    return {column: interleaved(contestants, options) for column, contestants in calls.items()}


def _step(flow: nn.Module, log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    def step() -> None:
        flow.zero_grad()
        (-log_prob(x).mean()).backward()

    return step


def table(found: dict) -> str:
    parts = []
    for column in ("step", "log_prob", "sample"):
        header = (f"{column}, ms", "ours", *PEERS, "fastest peer / ours")
        lines = []
        for case, columns in found.items():
            times = {who: summary["median"] for who, summary in columns[column].items()}
            fastest = min(times[peer] for peer in PEERS)
            lines.append(
                (
                    case,
                    number(times["ours"]),
                    *(number(times[peer]) for peer in PEERS),
                    f"{fastest / times['ours']:.2f}",
                )  # fmt: skip
            )
        parts.append(markdown(header, lines))
    return "\n\n".join(parts)
