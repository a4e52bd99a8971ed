"""Thickness and slant of a picture of strokes, measured from its pixels, and scipy's ways to them.

Pictures have the shape (N, 1, H, W), strokes are bright, and rows are counted downward.
"""

from collections.abc import Callable

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn.functional import pad

Operation = Callable[[Tensor, Tensor], Tensor]
FINE = 8  # parts of a pixel's side in which strokes grow


def thickness(x: Tensor) -> Tensor:
    r"""Width of the strokes in pixels, twice their area by their perimeter, shape (N,).

    .. math:: t = 2 \sum_{ij} p_{ij} \Big/ \sum_{ij} |\nabla p|_{ij}

    A stroke of length L and width w has an area of wL and a perimeter near 2L. The perimeter of a
    gray picture is its total variation (coarea formula), here of the means of the differences in
    squares of 2 × 2 pixels, with black around the picture. Brightness cancels. An empty picture
    has thickness 0.
    """
    p = pad(x[:, 0].double(), (1, 1, 1, 1))
    a, b, c, d = p[:, :-1, :-1], p[:, :-1, 1:], p[:, 1:, :-1], p[:, 1:, 1:]
    length = torch.hypot(b + d - a - c, c + d - a - b).sum((1, 2)) / 2
    return 2 * p.sum((1, 2)) / torch.where(length > 0, length, torch.inf)


def slant(x: Tensor) -> Tensor:
    r"""Shift to the right for each pixel upward, by second moments, shape (N,).

    .. math:: s = -\mu_{11} / \mu_{02}, \qquad
        \mu_{ab} = \sum_{ij} p_{ij}\,(j - \bar j)^a (i - \bar i)^b

    A shear by k adds k to it. It is the tangent of the angle by which Morpho-MNIST (Castro et al.,
    2019, https://arxiv.org/abs/1809.10780) measures slant. What has no height has slant 0.
    """
    p = x[:, 0].double()
    p = p / p.sum((1, 2), keepdim=True).clamp_min(1e-9)
    down, across = centered(p.sum(2)), centered(p.sum(1))
    product = torch.einsum("nij,ni,nj->n", p, down, across)
    height = torch.einsum("nij,ni->n", p, down**2)
    return -product / torch.where(height > 1e-9, height, torch.inf)


def centered(mass: Tensor) -> Tensor:
    """Coordinates less the mean of each row of masses, which sum to one, shape (N, size)."""
    at = torch.arange(mass.shape[1], dtype=mass.dtype)
    return at - (mass @ at)[:, None]


ATTRIBUTES = {"thickness": thickness, "slant": slant}


def sheared(x: Tensor, amount: Tensor) -> Tensor:
    """Each picture sheared about its center of mass: its slant grows by an amount, shape (N,)."""
    made = []
    for picture, k in zip(x[:, 0].double().numpy(), amount.tolist(), strict=True):
        row = ndimage.center_of_mass(picture)[0]
        matrix, offset = [[1.0, 0.0], [k, 1.0]], [0.0, -k * row]
        made.append(ndimage.affine_transform(picture, matrix, offset, order=1))
    return as_pictures(torch.from_numpy(np.stack(made)), x)


def thickened(x: Tensor, amount: Tensor) -> Tensor:
    """Each picture with strokes that are wider by an amount, shape (N,), of pixels.

    As Morpho-MNIST does: on a picture of FINE times the size the strokes, what is brighter than
    half, grow by a distance to both sides; what that adds to each pixel's area is added to it.
    """
    made = []
    for picture, k in zip(x[:, 0].double().numpy(), amount.tolist(), strict=True):
        fine = ndimage.zoom(picture, FINE, order=1, mode="nearest", grid_mode=True)
        stroke = fine > picture.max() / 2
        inside, outside = (ndimage.distance_transform_edt(part) for part in (stroke, ~stroke))
        grown = np.where(stroke, inside - 0.5, 0.5 - outside) + k / 2 * FINE > 0
        height, width = picture.shape
        area = (grown.astype(float) - stroke).reshape(height, FINE, width, FINE).mean((1, 3))
        made.append(picture + picture.max() * area)
    return as_pictures(torch.from_numpy(np.stack(made)), x)


def as_pictures(values: Tensor, like: Tensor) -> Tensor:
    """Whole gray levels from 0 to 255, in the shape and dtype of others."""
    return values.round().clamp(0, 255).reshape(like.shape).to(like.dtype)


OPERATIONS: dict[str, Operation] = {"thickness": thickened, "slant": sheared}
