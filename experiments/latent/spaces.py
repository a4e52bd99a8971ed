"""Spaces in which pictures have codes: pixels, PCA, an autoencoder, and the latents of flows."""

import warnings
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from attributes import as_pictures
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier, MLPRegressor
from torch import Generator, Tensor

import cnf
from cnf.data import Images, load
from cnf.objectives import Batch
from cnf.training.preprocessing import fit_preprocessing
from cnf.transforms import ActNorm

Options = dict[str, Any]


class Space(Protocol):
    """Pictures (N, 1, H, W) of gray levels, and their codes (N, D)."""

    def encode(self, x: Tensor, generator: Generator) -> Tensor: ...

    def decode(self, z: Tensor) -> Tensor: ...


class Pictures(NamedTuple):
    """MNIST of half the size: what models learn, what the judge learns, and the test."""

    train: Images
    judge: Images
    test: Images


def pictures(config: Options) -> Pictures:
    """Means of 2 × 2 pixels, rounded; the judge learns other pictures than the models."""
    whole = load("mnist")
    assert isinstance(whole, Images) and whole.test is not None
    ends = np.cumsum([0, config["pictures"], config["judge"]["pictures"]])
    parts = [whole.take(torch.arange(ends[k], ends[k + 1])) for k in range(2)]
    return Pictures(*(halved(part) for part in (*parts, whole.test)))


def halved(images: Images) -> Images:
    x = torch.nn.functional.avg_pool2d(images.x.float(), 2).round().to(torch.uint8)
    return Images(x, "mnist14", images.labels)


class Codes:
    """Codes of a linear map or of an autoencoder, standardized over the training pictures."""

    def __init__(self, shape: tuple[int, ...], x: np.ndarray) -> None:
        self.shape = shape
        rows = self.code(x)
        self.mean, self.scale = rows.mean(0), self.scale_of(rows)

    def code(self, x: np.ndarray) -> np.ndarray:
        """Codes of pixels in [0, 1], shape (N, D)."""
        return x

    def pixels(self, z: np.ndarray) -> np.ndarray:
        """Pixels of codes."""
        return z

    def scale_of(self, rows: np.ndarray) -> Any:
        return rows.std(0)

    def encode(self, x: Tensor, generator: Generator) -> Tensor:
        rows = self.code(x.flatten(1).double().numpy() / 255)
        return torch.from_numpy((rows - self.mean) / self.scale).float()

    def decode(self, z: Tensor) -> Tensor:
        found = self.pixels(z.double().numpy() * self.scale + self.mean)
        like = torch.empty(len(z), *self.shape)
        return as_pictures(255 * torch.from_numpy(found), like)


class Pixels(Codes):
    """Pixels less their means, in units of their common deviation."""

    def scale_of(self, rows: np.ndarray) -> Any:
        return (rows - rows.mean(0)).std()


class Components(Codes):
    """Principal components by scikit-learn, standardized."""

    def __init__(self, shape: tuple[int, ...], x: np.ndarray, options: Options) -> None:
        self.model = PCA(**options).fit(x)
        super().__init__(shape, x)

    def code(self, x: np.ndarray) -> np.ndarray:
        return self.model.transform(x)

    def pixels(self, z: np.ndarray) -> np.ndarray:
        return self.model.inverse_transform(z)


