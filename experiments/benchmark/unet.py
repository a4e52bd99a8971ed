"""A flow-matching step of the U-Net beside the bare network's, and its exact log-density."""

from collections.abc import Callable

import torch
from measure import Options, Peak, fresh, interleaved, timed
from tables import markdown, number, spread, times

import cnf
from cnf.fields import UNetField
from cnf.training.learner import Learner, launch_fabric

SHAPE, BATCH, PICTURES = (1, 28, 28), 16, 4
GOAL, LIMIT = 1.1, 2_000.0  # of the bare network's time; MB


def run(options: Options) -> dict:
    torch.manual_seed(0)
    shape = (1, 8, 8) if options.quick else SHAPE
    calls = {
        "a step of fit": _step_of_fit(shape, options.device),
        "bare network": _step_of_network(shape, options.device),
    }
    found: dict = {"step": interleaved(calls, options, warmups=2)}
    found["log_prob"] = fresh(options, _exact, shape, options.device)
    return found


def _step_of_fit(shape: tuple[int, ...], device: str) -> Callable[[], object]:
    """What `cnf.fit` does in a step: draws, loss, backward, clipping, Adam, average of weights."""
    flow, config = cnf.models.unet(shape).to(device), cnf.TrainConfig(device=device)
    learner = Learner(flow, cnf.FlowMatching(), config, launch_fabric(config, torch.float32))
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(BATCH, *shape, device=device)

    def step() -> object:
        rows, share = learner.prepare(cnf.Batch(x), generator)
        return learner.step(rows, 1e-4, share)

    return step


def _step_of_network(shape: tuple[int, ...], device: str) -> Callable[[], object]:
    """The least there is to do: its inputs and targets are drawn beforehand."""
    net = UNetField(shape).to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-4, fused=True)
    x, target = torch.randn(2, BATCH, *shape, device=device)
    t = torch.rand(BATCH, device=device)

    def step() -> None:
        loss = (net(t, x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def _exact(shape: tuple[int, ...], device: str) -> dict:
    """Seconds and memory of one evaluation, which is a step of Euler's method."""
    torch.manual_seed(0)
    flow = cnf.models.unet(shape, solver={"method": "euler", "steps": 1}).to(device).eval()
    torch.nn.init.normal_(flow.field.field.last.weight, std=0.05)
    x = torch.randn(PICTURES, *shape, device=device)
    flow.sample(1)
    peak = Peak(device)
    with torch.no_grad():
        ms = timed(lambda: flow.log_prob(x), device)
    return {"seconds": ms / 1e3, "peak MB": peak.growth()}


def table(found: dict) -> str:
    bare = found["step"]["bare network"]["median"]
    lines = [(name, spread(ms), times(ms["median"], bare)) for name, ms in found["step"].items()]
    text = markdown(("", "ms (quartiles)", "of the bare network"), lines)
    ratio = found["step"]["a step of fit"]["median"] / bare
    text += (
        f"\n\nBatch {BATCH} of {SHAPE}, the default network. Goal: at most {GOAL} times, "
        f"{'met' if ratio <= GOAL else 'MISSED'}.\n\n"
    )
    exact = found["log_prob"]
    if "failed" in exact:
        return text + f"Exact log_prob: {exact['failed']}."
    return text + (
        f"One evaluation of the exact log_prob of {PICTURES} pictures, without gradients: "
        f"{number(exact['seconds'])} s, {number(exact['peak MB'])} MB "
        f"(limit {number(LIMIT)}: {'kept' if exact['peak MB'] <= LIMIT else 'BROKEN'}). "
        "A log-density takes as many times longer as its solve has evaluations: 32 for "
        "Solver('rk4', steps=8)."
    )


if __name__ == "__main__":  # alone: without the other questions' peers
    torch.set_num_threads(1)
    print(table(run(Options(threads=1, repeats=9))))
