"""Who draws what: named random streams, draws on a generator's device, torch's global generators.

What the training step of one row gets depends on the seed, the stream's name and the step alone,
not on what else was drawn. Give each use its own name; who needs the draws of another module asks
that module for them.
"""

import zlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor

from cnf.errors import expect_generator

VERSION = 4  # raise it when a stream draws otherwise: runs begun before cannot be resumed


def stream_seed(seed: int, purpose: str, *place: int) -> int:
    """A 32-bit seed, as many bits as torch's CPU generator uses, of one stream.

    Streams of other seeds, purposes or places are independent of it.

    Args:
        seed: Any integer.
        purpose: The name of the stream.
        place: Where in the stream: the step, the epoch, the process.
    """
    key = (zlib.crc32(purpose.encode()), *place)
    sequence = np.random.SeedSequence(seed % 2**64, spawn_key=key)
    return int(sequence.generate_state(1)[0])


def stream(
    seed: int, purpose: str, *place: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """A generator at the beginning of a stream; the numbers differ between a CPU and a GPU.

    Args:
        seed: Any integer.
        purpose: The name of the stream.
        place: Where in the stream, as of `stream_seed`.
        device: Where it draws.
    """
    return torch.Generator(device).manual_seed(stream_seed(seed, purpose, *place))


def device_of(
    generator: torch.Generator | None, like: Tensor | None = None
) -> torch.device | None:
    """Where draws are made: the generator's device, else that of `like`, else torch's default.

    All draws that a user's generator makes ask this.

    Args:
        generator: The source of the draws.
        like: A tensor that lies where draws go.

    Raises:
        TypeError: The generator is something else, such as a seed.
    """
    expect_generator("random draws", generator)
    if generator is not None:
        return generator.device
    return None if like is None else like.device


def draws_itself(device: torch.device) -> bool:
    """Whether a step's draws are made on the device: a CPU would draw for long, and copy."""
    return device.type == "cuda"


def draw(
    sampler: Callable[..., Tensor],
    shape: Sequence[int],
    generator: torch.Generator | None,
    *,
    like: Tensor,
) -> Tensor:
    """Draw numbers on the generator's device, of the dtype of `like`, and move them to its device.

    Args:
        sampler: `torch.randn` or `torch.rand`.
        shape: Of the draws.
        generator: Their source; torch's global one of the device of `like` if None.
        like: A tensor of the wanted dtype and device.
    """
    drawn = sampler(
        tuple(shape), generator=generator, device=device_of(generator, like), dtype=like.dtype
    )
    return drawn.to(like.device)


def preserved(device: torch.device) -> AbstractContextManager[None]:
    """A context manager that restores torch's global generators of the CPU and of `device`.

    Dropout and torch.distributions draw from them. Without a list of devices,
    `torch.random.fork_rng` would initialize all GPUs and warn if there are several.
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
