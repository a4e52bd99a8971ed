"""Whole steps of `fit` on a CPU, plain and compiled: with draws, clipping, Adam and average.

Flow matching beside a bare network's forward, backward and fused Adam (its inputs drawn
beforehand), and beside torchcfm's; likelihood of the default field; discrete flows, with nets as
in `discrete`, beside zuko's, nflows' and normflows', plain and with `log_prob` compiled: loss,
gradient and fused Adam alone; beside flowjax's, one jitted function of loss, gradient, clipping
and Adam, in brackets as its `fit_to_data` takes it; and RealNVP and MAF beside the matrix products
of their step and nothing else.
"""

import itertools
from collections.abc import Callable
from dataclasses import replace

import discrete
import matching
import torch
from measure import Options
from tables import markdown, number
from torch import Tensor, nn
from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

import cnf
from cnf.random import stream
from cnf.training.learner import launch_fabric
from cnf.training.learners import learner_for

Step = Callable[[], object]
SOLVERS = {"RK4 × 12": cnf.Solver("rk4", steps=12), "dopri5 at 1e-5": cnf.Solver()}
FLOWS = ("nsf", "nsf-ar", "realnvp", "maf")
HEADER = ("", "plain, ms", "compiled, ms", "of plain")


def run(options: Options) -> dict:
    discrete.start_jax(options)
    in_a_row = replace(options, turn=0.01 if options.quick else 0.25)
    found = {}
    for name, build in cases(options).items():
        torch.manual_seed(0)
        found[name] = discrete.measured(build(), in_a_row, warmups=5)
    return found


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
    flows = ("nsf-ar", "realnvp") if options.quick else FLOWS
    for name, dim in itertools.product(flows, dims):
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
    import flowjax_flows

    torch.compiler.reset()
    x = torch.randn(rows, dim)
    found = _ours(lambda: discrete.ours(name, dim)[0], cnf.MaximumLikelihood(), rows, dim)
    for who, parts in discrete.contestants(name, dim).items():
        if not who.startswith("ours"):
            found[who] = _likelihood_step(parts, x)
    found |= flowjax_flows.steps(discrete.in_flowjax(name, dim), x)
    if name in ("realnvp", "maf"):
        found["bare products"] = _products(discrete.ours(name, dim)[0], rows)
    return found


def _likelihood_step(parts: discrete.Parts, x: Tensor) -> Step:
    flow, log_prob, _ = parts
    return _step_of(flow, lambda: -log_prob(x).mean())


def _products(flow: nn.Module, rows: int) -> Step:
    """The matrix products of a step: of the nets, their weights' gradients and their inputs'.

    Columns are rows of the data, as in our nets. The data need no gradient.
    """
    factors = []
    for k, linear in enumerate(part for part in flow.modules() if isinstance(part, nn.Linear)):
        weights = linear.weight.detach()
        inputs, slopes = (torch.randn(size, rows) for size in weights.shape[::-1])
        factors += [(weights, inputs), (slopes, inputs.T)]
        factors += [(weights.T, slopes)] if k else []
    products = [left @ right for left, right in factors]

    def step() -> None:
        for (left, right), product in zip(factors, products, strict=True):
            torch.mm(left, right, out=product)

    return step


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
    flows = {case: times for case, times in found.items() if case.split(",")[0] in FLOWS}
    others = {case: times for case, times in found.items() if case not in flows}
    return f"{_table_of_others(others)}\n\n{_table_of_flows(flows)}"


def _table_of_others(found: dict) -> str:
    lines = []
    for case, times in found.items():
        beside = [
            f"{who} {summary['median'] / times['compiled']['median']:.2f}"
            for who, summary in times.items()
            if who not in ("plain", "compiled")
        ]
        lines.append((case, *_of_ours(times), "; ".join(beside) or "–"))
    return markdown((*HEADER, "others / compiled"), lines)


def _table_of_flows(found: dict) -> str:
    """The peers' times over our compiled step's: compiled and, in brackets, plain."""
    lines = []
    for case, times in found.items():
        unit = times["compiled"]["median"]
        fastest = min(discrete.best(times, who) for who in discrete.PEERS)
        bare = times.get("bare products", {}).get("median")
        lines.append((
            case, *_of_ours(times), *(discrete.cell(times, who, unit) for who in discrete.PEERS),
            f"{fastest / unit:.2f}", f"{unit / bare:.2f}" if bare else "–",
        ))  # fmt: skip
    peers = (f"{who} / compiled" for who in discrete.PEERS)
    return markdown((*HEADER, *peers, "fastest peer", "compiled / bare products"), lines)


def _of_ours(times: dict[str, dict]) -> tuple[str, str, str]:
    plain, compiled = (times[way]["median"] for way in ("plain", "compiled"))
    return number(plain), number(compiled), f"{compiled / plain:.2f}"
