"""flowjax's flows, all of it jitted: the functions of our discrete flows, in JAX.

They are made by flowjax's own constructors, whose layers are one loop to XLA: unrolled they were
no faster. Affine maps are ours; the splines are flowjax's, which has weights for their slopes at
both ends too: 25 numbers for each variable where ours are 23.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
import torch
from flowjax.bijections import Affine, Invert, Permute, RationalQuadraticSpline
from flowjax.distributions import StandardNormal, Transformed
from flowjax.flows import coupling_flow, masked_autoregressive_flow
from flowjax.train.losses import MaximumLikelihoodLoss
from flowjax.train.train_utils import step as own_step
from torch import Tensor

import cnf
from cnf.transforms import Autoregressive, Coupling

Call = Callable[[], object]
LEAST = 1e-3  # of a bin's width and height, as a fraction of the interval, and of a slope
STEEPEST = 3.0  # largest log-scale of an affine map


def built(name: str, dim: int, hidden: tuple[int, ...], layers: int, bins: int, bound: float):
    """A flow whose log-density takes one pass of each net, as ours."""
    make = coupling_flow if name in ("realnvp", "nsf") else masked_autoregressive_flow
    affine = Invert(
        equinox.tree_at(
            lambda affine: affine.scale, Affine(), paramax.Parameterize(_scale, jnp.zeros(()))
        )
    )
    spline = RationalQuadraticSpline(
        knots=bins - 1, interval=bound, min_width=2 * bound * LEAST, min_derivative=LEAST
    )
    return make(
        jax.random.key(0), base_dist=StandardNormal((dim,)), flow_layers=layers,
        transformer=spline if "nsf" in name else affine,
        nn_width=hidden[0], nn_depth=len(hidden),
    )  # fmt: skip


def _scale(raw: Any) -> Any:
    return jnp.exp(STEEPEST * jnp.tanh(raw / STEEPEST))


def parameters(flow: Transformed) -> int:
    """The number of its weights, masked ones included."""
    return sum(weights.size for weights in jax.tree.leaves(_split(flow)[0]))


def calls(flow: Transformed, x: Tensor) -> dict[str, Call]:
    """The gradient of the loss, the log-densities, and as many samples."""
    weights, rest = _split(flow)
    points, key = jnp.asarray(x.numpy()), jax.random.key(1)
    gradient = jax.jit(jax.grad(partial(_loss, rest=rest)))
    log_prob = jax.jit(lambda weights, x: equinox.combine(weights, rest).log_prob(x))
    sample = jax.jit(lambda weights, key: equinox.combine(weights, rest).sample(key, (len(x),)))
    return {
        "gradient": lambda: jax.block_until_ready(gradient(weights, x=points)),
        "log_prob": lambda: jax.block_until_ready(log_prob(weights, points)),
        "sample": lambda: jax.block_until_ready(sample(weights, key)),
    }


def steps(flow: Transformed, x: Tensor) -> dict[str, Call]:
    """Training steps with clipping and Adam, both jitted: as `fit_to_data` takes them, and faster.

    flowjax's own step looks through the tree of weights at each call, in Python, and allocates new
    weights; the other is one jitted function that overwrites weights and moments.
    """
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-4))
    weights, rest = _split(flow)
    points, key, loss = jnp.asarray(x.numpy()), jax.random.key(1), MaximumLikelihoodLoss()

    def own(weights: Any, moments: Any) -> tuple[Any, Any, Any]:
        return own_step(
            weights, rest, points, optimizer=optimizer, opt_state=moments, loss_fn=loss, key=key
        )

    @partial(jax.jit, donate_argnums=(0, 1))
    def jitted(weights: Any, moments: Any, x: Any) -> tuple[Any, Any, Any]:
        value, gradient = jax.value_and_grad(partial(_loss, rest=rest))(weights, x=x)
        updates, moments = optimizer.update(gradient, moments, weights)
        return optax.apply_updates(weights, updates), moments, value

    return {
        "flowjax": _repeated(own, weights, optimizer.init(weights)),
        "flowjax, compiled": _repeated(
            lambda *state: jitted(*state, points),
            jax.tree.map(jnp.copy, weights), optimizer.init(weights),
        ),
    }  # fmt: skip


def _repeated(
    step: Callable[[Any, Any], tuple[Any, Any, Any]], weights: Any, moments: Any
) -> Call:
    state = [weights, moments]

    def call() -> None:
        *state[:], value = step(*state)
        jax.block_until_ready(value)

    return call


def _loss(weights: Any, rest: Any, x: Any) -> Any:
    return -equinox.combine(weights, rest).log_prob(x).mean()


def _split(flow: Transformed) -> tuple[Any, Any]:
    """Its weights, and what is not trained."""
    return equinox.partition(
        flow, equinox.is_inexact_array, is_leaf=lambda leaf: isinstance(leaf, paramax.NonTrainable)
    )


def disagreement(flow: Transformed, ours: cnf.Flow, name: str, x: Tensor) -> float:
    """The largest difference in log-density when flowjax's flow has our weights and masks.

    Args:
        flow: flowjax's flow, in float64.
        ours: Our flow, in float64.
        name: Name of the model.
        x: Points in float64, shape (N, D), D even.
    """
    dim, halves = x.shape[1], name in ("realnvp", "nsf")
    swapped = [*range(dim // 2, dim), *range(dim // 2)]
    # From data to base our last layer comes first. It transforms the first half, theirs the last.
    order = swapped if halves else [*range(dim)][::-1]
    flow = _with_order(_with_weights(flow, ours), order)
    points = x[:, swapped] if halves else x
    theirs = torch.from_numpy(np.array(flow.log_prob(jnp.asarray(points.numpy()))))
    with torch.no_grad():
        return (theirs - ours.log_prob(x)).abs().max().item()


def _with_weights(flow: Transformed, ours: cnf.Flow) -> Transformed:
    layers = [m for m in ours.transform.modules() if isinstance(m, Coupling | Autoregressive)]
    size, nets = layers[0].transformer.size, [layer.net for layer in reversed(layers)]
    parts: list[Tensor] = []
    for linears in zip(*(net.layers for net in nets), strict=True):
        last = linears[0] is nets[0].layers[-1]
        names = ("mask", "weight", "bias") if hasattr(linears[0], "mask") else ("weight", "bias")
        for part in names:
            found = [getattr(linear, part).detach() for linear in linears]
            parts.append(
                torch.stack([_by_variable(each, size) if last else each for each in found])
            )
    return equinox.tree_at(_parts, flow, [jnp.asarray(part.numpy()) for part in parts])


def _parts(flow: Transformed) -> list[Any]:
    """Masks, weights and biases of all layers."""
    layer = flow.bijection.bijection.bijection.bijections[0]
    net = getattr(layer, "conditioner", None) or layer.masked_autoregressive_mlp
    found = []
    for linear in net.layers:
        masked = isinstance(linear.weight, paramax.Parameterize)
        found += [*(linear.weight.args[:2] if masked else [linear.weight]), linear.bias]
    return found


def _by_variable(part: Tensor, size: int) -> Tensor:
    """Rows of the last layer in flowjax's order, variable by variable; slopes of 1 at the ends."""
    rows = part.unflatten(0, (size, -1)).transpose(0, 1)
    if size > 2:
        sizes, slopes = rows.tensor_split([2 * (size + 1) // 3], 1)
        end = torch.zeros_like(rows[:, :1])
        rows = torch.cat([sizes, end, slopes, end], 1)
    return rows.flatten(0, 1)


def _with_order(flow: Transformed, order: list[int]) -> Transformed:
    """The flow with this permutation after each layer."""
    layers = len(_parts(flow)[0])
    permutation = equinox.filter_vmap(lambda _: Permute(jnp.asarray(order)))(jnp.arange(layers))
    return equinox.tree_at(
        lambda flow: flow.bijection.bijection.bijection.bijections[1], flow, permutation
    )
