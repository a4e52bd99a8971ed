"""Layers that are conditioned on time and context, as in FFJORD.

Each is an affine map of its input whose scale, shift or weights depend on the conditioning input
u = [t, sin, cos, …, c].

Source: Grathwohl et al. (2019), FFJORD, https://arxiv.org/abs/1810.01367.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cnf.registry import Registry

LAYERS = Registry("layer")


class AffineLayer(NamedTuple):
    """The affine map h → scale ∘ (weight h) + bias.

    Attributes:
        weight: Weight, shape (out, in), or (*batch, out, in) with one for each row.
        bias: Bias, shape (out,) or (*batch, out).
        scale: Scale of each row, shape (*batch, out). None if there is none, or if all rows share
            it and the weight is already multiplied by it.
        joined: A second input, shape (*batch, features), and its weight, (out, features). It is
            concatenated with h, as one matrix product is faster than two.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor | None = None
    joined: tuple[Tensor, Tensor] | None = None

    def __call__(self, h: Tensor) -> Tensor:
        if self.weight.dim() > 2:
            return (self.weight @ h.unsqueeze(-1)).squeeze(-1) + self.bias
        if self.joined is not None:
            u, weight = self.joined
            both = torch.cat([h, u.expand(*h.shape[:-1], -1)], -1)
            return F.linear(both, torch.cat([self.weight, weight], -1), self.bias)
        if self.scale is not None:
            return F.linear(h, self.weight) * self.scale + self.bias
        return F.linear(h, self.weight, self.bias)


def along(layer: Any, tangents: Tensor) -> Tensor:
    """The derivative of an affine layer in directions of its input h.

    Args:
        layer: An `AffineLayer` or a `PlainLinear`.
        tangents: Directions, shape (n, *batch, in).

    Returns:
        Their images, shape (n, *batch, out).
    """
    if layer.weight.dim() > 2:
        return (layer.weight @ tangents.unsqueeze(-1)).squeeze(-1)
    images = F.linear(tangents, layer.weight)
    return images if layer.scale is None else images * layer.scale


class Modulation(nn.Module):
    """Scale σ(G u + g) and shift B u of a layer's outputs, each of which is optional.

    Args:
        features: Size of u.
        outputs: Number of outputs (channels, for images).
        scale: Whether there is a scale, in (0, 1).
        shift: Whether there is a shift.
    """

    def __init__(self, features: int, outputs: int, scale: bool, shift: bool) -> None:
        super().__init__()
        self.scale = nn.Linear(features, outputs) if scale else None
        self.shift = nn.Linear(features, outputs, bias=False) if shift else None

    def forward(self, u: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Scale and shift at u, (*batch, features), each of shape (*batch, outputs) or None."""
        scale = None if self.scale is None else torch.sigmoid(self.scale(u))
        return scale, None if self.shift is None else self.shift(u)


MODULATIONS = Registry("modulation")
for _name, _scale, _shift in (
    ("ignore", False, False),
    ("concat", False, True),
    ("squash", True, False),
    ("concatsquash", True, True),
):
    MODULATIONS.register(_name)(partial(Modulation, scale=_scale, shift=_shift))


class PlainLinear(nn.Linear):
    """A linear layer that does not depend on u, and is its own `AffineLayer`.

    Args:
        inputs: Size of h.
        outputs: Size of the output.
        features: Size of u.
    """

    scale = None

    def __init__(self, inputs: int, outputs: int, features: int) -> None:
        super().__init__(inputs, outputs)

    def affine(self, u: Tensor) -> "PlainLinear":
        """The layer at u, shape (features,) or (*batch, features)."""
        return self


class ModulatedLinear(nn.Module):
    """A linear layer whose outputs are scaled and shifted by the condition.

    Args:
        inputs: Size of h.
        outputs: Size of the output.
        features: Size of u.
        kind: A name in `MODULATIONS`: "concat" is a linear layer of [h, u], "squash" scales its
            outputs by σ(G u + g), and "concatsquash" does both.
    """

    def __init__(self, inputs: int, outputs: int, features: int, kind: str) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)
        self.modulation = MODULATIONS[kind](features, outputs)

    def affine(self, u: Tensor) -> AffineLayer:
        """The layer at u, shape (features,) or (*batch, features)."""
        weight, bias, modulation = self.linear.weight, self.linear.bias, self.modulation
        if modulation.scale is None:  # in fewer operations than the general case
            shift = modulation.shift.weight
            if u.dim() > 1:
                return AffineLayer(weight, bias, joined=(u, shift))
            return AffineLayer(weight, F.linear(u, shift, bias))
        scale, shift = modulation(u)
        bias = bias * scale if shift is None else bias * scale + shift
        if scale.dim() == 1:
            return AffineLayer(weight * scale.unsqueeze(-1), bias)
        return AffineLayer(weight, bias, scale)


class HyperLinear(nn.Module):
    """A linear layer whose weights and bias are an affine function of u.

    Args:
        inputs: Size of h.
        outputs: Size of the output.
        features: Size of u.
    """

    def __init__(self, inputs: int, outputs: int, features: int) -> None:
        super().__init__()
        self.shape = (outputs, inputs)
        self.hyper = nn.Linear(features, outputs * (inputs + 1))
        with torch.no_grad():  # at u = 0 the layer has torch's default initialization
            start = nn.Linear(inputs, outputs)
            self.hyper.bias.copy_(torch.cat([start.weight.flatten(), start.bias]))
            self.hyper.weight.mul_(inputs**-0.5)

    def affine(self, u: Tensor) -> AffineLayer:
        """The layer at u, shape (features,) or (*batch, features)."""
        outputs, inputs = self.shape
        weight, bias = self.hyper(u).split([outputs * inputs, outputs], -1)
        return AffineLayer(weight.unflatten(-1, (outputs, inputs)), bias)


class BlendLinear(nn.Module):
    """A linear layer whose weight and bias are interpolated linearly between t = 0 and t = 1.

    The other entries of u shift the outputs.

    Args:
        inputs: Size of h.
        outputs: Size of the output.
        features: Size of u.
    """

    def __init__(self, inputs: int, outputs: int, features: int) -> None:
        super().__init__()
        self.start, self.end = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)
        self.shift = nn.Linear(features - 1, outputs, bias=False) if features > 1 else None

    def affine(self, u: Tensor) -> AffineLayer:
        """The layer at u, shape (features,) or (*batch, features)."""
        t, rest = u.split([1, u.shape[-1] - 1], -1)
        weight = torch.lerp(self.start.weight, self.end.weight, t.unsqueeze(-1))
        bias = torch.lerp(self.start.bias, self.end.bias, t)
        return AffineLayer(weight, bias if self.shift is None else bias + self.shift(rest))


LAYERS.register("ignore")(PlainLinear)
for _name in ("concat", "squash", "concatsquash"):
    LAYERS.register(_name)(partial(ModulatedLinear, kind=_name))
LAYERS.register("hyper")(HyperLinear)
LAYERS.register("blend")(BlendLinear)
