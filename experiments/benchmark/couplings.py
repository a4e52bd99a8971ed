"""Flow matching beside torchcfm: training steps by coupling, the pairing alone, and sampling.

torchcfm asks for torchdyn, which drags torchvision and Lightning in and which these calls do not
need: `pip install --no-deps torchcfm`.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from measure import Options, interleaved
from tables import markdown, number, times
from torch import Tensor, nn
from torchcfm.conditional_flow_matching import (
    ConditionalFlowMatcher,
    ExactOptimalTransportConditionalFlowMatcher,
)
from torchdiffeq import odeint

import cnf
from cnf.fields import MLPField
from cnf.matching import COUPLINGS, Linear
from cnf.transforms import Continuous

HIDDEN, SIGMA, ROWS, SAMPLES = (64, 64, 64), 0.1, 10_000, 10_000
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
Calls = dict[str, Callable[[], object]]


def run(options: Options) -> dict:
    torch.manual_seed(0)
    sizes = (64,) if options.quick else (256, 1024, 4096)
    toy = cnf.data.toy("8gaussians-r5")
    rows = toy.sample(500 if options.quick else ROWS, torch.Generator().manual_seed(0))
    start = time.perf_counter()
    begun = cnf.FlowMatching(coupling="semidiscrete", path=Linear(noise=SIGMA)).begin(
        _flow(), lambda n: cnf.Batch(rows[:n]), torch.Generator().manual_seed(0)
    )
    found = {"fit_seconds": time.perf_counter() - start, "rows": len(rows), "steps": {}}
    for size in sizes:
        few = replace(options, repeats=20 * options.repeats)
        calls = _steps(rows[:size], begun)
        solving = {name: call for name, call in calls.items() if name.startswith("minibatch-ot")}
        quick = {name: call for name, call in calls.items() if name not in solving}
        # Apart: a step after seconds of another's transport starts with the caches cold.
        found["steps"][size] = {**interleaved(quick, few), **interleaved(solving, few)}
    found["sampling"] = interleaved(_samplers(), replace(options, repeats=3 * options.repeats))
    return found


def _flow() -> cnf.Flow:
    field = MLPField(2, HIDDEN, activation="selu", frequencies=0, fourier=0)
    return cnf.Flow(None, Continuous(field), event_shape=(2,))


def _net() -> nn.Sequential:
    """torchcfm's tutorial net: x and t in one tensor."""
    sizes = [3, *HIDDEN, 2]
    layers = [
        layer
        for i, o in zip(sizes[:-1], sizes[1:], strict=True)
        for layer in (nn.Linear(i, o), nn.SELU())
    ]
    return nn.Sequential(*layers[:-1])


def _steps(x1: Tensor, begun: cnf.FlowMatching) -> Calls:
    path, generator = Linear(noise=SIGMA), torch.Generator().manual_seed(0)
    calls: Calls = {}
    objectives = {
        "independent": cnf.FlowMatching(path=path),
        "semidiscrete": begun,
        "minibatch-ot": cnf.FlowMatching(path=path, coupling="minibatch-ot"),
    }
    for name, objective in objectives.items():
        flow = _flow()

        def ours(flow: cnf.Flow = flow, objective: cnf.FlowMatching = objective) -> Tensor:
            return objective(flow, cnf.Batch(x1), generator).value

        calls[f"{name}: ours"] = _step(flow, ours)
    matchers = {
        "independent": ConditionalFlowMatcher(sigma=SIGMA),
        "minibatch-ot": ExactOptimalTransportConditionalFlowMatcher(sigma=SIGMA),
    }
    for name, matcher in matchers.items():
        net = _net()

        def theirs(net: nn.Module = net, matcher: ConditionalFlowMatcher = matcher) -> Tensor:
            t, xt, ut = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
            return (net(torch.cat([xt, t[:, None]], -1)) - ut).square().mean()

        calls[f"{name}: torchcfm"] = _step(net, theirs)
        if name == "independent":
            calls[f"{name}: torchcfm, Adam as its tutorials have it"] = _step(net, theirs, None)
    x0, pair, sampler = torch.randn_like(x1), COUPLINGS.build("minibatch-ot"), matcher.ot_sampler
    calls["minibatch-ot, pairing alone: ours"] = lambda: pair(x0, x1)
    calls["minibatch-ot, pairing alone: torchcfm"] = lambda: sampler.sample_plan(x0, x1)
    return calls


def _step(
    module: nn.Module, loss: Callable[[], Tensor], fused: bool | None = True
) -> Callable[[], None]:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4, fused=fused)

    def step() -> None:
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def _samplers() -> Calls:
    flow, net = _flow(), _net()
    mine = [p for p in flow.field.parameters()]
    with torch.no_grad():  # the same field: the weights have the same shapes but for x and t
        for parameter in (*mine, *net.parameters()):
            parameter.mul_(0.5)
    few = flow.with_solver(cnf.Solver("euler", steps=8))
    own = flow.with_solver(cnf.Solver("dopri5", **TOLERANCE))

    def v(t: Tensor, x: Tensor) -> Tensor:
        return net(torch.cat([x, t.expand(len(x), 1)], -1))

    @torch.no_grad()
    def euler() -> Tensor:
        x = torch.randn(SAMPLES, 2)
        for k in range(8):
            x = x + v(torch.tensor(k / 8), x) / 8
        return x

    @torch.no_grad()
    def dopri5() -> Tensor:
        return odeint(v, torch.randn(SAMPLES, 2), torch.tensor([0.0, 1.0]), **TOLERANCE)[-1]

    return {
        "8 Euler steps: ours": lambda: few.sample(SAMPLES),
        "8 Euler steps: bare loop": euler,
        "dopri5 at 1e-5: ours": lambda: own.sample(SAMPLES),
        "dopri5 at 1e-5: torchdiffeq": dopri5,
    }


def table(found: dict) -> str:
    parts = []
    sizes = list(found["steps"])
    lines = []
    for name in found["steps"][sizes[0]]:
        medians = [found["steps"][size][name]["median"] for size in sizes]
        against = [found["steps"][size]["independent: ours"]["median"] for size in sizes]
        cells = [
            f"{number(ms)} ({times(ms, reference)})"
            for ms, reference in zip(medians, against, strict=True)
        ]
        lines.append((name, *cells))
    parts.append(markdown(("ms (of our independent step)", *(f"{n} rows" for n in sizes)), lines))
    parts.append(
        f"The semi-discrete coupling's fit to {found['rows']:,} rows, once: "
        f"{number(found['fit_seconds'])} s."
    )
    lines = [(name, number(ms["median"])) for name, ms in found["sampling"].items()]
    parts.append(markdown((f"{SAMPLES:,} samples", "ms"), lines))
    return "\n\n".join(parts)
