"""Seeds and generators: one's own, seeded by several integers, and torch's, which dropout and
torch.distributions draw from and which are left as they were.
"""

from contextlib import AbstractContextManager

import torch


def untouched(device: torch.device) -> AbstractContextManager[None]:
    """Inside, draws on the CPU and on `device` move torch's generators; then these are as before.

    Without devices, `torch.random.fork_rng` warns where there are two GPUs, and starts them all.
    """
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def reseed(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device`.

    `torch.manual_seed` takes a millisecond, and seeds those of every GPU.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def mixed(*numbers: int) -> int:
    """One well-spread 32-bit seed (all that torch's CPU generator uses) from integers."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & 0xFFFFFFFF


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator seeded by several integers."""
    return torch.Generator().manual_seed(mixed(*numbers))
