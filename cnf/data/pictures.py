"""Densities that are proportional to the darkness of a picture."""

from pathlib import Path

import numpy as np
import torch

from cnf.data.cells import Cells
from cnf.errors import optional

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp")
SIDE = 8.0  # the longer side, the scale of the other densities


class Picture(Cells):
    """The density on the plane that is proportional to the darkness of a picture.

    Each pixel is a cell of constant density, proportional to white minus its gray level. The
    longer side spans [-4, 4], the aspect ratio is preserved, the center is the origin and y points
    up. Transparent pixels count as white.

    Args:
        path: A picture file: PNG, JPEG, or another format that Pillow reads.
        invert: Whether the density is proportional to lightness instead.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not a readable picture, or all its pixels are equal.
        ImportError: Pillow is not installed.
    """

    def __init__(self, path: str | Path, invert: bool = False) -> None:
        path = Path(path)
        light = gray_levels(path)
        if light.min() == light.max():
            raise ValueError(
                f"Picture: expected a picture with light and dark pixels, got {path} with all "
                f"{light.size} pixels alike; its density would be uniform or none"
            )
        mass = np.flipud(light if invert else 1 - light)  # row 0 of a picture is its top
        rows, columns = mass.shape
        x, y = (SIDE / 2 * n / max(rows, columns) for n in (columns, rows))
        super().__init__(path.stem, torch.from_numpy(mass.copy()), (-x, -y), (x, y))


def gray_levels(path: Path) -> np.ndarray:
    """Gray levels of a picture file, shape (rows, columns), float64, from 0 (black) to 1 (white).

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Pillow cannot read it.
    """
    image, ops = optional("PIL.Image", "data"), optional("PIL.ImageOps", "data")
    if not path.is_file():
        raise FileNotFoundError(f"Picture: expected a picture file, got {path}, which is no file")
    try:
        with image.open(path) as opened:
            picture = ops.exif_transpose(opened)
            if picture.mode.startswith(("I", "F")):  # deeper than 8 bits; convert() would clip it
                deep = np.asarray(picture, dtype=np.float64)
                return (deep - deep.min()) / max(np.ptp(deep), np.finfo(float).tiny)
            picture = picture.convert("RGBA")
            white = image.new("RGBA", picture.size, "white")
            flat = image.alpha_composite(white, picture).convert("L")
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"Picture: expected a picture that Pillow reads, got {path} ({reason}); "
            "save it as PNG or JPEG"
        ) from error
    return np.asarray(flat, dtype=np.float64) / 255
