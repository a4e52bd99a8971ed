"""Flow matching of a flow of several ODEs, such as a multi-scale one; no ODE is solved."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from cnf.fields import VectorField
from cnf.flow import Flow, require_odes
from cnf.objectives.base import OBJECTIVES, Loss, Objective, as_flow, as_prepared, expect_rows
from cnf.objectives.batch import Batch, RowTensors, weighted_mean
from cnf.random import draw
from cnf.transforms.base import Compose, Transform, transforms_in
from cnf.transforms.continuous import Continuous, is_continuous, odes_in, without_odes
from cnf.transforms.image import OnChannels


@dataclass
class ScalePairs(RowTensors):
    """Ends of the paths of all ODEs, and where on its path each field is regressed.

    Attributes:
        x0: Base samples, shape (N, *event).
        x1: What the base would be if no ODE moved the data, shape (N, *event).
        t: A time in [0, 1] for each row and field, shape (N, fields).
        context: Condition as the fields take it, inside preprocessing, shape (N, C).
        weight: Weight of each row, shape (N,).
    """

    x0: Tensor
    x1: Tensor
    t: Tensor
    context: Tensor | None = None
    weight: Tensor | None = None


class Stretch(NamedTuple):
    """A field, and the part of a straight path that it follows.

    Attributes:
        field: The field of an ODE, or of one of its blocks.
        clock: The ODE's own times at which it begins and ends.
        before: How many ODEs carry the same variables before this one.
        count: How many there are.
        start: Where the path of these variables begins, at the base, shape (N, *its event).
        end: Where it ends, at the data.
    """

    field: VectorField
    clock: tuple[float, float]
    before: int
    count: int
    start: Tensor
    end: Tensor

    def squares(self, t: Tensor, context: Tensor | None) -> Tensor:
        """The field's squared error, integrated over its part of the path, shape (N,).

        Args:
            t: Where on this part, in [0, 1], shape (N,).
            context: Condition, shape (N, C), or None.
        """
        begins, ends = self.clock
        own = begins + (ends - begins) * t
        way = self.end - self.start
        along = ((self.before + own) / self.count).reshape(-1, *[1] * (way.dim() - 1))
        v = self.field(own, self.start + along * way, context)
        share = (ends - begins) / self.count
        return share * (self.count * v - way).square().flatten(1).sum(1)


@OBJECTIVES.register("multiscale-matching")
@dataclass(frozen=True)
class MultiscaleMatching(Objective):
    """Flow matching of every ODE of a flow at once: of each scale given the coarser ones.

    A flow such as multi-scale `ffjord` factors out half of the variables at each scale. Its ODEs
    of that scale are regressed on the velocity of straight paths that lead these from the base to
    the data, while the other half, which the coarser scales have made, stays where the data have
    it. So each scale learns p(its variables | those of the coarser scales), and the ODEs one after
    the other carry the base to the data. Several ODEs at one scale, and the blocks of one, follow
    the path one after the other, an equal part of it each.

    Source: flow matching is that of Lipman et al. (2023), https://arxiv.org/abs/2210.02747, and
    the factorization that of Dinh et al. (2017), https://arxiv.org/abs/1605.08803.

    Raises:
        TypeError: The flow holds no ODE, holds parameters outside of its ODEs, which would not be
            trained, or has ODEs elsewhere than in a `Compose` or an `OnChannels`.
    """

    needs_data = True
    rowwise = True
    capturable = True
    lr = 2e-3

    def prepare(
        self, module: nn.Module, batch: Batch, generator: Generator | None = None
    ) -> ScalePairs:
        """The ends of the paths, and a time for each field.

        Args:
            module: A flow with ODEs.
            batch: Data; with x0, the pairs are given.
            generator: Source of draws.

        Raises:
            TypeError: The flow is not one that can be trained so.
            ValueError: x, x0 or the context is not what the flow takes.
        """
        flow = as_flow("MultiscaleMatching", module)
        _expect_odes_alone(flow)
        expect_rows("MultiscaleMatching", flow, batch.x)
        rows = batch.x.shape[:1]
        context = flow.inner_context("MultiscaleMatching", batch.context, rows)
        with torch.no_grad():
            y = flow.inside(batch.x, generator)[0]
            x1 = without_odes(flow.transform).inverse(y)[0]
            x0 = flow.base.sample(rows, generator) if batch.x0 is None else batch.x0
            if x0.shape != x1.shape:
                shapes = f"{tuple(x1.shape)}, got {tuple(x0.shape)}"
                raise ValueError(f"MultiscaleMatching: expected x0 of the base's shape {shapes}")
            fields = sum(len(ode.field.knots) - 1 for ode in odes_in(flow.transform))
            t = draw(torch.rand, (*rows, fields), generator, like=x1)
        return ScalePairs(x0, x1, t, context, batch.weight)

    def __call__(
        self, module: nn.Module, batch: Batch | ScalePairs, generator: Generator | None = None
    ) -> Loss:
        batch = as_prepared(self, module, batch, generator)
        value = weighted_mean(self.per_row(module, batch), batch.weight)
        return Loss(value, {"fm": value.detach()})

    def per_row(
        self, module: nn.Module, batch: Batch | ScalePairs, generator: Generator | None = None
    ) -> Tensor:
        batch = as_prepared(self, module, batch, generator)
        flow = as_flow("MultiscaleMatching", module)
        found = stretches(flow.transform, batch.x0, batch.x1)
        return torch.stack([
            stretch.squares(t, batch.context)
            for stretch, t in zip(found, batch.t.unbind(1), strict=True)
        ]).sum(0)  # fmt: skip

    def parameters(self, module: nn.Module) -> Iterator[nn.Parameter]:
        """Those of the fields; the base stays as it is."""
        return as_flow("MultiscaleMatching", module).transform.parameters()


def stretches(transform: Transform, x0: Tensor, x1: Tensor) -> list[Stretch]:
    """The paths that the fields of a transform follow from the base to the data.

    Args:
        transform: Of ODEs in a `Compose` or `OnChannels`, and of maps without parameters.
        x0: Base samples, shape (N, *event).
        x1: What the base would be if no ODE moved the data, of the same shape.

    Raises:
        TypeError: An ODE is elsewhere.
    """
    walk = _Walk()
    walk.through(transform, x0, x1)
    return [*walk.done, *_shared_out(walk.open)]


class _Walk:
    """From the base to the data, as two points: one that the ODEs have not moved, and the data.

    Attributes:
        done: The stretches of scales that lie behind.
        open: The ODEs of this scale so far, with the ends of their path.
    """

    def __init__(self) -> None:
        self.done: list[Stretch] = []
        self.open: list[tuple[Continuous, Tensor, Tensor]] = []

    def through(self, part: Transform, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """The two points after a part of the transform."""
        if not is_continuous(part):
            return part(start)[0], part(end)[0]
        if isinstance(part, Continuous):
            self.open.append((part, start, end))
        elif isinstance(part, Compose):
            for step in part.transforms:
                start, end = self.through(step, start, end)  # pyright: ignore
        elif isinstance(part, OnChannels) and not self.open:
            start, end = self._past_coarser(part, start, end)
        else:
            raise TypeError(
                "MultiscaleMatching: expected ODEs in a Compose, and in an OnChannels before the "
                f"others, got one in {part}; train this flow with MaximumLikelihood()"
            )
        return start, end

    def _past_coarser(self, part: OnChannels, start: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """The two points once the coarser scales have carried their channels to the data."""
        (start, rest), (end, factored) = (
            x.tensor_split([part.channels], -3) for x in (start, end)
        )
        coarser = _Walk()
        _, data = coarser.through(part.transform, start, end)
        self.done += [*coarser.done, *_shared_out(coarser.open)]
        return torch.cat([data, rest], -3), torch.cat([data, factored], -3)


def _shared_out(odes: list[tuple[Continuous, Tensor, Tensor]]) -> list[Stretch]:
    """The stretches of ODEs that carry the same variables one after the other, by block."""
    return [
        Stretch(ode.field.block(k), clock, before, len(odes), start, end)
        for before, (ode, start, end) in enumerate(odes)
        for k, clock in enumerate(pairwise(ode.field.knots))
    ]


def _expect_odes_alone(flow: Flow) -> None:
    """Raise TypeError unless there are ODEs, and nothing else with parameters."""
    require_odes("MultiscaleMatching", flow)
    for part in transforms_in(flow.transform):
        if isinstance(part, Transform) and not is_continuous(part) and [*part.parameters()]:
            raise TypeError(
                f"MultiscaleMatching: expected no parameters outside of the ODEs, got a {part}, "
                "which would not be trained; train this flow with MaximumLikelihood()"
            )
