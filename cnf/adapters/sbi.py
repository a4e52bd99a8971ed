"""Flows as density estimators of sbi: posteriors and likelihoods of simulators."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from sbi.neural_nets.estimators import ConditionalDensityEstimator
from sbi.utils.sbiutils import standardizing_net
from torch import Size, Tensor, nn

from cnf.errors import expect_event, expect_finite, expect_shape, expect_tensor
from cnf.flow import Flow
from cnf.models import build
from cnf.objectives import OBJECTIVES, Batch, Objective
from cnf.objectives.base import as_flow
from cnf.objectives.batch import TrainingRows
from cnf.random import stream
from cnf.training import fit_preprocessing

Builder = Callable[[Tensor, Tensor], "FlowEstimator"]


class FlowEstimator(ConditionalDensityEstimator):
    """A conditional flow as a density estimator of sbi, with the loss that sbi is to train it by.

    sbi trains it by any objective that has a loss of each row, flow matching, too. A flow that
    `cnf.fit` has trained works as well: `DirectPosterior(FlowEstimator(flow), prior)`.

    Args:
        flow: A flow of vectors, with a context.
        objective: An objective, or its name; likelihood if nothing is said.
        embedding: A net from the condition to the flow's context; None for the condition itself.
        condition_shape: Shape of the condition; that of the flow's context if None.

    Raises:
        ValueError: The flow has no context.
    """

    net: Flow  # pyright: ignore

    def __init__(
        self,
        flow: Flow,
        objective: Objective | str = "maximum-likelihood",
        embedding: nn.Module | None = None,
        condition_shape: Size | None = None,
    ) -> None:
        if not as_flow("FlowEstimator", flow).context_dim:
            raise ValueError(
                "FlowEstimator: expected a conditional flow, got one without a context; build it "
                "with context=, the number of the condition's variables"
            )
        shape = expect_shape(
            "FlowEstimator", condition_shape or flow.context_dim, "condition_shape"
        )
        super().__init__(flow, Size(flow.event_shape), Size(shape))
        self.objective = OBJECTIVES.build(objective, "FlowEstimator")
        self.embedding = embedding

    @property
    def embedding_net(self) -> nn.Module | None:
        """The net from the condition to the flow's context, if there is one."""
        return self.embedding

    def log_prob(self, input: Tensor, condition: Tensor) -> Tensor:
        r"""Log-densities in nats, shape (samples, batch).

        Args:
            input: Points, shape (samples, batch, \*event) or (batch, \*event).
            condition: Their conditions, shape (batch, \*condition) or (samples, batch,
                \*condition).

        Raises:
            ValueError: Shapes that are not these, or do not fit each other.
        """
        expect_event("FlowEstimator.log_prob", "input", input, self.input_shape)
        context = self._context(condition)
        rows = input[None] if input.dim() == 1 + len(self.input_shape) else input
        try:
            batch = torch.broadcast_shapes(rows.shape[:2], context.shape[:-1])
        except RuntimeError:
            batch = ()
        if not len(batch) == 2 == rows.dim() - len(self.input_shape):
            raise ValueError(
                "FlowEstimator.log_prob: expected input of shape (samples, batch, *event), with a "
                f"condition for each of the batch, got {tuple(input.shape)} and conditions of "
                f"shape {tuple(condition.shape)}"
            )
        return self.net.log_prob(rows.expand(*batch, *self.input_shape), context)

    def loss(self, input: Tensor, condition: Tensor) -> Tensor:
        r"""The objective's loss of each row, shape (batch,).

        Args:
            input: Points, shape (batch, \*event).
            condition: Their conditions, shape (batch, \*condition).
        """
        return self.objective.per_row(self.net, Batch(input, self._context(condition)))

    def sample(self, sample_shape: Size, condition: Tensor) -> Tensor:
        r"""Samples, shape (\*sample_shape, batch, \*event).

        Args:
            sample_shape: How many for each condition.
            condition: Conditions, shape (batch, \*condition).
        """
        return self.net.sample(sample_shape, self._context(condition))

    def sample_and_log_prob(self, sample_shape: Size, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Samples as of `sample`, and their log-densities, of one pass.

        Args:
            sample_shape: How many for each condition.
            condition: Conditions, as of `sample`.
        """
        return self.net.sample_and_log_prob(sample_shape, self._context(condition))

    def _context(self, condition: Tensor) -> Tensor:
        expect_tensor("FlowEstimator", "condition", condition)
        self._check_condition_shape(condition)
        if self.embedding is None:
            return condition
        batch = condition.shape[: condition.dim() - len(self.condition_shape)]
        features = self.embedding(condition.reshape(-1, *self.condition_shape))
        return features.reshape(*batch, -1)


def posterior_estimator(
    model: str = "nsf",
    objective: Objective | str = "maximum-likelihood",
    embedding: nn.Module | None = None,
    **options: Any,
) -> Builder:
    """What sbi's NPE takes as its density estimator: p(theta | x) by a named model.

    >>> import torch
    >>> from sbi.inference import NPE
    >>> prior = torch.distributions.MultivariateNormal(torch.zeros(2), torch.eye(2))
    >>> estimator = posterior_estimator("cnf", "flow-matching", hidden=(32, 32))
    >>> inference = NPE(prior, density_estimator=estimator, show_progress_bars=False)

    Both are standardized, x before its embedding. Source of the two ways of training: Papamakarios
    & Murray (2016), https://arxiv.org/abs/1605.06376; of flow matching Wildberger et al. (2023),
    https://arxiv.org/abs/2305.17161.

    Args:
        model: A name in `cnf.models.MODELS`.
        objective: What sbi trains it by, or its name; sbi's `train` has the learning rate.
        embedding: A net from x, (N, *shape), to features, (N, C); trained with the flow.
        options: Options of the model, beside `dim` and `context`.
    """

    def built(theta: Tensor, x: Tensor) -> FlowEstimator:
        return _estimator(theta, x, model, objective, embedding, options)

    return built


def likelihood_estimator(
    model: str = "nsf",
    objective: Objective | str = "maximum-likelihood",
    embedding: nn.Module | None = None,
    **options: Any,
) -> Builder:
    """What sbi's NLE takes as its density estimator: p(x | theta) by a named model.

    Args:
        model: As of `posterior_estimator`.
        objective: As of `posterior_estimator`.
        embedding: A net from theta, (N, D), to features, (N, C).
        options: As of `posterior_estimator`.
    """

    def built(theta: Tensor, x: Tensor) -> FlowEstimator:
        return _estimator(x, theta, model, objective, embedding, options)

    return built


def _estimator(
    x: Tensor,
    condition: Tensor,
    model: str,
    objective: Objective | str,
    embedding: nn.Module | None,
    options: dict[str, Any],
) -> FlowEstimator:
    """An estimator of p(x | condition), made ready for training on these rows."""
    if x.dim() != 2 or not len(x):
        raise ValueError(
            f"sbi: expected one vector or more, of shape (N, D), where the density is wanted, got "
            f"{tuple(x.shape)}"
        )
    expect_finite("sbi", "the vectors whose density is wanted", x)
    if embedding is None and condition.dim() != 2:
        raise ValueError(
            f"sbi: expected conditions of shape (N, C), got {tuple(condition.shape)}; give "
            "embedding=, a net from them to vectors"
        )
    context = condition
    if embedding is not None:
        own = copy.deepcopy(embedding)  # not that of another estimator by the same builder
        embedding = nn.Sequential(standardizing_net(condition), own)
        options = {"context_preprocess": None, **options}  # the embedding is to be trained
        with torch.no_grad():
            context = embedding(condition)
    flow = build(model, dim=x.shape[1], context=context.shape[1], **options)
    goal: Objective = OBJECTIVES.build(objective, "sbi")
    if not goal.uses_data:
        raise ValueError(
            f"sbi: expected an objective that learns from simulations, got {type(goal).__name__}, "
            "which uses none; take maximum-likelihood or flow-matching"
        )
    flow, goal = _begun(goal, flow, Batch(x, context))
    return FlowEstimator(flow, goal, embedding, condition.shape[1:])


def _begun(objective: Objective, flow: Flow, rows: Batch) -> tuple[Flow, Objective]:
    """Both after what `fit` does before its first step, of which sbi does nothing."""
    fit_preprocessing(flow, rows)
    flow = as_flow("sbi", objective.settle(flow))
    flow.initialize(rows.x, rows.context)
    known = TrainingRows(lambda n: rows.map(lambda value: value[:n]), len(rows.x))
    return flow, objective.begin(flow, known, stream(0, "coupling for sbi"))
