"""The check that gradients reach every parameter, in train and in eval mode, and are right."""

from collections.abc import Callable

import torch
from torch import Generator, Tensor, nn

from cnf.checks.case import Case, NotApplicable, Outcome, in_mode
from cnf.fields import FlowMap
from cnf.flow import Flow

# Of a parameter's own size: the first for what an adaptive solver leaves, the last for a wild map.
_STEPS = (1e-3, 1e-5, 1e-7)

Leaves = dict[str, Tensor]
Gradients = dict[str, Tensor | None]


def gradients(case: Case) -> list[Outcome]:
    """Every parameter and the context get their gradient, the same in train and in eval mode.

    A gradient of zero is no fault in itself (a last layer that starts at zero gives the others
    none); it is one if log_prob moves with the parameter all the same.
    """
    train = _gradients(*_differentiable(in_mode(case.exact, True), case))
    leaves, value = _differentiable(in_mode(case.exact, False), case)
    return _judge(leaves, value, train, _gradients(leaves, value), case.generator)


def _differentiable(flow: Flow, case: Case) -> tuple[Leaves, Callable[[], Tensor]]:
    """What is to have a gradient, by name, and the mean log_prob as a function of it."""
    x, _, context = case.rows(flow, 8)
    unasked = {id(p) for head in _heads(flow) for p in head.parameters()}
    leaves: Leaves = {
        name: p for name, p in flow.named_parameters() if p.requires_grad and id(p) not in unasked
    }
    if context is not None:
        leaves["the context"] = context = context.clone().requires_grad_()
    if not leaves:
        raise NotApplicable("nothing is trained here, and there is no context")
    return leaves, lambda: flow.log_prob(x, context).mean()


def _heads(flow: Flow) -> list[nn.Module]:
    """Those of flow maps, which an estimate of the density uses, and log_prob does not."""
    return [part.head for part in flow.modules() if isinstance(part, FlowMap) and part.head]


def _gradients(leaves: Leaves, value: Callable[[], Tensor]) -> Gradients:
    with torch.enable_grad():
        result = value()
        if not result.requires_grad:
            return dict.fromkeys(leaves)
        found = torch.autograd.grad(result, list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def _judge(
    leaves: Leaves,
    value: Callable[[], Tensor],
    train: Gradients,
    evaluated: Gradients,
    generator: Generator,
) -> list[Outcome]:
    nan = [n for n, g in evaluated.items() if g is not None and not g.isfinite().all()]
    zero = [n for n, g in evaluated.items() if g is None or not g.abs().max() > 1e-12]
    unused = [n for n, g in evaluated.items() if g is None and train[n] is None]
    changes = {name: _change(train[name], evaluated[name]) for name in leaves}
    differing = [name for name, change in changes.items() if not change <= 1e-3]
    gone = [name for name in differing if name in zero]
    where = "is zero in eval mode only, for" if gone else "differs between train and eval mode, in"

    directions = {name: _direction(leaf, generator) for name, leaf in leaves.items()}
    idle = {name: directions[name] for name in zero}
    hidden = min(abs(_slope(leaves, idle, value, step)) for step in _STEPS[:2]) if idle else 0.0
    terms = {n: g * directions[n] for n, g in evaluated.items() if g is not None}
    claimed = sum(term.sum().item() for term in terms.values())
    size = sum(term.square().sum().item() for term in terms.values()) ** 0.5 + 1e-4
    slopes = [_slope(leaves, directions, value, step) for step in _STEPS]
    error = min(abs(slope - claimed) / (size + abs(slope)) for slope in slopes)
    return [
        Outcome(len(nan), 0, f"the gradient is NaN in {_listed(nan)}",
                "a 0·inf in the backward pass: look for sqrt, norm or log at zero"),
        Outcome(max(changes.values()), 1e-3, f"the gradient {where} {_listed(gone or differing)}",
                "look for a detach, no_grad, dropout or batch statistics that depend on "
                "self.training"),
        Outcome(hidden, 2e-4, f"log_prob depends on {_listed(zero)}, which get no gradient",
                "look for a detach, no_grad or .data on the way; for an ODE, that it is among the "
                "adjoint's parameters"),
        Outcome(len(unused), 0, f"log_prob does not use {_listed(unused)}",
                "take it out, or freeze it with requires_grad_(False)"),
        Outcome(error, 5e-2, f"gradients agree with differences of log_prob up to {error:.1g}",
                "part of a gradient is lost: a detach on one of several ways, or an adjoint that "
                "is not told of all parameters"),
    ]  # fmt: skip


def _change(a: Tensor | None, b: Tensor | None) -> float:
    """Relative difference of two gradients, None counted as zero."""
    if a is None or b is None:
        other = b if a is None else a
        return float(other is not None and bool(other.abs().max() > 1e-12))
    size = torch.maximum(a.norm(), b.norm()) + 1e-6  # below, what the adjoint's solver leaves
    return ((a - b).norm() / size).item()


def _direction(leaf: Tensor, generator: Generator) -> Tensor:
    draw = torch.randn(leaf.shape, generator=generator, dtype=torch.float64).to(leaf)
    return draw * leaf.detach().square().mean().sqrt().clamp(min=0.1)


@torch.no_grad()
def _slope(leaves: Leaves, directions: Leaves, value: Callable[[], Tensor], step: float) -> float:
    """Central difference of `value` along `directions`."""
    ends = []
    for move in (step, -2 * step):
        for name, direction in directions.items():
            leaves[name].add_(direction, alpha=move)
        ends.append(value().item())
    for name, direction in directions.items():
        leaves[name].add_(direction, alpha=step)
    return (ends[0] - ends[1]) / (2 * step)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    return shown or "nothing"
