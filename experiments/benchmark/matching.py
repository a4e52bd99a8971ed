"""A step of flow matching beside a bare network's forward, backward and Adam step."""

from collections.abc import Callable
from dataclasses import replace

import torch
from measure import Options, interleaved
from tables import markdown, spread, times
from torch import Tensor, nn

import cnf

DIM, HIDDEN, BATCH = 2, (64, 64, 64), 1024


def run(options: Options) -> dict:
    torch.manual_seed(0)
    repeats = options.repeats if options.quick else 20 * options.repeats
    calls = {"cnf": _matching_step(options.device), "bare network": bare_step(options.device)}
    return interleaved(calls, replace(options, repeats=repeats), warmups=10)


def _matching_step(device: str) -> Callable[[], None]:
    flow = cnf.models.build("cnf", dim=DIM, hidden=HIDDEN, frequencies=0, fourier=0).to(device)
    generator, objective = torch.Generator(device), cnf.FlowMatching()
    return _step_of(flow, lambda x: objective(flow, cnf.Batch(x), generator).value, device)


def bare_step(device: str, rows: int = BATCH) -> Callable[[], None]:
    """The least there is to do: its inputs and targets are drawn beforehand."""
    sizes = [DIM + 1, *HIDDEN, DIM]
    layers = []
    for i, o in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(i, o), nn.SiLU()]
    net = nn.Sequential(*layers[:-1]).to(device)
    target = torch.randn(rows, DIM, device=device)
    inputs = torch.randn(rows, DIM + 1, device=device)
    return _step_of(net, lambda x: (net(inputs) - target).square().mean(), device)


def _step_of(
    module: nn.Module, loss: Callable[[Tensor], Tensor], device: str
) -> Callable[[], None]:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4, fused=True)
    x = torch.randn(BATCH, DIM, device=device)

    def step() -> None:
        value = loss(x)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    return step


def table(found: dict) -> str:
    bare = found["bare network"]["median"]
    lines = [(name, spread(ms), times(ms["median"], bare)) for name, ms in found.items()]
    return markdown(("", "ms (quartiles)", "of the bare network"), lines) + (
        f"\n\nThree hidden layers of {HIDDEN[0]}, batch {BATCH:,}."
    )
