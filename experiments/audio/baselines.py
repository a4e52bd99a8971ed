"""What is not ours: densities of scikit-learn for each digit, a predictive code, compressors."""

import bz2
import lzma
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn.covariance import LedoitWolf
from sklearn.linear_model import LinearRegression
from sklearn.mixture import GaussianMixture
from torch import Tensor

from cnf.data import Images
from cnf.dequantization import UniformDequantization
from cnf.transforms import Transform

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "zlib": lambda data: zlib.compress(data, 9),
    "bz2": lambda data: bz2.compress(data, 9),
    "lzma": lambda data: lzma.compress(data, preset=9 | lzma.PRESET_EXTREME),
}  # fmt: skip


class ShrunkGaussian(LedoitWolf):
    """scikit-learn's Gaussian with a shrunk covariance, with the methods of its mixtures."""

    random_state: int | None = None

    def fit(self, X: np.ndarray, y: object = None) -> "ShrunkGaussian":  # noqa: N803
        self.store_precision = False  # it is not needed, and takes an eigendecomposition
        super().fit(X)
        root = stats.Covariance.from_cholesky(np.linalg.cholesky(self.covariance_))
        self.normal = stats.multivariate_normal(self.location_, root)  # pyright: ignore
        return self

    def score_samples(self, x: np.ndarray) -> np.ndarray:
        """The log-density of each row."""
        return self.normal.logpdf(x)

    def sample(self, n: int) -> tuple[np.ndarray]:
        """Rows, (n, D), in a tuple as mixtures give them with their labels."""
        return (self.normal.rvs(n, random_state=self.random_state).reshape(n, -1),)


ESTIMATORS = {"gaussian-mixture": GaussianMixture, "ledoit-wolf": ShrunkGaussian}


class PerDigit:
    """A density of scikit-learn for each digit, of the dequantized and preprocessed waveform.

    Args:
        images: What it is fitted to, with labels.
        preprocess: From what is modeled to waveforms.
        estimator: A name in `ESTIMATORS`, and its options.
        seed: Of the noise of dequantization, and of the estimator where it has one.
    """

    def __init__(
        self, images: Images, preprocess: Transform, estimator: Mapping[str, Any], seed: int
    ) -> None:
        self.preprocess, self.shape = preprocess, images.x.shape[1:]
        self.noise = UniformDequantization()
        options = {key: value for key, value in estimator.items() if key != "name"}
        kind = ESTIMATORS[estimator["name"]]
        if "random_state" in kind().get_params():
            options["random_state"] = seed
        y, _ = self._entered(images.x, torch.Generator().manual_seed(seed))
        labels = images.labels.numpy()
        self.models = [kind(**options).fit(y[labels == k]) for k in range(labels.max() + 1)]

    def log_prob(self, x: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        """The bound of log P(x | digit) of one draw of the noise, in nats, (N,)."""
        y, ladj = self._entered(x, generator)
        found = np.zeros(len(x))
        for k, model in enumerate(self.models):
            own = labels.numpy() == k
            found[own] = model.score_samples(y[own])
        return torch.from_numpy(found) + ladj

    def sample(self, labels: Tensor, seed: int) -> Tensor:
        """A waveform for each digit, (N, *shape)."""
        y = torch.zeros(len(labels), *self.shape, dtype=torch.float64)
        for k, model in enumerate(self.models):
            own = labels == k
            model.random_state = seed + k
            rows = model.sample(int(own.sum()))[0]
            y[own] = torch.from_numpy(rows).reshape(-1, *self.shape)
        return self.noise.decode(self.preprocess.forward(y)[0])

    def _entered(self, x: Tensor, generator: torch.Generator) -> tuple[np.ndarray, Tensor]:
        noisy, _ = self.noise.encode(x.double(), generator)
        y, ladj = self.preprocess.inverse(noisy)
        return y.flatten(1).numpy(), ladj


class Predictor:
    """A lossless code: linear prediction, and a table of errors for each size of errors before.

    A sample is predicted from the `order` before it by least squares; the rounded error is coded
    by its frequency in training among samples whose last 16 errors had the same size. It is what
    lossless codecs do, with all numbers learned beforehand, and knows no digit.

    Args:
        x: Waveforms that it learns from, (N, *shape).
        order: Number of samples of the prediction.
        classes: Number of sizes.
    """

    def __init__(self, x: Tensor, order: int = 64, classes: int = 16) -> None:
        self.order, self.model = order, LinearRegression()
        before, value = self._windows(x[: 400_000 // x[0].numel()])
        self.model.fit(before.reshape(-1, order), value.reshape(-1))
        errors, size = self._errors(x)
        self.edges = np.quantile(size, np.linspace(0, 1, classes + 1)[1:-1])
        kind = np.searchsorted(self.edges, size)
        counts = np.full((classes, 1023), 1e-3)  # of errors from -511 to 511
        np.add.at(counts, (kind, errors + 511), 1)
        self.bits = -np.log2(counts / counts.sum(1, keepdims=True))

    def code_length(self, x: Tensor) -> Tensor:
        """Bits of each waveform, (N,)."""
        errors, size = self._errors(x)
        return torch.from_numpy(self.bits[np.searchsorted(self.edges, size), errors + 511].sum(1))

    def _windows(self, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        s = np.pad(x.flatten(1).numpy().astype(np.float32) - 128, ((0, 0), (self.order, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(s, self.order + 1, axis=1)
        return windows[..., :-1], windows[..., -1]

    def _errors(self, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """The rounded errors, and the mean size of the 16 before each, (N, samples)."""
        parts = []
        for part in x.split(100):
            before, value = self._windows(part)
            parts.append(value - np.rint(before @ self.model.coef_ + self.model.intercept_))
        errors = np.concatenate(parts).clip(-511, 511).astype(int)
        summed = np.pad(np.abs(errors).cumsum(1), ((0, 0), (17, 0)))
        return errors, (summed[:, 16:-1] - summed[:, :-17]) / 16


def compressed(name: str, x: Tensor) -> float:
    """Bits per sample of all waveforms in one file, by a compressor of Python's library."""
    data = x.numpy().tobytes()
    return 8 * len(COMPRESSORS[name](data)) / len(data)
