"""The default field: a time-conditioned MLP that knows its own divergence."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.fields.base import FIELDS, VectorField
from cnf.nets import ACTIVATIONS, TimeFeatures, linear_sizes, zero_


@FIELDS.register("mlp")
class MLPField(VectorField):
    r"""v(t, x, c) = W_L σ(… σ(W_1 [x, τ(t), c] + b_1) …) + b_L, with its exact trace.

    With g_l = σ'(a_l) the gates of one row, the Jacobian is W_L diag(g_{L-1}) W_{L-1} … diag(g_1)
    W_1x. For two hidden layers its trace is :math:`g_2^\top (W_2 \circ (W_{1x} W_3)^\top)\, g_1`:
    one more product of the size of the forward's own, whatever D is. For any other depth the D
    tangents W_1x e_i go through the layers in one batched product. Neither builds an autograd
    graph inside the trace, and both are differentiable.

    >>> field = MLPField(dim=3, hidden=(32, 32))
    >>> v, div = field.with_divergence(torch.tensor(0.1), torch.randn(5, 3))
    >>> v.shape, div.shape
    (torch.Size([5, 3]), torch.Size([5]))

    Args:
        dim: D.
        hidden: Widths of the hidden layers (one at least).
        context_dim: Size of the context; 0 for none.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        frequencies: Fourier features of time (0 for plain t), see `TimeFeatures`.
        zero_last: Start at v = 0, the identity flow.
    """

    def __init__(
        self,
        dim: int,
        hidden: Sequence[int] = (128, 128),
        context_dim: int = 0,
        activation: str = "silu",
        frequencies: int = 4,
        zero_last: bool = False,
    ) -> None:
        super().__init__((dim,), context_dim)
        self.dim = dim
        if not hidden:
            raise ValueError("MLPField: expected at least one hidden layer, got hidden=()")
        self.time = TimeFeatures(frequencies)
        self.activation = ACTIVATIONS[activation]
        self.first = nn.Linear(dim + self.time.size + context_dim, hidden[0])
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in linear_sizes([*hidden, dim]))
        if zero_last:
            zero_(self.layers[-1])

    def _enter(self, t: Tensor, x: Tensor, context: Tensor | None) -> Tensor:
        """a_1 = W_1 [x, τ(t), c] + b_1."""
        features = self.time(t.to(x.dtype))
        if t.dim() == 0 and context is None:
            # In an ODE solve all rows share t: its part is one vector, not columns of the batch.
            shared = F.linear(features, self.first.weight[:, self.dim :], self.first.bias)
            return F.linear(x, self._weight_of_x) + shared
        parts = [x, features.expand(*x.shape[:-1], -1)]
        if context is not None:
            parts.append(context.expand(*x.shape[:-1], -1))
        return self.first(torch.cat(parts, -1))

    @property
    def _weight_of_x(self) -> Tensor:
        return self.first.weight[:, : self.dim]

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        a = self._enter(t, x, context)
        for layer in self.layers:
            a = layer(self.activation.function(a))
        return a

    def with_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity and exact divergence, see the class; shapes (*batch, D) and (*batch,)."""
        a = self._enter(t, x, context)
        gates = []
        for layer in self.layers:
            h, gate = self.activation.with_derivative(a)
            gates.append(gate)
            a = layer(h)
        trace = self._trace_of_two if len(gates) == 2 else self._trace_by_tangents
        return a, trace(gates)

    def _trace_of_two(self, gates: list[Tensor]) -> Tensor:
        middle, last = self._weights()
        weights = middle * (self._weight_of_x @ last).T
        return (F.linear(gates[0], weights) * gates[1]).sum(-1)

    def _trace_by_tangents(self, gates: list[Tensor]) -> Tensor:
        tangents = self._weight_of_x.T.expand(*gates[0].shape[:-1], -1, -1)  # (*batch, D, H)
        *middle, last = self._weights()
        for gate, weight in zip(gates[:-1], middle, strict=True):
            tangents = F.linear(tangents * gate.unsqueeze(-2), weight)
        # The last product is needed on its diagonal only.
        return ((tangents * last).sum(-2) * gates[-1]).sum(-1)

    def _weights(self) -> list[Tensor]:
        return [layer.weight for layer in self.layers]  # pyright: ignore[reportReturnType]
