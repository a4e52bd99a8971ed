"""Waveforms as pictures of frequency and time, exactly, and what is measured of their sound."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from scipy.fft import dct
from scipy.signal import ShortTimeFFT, get_window
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor

from cnf.errors import expect_positive
from cnf.transforms import Transform
from cnf.transforms.preprocessing import PREPROCESSING

SILENCE = 128.0
MELS, HOP = 20, 64
FLOOR = 1e-5  # of the power of a full-scale sine, below which there is only rounding


@PREPROCESSING.register("local-cosine")
class LocalCosine(Transform):
    r"""The inverse is an orthonormal lapped cosine transform: a waveform as frequency × time.

    A picture of (C, H, W) has C·H frequencies, the lowest first, and W times. The waveform of
    C·H·W samples, in the order of time, is cut into W blocks of M = C·H. With the half-window
    :math:`w_i = \sin\frac\pi4(1 + \frac{2i + 1}M)` the samples before and after a border of blocks
    are rotated into each other,

    .. math:: r_i = w_i s_{b+i} + w_{-1-i} s_{b-1-i}, \quad
        l_i = w_i s_{b-1-i} - w_{-1-i} s_{b+i}, \qquad 0 \le i < M/2,

    and a DCT of type IV follows in each block. Both are orthogonal, so that the log-determinant
    is 0; it is the MDCT with a sine window, but for the two ends, where nothing overlaps.

    Source: Princen & Bradley (1986), https://doi.org/10.1109/TASSP.1986.1164954; Coifman & Meyer
    (1991), Remarques sur l'analyse de Fourier à fenêtre.

    Args:
        event_shape: (C, H, W), with an even C·H.

    Raises:
        ValueError: Another shape.
    """

    def __init__(self, event_shape: Sequence[int]) -> None:
        super().__init__(event_shape=event_shape)
        shape = self.event_shape or ()
        if len(shape) != 3 or shape[0] * shape[1] % 2:
            raise ValueError(
                "LocalCosine: expected a shape (C, H, W) of C·H frequencies, an even number, and "
                f"W times, got {shape}"
            )
        self.block = shape[0] * shape[1]
        self.spec = "local-cosine"
        cosines = dct(np.eye(self.block), type=4, norm="ortho")
        i = torch.arange(self.block // 2, dtype=torch.float64)
        angle = math.pi / 4 * (1 + (2 * i + 1) / self.block)
        self.register_buffer("cosines", torch.from_numpy(cosines), persistent=False)
        self.register_buffer("far", angle.sin(), persistent=False)  # w_i
        self.register_buffer("near", angle.cos(), persistent=False)  # w_{-1-i}

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z)
        blocks = z.flatten(-3, -2).transpose(-1, -2) @ self.cosines.to(z.dtype)
        s = self._rotated(blocks, -1.0)
        return s.reshape(z.shape) + SILENCE, z.new_zeros(z.shape[:-3])

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x)
        blocks = (x - SILENCE).reshape(*x.shape[:-3], -1, self.block)
        z = self._rotated(blocks, 1.0) @ self.cosines.to(x.dtype)
        return z.transpose(-1, -2).reshape(x.shape), x.new_zeros(x.shape[:-3])

    def _rotated(self, blocks: Tensor, sign: float) -> Tensor:
        """Samples on both sides of each border in terms of each other; -1 undoes it."""
        half = self.block // 2
        far, near = self.far.to(blocks.dtype), sign * self.near.to(blocks.dtype)
        first, last = blocks.split(half, -1)
        before, after = last[..., :-1, :].flip(-1), first[..., 1:, :]  # from the border outwards
        right, left = far * after + near * before, far * before - near * after
        first = torch.cat([first[..., :1, :], right], -2)
        last = torch.cat([left.flip(-1), last[..., -1:, :]], -2)
        return torch.cat([first, last], -1)


@PREPROCESSING.register("arcsinh")
class Arcsinh(Transform):
    r"""x = s·sinh z, whose inverse is linear near 0 and logarithmic beyond s.

    .. math:: \log\left|\frac{dx}{dz}\right| = \log(s \cosh z)

    Args:
        event_shape: Shape of one x.
        scale: The s, in units of x.
    """

    def __init__(self, event_shape: int | Sequence[int], *, scale: float = 1.0) -> None:
        super().__init__(event_shape=event_shape)
        expect_positive("Arcsinh", scale=scale)
        self.scale = scale
        self.spec = {"name": "arcsinh", "scale": scale}

    def forward(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("z", z)
        return self.scale * z.sinh(), self._ladj(z)

    def inverse(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        self._expect("x", x)
        z = (x / self.scale).asinh()
        return z, -self._ladj(z)

    def _ladj(self, z: Tensor) -> Tensor:
        slope = math.log(self.scale / 2) + torch.logaddexp(z, -z)
        return slope.sum(tuple(range(-self.event_dims, 0)))


def spectrogram(x: Tensor, hop: int) -> np.ndarray:
    """Power of each frequency and time, (N, frequencies, times); 1 for a full-scale sine.

    Args:
        x: Waveforms from 0 to 255, (N, *shape).
        hop: Samples from one window to the next, of Hann windows of twice as many as `HOP`.
    """
    s = (x.double().flatten(1).numpy() - SILENCE) / SILENCE
    window = get_window("hann", 2 * HOP)
    return ShortTimeFFT(2 * window / window.sum(), hop, 1.0).spectrogram(s)


def log_mel(x: Tensor, rate: int) -> np.ndarray:
    """Power in dB of 20 bands between 0 and half of the rate, (N, bands, times).

    The bands are triangles of equal width in mel = log(1 + f/700).

    Args:
        x: Waveforms from 0 to 255, (N, *shape).
        rate: Samples per second.
    """
    frequencies = np.linspace(0, rate / 2, HOP + 1)
    edges = 700 * np.expm1(np.linspace(0, np.log1p(rate / 1400), MELS + 2))
    low, middle, high = (edges[i : i + MELS, None] for i in range(3))
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    bands = np.minimum(rising, falling).clip(0)
    return 10 * np.log10(np.einsum("mf,nft->nmt", bands, spectrogram(x, HOP)) + FLOOR)


class Listener:
    """Which digit is heard: a support vector machine of the log-mel picture.

    Args:
        x: Waveforms to learn from, (N, *shape).
        labels: Their digits, (N,).
        rate: Samples per second.
    """

    def __init__(self, x: Tensor, labels: Tensor, rate: int) -> None:
        self.rate = rate
        self.model = make_pipeline(StandardScaler(), SVC(C=10.0))
        self.model.fit(log_mel(x, rate).reshape(len(x), -1), labels.numpy())

    def accuracy(self, x: Tensor, labels: Tensor) -> float:
        """The part of waveforms that is heard as the digit that it should be."""
        return self.model.score(log_mel(x, self.rate).reshape(len(x), -1), labels.numpy())


def loudness(x: Tensor) -> float:
    """The mean level of the utterances, in dB below a full-scale square wave."""
    s = (x.double().flatten(1) - SILENCE) / SILENCE
    return 10 * s.square().mean(1).clamp(min=1e-9).log10().mean().item()


def spectrum_error(x: Tensor, labels: Tensor, y: Tensor, digits: Tensor, rate: int) -> float:
    """How far the mean log-mel pictures of each digit are apart, root mean square, in dB.

    Args:
        x: Waveforms, (N, *shape).
        labels: Their digits.
        y: Other waveforms, with all of these digits.
        digits: Theirs.
        rate: Samples per second.
    """
    mels, others = log_mel(x, rate), log_mel(y, rate)
    found = [
        mels[labels.numpy() == digit].mean(0) - others[digits.numpy() == digit].mean(0)
        for digit in labels.unique().tolist()
    ]
    return float(np.sqrt(np.mean(np.square(found))))


def periodicity(x: Tensor, rate: int, frame: int = 256) -> float:
    """How alike a frame is to itself a period later: 1 for a periodic sound, near 0 for noise.

    The largest autocorrelation, normalized by the energies of both parts, at lags of 1/400 to
    1/60 s, of frames that overlap by half, in the mean weighted with their energy.

    Args:
        x: Waveforms from 0 to 255, (N, *shape).
        rate: Samples per second.
        frame: Samples of a frame.
    """
    s = (x.double().flatten(1) - SILENCE).unfold(1, frame, frame // 2).flatten(0, 1)
    best = s.new_zeros(len(s))
    for lag in range(rate // 400, rate // 60 + 1):
        first, second = s[:, :-lag], s[:, lag:]
        norm = (first.square().sum(1) * second.square().sum(1)).sqrt().clamp(min=1e-9)
        best = torch.maximum(best, (first * second).sum(1) / norm)
    energy = s.square().sum(1)
    return ((best * energy).sum() / energy.sum().clamp(min=1e-9)).item()
