"""Networks that predict data, noise or score, and their conversion to velocities."""

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
MARGIN = 1e-2  # distance from t = 0 and 1, where α or σ vanish: conversions are singular


def converted(value: Tensor, given: str, wanted: str, x: Tensor, t: Tensor, path: Path) -> Tensor:
    """Convert one of velocity, x1, noise and score at (t, x) into another.

    Velocity, x1 and noise are the conditional means of dxt/dt, x1 and ε given xt = α·x1 + σ·ε, and
    the score is -noise/σ. Conversions among the first three hold for every coupling, with ε = x0.
    The score, and noisy paths, require a standard normal base and the independent coupling.

    Source: Lipman et al. (2024), https://arxiv.org/abs/2412.06264, table 1.

    Args:
        value: The given quantity, of x's shape.
        given: Its name in `TARGETS`.
        wanted: Name of the quantity to compute.
        x: Points, shape (*batch, *event).
        t: Times, shape () or (*batch,); they are clamped to [0.01, 0.99].
        path: The path that the flow was trained with.
    """
    for name, choice in (("given", given), ("wanted", wanted)):
        expect_choice("converted", name, choice, TARGETS)
    if given == wanted:
        return value
    at = path.over(_clamped(t, path), x.dim() - t.dim()).gaussian()
    a, b = _velocity_from(given, at)
    v = a * x + b * value
    a, b = _velocity_from(wanted, at)
    return (v - a * x) / b


def _velocity_from(target: str, at: Schedule) -> tuple[Any, Any]:
    """The coefficients A and B in velocity = A·x + B·target."""
    alpha, sigma, d_alpha, d_sigma, *_ = at
    if target == "velocity":
        return 0.0, 1.0
    if target == "x1":
        return d_sigma / sigma, d_alpha - d_sigma * alpha / sigma
    noise = d_sigma - d_alpha * sigma / alpha
    return d_alpha / alpha, noise if target == "noise" else -sigma * noise


def _clamped(t: Tensor, path: Path) -> Tensor:
    return path.clipped(t.clamp(MARGIN, 1 - MARGIN))


class Predicts(Wrapper):
    """A network that predicts x1, noise or score, converted to the velocity of the flow.

    Flow matching regresses the predicted quantity. Times are clamped to [0.01, 0.99], as the
    conversion is singular at the ends. It multiplies an error of a predicted x1 by 1/(1 - t), and
    of a predicted noise by 1/t; therefore, predict velocities for an accurate `log_prob`.

    Args:
        field: The network, as a field.
        target: The predicted quantity, a name in `TARGETS`.
        path: The path that the field is trained with: a name in `PATHS`, a `Path`, or
            {"name": …, **fields}.
    """

    def __init__(self, field: VectorField, target: str = "x1", path: Any = "linear") -> None:
        super().__init__(field)
        expect_choice("Predicts", "target", target, TARGETS)
        self.target, self.path = target, PATHS.build(path)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        t = _clamped(t, self.path)
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
        t = _clamped(t, self.path)
        value, div = exact_divergence(self.field, t, x, context)
        v = converted(value, self.target, "velocity", x, t, self.path)
        at = self.path.schedule(t).gaussian()
        a, b = _velocity_from(self.target, at)
        return v, a * math.prod(self.event_shape) + b * div

    def extra_repr(self) -> str:
        return f"{self.field}, {self.target}, {self.path}"


class WithScore(Wrapper):
    """A velocity with a second network for the noise of a noisy path, and so for the score.

    Flow matching trains both networks. The flow and its density depend on the velocity only; the
    score is used to sample by an SDE.

    Source: Tong et al. (2024), [SF]²M, https://arxiv.org/abs/2307.03672.

    Args:
        field: The velocity.
        head: A field with the same event shape and context size, which predicts the noise z of
            the path.
        path: A noisy path, as in `Predicts`.

    Raises:
        ValueError: The head does not fit the velocity, or the path is not noisy.
    """

    head: VectorField

    def __init__(self, field: VectorField, head: VectorField, path: Any = "bridge") -> None:
        super().__init__(field)
        self.head, self.path = head, PATHS.build(path)
        fits = (head.event_shape, head.context_dim) == (field.event_shape, field.context_dim)
        if not fits or (field.optional_context and not head.optional_context):
            raise ValueError(
                "WithScore: expected a head of the velocity's event shape and context size, whose "
                f"context may be missing if the velocity's may, got {head} and {field}"
            )
        if not self.path.noisy:
            raise ValueError(
                f"WithScore: expected a noisy path, got {self.path}; on other paths the score "
                "follows from the velocity: cnf.fields.converted"
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
        """The score ∇ log p_t(x), of x's shape, at times clamped to [0.01, 0.99].

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
        """
        t = _clamped(t, self.path)
        gamma = self.path.over(t, x.dim() - t.dim()).gamma
        return -self.head(t, x, context) / gamma


def path_of(field: VectorField) -> Path | None:
    """The path that a field or a wrapped field is trained with; None if it is not fixed.

    It is fixed by what a field predicts, and by the sphere or torus that it is on.
    """
    paths = (getattr(part, "path", None) for part in wrapped(field))
    return next((path for path in paths if isinstance(path, Path)), None)


def score(
    field: VectorField, t: Tensor, x: Tensor, context: Tensor | None = None, path: Any = "linear"
) -> Tensor:
    """The score ∇ log p_t(x) of a trained field, of x's shape.

    It is that of the field's head, if it has one, else it is computed from the velocity.

    Args:
        field: The field.
        t: Times, shape () or (*batch,); they are clamped to [0.01, 0.99].
        x: Points, shape (*batch, *event).
        context: Condition, shape (*batch, C), or None.
        path: The path that the field was trained with, unless the field has one.
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
    t = _clamped(t, path)
    return converted(field(t, x, context), "velocity", "score", x, t, path)
