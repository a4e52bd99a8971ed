"""A residual network as a field, with a closed-form divergence."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from cnf.fields.base import FIELDS, VectorField
from cnf.fields.concat import ModulatedLinear
from cnf.fields.trace import gated_product
from cnf.nets import ACTIVATIONS, Condition, zero_


@FIELDS.register("residual")
class ResidualField(VectorField):
    r"""h_0 = W_0 x + b_0; h_l = h_{l-1} + V_l σ(W_l h_{l-1} + U_l u + b_l); v = W_L h + b_L.

    Time and context u = [τ(t), c] are an input of every block. With the gates g_l = σ'(a_l), the
    tangents are T_0 = W_0 and :math:`T_l = T_{l-1} + V_l\,\mathrm{diag}(g_l)\,W_l T_{l-1}`. In the
    first and last block, products of weight matrices are computed once per evaluation instead of
    once per row.

    >>> import torch
    >>> field = ResidualField(dim=3, hidden=(32, 32))
    >>> v, div = field.with_divergence(torch.tensor(0.1), torch.randn(5, 3))
    >>> v.shape, div.shape
    (torch.Size([5, 3]), torch.Size([5]))

    Args:
        dim: D.
        hidden: Width of the hidden layer of each block, at least one; the first is also that of h.
        context_dim: Size of the context; 0 for none.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        frequencies: Number of Fourier features of time; 0 for t alone.
        zero_last: Whether v = 0 at the start, which is the identity flow.

    Raises:
        ValueError: There is no block, or a width is below 1.
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
        if not hidden or min(hidden) < 1:
            raise ValueError(
                "ResidualField: expected at least one block and every width >= 1, got "
                f"hidden={tuple(hidden)}"
            )
        self.condition = Condition(frequencies, context_dim)
        self.activation = ACTIVATIONS[activation]
        width = hidden[0]
        self.first = nn.Linear(dim, width)
        self.inward = nn.ModuleList(
            ModulatedLinear(width, inner, self.condition.size, "concat") for inner in hidden
        )
        self.outward = nn.ModuleList(nn.Linear(inner, width, bias=False) for inner in hidden)
        self.last = nn.Linear(width, dim)
        if zero_last:
            zero_(self.last)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None = None) -> Tensor:
        u = self.condition(t, x, context)
        h = self.first(x)
        for inward, outward in zip(self.inward, self.outward, strict=True):
            h = h + outward(self.activation.function(inward.affine(u)(h)))  # pyright: ignore
        return self.last(h)

    def with_divergence(
        self, t: Tensor, x: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Velocity, shape (*batch, D), and exact divergence in closed form, shape (*batch,).

        Args:
            t: Time, shape () or (*batch,).
            x: Points, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
        """
        u = self.condition(t, x, context)
        h, gates, weights = self.first(x), [], []
        for inward, outward in zip(self.inward, self.outward, strict=True):
            affine = inward.affine(u)  # pyright: ignore
            value, gate = self.activation.with_derivative(affine(h))
            h = h + outward(value)
            gates.append(gate)
            weights.append((affine.weight, outward.weight))
        return self.last(h), self._trace(gates, weights)

    def extra_repr(self) -> str:
        hidden = tuple(layer.in_features for layer in self.outward)  # pyright: ignore
        return f"{super().extra_repr()}, hidden {hidden}"

    def _trace(self, gates: list[Tensor], weights: list[tuple[Tensor, Tensor]]) -> Tensor:
        tangents = self.first.weight.T  # (D, H), and (*batch, D, H) after the first block
        trace = (self.last.weight * tangents).sum()
        for k, (gate, (inward, outward)) in enumerate(zip(gates, weights, strict=True)):
            entering = F.linear(tangents, inward)  # (…, D, K)
            # A block adds tr(W_L V diag(g) W T) to the trace; no full product is needed.
            trace = trace + ((entering * (self.last.weight @ outward)).sum(-2) * gate).sum(-1)
            if k == len(gates) - 1:
                break
            if k == 0:
                tangents = tangents + gated_product(outward, gate, entering.T)
            else:
                tangents = tangents + F.linear(entering * gate.unsqueeze(-2), outward)
        return trace
