"""Networks that predict data, noise or score, and the velocity that follows from each."""

import math
from typing import Any

import torch
from torch import Tensor

from cnf.errors import expect_choice
from cnf.fields.base import VectorField, exact_divergence
from cnf.fields.guidance import Guided, NullContext
from cnf.fields.wrappers import Wrapper, wrapped
from cnf.matching.paths import PATHS, Path, Schedule

TARGETS = ("velocity", "x1", "noise", "score")
MARGIN = 1e-2  # of time, from the ends, where α or σ vanish and conversions are singular


def converted(value: Tensor, given: str, wanted: str, x: Tensor, t: Tensor, path: Path) -> Tensor:
    """Convert one of velocity, x1, noise and score at (t, x) into another.

    They are conditional means given xt = α·x1 + σ·ε: of the velocity, the data, the noise ε; the
    score is -noise/σ. Between velocity, x1 and noise it holds for every coupling (ε is then x0);
    a score, or a path with noise of its own, needs a standard normal base paired independently.
    Source: Lipman et al. (2024), https://arxiv.org/abs/2412.06264, table 1.

    Args:
        value: What is given, of x's shape.
        given: Its name in `TARGETS`.
        wanted: The other's name.
        x: Points, shape (*batch, *event).
        t: Times, shape () or (*batch,); those within 0.01 of the ends are moved inside.
        path: The path that the flow was trained with.
    """
    for name, choice in (("given", given), ("wanted", wanted)):
        expect_choice("converted", name, choice, TARGETS)
    if given == wanted:
        return value
    at = path.over(_inside(t, path), x.dim() - t.dim()).gaussian()
    a, b = _velocity_from(given, at)
    v = a * x + b * value
    a, b = _velocity_from(wanted, at)
    return (v - a * x) / b


def _velocity_from(target: str, at: Schedule) -> tuple[Any, Any]:
    """(A, B) with velocity = A·x + B·target."""
    alpha, sigma, d_alpha, d_sigma, *_ = at
    if target == "velocity":
        return 0.0, 1.0
    if target == "x1":
        return d_sigma / sigma, d_alpha - d_sigma * alpha / sigma
    noise = d_sigma - d_alpha * sigma / alpha
    return d_alpha / alpha, noise if target == "noise" else -sigma * noise


def _inside(t: Tensor, path: Path) -> Tensor:
    return path.clipped(t.clamp(MARGIN, 1 - MARGIN))


class Predicts(Wrapper):
    """A network that predicts x1, noise or score; to a solver it is the velocity that follows.

    Flow matching regresses what the network predicts. Within 0.01 of the ends, where the
    conversion is singular, the velocity is that of 0.01. An error of a predicted x1 or noise is
    an error 1/(1 - t) or 1/t times as large in the velocity: for `log_prob`, predict velocities.

    Args:
        field: The network, called as a field.
        target: A name in `TARGETS`.
        path: The path that it is trained with: a name in `PATHS`, a `Path`, or
            {"name": …, **fields}.
    """

    def __init__(self, field: VectorField, target: str = "x1", path: Any = "linear") -> None:
        super().__init__(field)
        expect_choice("Predicts", "target", target, TARGETS)
        self.target, self.path = target, PATHS.build(path)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        t = _inside(t, self.path)
        return converted(self.field(t, x, context), self.target, "velocity", x, t, self.path)

    def with_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity and exact divergence, the network's own where it has one.

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
        """
        t = _inside(t, self.path)
        value, div = exact_divergence(self.field, t, x, context)
        v = converted(value, self.target, "velocity", x, t, self.path)
        at = self.path.schedule(t).gaussian()
        a, b = _velocity_from(self.target, at)
        return v, a * math.prod(self.event_shape) + b * div

    def extra_repr(self) -> str:
        return f"{self.field}, {self.target}, {self.path}"


class WithScore(Wrapper):
    """A velocity beside a head for a noisy path's noise, hence the score, for sampling by SDE.

    Flow matching trains both; the flow and its density are the velocity's.
    Source: Tong et al. (2024), [SF]²M, https://arxiv.org/abs/2307.03672.

    Args:
        field: The velocity.
        head: A field of the same event shape and context; it predicts the path's noise z.
        path: A noisy path, as in `Predicts`.

    Raises:
        ValueError: A head that does not fit the velocity, or a path without noise of its own.
    """

    head: VectorField

    def __init__(self, field: VectorField, head: VectorField, path: Any = "bridge") -> None:
        super().__init__(field)
        self.head, self.path = head, PATHS.build(path)
        fits = (head.event_shape, head.context_dim) == (field.event_shape, field.context_dim)
        if not fits or (field.optional_context and not head.optional_context):
            raise ValueError(
                "WithScore: expected a head of the velocity's event shape and context, which may "
                "be missing where the velocity's may"
            )
        if not self.path.noisy:
            raise ValueError(
                f"WithScore: expected a path with noise of its own, got {self.path}; elsewhere "
                "the score follows from the velocity: cnf.fields.converted"
            )

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.field(t, x, context)

    def with_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity and exact divergence, the field's own where it has one.

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
        """
        return exact_divergence(self.field, t, x, context)

    def extra_repr(self) -> str:
        return f"{self.field}, {self.head}, {self.path}"

    def score(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """∇ log p_t(x), of x's shape; within 0.01 of the ends, that of 0.01.

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
        """
        t = _inside(t, self.path)
        gamma = self.path.over(t, x.dim() - t.dim()).gamma
        return -self.head(t, x, context) / gamma


def path_of(field: VectorField) -> Path | None:
    """The path that a field, or what its wrappers hold, was made for; None where any path fits."""
    parts = (part for part in wrapped(field) if isinstance(part, Predicts | WithScore))
    return next((part.path for part in parts), None)


def score(
    field: VectorField, t: Tensor, x: Tensor, context: Tensor | None = None, path: Any = "linear"
) -> Tensor:
    """∇ log p_t(x) of a trained field: its head's, else what follows from the velocity.

    Args:
        field: The field.
        t: Times, shape () or (*batch,); those within 0.01 of the ends are moved inside.
        x: Points, shape (*batch, *event).
        context: Condition.
        path: The path that it was trained with, where the field does not say.
    """
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    if isinstance(field, NullContext):
        return score(field.field, t, x, field.filled(context), path)
    if isinstance(field, Guided) and context is not None:
        without = score(field.field, t, x, None, path)
        return field.mixed(t, score(field.field, t, x, context, path), without)
    if isinstance(field, WithScore):
        return field.score(t, x, context)
    path = field.path if isinstance(field, Predicts) else PATHS.build(path)
    t = _inside(t, path)
    return converted(field(t, x, context), "velocity", "score", x, t, path)
