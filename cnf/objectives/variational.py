"""Variational inference: a flow learns a density that is known up to a factor, without data.

With x = T(z) drawn by the flow and log w = log p(x) - log q(x), the mean of log w is the ELBO,
below the log of the factor by KL(q ‖ p). Over several draws log mean w is the importance-weighted
bound, which is tighter.
"""

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from cnf.errors import expect_counts
from cnf.flow import Flow
from cnf.objectives.base import OBJECTIVES, Loss, Objective, as_flow, as_prepared
from cnf.objectives.batch import Batch, RowTensors, weighted_mean
from cnf.objectives.target import as_log_density, expect_log_density, log_densities
from cnf.transforms.continuous import under_recipes

FIRST = 256  # draws at which the density is looked at before training


@dataclass
class BaseDraws(RowTensors):
    """Draws of the base for each row, and the row's context.

    Attributes:
        z: Base samples, shape (N, draws, *event).
        context: Condition, shape (N, C).
        weight: Weight of each row, shape (N,).
    """

    z: Tensor
    context: Tensor | None = None
    weight: Tensor | None = None


@dataclass(frozen=True)
class VariationalObjective(Objective):
    """A bound of the evidence by draws of the flow; `cnf.fit` takes it without data.

    With a context the posterior is amortized: `fit(flow, objective, context=y)`, and the
    log-density is that of x given y, up to a constant for each y.

    Attributes:
        log_density: log p(x), or log p(x, context), up to a constant: a function of tensors of
            shape (M, *event), and (M, C), that gives shape (M,), or what has a `log_prob`.
        draws: Draws for each row of a batch.
        path_gradient: Whether the gradient is that along the path of x alone.
        capturable: As of `ReverseKL`.
    """

    uses_data = False
    scores_density = False
    rowwise = True
    solves = True

    log_density: Any
    draws: int = 1
    path_gradient: bool = True
    capturable: bool = False

    def __post_init__(self) -> None:
        who = type(self).__name__
        expect_counts(who, draws=self.draws)
        as_log_density(who, self.log_density)

    def as_trained(self, flow: Flow) -> Flow:
        """Under the solver of its recipe, as likelihood trains it."""
        return flow.with_transform(under_recipes(flow.transform))

    def begin(
        self, module: nn.Module, rows: Callable[[int], Batch | None], generator: Generator
    ) -> "VariationalObjective":
        """Look at the log-density of some draws of the flow.

        Raises:
            TypeError: The flow is dequantized: its samples are rounded and have no gradient.
            ValueError: It is not one finite number for each, or without a gradient in x.
        """
        flow = as_flow(type(self).__name__, module)
        flow.expect_density_of_samples(type(self).__name__)
        batch = rows(FIRST) or Batch(torch.empty(FIRST, 0))
        first = self.prepare(flow, batch.map(lambda value: value.to(flow.device)), generator)
        with torch.no_grad():
            x = flow.decode(first.z[:, 0], first.context)
        expect_log_density(type(self).__name__, self.log_density, x, first.context)
        return self

    def prepare(
        self, module: nn.Module, batch: Batch, generator: Generator | None = None
    ) -> BaseDraws:
        flow = as_flow(type(self).__name__, module)
        z = flow.base.sample((len(batch.x), self.draws), generator)
        return BaseDraws(z.to(flow.dtype), batch.context, batch.weight)

    def __call__(
        self, module: nn.Module, batch: Batch | BaseDraws, generator: Generator | None = None
    ) -> Loss:
        flow = as_flow(type(self).__name__, module)
        rows = as_prepared(self, flow, batch, generator)
        log_w = self._log_weights(flow, rows)
        elbo = weighted_mean(log_w.detach().mean(1), rows.weight)
        return Loss(weighted_mean(self._losses(log_w), rows.weight), {"elbo": elbo})

    def per_row(
        self, module: nn.Module, batch: Batch | BaseDraws, generator: Generator | None = None
    ) -> Tensor:
        flow = as_flow(type(self).__name__, module)
        rows = as_prepared(self, flow, batch, generator)
        return self._losses(self._log_weights(flow, rows))

    @abstractmethod
    def _losses(self, log_w: Tensor) -> Tensor:
        """The loss of each row, shape (N,), of its log-weights, (N, draws)."""

    def _log_weights(self, flow: Flow, rows: BaseDraws) -> Tensor:
        """The log p(x) - log q(x) of each draw, shape (N, draws)."""
        n, draws = rows.z.shape[:2]
        flow, z, context = self.as_trained(flow), rows.z.flatten(0, 1), rows.context
        if context is not None:
            context = context[:, None].expand(n, draws, -1).flatten(0, 1)
        if self.path_gradient:
            x = flow.decode(z, context)
            log_q = _log_prob_of_constants(flow, x, context)
        else:
            x, log_q = flow.decode_and_log_prob(z, context)
        log_p = log_densities(type(self).__name__, self.log_density, x, context)
        return (log_p - log_q).reshape(n, draws)


