"""Seeded generators, and the state of torch's global ones.

Dropout and torch.distributions draw from the global generators, whose state is restored.
"""

from contextlib import AbstractContextManager

import torch


def untouched(device: torch.device) -> AbstractContextManager[None]:
    """A context manager that restores torch's global generators of the CPU and of `device`.

    Without a list of devices, `torch.random.fork_rng` would initialize all GPUs and warn if there
    are several.
    """
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


def reseed(seed: int, device: torch.device) -> None:
    """Seed torch's global generators of the CPU and of `device`.

    `torch.manual_seed` takes a millisecond and seeds those of all GPUs.

    Args:
        seed: The seed.
        device: The device.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def mixed(*numbers: int) -> int:
    """Hash integers to a 32-bit seed, as many bits as torch's CPU generator uses."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & 0xFFFFFFFF


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator whose seed is a hash of several integers."""
    return torch.Generator().manual_seed(mixed(*numbers))
