"""Patches of the BSDS300 photographs, as MAF's authors cut them.

Grey, 8 × 8, plus U[0, 1), over 256, less the patch's mean, without the last pixel: D = 63.
Source: Papamakarios et al. (2017), https://arxiv.org/abs/1705.07057. Their random patches are not
public: these are drawn anew.
"""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
SIDE = 8


def archive() -> Path:
    """Where the photographs are, under $CNF_DATA, or ../shared/data from the project's root."""
    folder = Path(os.environ.get("CNF_DATA", ROOT.parent / "shared" / "data"))
    return folder / "bsds300" / "BSDS300-images.tar"


def patches(count: int, photographs: int = 180, seed: int = 0) -> Tensor:
    """Patches of the first training photographs, as many from each: shape (count, 63)."""
    generator = np.random.default_rng(seed)
    found = []
    images = _photographs(photographs)
    for gray in images:
        rows = generator.integers(0, gray.shape[0] - SIDE + 1, -(-count // len(images)))
        columns = generator.integers(0, gray.shape[1] - SIDE + 1, len(rows))
        windows = np.lib.stride_tricks.sliding_window_view(gray, (SIDE, SIDE))
        found.append(windows[rows, columns].reshape(len(rows), -1))
    x = np.concatenate(found)
    x = (x + generator.random(x.shape)) / 256
    x = generator.permutation(x - x.mean(1, keepdims=True))[:count, :-1]
    return torch.from_numpy(x).float()


def _photographs(count: int) -> list[np.ndarray]:
    from PIL import Image

    with tarfile.open(archive()) as file:
        members = [m for m in file.getmembers() if "/train/" in m.name and m.name.endswith("jpg")]
        members = sorted(members, key=lambda member: member.name)[:count]
        contents = [file.extractfile(member).read() for member in members]  # pyright: ignore
    return [np.asarray(Image.open(io.BytesIO(c)).convert("L"), np.float64) for c in contents]
