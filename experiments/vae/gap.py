"""How much of the Gaussian's gap is amortization: its means and deviations, trained by picture.

`python experiments/vae/gap.py` takes the weights that run.py has trained and the test pictures of
the importance-weighted bound, and prints nats for each seed; `--sets mnist14` a part of it.

Source: Cremer et al. (2018), Inference Suboptimality, https://arxiv.org/abs/1801.03558.
"""

import argparse

import torch
import yaml
from run import DATA, HERE, built, evidence, weights_of
from torch import Tensor, nn
from vae import VAE, NegativeELBO

import cnf
from cnf.random import stream


class PerPicture(nn.Module):
    """A VAE whose Gaussian posterior has a mean and a deviation of its own for each picture.

    Args:
        vae: With a Gaussian posterior, at which this one begins; its weights stay as they are.
        pictures: Shape (N, P); elsewhere x is their numbers, shape (*, 1).
    """

    def __init__(self, vae: VAE, pictures: Tensor) -> None:
        super().__init__()
        self.vae, self.pictures, self.latent = vae.requires_grad_(False), pictures, vae.latent
        h = vae.features(pictures)
        mean = vae.posterior.decode(torch.zeros(len(h), vae.latent), h)
        scale = vae.posterior.decode(torch.ones(len(h), vae.latent), h) - mean
        self.mean, self.log_scale = nn.Parameter(mean), nn.Parameter(scale.log())

    def log_weights(self, x: Tensor, noise: Tensor) -> Tensor:
        rows = x[:, 0].long()
        mean, log_scale = self.mean[rows], self.log_scale[rows]
        log_q = self.vae.prior.log_prob(noise) - log_scale.sum(-1)
        return self.vae.log_joint(self.pictures[rows], mean + log_scale.exp() * noise) - log_q

    def elbo(self, draws: int, generator: torch.Generator) -> float:
        """The mean over all pictures, from some draws for each."""
        numbers = torch.arange(len(self.pictures)).repeat(draws).unsqueeze(-1)
        noise = torch.randn(len(numbers), self.latent, generator=generator)
        with torch.no_grad():
            return self.log_weights(numbers, noise).mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="*", default=["mnist14", "freyfaces"])
    torch.set_num_threads(1)
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    for name in parser.parse_args().sets:
        pictures = DATA[config["sets"][name]["data"]]()[2][: config["draws"]["pictures"]]
        for seed in config["seeds"]:
            told = ", ".join(f"{k} {v:.3f}" for k, v in gap(config, name, pictures, seed).items())
            print(f"{name}, seed {seed}: {told}", flush=True)


def gap(config: dict, name: str, pictures: Tensor, seed: int) -> dict[str, float]:
    """Of the Gaussian, the negative ELBO, that with means and deviations by picture, the bound."""
    draws = config["draws"]["bound"]
    vae = built(config, name, "Gaussian", pictures.shape[1], seed)
    vae.load_state_dict(torch.load(weights_of(name, "Gaussian", seed)))
    vae.eval()
    _, bound = evidence(vae, pictures, draws, seed, 50)
    own = PerPicture(vae, pictures)
    before = own.elbo(draws, stream(seed, "gap"))
    numbers = torch.arange(len(pictures)).float().unsqueeze(-1)
    settings = cnf.TrainConfig(
        steps=1_500, batch_size=len(pictures), lr=3e-2, ema=0.99, validations=0, seed=seed,
        device="cpu", compile=False, progress=False,
    )  # fmt: skip
    cnf.fit(own, NegativeELBO(), numbers, settings)
    after = own.elbo(draws, stream(seed, "gap"))
    return {"-ELBO": -before, "by picture": -after, "bound": -bound.mean().item()}


if __name__ == "__main__":
    main()
