"""Flow maps: fields of average velocities, which take a step of any length in one evaluation."""

import torch
from torch import Tensor

from cnf.fields.base import VectorField, exact_divergence, tangent_products
from cnf.fields.wrappers import Wrapper


class FlowMap(Wrapper):
    r"""The average velocity u(t, s, x) of an ODE's solution: x_s = x_t + (s - t) u(t, s, x_t).

    As a field it is the velocity u(t, t, x), which any ODE solver integrates.
    `Solver("flow-map", steps=K)` takes K steps of the map, of one evaluation each, in either
    direction of time. `SelfDistillation`, `MeanFlow` and `Shortcut` train it.

    With a head it also gives the average divergence along the path from x_t to x_s, which
    `log_prob(x, divergence="learned")` takes for the log-determinant of a step: an estimate, see
    `Learned`. The same objectives train the head.

    Source: Boffi et al. (2024), https://arxiv.org/abs/2406.07507; Geng et al. (2025),
    https://arxiv.org/abs/2505.13447; for the head Ai et al. (2026), F2D2,
    https://arxiv.org/abs/2512.02636.

    >>> from cnf.fields import MLPField
    >>> field = FlowMap(MLPField(dim=2, context_dim=1))
    >>> start, x = torch.tensor(0.0), torch.randn(5, 2)
    >>> (x + field.until(1.0)(start, x)).shape
    torch.Size([5, 2])

    Args:
        field: A field that takes s - t as the last column of its context.
        head: A field of the same event shape and context size, the sum of whose entries is the
            average divergence; None for none.

    Raises:
        ValueError: The field takes no context, or the head does not fit it.
    """

    head: VectorField | None

    def __init__(self, field: VectorField, head: VectorField | None = None) -> None:
        super().__init__(field)
        if not field.context_dim:
            raise ValueError(
                f"FlowMap: expected a field that takes the length of a step as the last column of "
                f"its context, got {field}; build it with context_dim=1"
            )
        if head is not None and (head.event_shape, head.context_dim) != (
            field.event_shape,
            field.context_dim,
        ):
            raise ValueError(
                "FlowMap: expected a head of the field's event shape and context size, got "
                f"{head} and {field}"
            )
        self.head = head
        self.context_dim = field.context_dim - 1
        self.optional_context = False
        self._stop: float | Tensor | None = None

    def until(self, stop: float | Tensor) -> VectorField:
        """The average velocity from t until `stop`, as a field.

        Args:
            stop: A time, or one for each row, shape (*batch,).
        """
        found = self._around(self.field, None if isinstance(stop, Tensor) else ("until", stop))
        found._stop = stop
        return found

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.field(t, x, self._with_length(t, x, context))

    def with_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity and exact divergence, the field's own where it has one.

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
        """
        return exact_divergence(self.field, t, x, self._with_length(t, x, context))

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
        return tangent_products(self.field, t, x, self._with_length(t, x, context), tangents)

    @property
    def learns_divergence(self) -> bool:
        return self.head is not None

    def average_divergence(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        """The head's average divergence along the path from x at t until `stop`, (*batch,).

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.

        Raises:
            TypeError: There is no head.
        """
        if self.head is None:
            return super().average_divergence(t, x, context)
        parts = self.head(t, x, self._with_length(t, x, context))
        return parts.flatten(x.dim() - len(self.event_shape)).sum(-1)

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.head is None else f", {self.head}")

    def _with_length(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """The context and s - t, shape (*batch, C + 1)."""
        batch = x.shape[: x.dim() - len(self.event_shape)]
        length = torch.zeros_like(t) if self._stop is None else self._stop - t
        length = length.to(x.dtype).expand(batch).unsqueeze(-1)
        return length if context is None else torch.cat([context.expand(*batch, -1), length], -1)
