"""Conditional fields whose context may be missing, and classifier-free guidance."""

import math

import torch
from torch import Tensor, nn

from cnf.fields.base import VectorField, exact_divergence, tangent_products
from cnf.fields.wrappers import Wrapper


class NullContext(Wrapper):
    """A conditional field whose context may be missing, and is then replaced by a learned vector.

    A missing context is None for all rows, or NaN in some of them.

    Source: Ho & Salimans (2022), https://arxiv.org/abs/2207.12598.

    Args:
        field: A conditional field.
        null: The learned vector, shape (context_dim,); if None, a new one that starts at zero.

    Raises:
        ValueError: The field is unconditional.
    """

    def __init__(self, field: VectorField, null: nn.Parameter | None = None) -> None:
        super().__init__(field)
        if not field.context_dim:
            raise ValueError(
                f"NullContext: expected a conditional field, got {field}; build it with context=…"
            )
        self.null = nn.Parameter(torch.zeros(field.context_dim)) if null is None else null
        self.optional_context = True

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.field(t, x, self.filled(context))

    def with_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity and exact divergence, the field's own where it has one.

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
        """
        return exact_divergence(self.field, t, x, self.filled(context))

    def with_tangents(
        self, t: Tensor, x: Tensor, context: Tensor | None, tangents: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See `cnf.fields.HasTangents`, which this is if the wrapped field is.

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
            tangents: Shape (n, *batch, *event).
        """
        return tangent_products(self.field, t, x, self.filled(context), tangents)

    @property
    def learns_divergence(self) -> bool:
        return self.field.learns_divergence

    def average_divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.field.average_divergence(t, x, self.filled(context))

    def filled(self, context: Tensor | None) -> Tensor:
        """The context, with missing values replaced by those of the learned vector."""
        return self.null if context is None else torch.where(context.isnan(), self.null, context)


class Guided(Wrapper):
    """v(t, x, c) = v(t, x) + w·(v(t, x, c) - v(t, x)): classifier-free guidance.

    Weight 1 gives the conditional field and 0 the unconditional one. A weight above 1 amplifies
    the influence of the context. The density of the flow is that of its guided samples.

    Source: Ho & Salimans (2022), https://arxiv.org/abs/2207.12598; the interval, Kynkäänniemi et
    al. (2024), https://arxiv.org/abs/2404.07724.

    Args:
        field: A field whose context may be missing, see `NullContext`.
        weight: Guidance weight w.
        interval: Times, from and to, at which guidance is applied; at other times w = 1.

    Raises:
        ValueError: The field requires a context, or the weight or interval is out of range.
    """

    def __init__(
        self, field: VectorField, weight: float, interval: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        super().__init__(field)
        if not field.optional_context:
            raise ValueError(
                f"Guided: expected a field whose context may be missing, got {field}; build the "
                "model with null_context=True and train it with FlowMatching(context_dropout=0.1)"
            )
        start, end = interval
        if not math.isfinite(weight) or not 0 <= start <= end <= 1:
            raise ValueError(
                "Guided: expected a finite weight and an interval inside [0, 1], got "
                f"{weight} and {interval}"
            )
        self.weight, self.interval = weight, interval

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        conditional = self.field(t, x, context)
        if context is None or self.weight == 1:
            return conditional
        return self.mixed(t, conditional, self.field(t, x, None))

    def with_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity and exact divergence, the field's own where it has one.

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
        """
        v, div = exact_divergence(self.field, t, x, context)
        if context is None or self.weight == 1:
            return v, div
        v0, div0 = exact_divergence(self.field, t, x, None)
        return self.mixed(t, v, v0), self.mixed(t, div, div0)

    def extra_repr(self) -> str:
        return f"{self.field}, weight {self.weight:g}"

    def mixed(self, t: Tensor, conditional: Tensor, without: Tensor) -> Tensor:
        """Guide a velocity or divergence, given its conditional and unconditional values.

        Args:
            t: Time, shape () or (*batch,).
            conditional: The value with the context.
            without: The value without the context.
        """
        start, end = self.interval
        active = (t >= start) & (t <= end)
        weight = torch.where(active, torch.full_like(t, self.weight), torch.ones_like(t))
        weight = weight.reshape([*t.shape, *[1] * (conditional.dim() - t.dim())])
        return without + weight * (conditional - without)
