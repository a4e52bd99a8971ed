"""Elementwise maps (transformers) and the base classes of the layers that apply them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnf.nets import MADE, MLP
from cnf.printing import joined, shaped
from cnf.registry import Registry
from cnf.transforms.base import TRANSFORMS, Transform

Parameters = tuple[Tensor, ...]


class ElementwiseMap(ABC):
    """An increasing function of one variable, given its (constrained) parameters.

    The axis of the parameters comes first, so that each parameter of all variables is contiguous
    in memory. This is several times faster than the parameters of a variable next to each other.

    Attributes:
        size: Number of unconstrained numbers from which `parametrize` computes the parameters of
            a variable.
    """

    size: int

    def __repr__(self) -> str:
        return MAPS.name_of(self) or type(self).__name__

    @abstractmethod
    def parametrize(self, raw: Tensor) -> Parameters:
        """Parameters from unconstrained numbers, (size, *); zeros: the identity, or nearly."""

    @abstractmethod
    def forward(self, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The value x and log dx/dz, both of z's shape (*).

        Args:
            z: Shape (*).
            parameters: What `parametrize` makes.
        """

    @abstractmethod
    def inverse(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        """The value z and log dz/dx, both of x's shape (*).

        Args:
            x: Shape (*).
            parameters: What `parametrize` makes.
        """


MAPS = Registry("elementwise map", ElementwiseMap)


@MAPS.register("additive")
class Additive(ElementwiseMap):
    """x = z + m; log dx/dz = 0.

    Source: Dinh et al. (2014), NICE, https://arxiv.org/abs/1410.8516.
    """

    size = 1

    def parametrize(self, raw: Tensor) -> Parameters:
        """The shift m."""
        return (raw.squeeze(0),)

    def forward(self, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        (shift,) = parameters
        return z + shift, torch.zeros_like(z)

    def inverse(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        (shift,) = parameters
        return x - shift, torch.zeros_like(x)


@MAPS.register("affine")
class Affine(ElementwiseMap):
    """x = z·exp(s) + m; log dx/dz = s.

    Args:
        bound: Largest |s|.
    """

    size = 2

    def __init__(self, bound: float = 3.0) -> None:
        self.bound = bound

    def parametrize(self, raw: Tensor) -> Parameters:
        """The shift m and the log-scale s, which is limited to ±bound by a tanh."""
        shift, log_scale = raw.unbind(0)
        return shift, self.bound * torch.tanh(log_scale / self.bound)

    def forward(self, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = parameters
        return torch.addcmul(shift, z, log_scale.exp()), log_scale

    def inverse(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = parameters
        ladj = -log_scale
        return (x - shift) * ladj.exp(), ladj


class Inverted(ElementwiseMap):
    """A map with its two directions exchanged.

    Args:
        transformer: The map.
    """

    def __init__(self, transformer: ElementwiseMap) -> None:
        self.transformer, self.size = transformer, transformer.size

    def parametrize(self, raw: Tensor) -> Parameters:
        return self.transformer.parametrize(raw)

    def forward(self, z: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self.transformer.inverse(z, *parameters)

    def inverse(self, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        return self.transformer.forward(x, *parameters)

    def __repr__(self) -> str:
        return f"inverse {self.transformer}"


Transformer = ElementwiseMap | str | Mapping[str, Any] | None


class Scheme(Transform):
    """A transform that applies an elementwise map, the transformer, to the variables.

    Subclasses differ in the conditioner, which computes the map's parameters.

    Args:
        dim: D, or the number of channels of an image.
        transformer: The map: a name in `MAPS`, {"name": …, **options} or an instance; affine if
            None.
        parametrize: Function from unconstrained numbers, of shape (transformer.size, *), to the
            map's parameters; `transformer.parametrize` if None.
        context_dim: Size of the context; 0 for none.
        event_dims: 1 for vectors, 3 for images.
    """

    def __init__(
        self,
        dim: int,
        transformer: Transformer = None,
        parametrize: Callable[[Tensor], Parameters] | None = None,
        context_dim: int = 0,
        event_dims: int = 1,
    ) -> None:
        shape = (dim,) if event_dims == 1 else None
        super().__init__(event_dims, context_dim, shape)
        self.dim = dim
        self.transformer: ElementwiseMap = MAPS.build(transformer or "affine", type(self).__name__)
        self.parametrize = parametrize or self.transformer.parametrize

    def extra_repr(self) -> str:
        net = getattr(self, "net", None)
        hidden = f"hidden {net.hidden}" if isinstance(net, MLP | MADE) else ""
        return joined(shaped((self.dim,), self.context_dim), repr(self.transformer), hidden)

    def _constrained(self, raw: Tensor, value: Tensor) -> Parameters:
        """The map's parameters in the value's dtype, as a network may compute in bfloat16."""
        return self.parametrize(raw.to(value.dtype))

    def _columns(self, value: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(*batch, D) → (D, N), contiguous for each variable, and the context as (N, C)."""
        if context is not None:
            context = context.expand(*value.shape[:-1], -1).reshape(-1, self.context_dim)
        rows = value if value.dim() == 2 else value.reshape(-1, self.dim)
        return rows.T.contiguous(), context

    def _rows(self, columns: Tensor, ladj: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The values and the sum of the log-slopes, both (D, N), in the shape of the batch."""
        rows, ladj = columns.T, ladj.sum(0)
        if like.dim() == 2:  # the usual case, in fewer operations
            return rows, ladj
        return rows.reshape(like.shape), ladj.reshape(like.shape[:-1])


class TwoWayScheme(Scheme):
    """A scheme whose conditioner has the same input in both directions."""

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z, context)
        return self._transformed(self.transformer.forward, z, context)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x, context)
        return self._transformed(self.transformer.inverse, x, context)

    @abstractmethod
    def _transformed(
        self,
        direction: Callable[..., tuple[Tensor, Tensor]],
        value: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The value under the map's `forward` or `inverse`, and the log-determinant."""


@TRANSFORMS.register(
    "elementwise", example=lambda dim, context_dim=0: Elementwise(dim, context_dim=context_dim)
)
class Elementwise(TwoWayScheme):
    """x_i = m(z_i; θ_i), with the same θ for all points or, with a context, θ(c).

    Args:
        dim: D.
        transformer: The elementwise map m; affine if None.
        parametrize: Function from unconstrained numbers, of shape (transformer.size, D, N), or
            (transformer.size, D, 1) without a context, to the map's parameters;
            `transformer.parametrize` if None.
        hidden: Widths of the hidden layers of the conditioner, an MLP of the context.
        context_dim: Size of the context; 0 for none.
        activation: A name in `cnf.nets.ACTIVATIONS`.
    """

    def __init__(
        self,
        dim: int,
        transformer: Transformer = None,
        *,
        parametrize: Callable[[Tensor], Parameters] | None = None,
        hidden: Sequence[int] = (64, 64),
        context_dim: int = 0,
        activation: str = "silu",
    ) -> None:
        super().__init__(dim, transformer, parametrize, context_dim)
        numbers = self.transformer.size * dim
        self.raw = None if context_dim else nn.Parameter(torch.zeros(numbers, 1))
        self.net = None
        if context_dim:
            self.net = MLP(context_dim, numbers, hidden, activation, zero_last=True)

    def _transformed(
        self,
        direction: Callable[..., tuple[Tensor, Tensor]],
        value: Tensor,
        context: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        columns, context = self._columns(value, context)
        raw = self.raw
        if self.net is not None:
            assert context is not None
            raw = self.net.columns(context)
        assert raw is not None
        parameters = self._constrained(raw.unflatten(0, (self.transformer.size, self.dim)), value)
        parameters = [p.expand(*p.shape[:-1], columns.shape[1]) for p in parameters]
        return self._rows(*direction(columns, *parameters), value)
