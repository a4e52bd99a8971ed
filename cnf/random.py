"""torch's own generators, from which dropout and torch.distributions draw: seeded, and left as
they were."""

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
