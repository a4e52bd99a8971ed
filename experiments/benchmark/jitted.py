"""Log-densities and their gradient beside diffrax's: JAX, all of it jitted, the exact trace.

One state of all rows, so that both sides control the same error and take the same steps; weights
and tolerances as in `likelihood`. diffrax's gradient is its default, backprop with checkpoints:
its others are as fast or slower.
"""

import copy
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

import torch
from contestants import FREQUENCIES, TIGHT, Ours, evaluations_of, linears_of, random_field
from measure import Options, cores, interleaved
from tables import markdown, spread, times
from torch import Tensor

import cnf
from cnf.fields import MLPField

BATCH, HIDDEN, TOLERANCE, AGREEMENT = 512, (128, 128), 1e-5, 1e-4
OURS = {"ours": {}, "ours, compiled": {"compile": True}, "ours, adjoint": {"gradient": "adjoint"}}
TRACES = ("forward mode", "reverse mode")


def run(options: Options) -> dict:
    if options.device != "cpu":
        raise ValueError("jitted: expected --device cpu; JAX's devices are not chosen here")
    with cores(options.threads):
        dims = (2, 3) if options.quick else (2, 8, 63)
        return {
            "versions": {name: metadata.version(name) for name in ("jax", "diffrax")},
            **{f"D = {dim}": _case(dim, options) for dim in dims},
        }


def _case(dim: int, options: Options) -> dict:
    torch.manual_seed(0)
    torch.compiler.reset()
    field = random_field(dim, (16, 16) if options.quick else HIDDEN)
    x = torch.randn(BATCH, dim)
    disagreement = _disagreement(field, x[:16])
    assert disagreement < AGREEMENT, disagreement
    log_probs, steps, counts = {}, {}, {}
    for name, settings in OURS.items():
        solver = cnf.Solver(rtol=TOLERANCE, atol=TOLERANCE, **{"gradient": "backprop", **settings})
        module = Ours(field, solver)
        steps[name] = partial(_gradient, module, x)
        if "adjoint" not in name:
            log_probs[name] = partial(_log_prob, module, x)
        counts[name] = evaluations_of(module, x)
    for trace in TRACES:
        log_prob, gradient, evaluations = _diffrax(field, x, trace, TOLERANCE)
        log_probs[f"diffrax, {trace}"], steps[f"diffrax, {trace}"] = log_prob, gradient
        counts[f"diffrax, {trace}"] = evaluations(), 0
    return {
        "log_prob": interleaved(log_probs, options), "gradient": interleaved(steps, options),
        "evaluations": counts, "largest difference, float64 at 1e-7": disagreement,
    }  # fmt: skip


@torch.no_grad()
def _log_prob(module: Ours, x: Tensor) -> Tensor:
    return module.log_prob(x)


def _gradient(module: Ours, x: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(module.log_prob(x).mean(), tuple(module.parameters()))


def _diffrax(
    field: MLPField, x: Tensor, trace: str, tolerance: float
) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], int]]:
    """log p of the points; the gradient of its mean; the evaluations that both take."""
    import diffrax
    import jax
    import jax.numpy as jnp

    weights = [jnp.asarray(linear.weight.detach().numpy()) for linear in linears_of(field)]
    biases = [jnp.asarray(linear.bias.detach().numpy()) for linear in linears_of(field)]
    time: Any = field.layers[0].modulation
    time = jnp.asarray(time.shift.weight.detach().numpy())
    points, angles = jnp.asarray(x.numpy()), jnp.pi * jnp.arange(1, FREQUENCIES + 1)

    def velocity(t: Any, row: Any, parameters: Any) -> Any:
        weights, biases, time = parameters
        features = jnp.concatenate([t[None], jnp.sin(angles * t), jnp.cos(angles * t)])
        h = jax.nn.silu(weights[0] @ row + biases[0] + time @ features.astype(row.dtype))
        for weight, bias in zip(weights[1:-1], biases[1:-1], strict=True):
            h = jax.nn.silu(weight @ h + bias)
        return weights[-1] @ h + biases[-1]

    def rates(t: Any, row: Any, parameters: Any) -> tuple[Any, Any]:
        at = partial(velocity, t, parameters=parameters)
        if trace == "reverse mode":  # as in diffrax's example
            v, pull = jax.vjp(at, row)
            (jacobian,) = jax.vmap(pull)(jnp.eye(len(row), dtype=row.dtype))
        else:
            v, push = jax.linearize(at, row)
            jacobian = jax.vmap(push)(jnp.eye(len(row), dtype=row.dtype))
        return v, jnp.trace(jacobian)

    def dynamics(t: Any, state: Any, parameters: Any) -> tuple[Any, Any]:
        return jax.vmap(lambda row: rates(t, row, parameters))(state[0])

    def solve(parameters: Any, points: Any) -> Any:
        return diffrax.diffeqsolve(
            diffrax.ODETerm(dynamics), diffrax.Dopri5(), 1.0, 0.0, None,  # pyright: ignore
            (points, jnp.zeros(len(points), points.dtype)), parameters,
            stepsize_controller=diffrax.PIDController(rtol=tolerance, atol=tolerance),
        )  # fmt: skip

    def log_prob(parameters: Any, points: Any) -> Any:
        z, ladj = solve(parameters, points).ys
        normal = -0.5 * (z[-1] ** 2 + jnp.log(2 * jnp.pi)).sum(-1)
        return normal + ladj[-1]

    parameters = (weights, biases, time)
    value = jax.jit(log_prob)
    slope = jax.jit(jax.grad(lambda parameters, points: log_prob(parameters, points).mean()))

    def evaluations() -> int:
        return 2 + 6 * int(solve(parameters, points).stats["num_steps"])

    return (
        lambda: jax.block_until_ready(value(parameters, points)),
        lambda: jax.block_until_ready(slope(parameters, points)),
        evaluations,
    )


def _disagreement(field: MLPField, x: Tensor) -> float:
    """The largest difference in log-density, in float64 at `TIGHT`."""
    import jax

    double = copy.deepcopy(field).double()
    ours = Ours(double, cnf.Solver(rtol=TIGHT, atol=TIGHT))
    exact, largest = _log_prob(ours, x.double()), 0.0
    with jax.enable_x64(True):
        for trace in TRACES:
            theirs = torch.tensor(_diffrax(double, x.double(), trace, TIGHT)[0]().tolist())
            largest = max(largest, (theirs - exact).abs().max().item())
    return largest


def table(found: dict) -> str:
    parts = []
    for title, case in found.items():
        if title == "versions":
            continue
        for kind in ("log_prob", "gradient"):
            ours = case[kind]["ours"]["median"]
            lines = [
                (name, spread(ms), times(ms["median"], ours), case["evaluations"][name][0])
                for name, ms in case[kind].items()
            ]
            header = (f"{title}, {kind}", "ms (quartiles)", "of ours", "evaluations")
            parts.append(markdown(header, lines))
    peers = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"Batch {BATCH}, dopri5 at {TOLERANCE:g}, {peers}.\n\n" + "\n\n".join(parts)