@OBJECTIVES.register("reverse-kl")
@dataclass(frozen=True)
class ReverseKL(VariationalObjective):
    r"""KL(q ‖ p) up to a constant, the negative ELBO: :math:`E_z[\log q(T(z)) - \log p(T(z))]`.

    It is least where the flow is the normalized density, and prefers to miss one of several modes
    to having mass between them.

    >>> import cnf
    >>> target = torch.distributions.MultivariateNormal(torch.ones(2), torch.eye(2))
    >>> flow, budget = cnf.models.realnvp(2), cnf.TrainConfig(steps=2, progress=False)
    >>> history = cnf.fit(flow, ReverseKL(target.log_prob), config=budget)

    The gradient of log q(T(z)) in the flow's parameters is that along the path x = T(z), and one
    of mean 0, of the density at a fixed x. With the path gradient the latter is left out: where
    q = p no gradient is left, and no noise. It scores x by `log_prob`, the other direction.
    Source: Rezende & Mohamed (2015), https://arxiv.org/abs/1505.05770; of path gradients Roeder et
    al. (2017), https://arxiv.org/abs/1703.09194, and Vaitl et al. (2022),
    https://arxiv.org/abs/2206.09016.

    Args:
        log_density: log p(x), or log p(x, context), up to a constant: a function of tensors of
            shape (M, *event), and (M, C), that gives shape (M,), or what has a `log_prob`.
        draws: Draws for each row of a batch.
        path_gradient: Whether the gradient is that along the path of x alone.
        capturable: Whether the log-density computes the same of x (and the context) each time, so
            that steps may be compiled: no random numbers, none that a callback changes, no value
            read on the host (`torch.distributions` reads some unless `validate_args=False`).

    Raises:
        TypeError: The log-density cannot be called.
        ValueError: `draws` is below 1.
    """

    def _losses(self, log_w: Tensor) -> Tensor:
        return -log_w.mean(1)


@OBJECTIVES.register("importance-weighted")
@dataclass(frozen=True)
class ImportanceWeighted(VariationalObjective):
    r"""The negative importance-weighted bound, :math:`-E \log \frac{1}{K} \sum_k w_k`.

    The more draws K, the nearer it is to the log evidence, and the more it covers all modes. With
    the path gradient this is the doubly reparametrized one, whose noise does not outgrow it with
    K. Parameters of the log-density then get another gradient than that of the bound: train them
    with path_gradient=False.
    Source: Burda et al. (2016), https://arxiv.org/abs/1509.00519; Tucker et al. (2019),
    https://arxiv.org/abs/1810.04152.

    Args:
        log_density: As of `ReverseKL`.
        draws: K, for each row of a batch.
        path_gradient: Whether the gradient is that along the path of x alone.
        capturable: As of `ReverseKL`.

    Raises:
        TypeError: The log-density cannot be called.
        ValueError: `draws` is below 1.
    """

    draws: int = 8

    def _losses(self, log_w: Tensor) -> Tensor:
        bound = log_w.logsumexp(1) - math.log(log_w.shape[1])
        if not self.path_gradient:
            return -bound
        shares = log_w.detach().softmax(1)
        along = (shares.square() * log_w.masked_fill(shares == 0, 0.0)).sum(1)  # 0 · -inf is 0
        return -(bound.detach() + along - along.detach())


class _Density(nn.Module):
    """A flow's `log_prob` as a module's call."""

    def __init__(self, flow: Flow) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        return self.flow.log_prob(x, context)


def _log_prob_of_constants(flow: Flow, x: Tensor, context: Tensor | None) -> Tensor:
    """The log q(x), with a gradient in x, and none in the flow's parameters or the context."""
    density = _Density(flow)
    constants = {name: value.detach() for name, value in density.named_parameters()}
    context = None if context is None else context.detach()
    return torch.func.functional_call(density, constants, (x, context))
