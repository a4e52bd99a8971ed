"""The interface of transforms, their composition and their inversion."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnf.errors import expect_context, expect_event, expect_shape
from cnf.printing import grouped, named, shaped
from cnf.registry import Registry
from cnf.transforms.recompute import Step, recomputed

TRANSFORMS = Registry("transform")


class Transform(nn.Module, ABC):
    """A bijection between base z and data x, with log|det Jacobian| of each direction.

    Classes are abstract or final: a subclass implements `forward` and `inverse`, and overrides no
    method that is implemented.

    Attributes:
        event_dims: Number of trailing axes that form the event: 1 for vectors, 3 for images.
        event_shape: Shape of one event; None if any shape is accepted.
        context_dim: Size of the context; 0 for an unconditional transform.
        optional_context: Whether a conditional transform also accepts context=None.
        recomputable: Whether the two directions are inverses of each other in train mode as well.
    """

    optional_context = False
    recomputable = True

    def __init__(
        self,
        event_dims: int = 1,
        context_dim: int = 0,
        event_shape: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.event_shape, self.event_dims = None, event_dims
        if event_shape is not None:
            self.event_shape = expect_shape(type(self).__name__, event_shape, "event_shape")
            self.event_dims = len(self.event_shape)
        self.context_dim = context_dim

    @abstractmethod
    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Base → data: x, of z's batch shape, and log|det ∂x/∂z|, shape (*batch,), in nats.

        Args:
            z: Base samples, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
        """

    @abstractmethod
    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Data → base: z, of x's batch shape, and log|det ∂z/∂x|, shape (*batch,), in nats.

        Args:
            x: Data, shape (*batch, *event).
            context: Condition, shape (*batch, C), or None.
        """

    def _expect(self, name: str, value: Tensor, context: Tensor | None = None) -> None:
        """Raise ValueError if the value has another event shape, or there is no context for it."""
        shape, size = self.event_shape, self.context_dim
        if shape is not None and value.shape[value.dim() - len(shape) :] != shape:
            expect_event(self._who(name), name, value, shape)
        if not size or (context is None and self.optional_context):
            return
        if context is None or context.shape[-1:] != (size,):
            expect_context(self._who(name), context, size)

    def extra_repr(self) -> str:
        """The text of `repr`; `torch.nn.Module.__repr__(transform)` also shows the networks."""
        return shaped(self.event_shape, self.context_dim)

    def __repr__(self) -> str:
        return named(self, self.extra_repr())

    def _who(self, name: str) -> str:
        return f"{type(self).__name__}.{'forward' if name == 'z' else 'inverse'}"


@TRANSFORMS.register("identity", example=lambda dim: Identity(dim))
class Identity(Transform):
    """x = z; log|det| = 0. With it a flow is its base, preprocessing and dequantization alone.

    Args:
        event_shape: (D,), (C, H, W) or another shape of z.
    """

    def __init__(self, event_shape: int | Sequence[int]) -> None:
        super().__init__(event_shape=event_shape)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z)
        return z, z.new_zeros(z.shape[: z.dim() - self.event_dims])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x)
        return x, x.new_zeros(x.shape[: x.dim() - self.event_dims])


class Compose(Transform):
    """The composition f_n ∘ … ∘ f_1, listed from base to data; the log-determinants add up.

    Args:
        transforms: One or more transforms with the same number of event axes (and, for vectors,
            the same D). All conditional ones have the same context size.
        recompute: Whether the backward pass recomputes the activations by inversion instead of
            storing them. Memory then does not grow with the number of transforms, at the cost of
            one pass through the inverses.

    Raises:
        ValueError: There is no transform, the transforms do not fit each other, or `recompute` is
            set with a transform that has no inverse in train mode.
    """

    def __init__(self, transforms: Sequence[Transform], recompute: bool = False) -> None:
        if not transforms:
            raise ValueError(
                "Compose: expected at least one transform, got none; Identity(shape) is one"
            )
        dims = {transform.event_dims for transform in transforms}
        if len(dims) > 1:
            raise ValueError(f"Compose: expected one event_dims for all, got {sorted(dims)}")
        lossy = [type(t).__name__ for t in transforms if not t.recomputable]
        if recompute and lossy:
            raise ValueError(
                f"Compose: expected transforms that are invertible in train mode, as "
                f"recompute=True needs, got {lossy[0]}; set recompute=False"
            )
        sizes = {t.context_dim for t in transforms} - {0}
        if len(sizes) > 1:
            raise ValueError(f"Compose: expected one context_dim for all, got {sorted(sizes)}")
        shapes = {t.event_shape: type(t).__name__ for t in transforms if t.event_shape is not None}
        if dims == {1} and len(shapes) > 1:
            parts = " and ".join(f"{name} of {shape}" for shape, name in shapes.items())
            raise ValueError(f"Compose: expected one event shape for all, got {parts}")
        shape = next(iter(shapes), None) if dims == {1} else None  # images may be squeezed
        super().__init__(dims.pop(), max(sizes, default=0), shape)
        self.optional_context = all(t.optional_context for t in transforms if t.context_dim)
        self.recomputable = not lossy
        self.recompute = recompute
        self.transforms = nn.ModuleList(transforms)

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self._apply_steps(
            [Step(t, t.forward, t.inverse) for t in self._parts()], z, context
        )

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        parts = reversed(self._parts())
        return self._apply_steps([Step(t, t.inverse, t.forward) for t in parts], x, context)

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Fit each part that has a `fit` to data x, (N, *event), under the parts after it."""
        for part in reversed(self._parts()):
            if hasattr(part, "fit"):
                part.fit(x)  # pyright: ignore
            x, _ = part.inverse(x)

    @property
    def fitted(self) -> bool:
        """Whether any part has been fitted."""
        return any(getattr(part, "fitted", False) for part in self._parts())

    @property
    def spec(self) -> list[Any] | None:
        """The parts' own, from the data on, as a model's `preprocess` takes them."""
        parts = [getattr(part, "spec", None) for part in reversed(self._parts())]
        return None if None in parts else parts

    def extra_repr(self) -> str:
        return grouped(self._parts())

    def _apply_steps(
        self, steps: list[Step], value: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if self.recompute and torch.is_grad_enabled():
            return recomputed(steps, value, context)
        total = None
        for step in steps:
            value, ladj = step.apply(value, context)
            total = ladj if total is None else total + ladj
        assert total is not None
        return value, total

    def _parts(self) -> list[Transform]:
        return list(self.transforms)  # pyright: ignore


class Inverse(Transform):
    """A transform with its two directions exchanged."""

    def __init__(self, transform: Transform) -> None:
        super().__init__(transform.event_dims, transform.context_dim, transform.event_shape)
        self.optional_context = transform.optional_context
        self.recomputable = transform.recomputable
        self.transform = transform

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform.inverse(z, context)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.transform(x, context)

    def extra_repr(self) -> str:
        return repr(self.transform)


def transforms_in(transform: Transform) -> Iterator[nn.Module]:
    """The transform and its parts, without the layers of their networks.

    This is 20× faster than `modules`. A module that is used twice is returned twice.
    """
    found: list[nn.Module] = [transform]
    while found:
        part = found.pop()
        yield part
        if isinstance(part, Transform | nn.ModuleList):
            found += (inner for inner in part._modules.values() if inner is not None)
