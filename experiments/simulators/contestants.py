"""Who learns a posterior from simulations: any model of this library, and sbi's own."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from sbi.inference import FMPE, NPE, DirectPosterior
from torch import Tensor
from torch.distributions import Distribution

import cnf
from cnf.adapters.sbi import FlowEstimator
from cnf.objectives import OBJECTIVES

Fit = Callable[[Distribution, Tensor, Tensor, dict, int], object]  # a posterior of sbi

OPTIONS = {
    "cnf": {"hidden": (128, 128), "solver": cnf.Solver("dopri5", rtol=1e-4, atol=1e-4)},
    "nsf": {"hidden": (64, 64), "layers": 5},
}
RK4 = cnf.Solver("rk4", steps=6)  # of training; what is drawn and scored takes the flow's own


def ours(model: str, objective: Any) -> Fit:
    """A named model, trained by `cnf.fit` and early stopping, behind sbi's `DirectPosterior`.

    Args:
        model: A name of `cnf.models`.
        objective: A name of `cnf.objectives`, or a specification with that objective's settings.
    """

    def fitted(prior: Distribution, theta: Tensor, x: Tensor, config: dict, seed: int) -> object:
        flow = cnf.models.build(model, dim=theta.shape[1], context=x.shape[1], **OPTIONS[model])
        settings = cnf.TrainConfig(
            steps=config["steps"], batch_size=config["batch_size"], validations=40, patience=8,
            seed=seed, progress=False, device="cpu", compile=False,
        )  # fmt: skip
        cnf.fit(flow, OBJECTIVES.build(objective), theta, settings, context=x)
        return DirectPosterior(FlowEstimator(flow), prior)

    return fitted


def theirs(trainer: type) -> Fit:
    """A trainer of sbi as it comes, for at most as many steps."""

    def fitted(prior: Distribution, theta: Tensor, x: Tensor, config: dict, seed: int) -> object:
        inference = trainer(prior, show_progress_bars=False)
        inference.append_simulations(theta, x)
        epochs = config["steps"] * config["batch_size"] // len(theta)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Maximum number of epochs")
            inference.train(training_batch_size=config["batch_size"], max_num_epochs=epochs)
        return inference.build_posterior()

    return fitted


CONTESTANTS: dict[str, Fit] = {
    "nsf-likelihood": ours("nsf", "maximum-likelihood"),
    "cnf-likelihood": ours("cnf", {"name": "maximum-likelihood", "solver": RK4}),
    "cnf-flow-matching": ours("cnf", "flow-matching"),
    "sbi-npe": theirs(NPE),
    "sbi-fmpe": theirs(FMPE),
}


def draws(posterior: object, x: Tensor, n: int) -> Tensor:
    """Draws for each of some x: (N, C) → (n, N, D)."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of samples outside of the prior, which are drawn again
        return posterior.sample_batched((n,), x, show_progress_bars=False)
