"""What a transform is; composition and inversion."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor, nn

from cnf.registry import Registry

TRANSFORMS = Registry("transform")


class Transform(nn.Module, ABC):
    """A bijection between base z and data x, with log|det Jacobian| of each direction.

    Abstract or final: a subclass implements `forward` and `inverse` and overrides nothing that is
    implemented.

    Attributes:
        event_dims: How many trailing axes form the event: 1 for vectors, 3 for images.
        context_dim: Size of the context; 0 for an unconditional transform.
        optional_context: Whether a conditional transform also takes context=None.
    """

    optional_context = False

    def __init__(self, event_dims: int = 1, context_dim: int = 0) -> None:
        super().__init__()
        self.event_dims = event_dims
        self.context_dim = context_dim

    @abstractmethod
    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Base → data: x, of z's batch shape, and log|det ∂x/∂z|, shape (*batch,), in nats."""

    @abstractmethod
    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → base: z, of x's batch shape, and log|det ∂z/∂x|, shape (*batch,), in nats."""


class Compose(Transform):
    """f_n ∘ … ∘ f_1, listed from base to data; log-determinants add.

    Args:
        transforms: One or more transforms of the same event dims.
    """

    def __init__(self, transforms: Sequence[Transform]) -> None:
        if not transforms:
            raise ValueError("Compose: expected at least one transform, got none")
        dims = {transform.event_dims for transform in transforms}
        if len(dims) > 1:
            raise ValueError(f"Compose: expected one event_dims for all, got {sorted(dims)}")
        super().__init__(dims.pop(), max(transform.context_dim for transform in transforms))
        self.optional_context = all(t.optional_context for t in transforms if t.context_dim)
        self.transforms = nn.ModuleList(transforms)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        x, ladj = z, None
        for transform in self.transforms:
            x, step = transform(x, _for(transform, context))
            ladj = step if ladj is None else ladj + step
        assert ladj is not None
        return x, ladj

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        z, ladj = x, None
        for transform in reversed(self.transforms):
            assert isinstance(transform, Transform)
            z, step = transform.inverse(z, _for(transform, context))
            ladj = step if ladj is None else ladj + step
        assert ladj is not None
        return z, ladj


class Inverse(Transform):
    """A transform with its two directions exchanged."""

    def __init__(self, transform: Transform) -> None:
        super().__init__(transform.event_dims, transform.context_dim)
        self.optional_context = transform.optional_context
        self.transform = transform

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(z, context)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform(x, context)


def _for(transform: nn.Module, context: Tensor | None) -> Tensor | None:
    """Unconditional parts of a conditional flow are not shown the context."""
    return context if transform.context_dim else None
