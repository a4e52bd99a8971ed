"""Snapshots of single cells in few variables, and what needs no training to fill a gap."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from cnf.matching.couplings import partial
from cnf.metrics import wasserstein1

SETS = {
    "lineage": "tigon_lineage.npz", "emt": "tigon_emt.npz", "emt-10d": "emt.csv.gz",
    "bifurcation": "tigon_bifurcation.npz",
}  # fmt: skip


def snapshots(name: str) -> list[Tensor]:
    """The cells of each time, in order, shape (N, D) each; from $CNF_DATA/singlecell.

    Args:
        name: A name in `SETS`.
    """
    path = Path(os.environ["CNF_DATA"]) / "singlecell" / SETS[name]
    if path.suffix == ".npz":
        found = np.load(path)
        x, t = found["x"], found["t"]
    else:
        table = np.loadtxt(path, delimiter=",", skiprows=1)
        x, t = table[:, 1:], table[:, 0]
    return [torch.from_numpy(x[t == time]).double() for time in np.unique(t)]


@dataclass(frozen=True)
class Gap:
    """A snapshot that is held out, and what a model may see, all shifted and scaled alike.

    Attributes:
        seen: The other snapshots by time, shape (N, D) each.
        time: Of the one that is held out.
        target: One half of it, shape (M, D), that everything is compared with.
        other: The other half, shape (M, D).
        scale: What a unit is in the data's own: one number, so that transport is the same.
    """

    seen: dict[int, Tensor]
    time: int
    target: Tensor
    other: Tensor
    scale: float

    @property
    def before(self) -> Tensor:
        """The snapshot before, shape (N, D)."""
        return self.seen[self.time - 1]

    @property
    def after(self) -> Tensor:
        """The snapshot after, shape (N, D)."""
        return self.seen[self.time + 1]

    def distance(self, x: Tensor) -> float:
        """The exact W1 from the held-out half, in the data's units.

        Args:
            x: As many points as it has, shape (M, D).
        """
        if x.shape != self.target.shape:
            raise ValueError(
                f"Gap.distance: expected x of shape {tuple(self.target.shape)}, as W1 depends on "
                f"the number of points, got {tuple(x.shape)}"
            )
        return self.scale * wasserstein1(x, self.target)


def gap(cells: list[Tensor], time: int, generator: Generator) -> Gap:
    """Hold a snapshot out.

    Args:
        cells: All snapshots.
        time: The one that is held out, neither the first nor the last.
        generator: Source of its halves.
    """
    if not 0 < time < len(cells) - 1:
        raise ValueError(f"gap: expected a time in 1 … {len(cells) - 2}, got {time}")
    known = torch.cat([x for k, x in enumerate(cells) if k != time])
    loc = known.mean(0)
    scale = (known - loc).square().mean().sqrt().item()
    inside = [((x - loc) / scale).float() for x in cells]
    order = torch.randperm(len(cells[time]), generator=generator)
    half = len(order) // 2
    target, other = inside[time][order[:half]], inside[time][order[half : 2 * half]]
    return Gap({k: x for k, x in enumerate(inside) if k != time}, time, target, other, scale)


def starts(own: Gap, generator: Generator) -> Tensor:
    """As many points of the snapshot before as are compared, shape (M, D)."""
    return own.before[torch.randint(len(own.before), (len(own.target),), generator=generator)]


def earlier(own: Gap, generator: Generator) -> Tensor:
    """The snapshot before, as it is."""
    return starts(own, generator)


def later(own: Gap, generator: Generator) -> Tensor:
    """The snapshot after, as it is."""
    return own.after[torch.randint(len(own.after), (len(own.target),), generator=generator)]


def random_pairs(own: Gap, generator: Generator) -> Tensor:
    """Linear interpolation: the middle of independent points of both."""
    return (starts(own, generator) + later(own, generator)) / 2


def transport_pairs(own: Gap, generator: Generator) -> Tensor:
    """The middle of pairs drawn from the exact optimal transport plan, of squared distances."""
    pairing = partial(own.before, own.after, generator=generator, mass=1.0)
    middle = (own.before + own.after[pairing.j]) / 2
    return middle[torch.randint(len(middle), (len(own.target),), generator=generator)]


def floor(own: Gap, generator: Generator) -> Tensor:
    """The other half of the held-out snapshot."""
    return own.other


BASELINES = {
    "snapshot before": earlier,
    "snapshot after": later,
    "random pairs": random_pairs,
    "exact OT pairs": transport_pairs,
    "other half": floor,
}
