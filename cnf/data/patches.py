"""Patches of natural pictures: BSDS300, cut from its pictures."""

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cnf.data.downloads import lying
from cnf.data.table_sets import TABLE_SETS
from cnf.data.tabular import Points
from cnf.errors import expect_counts, optional
from cnf.random import stream

SIDE = 8  # pixels
ARCHIVES = ("BSDS300-images.tar", "BSDS300-images.tgz", "BSDS300-images.tar.gz")
ADDRESS = "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/bsds/"


@TABLE_SETS.register("bsds300")
def bsds300(
    train: int = 1_000_000, validation: int = 50_000, test: int = 250_000, seed: int = 0
) -> Points:
    """Gray patches of 8×8 pixels of 300 photographs, less their mean, in 63 columns.

    Of the 200 pictures that BSDS300 names train 180 are for training and the last 20, by their
    numbers, for validation; the 100 named test are the test. Places are uniform in a picture
    that is uniform. Pixels + U[0, 1) are divided by 256, less the patch's mean; the last one,
    minus the sum of the others, is left out. MAF's own patches, of the same recipe, are not
    public: results are comparable, not identical.

    Source: Martin et al. (2001), https://doi.org/10.1109/ICCV.2001.937655; Papamakarios et al.
    (2017), MAF, https://arxiv.org/abs/1705.07057.

    Args:
        train: Number of patches to train on; by default it is MAF's, like the others.
        validation: Number of patches to validate on.
        test: Number of test patches.
        seed: Of places and noise.

    Raises:
        FileNotFoundError: The archive of pictures is not there.
        ValueError: It holds something else, or a number is below 2.
    """
    counts = {"train": train, "validation": validation, "test": test}
    expect_counts("bsds300", 2, **counts)
    archive = lying("bsds300", ARCHIVES, f"it is at {ADDRESS}")
    pictures = _gray(archive, "train"), _gray(archive, "test")
    if tuple(map(len, pictures)) != (200, 100):
        raise ValueError(
            "bsds300: expected 200 pictures in train/ and 100 in test/ of "
            f"{archive}, got {len(pictures[0])} and {len(pictures[1])}"
        )
    parts = {"train": pictures[0][:180], "validation": pictures[0][180:], "test": pictures[1]}
    made = {
        name: Points(
            patches(parts[name], count, stream(seed, f"bsds300 {name}")),
            "bsds300",
        )
        for name, count in counts.items()
    }
    points = made["train"]
    points.validation, points.test = made["validation"], made["test"]
    return points


def patches(pictures: Sequence[np.ndarray], n: int, generator: torch.Generator) -> Tensor:
    """Patches of gray pictures as `bsds300` describes them, float32, shape (n, 63).

    Args:
        pictures: Gray levels of at least 8×8 pixels, each uint8 of shape (H, W).
        n: Number of patches.
        generator: Source of places and noise.
    """
    which = torch.randint(len(pictures), (n,), generator=generator)
    places = torch.rand(n, 2, generator=generator, dtype=torch.float64)
    found = torch.empty(n, SIDE, SIDE, dtype=torch.uint8)
    for number, picture in enumerate(pictures):
        rows = (which == number).nonzero().flatten()
        windows = torch.from_numpy(picture).unfold(0, SIDE, 1).unfold(1, SIDE, 1)
        corners = (places[rows] * torch.tensor(windows.shape[:2])).long()
        found[rows] = windows[corners[:, 0], corners[:, 1]]
    x = torch.rand(n, SIDE * SIDE, generator=generator).add_(found.flatten(1)).div_(256)
    return x.sub_(x.mean(1, keepdim=True))[:, :-1].contiguous()


def _gray(archive: Path, part: str) -> list[np.ndarray]:
    """The gray levels of an archive's pictures in a folder, in the order of their numbers."""
    image = optional("PIL.Image", "data")
    try:
        with tarfile.open(archive) as opened:
            members = [m for m in opened.getmembers() if Path(m.name).parent.name == part]
            pictures = {}
            for member in members:
                file = opened.extractfile(member)
                if file is not None and member.name.endswith(".jpg"):
                    picture = image.open(io.BytesIO(file.read())).convert("L")
                    pictures[int(Path(member.name).stem)] = np.array(picture)
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise ValueError(
            f"bsds300: expected BSDS300's pictures, got {archive} ({error})"
        ) from None
    return [pictures[number] for number in sorted(pictures)]
