"""Coupling layers: one part of the vector and the context determine the map of the rest."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cnf.errors import call_without_edits
from cnf.nets import MLP, on_circle
from cnf.transforms.base import TRANSFORMS
from cnf.transforms.elementwise import Parameters, Transformer, TwoWayScheme


def built_conditioner(
    who: str, conditioner: Callable[[int, int], nn.Module], inputs: int, outputs: int
) -> nn.Module:
    """The network that a conditioner function makes.

    Args:
        who: Whose conditioner it is, for errors.
        conditioner: A function of the numbers of inputs and outputs.
        inputs: Numbers that the network gets for each row.
        outputs: Numbers that it gives.

    Raises:
        TypeError: It is a network, or gives something else.
    """
    net = None if isinstance(conditioner, nn.Module) else conditioner(inputs, outputs)
    if not isinstance(net, nn.Module):
        got = type(conditioner if net is None else net).__name__
        raise TypeError(
            f"{who}: expected conditioner to be a function (inputs, outputs) that returns a "
            f"network, got a {got}; write conditioner=lambda inputs, outputs: Net(inputs, outputs)"
        )
    return net


def conditioner_output(who: str, net: nn.Module, x: Tensor, outputs: int) -> Tensor:
    """What a user's conditioner gives for x, which may be a view of the flow's own input.

    Args:
        who: Whose conditioner it is, for errors.
        net: The conditioner.
        x: Its input, shape (N, inputs, *).
        outputs: Numbers that it is to give, along axis 1.

    Raises:
        ValueError: It edits x in place, or gives another number.
    """
    found = call_without_edits(net, lambda: net(x), x=x)
    if found.shape[1] != outputs:
        raise ValueError(
            f"{who}: expected the conditioner {type(net).__name__} to give {outputs} numbers for "
            f"each row, got {found.shape[1]}; it is built by conditioner(inputs, outputs)"
        )
    return found


@TRANSFORMS.register(
    "coupling", example=lambda dim, context_dim=0: Coupling(dim, context_dim=context_dim)
)
class Coupling(TwoWayScheme):
    """x_a = z_a, x_b = m(z_b; θ(z_a, c)): triangular Jacobian, log|det| = Σ_b log m'.

    Source: Dinh et al. (2017), RealNVP, https://arxiv.org/abs/1605.08803.

    Args:
        dim: D, at least 2; with a context also 1, as the context is then what the map is
            conditioned on.
        keep: Indices of the part a that is left unchanged; the even ones by default.
        transformer: The elementwise map m; affine if None.
        parametrize: Function from the conditioner's output, of shape (transformer.size, D_b, N),
            to the map's parameters; `transformer.parametrize` if None.
        hidden: Widths of the hidden layers of the conditioner θ, an MLP.
        context_dim: Size of the context; 0 for none.
        activation: A name in `cnf.nets.ACTIVATIONS`.
        period: Period of the variables, if they are angles: the conditioner's inputs are then
            their sines and cosines.
        conditioner: Function from the numbers of inputs and outputs to a module θ that maps
            (N, inputs) to (N, outputs); it replaces the MLP of `hidden` and `activation`. If its
            last layer is zero at the start, the coupling is the identity at the start.

    Raises:
        ValueError: No variable would be transformed, or none would be left to condition on.
    """

    order: Tensor
    restore: Tensor

    def __init__(
        self,
        dim: int,
        keep: Sequence[int] | None = None,
        transformer: Transformer = None,
        *,
        parametrize: Callable[[Tensor], Parameters] | None = None,
        hidden: Sequence[int] = (64, 64),
        context_dim: int = 0,
        activation: str = "silu",
        period: float | None = None,
        conditioner: Callable[[int, int], nn.Module] | None = None,
    ) -> None:
        super().__init__(dim, transformer, parametrize, context_dim)
        self.period = period
        kept = list(range(0, dim, 2)) if keep is None else list(keep)
        if dim == 1:
            kept = []
        moved = [index for index in range(dim) if index not in kept]
        if not kept and dim == 1 and not context_dim:
            raise ValueError(
                "Coupling: expected two dimensions or more, or a context, got dim=1, which leaves "
                "nothing to condition on; take an autoregressive model, such as nsf-ar"
            )
        unknown = len(set(kept)) < len(kept) or not set(kept) <= set(range(dim))
        if unknown or not moved or not (kept or context_dim):
            raise ValueError(
                f"Coupling: expected keep to be some but not all of the indices 0, …, {dim - 1}, "
                f"each once (none only with a context), got keep={tuple(kept)}"
            )
        self.kept_last = kept[0] > 0 if kept else False
        order = torch.tensor(moved + kept if self.kept_last else kept + moved)
        self.sizes = [len(moved), len(kept)] if self.kept_last else [len(kept), len(moved)]
        self.ordered = bool((order == torch.arange(dim)).all())  # no permutation is needed
        self.register_buffer("order", order, persistent=False)
        self.register_buffer("restore", torch.argsort(order), persistent=False)
        inputs = len(kept) * (1 if period is None else 2) + context_dim
        outputs = len(moved) * self.transformer.size
        if conditioner is None:
            self.net = MLP(inputs, outputs, hidden, activation, zero_last=True)
        else:
            self.net = built_conditioner("Coupling", conditioner, inputs, outputs)

    def _transformed(
        self,
        direction: Callable[..., tuple[Tensor, Tensor]],
        value: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        columns, context = self._columns(value, context)
        parts = self._permuted(columns, self.order).split(self.sizes)
        kept, moved = reversed(parts) if self.kept_last else parts
        conditioning = on_circle(kept.T, self.period)
        if context is not None:
            conditioning = torch.cat([conditioning, context], -1)
        if isinstance(self.net, MLP):
            raw = self.net.columns(conditioning)
        else:
            outputs = self.transformer.size * len(moved)
            raw = conditioner_output("Coupling", self.net, conditioning, outputs).T
        raw = raw.unflatten(0, (self.transformer.size, len(moved)))
        moved, ladj = direction(moved, *self._constrained(raw, value))
        parts = torch.cat([moved, kept] if self.kept_last else [kept, moved])
        return self._rows(self._permuted(parts, self.restore), ladj, value)

    def _permuted(self, columns: Tensor, order: Tensor) -> Tensor:
        return columns if self.ordered else columns.index_select(0, order)
