"""Spoken digits by espeak-ng: seeded voices, pitches and speeds, as waveforms of whole numbers."""

import io
import random
import shutil
import subprocess
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.signal import resample_poly
from torch import Tensor

from cnf.data import Images

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
LEVELS = 256  # of a sample, as in a WAV of 8 bits, whose silence is 128
SPOKEN = 22_050  # Hz, of espeak-ng
PEAK = 120  # levels from 128 that the loudest sample of an utterance has
SILENT = 0.02  # of the peak: what is below at the beginning is cut off


def spoken_digits(
    folder: Path, shape: Sequence[int], rate: int, accents: Sequence[str],
    parts: Mapping[str, Mapping[str, Any]],
) -> Images:  # fmt: skip
    """Digits with their labels as context, read from a folder, or spoken and kept there.

    Args:
        folder: Where waveforms are kept, as digits.npz of each part.
        shape: How the samples of an utterance are given, (C, H, W).
        rate: Samples per second.
        accents: Voices of espeak-ng, each of which is spoken in each variant.
        parts: Of "train", "validation" and "test" the number of utterances and the variants.
    """
    made = {}
    for name, part in parts.items():
        path = folder / f"{name}-{part['utterances']}-{rate}.npz"
        if not path.exists():
            length = int(np.prod(shape))
            x, labels = speak_all(name, length, rate, accents, **part)
            folder.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, x=x, labels=labels)
        kept = np.load(path)
        x = torch.from_numpy(kept["x"]).reshape(-1, *shape)
        made[name] = Images(x, f"digits, {name}", kept["labels"])
    images = made["train"]
    images.validation, images.test = made["validation"], made["test"]
    return images.conditional(len(WORDS))


def speak_all(
    seed: str, length: int, rate: int, accents: Sequence[str], utterances: int,
    variants: Sequence[str],
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Utterances of digits in turn, (N, length) of uint8, and the digits, (N,).

    Voice, pitch and speed are drawn anew for each utterance.
    """
    rng = random.Random(seed)
    rows, labels = [], np.arange(utterances) % len(WORDS)
    for label in labels:
        voice = f"{rng.choice(accents)}+{rng.choice(variants)}"
        loud = speak(WORDS[label], voice, rng.randint(20, 80), rng.randint(160, 220))
        dither = np.random.default_rng(rng.getrandbits(32)).uniform(-0.5, 0.5, (2, length)).sum(0)
        rows.append(of_whole_numbers(loud, rate, length, dither))
    return np.stack(rows), labels


def speak(word: str, voice: str, pitch: int, speed: int) -> np.ndarray:
    """A word as espeak-ng says it, at 22,050 Hz.

    Args:
        word: What is said.
        voice: An accent, "+", and a variant.
        pitch: From 0 to 99.
        speed: Words per minute.

    Raises:
        FileNotFoundError: espeak-ng is not installed.
    """
    if shutil.which("espeak-ng") is None:
        raise FileNotFoundError(
            "speak: expected the program espeak-ng, which makes the data, and found none; "
            "install it by apt-get install espeak-ng"
        )
    command = ["espeak-ng", "-v", voice, "-p", str(pitch), "-s", str(speed), "--stdout", word]
    found = subprocess.run(command, capture_output=True, check=True).stdout
    with wave.open(io.BytesIO(found)) as file:  # its header leaves the length open
        frames = file.readframes(len(found))
    return np.frombuffer(frames, "<i2").astype(float)


def of_whole_numbers(loud: np.ndarray, rate: int, length: int, dither: np.ndarray) -> np.ndarray:
    """Whole numbers from 0 to 255 at another rate, from the first sound on, of a given length.

    Dither is what keeps rounding from being heard: noise of the sum of two uniform numbers. It
    also keeps silence from being 128 throughout, which has no density.

    Source: Lipshitz et al. (1992), Quantization and dither: a theoretical survey.

    Args:
        loud: Samples at 22,050 Hz.
        rate: Samples per second of the result.
        length: Samples of the result; what is shorter ends in silence, 128 and dither.
        dither: What is added before rounding, in levels, (length,).
    """
    slow = resample_poly(loud, rate, SPOKEN)
    slow *= PEAK / np.abs(slow).max()
    begin = int(np.argmax(np.abs(slow) > SILENT * PEAK))
    slow = slow[begin : begin + length]
    slow = np.pad(slow, (0, length - len(slow)))
    return ((slow + dither).round() + LEVELS // 2).clip(0, LEVELS - 1).astype(np.uint8)


def write_wav(path: Path, x: Tensor, rate: int) -> None:
    """Write samples of 8 bits, one utterance after the other.

    Args:
        path: The file, with its folder.
        x: Whole numbers from 0 to 255, (N, *shape).
        rate: Samples per second.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(1)
        file.setframerate(rate)
        file.writeframes(x.to(torch.uint8).numpy().tobytes())
