"""What tells one data set from another, kept with a run so that it goes on with its own."""

import hashlib
from typing import Any

import torch
from torch import Tensor

from cnf.objectives import Batch

WHOLE = 64_000_000  # bytes; of larger tensors the first and last rows are hashed
ROWS = 1_000
DRAWS = 8


def of_rows(batch: Batch) -> str:
    """A hash of rows: names, shapes, dtypes and bytes."""
    digest = hashlib.sha256()
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
            small = value.numel() * value.element_size() <= WHOLE
            rows = value if small else torch.cat([value[:ROWS], value[-ROWS:]])
            flat = rows.detach().cpu().contiguous().flatten()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def of_density(density: Any, seed: int) -> Tensor | None:
    """A few draws: numbers rather than a hash, since machines differ in their last digits.

    None where a density draws otherwise each time, whatever the generator.
    """
    one, two = (
        density.sample(DRAWS, torch.Generator().manual_seed(seed)).cpu().double() for _ in range(2)
    )
    return one if torch.equal(one, two) else None


def same_data(before: Any, now: Any) -> bool:
    """Whether two fingerprints are of the same data; one that is not known may be of any."""
    if before is None or now is None:
        return True
    if isinstance(before, Tensor) and isinstance(now, Tensor):
        if before.shape != now.shape:
            return False
        scale = now.abs().max().item()
        return torch.allclose(before, now, rtol=1e-3, atol=1e-3 * scale)
    return isinstance(before, str) and isinstance(now, str) and before == now