class Autoencoder(Codes):
    """A regression of pictures on themselves by scikit-learn, cut in the middle."""

    def __init__(self, shape: tuple[int, ...], x: np.ndarray, options: Options) -> None:
        self.model = MLPRegressor(activation="tanh", **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the budget is meant to end it
            self.model.fit(x, x)
        self.middle = len(options["hidden_layer_sizes"]) // 2 + 1
        super().__init__(shape, x)

    def code(self, x: np.ndarray) -> np.ndarray:
        return self.layers(x, 0, self.middle)

    def pixels(self, z: np.ndarray) -> np.ndarray:
        return self.layers(z, self.middle, len(self.model.coefs_))

    def layers(self, x: np.ndarray, first: int, end: int) -> np.ndarray:
        """The layers from the first to before the end; scikit-learn gives the last alone."""
        for layer in range(first, end):
            x = x @ self.model.coefs_[layer] + self.model.intercepts_[layer]
            x = np.tanh(x) if layer < len(self.model.coefs_) - 1 else x
        return x


class Latent:
    """Codes of a flow of whole numbers: z of the noisy pictures x + u; pictures are rounded.

    Args:
        flow: A flow with a dequantization.
        noise: Whether u is drawn; else it is ½, the middle of each level.
    """

    def __init__(self, flow: cnf.Flow, noise: bool = True) -> None:
        self.noise = noise
        assert flow.dequantization is not None
        self.flow, self.dequantization = flow.eval(), flow.dequantization
        # The same flow of real numbers: `Flow.encode` draws u by itself, `Flow.decode` rounds.
        self.real = cnf.Flow(flow.base, flow.transform, flow.preprocess).eval()

    def noisy(self, x: Tensor, generator: Generator) -> Tensor:
        """Pictures with uniform noise, as the flow models them, or with one half."""
        if not self.noise:
            return x.float() + 0.5
        return self.dequantization.encode(x.float(), generator)[0]

    @torch.no_grad()
    def encode(self, x: Tensor, generator: Generator) -> Tensor:
        return self.real.encode(self.noisy(x, generator)).flatten(1)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        return self.flow.decode(z.unflatten(1, self.flow.event_shape))


def space_of(
    told: Options, images: Images, seed: int, config: Options, kept: Path
) -> tuple[Space, Options]:
    """The space that a part of config.yaml describes, and what its training took.

    Args:
        told: A "model" of the library, or a "baseline", with their options.
        images: What is learned from.
        seed: Of weights and draws.
        config: All of config.yaml.
        kept: A flow that was trained before, or where it will be saved.
    """
    shape, options = tuple(images.x.shape[1:]), told.get("options", {})
    x = images.x.flatten(1).double().numpy() / 255
    sizes = {**images.sizes, "preprocess": config["preprocess"]}
    settings = {**config["train"], **told.get("train", {}), "seed": seed}
    if told.get("baseline") == "pixels":
        return Pixels(shape, x), {}
    if told.get("baseline") == "pca":
        return Components(shape, x, options), {}
    if told.get("baseline") == "autoencoder":
        batch, epochs = settings["batch_size"], settings["steps"] * settings["batch_size"] / len(x)
        own = {"max_iter": max(round(epochs), 1), "batch_size": batch}
        return Autoencoder(shape, x, {**options, **own, "random_state": seed}), {}
    if told.get("baseline") == "preprocessing":
        glow = cnf.models.build("glow", **sizes, levels=1, layers=1)  # for what is around it
        flow = glow.with_transform(ActNorm(shape))  # the identity, as long as none is trained
        fit_preprocessing(flow, Batch(images.x))
        return Latent(flow), {}
    if kept.exists():
        return Latent(cnf.load(kept), told.get("noise", True)), {}
    torch.manual_seed(seed)
    flow = cnf.models.build(told["model"], **sizes, **options)
    history = cnf.fit(flow, told["objective"], Images(images.x, "mnist14"), settings)
    if history.signal:  # what was cut short is no result
        raise SystemExit(128 + history.signal)
    kept.parent.mkdir(parents=True, exist_ok=True)
    cnf.save(flow, kept)
    return Latent(flow), {"steps": history.steps}


class Judge:
    """A classifier of scikit-learn that has learned other pictures than the models."""

    def __init__(self, images: Images, options: Options) -> None:
        assert images.labels is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.model = MLPClassifier(**options).fit(self.rows(images.x), images.labels.numpy())

    @staticmethod
    def rows(x: Tensor) -> np.ndarray:
        return x.flatten(1).double().numpy() / 255

    def probabilities(self, x: Tensor) -> Tensor:
        """Of the ten digits, shape (N, 10)."""
        return torch.from_numpy(self.model.predict_proba(self.rows(x)))
