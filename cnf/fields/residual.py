"""A residual network as a field, with its exact trace."""

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

    u = [τ(t), c] enters every block. With g_l = σ'(a_l), the tangents T_0 = W_0 go through
    :math:`T_l = T_{l-1} + V_l\,\mathrm{diag}(g_l)\,W_l T_{l-1}`; the first block's and the last
    one's products with shared matrices are formed once per evaluation, not for each row.

    >>> import torch
    >>> field = ResidualField(dim=3, hidden=(32, 32))
    >>> v, div = field.with_divergence(torch.tensor(0.1), torch.randn(5, 3))
    >>> v.shape, div.shape
    (torch.Size([5, 3]), torch.Size([5]))

    Args:
        dim: D.
        hidden: Widths inside the blocks, one for each block (one at least); h has the first one's.
        context_dim: Size of the context; 0 for none.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        frequencies: Fourier features of time (0 for plain t).
        zero_last: Start at v = 0, the identity flow.

    Raises:
        ValueError: No block, or a width below 1.
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
        """Velocity and exact divergence, see the class; shapes (*batch, D) and (*batch,).

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
        tangents = self.first.weight.T  # (D, H), and from the first block on (*batch, D, H)
        trace = (self.last.weight * tangents).sum()
        for k, (gate, (inward, outward)) in enumerate(zip(gates, weights, strict=True)):
            entering = F.linear(tangents, inward)  # (…, D, K)
            # Along with h, the trace grows by tr(W_L V diag(g) W T): its diagonal is enough.
            trace = trace + ((entering * (self.last.weight @ outward)).sum(-2) * gate).sum(-1)
            if k == len(gates) - 1:
                break
            if k == 0:
                tangents = tangents + gated_product(outward, gate, entering.T)
            else:
                tangents = tangents + F.linear(entering * gate.unsqueeze(-2), outward)
        return trace
