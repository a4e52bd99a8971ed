"""Whole steps of `fit` on a CPU, plain and compiled: with draws, clipping, Adam and average.

Flow matching beside a bare network's forward, backward and fused Adam (its inputs drawn
beforehand), and beside torchcfm's; likelihood of the default field; discrete flows, with nets as
in `discrete`, beside zuko's, plain and with `log_prob` compiled: loss, gradient and fused Adam
alone.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import discrete
import matching
import torch
from compiled import compiled
from measure import Options, interleaved
from tables import markdown, number
from torch import Tensor, nn
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

import cnf
from cnf.random import stream
from cnf.training.engine import learner_for
from cnf.training.learner import launch_fabric

Step = Callable[[], object]
SOLVERS = {"RK4 × 12": cnf.Solver("rk4", steps=12), "dopri5 at 1e-5": cnf.Solver()}
FLOWS = ("nsf", "nsf-ar", "realnvp", "maf")


def run(options: Options) -> dict:
    repeated = replace(options, repeats=4 * options.repeats)
    return {
        name: interleaved(build(), repeated, warmups=5) for name, build in cases(options).items()
    }


def cases(options: Options) -> dict[str, Callable[[], dict[str, Step]]]:
    """What is compared in each case, built where it is measured."""
    sizes, dims = ((32,), (2,)) if options.quick else ((256, 1024, 8192), (2, 8))
    rows = 32 if options.quick else 1024
    found = {f"flow matching, {size:,} rows": lambda size=size: _matching(size) for size in sizes}
    for name, solver in SOLVERS.items():
        objective = cnf.MaximumLikelihood(solver=solver)
        found[f"likelihood, {name}"] = lambda objective=objective: _ours(
            lambda: cnf.models.cnf(2), objective, min(256, rows)
        )
    for name, dim in itertools.product(FLOWS, dims):
        found[f"{name}, D = {dim}"] = lambda name=name, dim=dim: _discrete(name, dim, rows)
    return found


def _matching(rows: int) -> dict[str, Step]:
    def build() -> cnf.Flow:
        hidden = matching.HIDDEN
        return cnf.models.cnf(matching.DIM, hidden=hidden, frequencies=0, fourier=0)

    return {
        **_ours(build, cnf.FlowMatching(), rows),
        "bare network": matching.bare_step("cpu", rows),
        "torchcfm": _torchcfm(build(), rows),
    }


def _discrete(name: str, dim: int, rows: int) -> dict[str, Step]:
    torch.compiler.reset()
    x = torch.randn(rows, dim)
    found = _ours(lambda: discrete.ours(name, dim)[0], cnf.MaximumLikelihood(), rows, dim)
    for way, build in {
        "zuko": discrete.of_zuko,
        "zuko, compiled": compiled(discrete.of_zuko),
    }.items():
        flow, log_prob, _ = build(name, dim)
        found[way] = _step_of(flow, lambda log_prob=log_prob: -log_prob(x).mean())
    return found


def _ours(
    build: Callable[[], cnf.Flow], objective: cnf.objectives.Objective, rows: int, dim: int = 2
) -> dict[str, Step]:
    return {
        "plain": _fit_step(build(), objective, torch.randn(rows, dim), False),
        "compiled": _fit_step(build(), objective, torch.randn(rows, dim), True),
    }


def _fit_step(
    flow: cnf.Flow, objective: cnf.objectives.Objective, x: Tensor, compile: bool
) -> Step:
    """A step as `fit` takes it, on the same rows each time."""
    config = cnf.TrainConfig(steps=1, device="cpu", compile=compile, progress=False)
    learner = learner_for(flow.train(), objective, config, launch_fabric(config, torch.float32))
    learner.begin(objective.begin(flow, lambda n: cnf.Batch(x[:n]), torch.Generator()))
    numbers = itertools.count()

    def step() -> None:
        rows, share = learner.prepare(cnf.Batch(x), stream(0, "step", next(numbers)))
        learner.step(rows, 1e-4, share)

    if learner.compiles:
        learner.warm_up(learner.prepare(cnf.Batch(x), torch.Generator())[0])
    return step


def _torchcfm(flow: cnf.Flow, rows: int) -> Step:
    matcher, x1 = ConditionalFlowMatcher(sigma=0.0), torch.randn(rows, matching.DIM)

    def loss() -> Tensor:
        t, xt, ut = matcher.sample_location_and_conditional_flow(torch.randn_like(x1), x1)
        return (flow.field(t, xt) - ut).square().mean()

    return _step_of(flow, loss)


def _step_of(module: nn.Module, loss: Callable[[], Tensor]) -> Step:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def table(found: dict) -> str:
    lines = []
    for case, columns in found.items():
        ms = {who: summary["median"] for who, summary in columns.items()}
        others = {who: value for who, value in ms.items() if who not in ("plain", "compiled")}
        beside = "; ".join(f"{who} {value / ms['compiled']:.2f}" for who, value in others.items())
        ratio = f"{ms['compiled'] / ms['plain']:.2f}"
        lines.append((case, number(ms["plain"]), number(ms["compiled"]), ratio, beside or "–"))
    return markdown(("", "plain, ms", "compiled, ms", "of plain", "others / compiled"), lines)
