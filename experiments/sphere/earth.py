"""Places on the earth in two charts, kernel densities, and angles with a known density."""

import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, VonMises

FILES = {  # name in $CNF_DATA/earth, and the lines before the numbers
    "volcano": ("volerup.csv", 2),
    "earthquake": ("quakes_all.csv", 4),
    "flood": ("flood.csv", 2),
    "fire": ("fire.csv", 1),
}
SHARES = (0.8, 0.1)  # of the rows: to train on, and to validate on
CONCENTRATIONS = np.logspace(0, 7, 57)


class Split(NamedTuple):
    """Unit vectors to train on, to validate on and to test on, shape (N, 3), in float64."""

    train: Tensor
    validation: Tensor
    test: Tensor


def read(name: str) -> Tensor:
    """Latitudes and longitudes in degrees, shape (N, 2)."""
    file, skip = FILES[name]
    path = Path(os.environ["CNF_DATA"]) / "earth" / file
    return torch.from_numpy(np.loadtxt(path, delimiter=",", skiprows=skip))


def split(places: Tensor, seed: int) -> Split:
    """The parts of one random split, as in the papers on flows on manifolds."""
    order = torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))
    sizes = [round(share * len(places)) for share in SHARES]
    train, validation, test = unit_vectors(places)[order].tensor_split(
        [sizes[0], sizes[0] + sizes[1]]
    )
    return Split(train, validation, test)


def unit_vectors(places: Tensor) -> Tensor:
    """Unit vectors, shape (N, 3), of latitudes and longitudes in degrees, shape (N, 2)."""
    latitude, longitude = torch.deg2rad(places).unbind(-1)
    across = latitude.cos()
    return torch.stack([across * longitude.cos(), across * longitude.sin(), latitude.sin()], -1)


def sphere(x: Tensor) -> tuple[Tensor, float]:
    """Unit vectors as they are, and the log of the area that a unit of them is."""
    return x, 0.0


def cylinder(x: Tensor) -> tuple[Tensor, float]:
    """Longitude and π·sin(latitude), in [-π, π): equal areas (Archimedes) of two "angles".

    An area on the sphere is 1/π of that of the angles. Taken as a circle, the second joins the two
    poles, and nothing tells that all longitudes are one point there.
    """
    angles = torch.stack([torch.atan2(x[:, 1], x[:, 0]), math.pi * x[:, 2]], -1)
    return angles, -math.log(math.pi)


CHARTS = {"sphere": sphere, "cylinder": cylinder}


def is_new(test: Tensor, train: Tensor) -> Tensor:
    """Which test rows are at no place of the training rows, to the digits of the files."""
    known = {tuple(row) for row in train.mul(1e9).round().tolist()}
    return torch.tensor([tuple(row) not in known for row in test.mul(1e9).round().tolist()])


def kernel_log_density(x: Tensor, centers: Tensor, concentration: float) -> Tensor:
    r"""Mean of von Mises-Fisher densities κ/(2π(1 - exp(-2κ)))·exp(κ(x·c - 1)) around the centers.

    Args:
        x: Unit vectors, shape (N, 3).
        centers: Unit vectors, shape (M, 3).
        concentration: κ.
    """
    scale = math.log(concentration / (2 * math.pi * -math.expm1(-2 * concentration)))
    near = -0.5 * torch.cdist(x, centers, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.logsumexp(concentration * near, -1) - math.log(len(centers)) + scale


def spiked_log_density(
    x: Tensor, centers: Tensor, concentration: float, spike: float = 1e10
) -> Tensor:
    """Half of the kernels' density, and half of it in spikes of about 60 m at the centers."""
    both = [kernel_log_density(x, centers, k) for k in (concentration, spike)]
    return torch.stack(both).logsumexp(0) - math.log(2)


def fitted_concentration(parts: Split) -> float:
    """The concentration that the validation rows like best."""
    scores = [kernel_log_density(parts.validation, parts.train, k).mean() for k in CONCENTRATIONS]
    return float(CONCENTRATIONS[int(torch.stack(scores).argmax())])


def angles_with_known_density() -> MixtureSameFamily:
    """Six products of two von Mises densities, three of which lie across the seam at ±π."""
    means = [[3.0, 0.0], [0.0, -3.1], [-3.0, 3.1], [1.5, 1.5], [-1.5, -1.0], [0.5, 0.5]]
    concentrations = [
        [8.0, 2.0],
        [3.0, 20.0],
        [20.0, 20.0],
        [40.0, 40.0],
        [10.0, 100.0],
        [4.0, 4.0],
    ]
    parts = Independent(VonMises(torch.tensor(means), torch.tensor(concentrations)), 1)
    return MixtureSameFamily(Categorical(torch.ones(6)), parts)


def entropy(density: MixtureSameFamily, side: int = 1024) -> float:
    """-∫ p log p over the torus by the trapezoidal rule, which has no error to speak of here."""
    line = (torch.arange(side, dtype=torch.float64) / side - 0.5) * 2 * math.pi
    log_p = torch.cat(
        [density.log_prob(torch.cartesian_prod(part, line)) for part in line.split(64)]
    )
    return float(-(log_p.exp() * log_p).sum() * (2 * math.pi / side) ** 2)
