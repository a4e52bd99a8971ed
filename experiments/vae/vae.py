"""A variational autoencoder whose posterior, prior and decoder may be flows; its objective."""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cnf
from cnf.distributions import StandardNormal
from cnf.errors import expect_choice
from cnf.nets import MLP
from cnf.objectives import Batch, Loss, Objective
from cnf.objectives.base import as_prepared
from cnf.objectives.batch import RowTensors, weighted_mean
from cnf.random import draw
from cnf.transforms import Compose, Elementwise
from cnf.transforms.continuous import odes_in

Options = Mapping[str, Any]
LEVELS = 256  # of a gray pixel
UNUSED = {"name": "planar", "layers": 1}  # takes the place of a flow that is not named
DECODERS = ("bernoulli", "logistic", "flow")


class VAE(nn.Module):
    r"""p(x, z) = p(z) p(x | z) and a posterior q(z | x), each of which may be a flow.

    A draw of the posterior is :math:`z = \mu(h) + \sigma(h) \odot f(\epsilon; h)` with features h
    of x, :math:`\epsilon \sim N(0, I)`, and a conditional flow f by name; without a name f is the
    identity, and the posterior the usual diagonal Gaussian. All modules are made in the same
    order and the flows last, so that one seed gives all models the same encoder and decoder.

    Source: Kingma & Welling (2014), https://arxiv.org/abs/1312.6114; Rezende & Mohamed (2015),
    https://arxiv.org/abs/1505.05770.

    Args:
        pixels: Number of pixels.
        latent: Number of latent variables.
        features: Size of h.
        hidden: Widths of the encoder; those of the decoder are reversed.
        decoder: "bernoulli" for pixels of 0 and 1; "logistic" and "flow" for gray levels.
        posterior: Name and options of f, or None.
        prior: Name and options of a flow p(z), or None for N(0, I).
        decoder_flow: Name and options of the flow of a "flow" decoder.

    Raises:
        ValueError: The decoder or a model is unknown.
    """

    def __init__(
        self, pixels: int, latent: int = 32, features: int = 64,
        hidden: tuple[int, ...] = (200, 200), decoder: str = "bernoulli",
        posterior: Options | None = None, prior: Options | None = None,
        decoder_flow: Options | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        expect_choice("VAE", "decoder", decoder, DECODERS)
        self.latent, self.scale = latent, 1.0 if decoder == "bernoulli" else LEVELS - 1.0
        self.encoder = MLP(pixels, features, hidden)
        kinds = {"bernoulli": Bernoulli, "logistic": DiscretizedLogistic}
        if decoder == "flow":
            self.decoder = FlowDecoder(latent, pixels, hidden[::-1], decoder_flow)
        else:
            self.decoder = kinds[decoder](latent, pixels, hidden[::-1])
        affine = amortized_affine(latent, features)
        for net in (self.encoder, self.decoder.net):
            draw_weights(net, 1.7)
        parts = [] if posterior is None else [named(posterior, latent, features).transform]
        self.posterior = cnf.Flow(None, Compose([*parts, affine]), event_shape=(latent,))
        self.prior = StandardNormal((latent,)) if prior is None else named(prior, latent)

    def features(self, x: Tensor) -> Tensor:
        """The context h(x) of the posterior, shape (N, features)."""
        return self.encoder(x / self.scale - 0.5)

    def log_joint(self, x: Tensor, z: Tensor) -> Tensor:
        """The log p(x, z) of rows of both, shape (N,)."""
        return self.prior.log_prob(z) + self.decoder.log_prob(x, z)

    def log_weights(self, x: Tensor, noise: Tensor) -> Tensor:
        """The log p(x, z) - log q(z | x) at z = z(noise, x), shape (N,); its mean is the ELBO."""
        z, log_q = self.posterior.decode_and_log_prob(noise, self.features(x))
        return self.log_joint(x, z) - log_q

    def with_solver(self, solver: cnf.Solver) -> "VAE":
        """The same weights, in which every ODE is solved by another solver."""
        vae = copy.copy(self)
        vae._modules = {**self._modules}
        for name in ("posterior", "prior"):
            flow = getattr(self, name)
            if isinstance(flow, cnf.Flow) and odes_in(flow.transform):
                vae._modules[name] = flow.with_solver(solver)
        return vae

    def shared(self) -> nn.ModuleList:
        """All but the flows, which every model has alike: encoder, decoder and affine maps."""
        maps = [self.posterior]
        decoder = self.decoder
        if isinstance(decoder, FlowDecoder):
            maps, decoder = [self.posterior, decoder.flow], decoder.net
        return nn.ModuleList([self.encoder, decoder, *(last_map(flow) for flow in maps)])

    @property
    def odes(self) -> int:
        """Number of ODEs that posterior and prior solve."""
        flows = [flow for flow in (self.posterior, self.prior) if isinstance(flow, cnf.Flow)]
        return sum(len(odes_in(flow.transform)) for flow in flows)


def named(options: Options, dim: int, context: int = 0, **more: Any) -> cnf.Flow:
    """A model of the library by its name, on the latent variables as they are.

    Args:
        options: Its "name" and options.
        dim: Number of variables.
        context: Size of the context.
        more: Other options.
    """
    own = {"preprocess": None, "context_preprocess": None, **more, **options}
    return cnf.models.build(own.pop("name"), dim=dim, context=context, **own)


def last_map(flow: cnf.Flow) -> nn.Module:
    """The affine map at the end of a posterior, or of a flow that is a decoder."""
    assert isinstance(flow.transform, Compose)
    return flow.transform.transforms[-1]


class Bernoulli(nn.Module):
    """Pixels of 0 and 1, independent given z, with logits of an MLP."""

    def __init__(self, latent: int, pixels: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.net = MLP(latent, pixels, hidden)

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return -F.binary_cross_entropy_with_logits(self.net(z), x, reduction="none").sum(-1)

    def mean(self, z: Tensor) -> Tensor:
        """The mean of each pixel, in [0, 1]."""
        return self.net(z).sigmoid()


class DiscretizedLogistic(nn.Module):
    r"""Gray levels 0, …, 255, independent given z: a logistic distribution in bins of width 1.

    P(x) = σ((x + ½ - m)/s) - σ((x - ½ - m)/s), whose first and last bin take the tails, with the
    mean m of an MLP and a trained scale s of each pixel.
    Source: Salimans et al. (2017), PixelCNN++, https://arxiv.org/abs/1701.05517.
    """

    def __init__(self, latent: int, pixels: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        self.net = MLP(latent, pixels, hidden)
        self.log_scale = nn.Parameter(torch.full((pixels,), math.log(8.0)))

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return logistic_log_prob(x, self._center(z), self.log_scale).sum(-1)

    def mean(self, z: Tensor) -> Tensor:
        """The center of each pixel, in [0, 1]."""
        return (self._center(z) / (LEVELS - 1)).clamp(0, 1)

    def _center(self, z: Tensor) -> Tensor:
        return LEVELS * (0.5 + 0.1 * self.net(z))


def logistic_log_prob(x: Tensor, center: Tensor, log_scale: Tensor) -> Tensor:
    """The log-probability of gray levels under a discretized logistic distribution.

    With a < b the ends of the bin, σ(b) - σ(a) = σ(b) σ(-a) (1 - exp(a - b)), which does not
    cancel.

    Args:
        x: Whole numbers from 0 to 255.
        center: Of the distribution, in gray levels.
        log_scale: The log of its scale.
    """
    inverse = (-log_scale).exp()
    low, high = (x - 0.5 - center) * inverse, (x + 0.5 - center) * inverse
    inner = F.logsigmoid(high) + F.logsigmoid(-low) + (-torch.expm1(-inverse)).log()
    last = F.logsigmoid(-low)
    return torch.where(x == 0, F.logsigmoid(high), torch.where(x == LEVELS - 1, last, inner))


class FlowDecoder(nn.Module):
    """Gray levels by a conditional flow with uniform dequantization, whose context is an MLP of z.

    It is composed as the posterior is: a flow by name, then an amortized affine map, before the
    sigmoid that leads to pixels.
    """

    def __init__(
        self, latent: int, pixels: int, hidden: tuple[int, ...], flow: Options | None = None
    ) -> None:
        super().__init__()
        *inner, size = hidden
        self.net = MLP(latent, size, inner)
        outside = {"preprocess": "logit", "dequantization": "uniform"}
        affine = amortized_affine(pixels, size)
        model = named(flow or UNUSED, pixels, size, **outside)
        parts = [] if flow is None else [model.transform]
        self.flow = model.with_transform(Compose([*parts, affine]))

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return self.flow.log_prob(x, self.net(z))

    def mean(self, z: Tensor) -> Tensor:
        """The picture at the base's mode, in [0, 1]."""
        noise = torch.zeros(len(z), *self.flow.event_shape)
        return self.flow.decode(noise, self.net(z)) / (LEVELS - 1)


def amortized_affine(dim: int, context: int) -> Elementwise:
    """The map z ↦ μ(c) + σ(c) z, where μ and the log of σ are linear in c, and not 0 at the start.

    Args:
        dim: Number of variables.
        context: Size of c.
    """
    affine = Elementwise(dim, {"name": "affine", "bound": 5.0}, hidden=(), context_dim=context)
    assert affine.net is not None
    draw_weights(affine.net, 0.5)  # at 0 the decoder would first learn to ignore z
    return affine


def draw_weights(net: MLP, gain: float) -> None:
    """Draw the weights of a net again, by Glorot's rule; 1.7 keeps the scale through SiLU layers.

    Args:
        net: Changed in place.
        gain: Factor of the weights' deviation.
    """
    for parameter in net.parameters():
        if parameter.dim() == 2:
            nn.init.xavier_normal_(parameter, gain)


@dataclass
class NoisyRows(RowTensors):
    """Pictures, binarized where they are to be, and the noise of the posterior.

    Attributes:
        x: Pixels, shape (N, P).
        noise: Of N(0, I), shape (N, latent).
        weight: Weight of each row, shape (N,).
    """

    x: Tensor
    noise: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class NegativeELBO(Objective):
    """The mean of -log p(x, z) + log q(z | x) over one draw of z for each picture.

    Args:
        binarize: Whether pixels are probabilities, from which 0 and 1 are drawn in each step.
    """

    binarize: bool = False

    needs_data = True
    rowwise = True
    capturable = True
    scores_density = False
    lr = 1e-3
    clip = 1_000.0

    def prepare(
        self, module: VAE, batch: Batch, generator: torch.Generator | None = None
    ) -> NoisyRows:
        x = batch.x
        noise = draw(torch.randn, (len(x), module.latent), generator, like=x)
        if self.binarize:
            x = (draw(torch.rand, x.shape, generator, like=x) < x).to(x)
        return NoisyRows(x, noise, batch.weight)

    def __call__(
        self, module: VAE, batch: Batch | NoisyRows, generator: torch.Generator | None = None
    ) -> Loss:
        rows = as_prepared(self, module, batch, generator)
        loss = -module.log_weights(rows.x, rows.noise)
        return Loss(weighted_mean(loss, rows.weight), {})
