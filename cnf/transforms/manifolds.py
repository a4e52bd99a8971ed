"""What stands between a flow on a sphere or a torus and its data: no map, but checks."""

import math

import torch
from torch import Tensor

from cnf.errors import expect_positive, warn
from cnf.matching.paths import wrapped_angle
from cnf.transforms.base import Transform

CLOSE = 1e-3  # of the length of data to 1: few digits may be that far off
TURNS = 4  # periods that angles in radians may span without a warning
DRIFT = 0.1  # of that of samples, which a coarse solver leaves; `OnSphere` takes any length


class UnitVectors(Transform):
    """The identity on unit vectors, which refuses others in training and held-out data.

    Elsewhere one whose length is off by more than 1/10 has a log-density of -inf. Nothing is
    standardized: as a flow's `preprocess` it keeps data on the sphere.

    Args:
        dim: Number of coordinates D.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(event_shape=(dim,))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Look at data x, shape (N, D), of which nothing is kept.

        Args:
            x: The training data.

        Raises:
            ValueError: Rows are no unit vectors.
        """
        self.expect_unit_vectors("x", x)

    def expect_unit_vectors(self, name: str, x: Tensor) -> None:
        """Raise ValueError unless all rows of data have a length of 1.

        Args:
            name: What the data are, for the message.
            x: The data, shape (N, D).
        """
        self._expect("x", x)
        length = x.norm(dim=-1)
        off = ~((length - 1).abs() <= CLOSE)  # NaN, too
        if off.any():
            raise ValueError(
                f"UnitVectors.fit: expected {name} to be vectors of length 1, got "
                f"{int(off.sum())} of {len(x)} rows of other lengths, from {length.min():.3g} to "
                f"{length.max():.3g}; give x / x.norm(dim=1, keepdim=True), or, of latitude a and "
                "longitude b in radians, "
                "(cos a cos b, cos a sin b, sin a)"
            )

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z)
        return z, z.new_zeros(z.shape[:-1])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x)
        off = (x.norm(dim=-1) - 1).abs() > DRIFT
        return x, x.new_zeros(off.shape).masked_fill(off, -math.inf)


class WrappedAngles(Transform):
    """Angles modulo their period: both directions give those in [-period/2, period/2).

    Args:
        dim: Number of angles D.
        period: Length of the circle.

    Raises:
        ValueError: The period is not positive.
    """

    def __init__(self, dim: int, period: float = 2 * math.pi) -> None:
        expect_positive("WrappedAngles", period=period)
        super().__init__(event_shape=(dim,))
        self.period = period

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Look at data x, shape (N, D), of which nothing is kept; warn of what may be degrees.

        Args:
            x: The training data.
        """
        self._expect("x", x)
        span = float(x.max() - x.min())
        if span > TURNS * self.period:
            warn(
                f"WrappedAngles.fit: the data span {span:.4g}, which is more than {TURNS} periods "
                f"of {self.period:.4g}; give degrees as radians (torch.deg2rad)"
            )

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, period {self.period:g}"

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z)
        return wrapped_angle(z, self.period), z.new_zeros(z.shape[:-1])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x)
        return wrapped_angle(x, self.period), x.new_zeros(x.shape[:-1])
