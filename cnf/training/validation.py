"""Held-out scores during training, and when to stop for want of a better one."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Generator, nn

from cnf.dynamics.divergence import (
    AFFORDABLE,
    DIVERGENCES,
    Divergence,
    Hutchinson,
    Learned,
    exact_directions,
    number_of_probes,
)
from cnf.errors import DivergedError, warn
from cnf.flow import Flow, evaluating
from cnf.objectives import Batch, Objective
from cnf.random import stream
from cnf.training.config import BATCH_SIZE, TrainConfig
from cnf.training.diagnosis import outside_of_base, warn_of_few_steps, warn_of_other_loss
from cnf.training.history import held_out_nll
from cnf.training.processes import by_first, shared
from cnf.transforms.continuous import has_discrete_steps, odes_in

if TYPE_CHECKING:
    from lightning_fabric import Fabric

# Rows scored at once, and numbers in them: a CPU is as fast by few, which several processes can
# share; a GPU is not, unless the rows are large.
AT_ONCE, AT_ONCE_ON_GPU = (2_500, 2**16), (10_000, 2**20)
WORSE = 0.5  # nats: more is no noise of an optimizer


class Validation:
    """Scores the kept weights, evenly over the budget; remembers the best if patience is set.

    Several processes share the rows in chunks, which depend on the rows alone, as do their draws:
    the score is the same, bit for bit, however many processes there are.

    Args:
        objective: What trains the flow.
        config: How often, by what divergence, and with which seed.
        held_out: The rows, all of them, in each process; None for none.
        fabric: That of the processes; None where there is but this one.

    Attributes:
        name: What the score is called: "val_nll" for a flow with a density, with the estimator in
            parentheses if there is one, such as "val_nll (Hutchinson, 1 probe)"; else "val_loss".
    """

    def __init__(
        self,
        objective: Objective,
        config: TrainConfig,
        held_out: Batch | None,
        fabric: "Fabric | None" = None,
    ) -> None:
        self.objective, self.config, self.held_out = objective, config, held_out
        self.fabric = fabric
        self.done = self.stale = 0
        self.name = "val_loss"
        self.warned = self.warned_of_base = self.may_fold = False
        self.best, self.best_weights = float("inf"), None
        self.first = float("inf")  # the score before training

    def due(self, fraction: float) -> bool:
        """Whether it is time for the next one."""
        return self.held_out is not None and self._reached(fraction) > self.done

    def count_done(self, fraction: float) -> None:
        """Take those due by now as done: a budget that was changed has others to come."""
        self.done = self._reached(fraction)

    def _reached(self, fraction: float) -> int:
        return int(fraction * self.config.validations + 1e-9)

    def begin(self, module: nn.Module) -> None:
        """With early stopping, score the weights before training and keep them as the best.

        Without held-out rows, which it needs, warn.

        Args:
            module: The module that is to be trained.
        """
        patience = self.config.patience
        if patience is None or self.config.validations == 0:
            return
        if self.held_out is None:
            warn(
                f"fit: expected held-out rows, by which patience={patience} ends training early, "
                "got none, so that the whole budget is taken; give validation=…, ten rows or "
                "more, or no patience"
            )
            return
        with evaluating(module), torch.no_grad():
            self.name, self.first = self._scored(module)
        self._remember(module, self.first)
        self.stale = 0  # a score of NaN here is no validation without a better one

    def score(self, module: nn.Module, fraction: float) -> float:
        """A flow's mean negative log-likelihood on held-out rows, in nats; else the loss."""
        self.count_done(fraction)
        with evaluating(module), torch.no_grad():
            self.name, score = self._scored(module)
            if self._compares(fraction) and not score > self.best:  # else it will not be kept
                self._compare(module, score)
        if self.config.patience is not None:
            self._remember(module, score)
        return score

    def _scored(self, module: nn.Module) -> tuple[str, float]:
        """What the score is called, and the score."""
        flow = self._with_density(module)
        if flow is None:
            return "val_loss", self._loss(module)
        self.may_fold = has_discrete_steps(flow.transform)
        return self._nll(flow)

    def _with_density(self, module: nn.Module) -> Flow | None:
        """The flow whose NLL is the score; None where the score is the loss."""
        if self.objective.scores_density and isinstance(module, Flow) and module.base.has_density:
            return module
        return None

    def _remember(self, module: nn.Module, score: float) -> None:
        """Keep the weights if their score is the best so far; else count one more without."""
        if score < self.best:
            weights = {name: value.clone() for name, value in module.state_dict().items()}
            self.best, self.best_weights, self.stale = score, weights, 0
        else:
            self.stale += 1

    def warn_of_worsening(self, records: Sequence[dict[str, float]]) -> None:
        """Warn where the last held-out NLL, which is kept, is well above what it was before.

        That is an earlier one, or the NLL of the first step's rows.

        Raises:
            DivergedError: It is NaN, and not for steps of a discrete solver that fold.
        """
        found = ((int(record["step"]), held_out_nll(record)) for record in records)
        scores = {step: score for step, score in found if score is not None}
        if not scores or self.best_weights is not None:
            return
        last = next(reversed(scores.values()))
        if math.isnan(last) and self.may_fold:
            warn(
                "fit: the held-out NLL is NaN, as steps of the solver fold at some held-out rows, "
                "which have no density; train longer, or take more steps"
            )
            return
        if math.isnan(last):
            raise DivergedError(
                "fit: training diverged: the held-out NLL is NaN; lower lr, or clip harder"
            )
        best = min(scores, key=lambda step: scores[step])
        told = f"at step {best:,} it was {scores[best]:.3g}"
        began = records[0].get("nll", math.inf)  # of few rows, so roughly known
        if last > min(scores[best] + WORSE, began + 10 * WORSE):
            told = told if scores[best] < began else f"it began at {began:.3g}"
            warn(
                f"fit: the held-out NLL ends at {last:.3g} nats, and {told}: the flow overfits, "
                "or training diverges; stop early (patience=3, which keeps the best weights), "
                "take fewer steps, a lower lr, or a smaller flow"
            )

    def warn_of_untrained(self) -> None:
        """Warn where early stopping keeps the weights it began with, as none scored better."""
        unimproved = self.best >= self.first  # not where the first was NaN
        if not self.done or self.best_weights is None or not unimproved:
            return
        warn(
            f"fit: early stopping keeps the weights from before training, as no validation was "
            f"better than their {self.name} of {self.first:.3g}; train for more steps, with a "
            f"larger patience (now {self.config.patience}), another lr, or a faster average of "
            f"the weights (ema={self.config.ema})"
        )

    def compare_kept(self, module: nn.Module) -> None:
        """Compare the solvers of the weights that early stopping keeps, in the module by now."""
        if self.done and self.best_weights is not None:
            with evaluating(module), torch.no_grad():
                self._compare(module, self.best)

    @property
    def exhausted(self) -> bool:
        """Whether patience has run out."""
        return self.config.patience is not None and self.stale >= self.config.patience

    def _nll(self, flow: Flow) -> tuple[str, float]:
        """What the NLL is called, and the NLL."""
        divergence, name = self._divergence(flow), "val_nll"
        if isinstance(divergence, Hutchinson):
            probes = number_of_probes(divergence)
            name += f" (Hutchinson, {probes} probe{'s' * (probes > 1)})"

        def total(rows: Batch, place: int) -> float:
            own, noise = (
                stream(self.config.seed, purpose, place)  # the same in each validation
                for purpose in ("validation probes", "dequantization")
            )
            log_prob = flow.log_prob(
                rows.x, rows.context, divergence=_drawn_by(own, divergence), generator=noise
            ).double()
            return -(log_prob if rows.weight is None else rows.weight * log_prob).sum().item()

        nll = self._mean(total, _rows_at_once(self._rows))
        if nll == math.inf:
            self._explain_infinity(flow)
        return name, nll

    def _divergence(self, flow: Flow) -> Divergence | None:
        """How the flow's divergence is computed: exactly (None) where that is affordable."""
        odes = odes_in(flow.transform)
        if self.config.validation_divergence is not None:
            given = DIVERGENCES.build(self.config.validation_divergence)
            return given if odes else None
        if all(ode.solver.discrete or exact_directions(ode.field) <= AFFORDABLE for ode in odes):
            own = [DIVERGENCES.build(ode.divergence or "exact") for ode in odes]
            learned = any(isinstance(each, Learned) for each in own)
            return DIVERGENCES.build("exact") if learned else None
        told = getattr(self.objective, "divergence", None)
        training = [told] if told is not None else [ode.recipe.divergence for ode in odes]
        built = [DIVERGENCES.build(each) for each in training]
        if told is not None:
            return built[0]
        return next((each for each in built if number_of_probes(each)), Hutchinson())

    def _explain_infinity(self, flow: Flow) -> None:
        """Warn, once, where the score is infinite because of the base's support."""
        if self.warned_of_base or flow.dequantization is not None:
            return
        if why := by_first(partial(outside_of_base, flow, self._rows), self.fabric):
            self.warned_of_base = True
            warn(f"fit: the held-out NLL is infinite: {why}")

    def _compares(self, fraction: float) -> bool:
        """Whether this is the last validation, or the 1st, 2nd, 4th, 8th, and so on."""
        return fraction >= 1 or self.done & (self.done - 1) == 0

    def _compare(self, module: nn.Module, score: float) -> None:
        """Warn, once, where the score is another by twice the steps of fixed solvers."""
        flow = self._with_density(module)
        if flow is not None:
            self.compare_solvers(flow, self._rows, "held-out")
        elif not self.warned:
            self.warned = warn_of_other_loss("fit", module, score, self._loss)

    def compare_solvers(self, flow: Flow, rows: Batch, kind: str) -> None:
        """Warn, once, where fixed steps, the flow's or the loss's, are too few.

        Likelihood may train the field to exploit their error.

        Args:
            flow: The flow.
            rows: To compare the steps on.
            kind: Of rows, in words.
        """
        for under in dict.fromkeys((flow, self.objective.as_trained(flow))):
            whose = "flow" if under is flow else "loss"
            if not self.warned:
                compare = partial(
                    warn_of_few_steps, "fit", under, rows, whose=whose, kind=kind,
                    divergence=self._divergence(flow),
                )  # fmt: skip
                self.warned = by_first(compare, self.fabric)

    def compare_on_training_rows(self, module: nn.Module, rows: Batch) -> None:
        """Where nothing was held out: whether likelihood's fixed steps were enough."""
        if isinstance(module, Flow) and module.base.has_density:
            self.compare_solvers(module, rows, "training")

    def _loss(self, module: nn.Module) -> float:
        """The loss, in batches of the size that couplings are made for."""

        def total(rows: Batch, place: int) -> float:
            generator = stream(self.config.seed, "held-out loss", place)
            batch = self.objective.prepare(module, rows, generator)
            return _total_weight(rows) * self.objective(module, batch).value.item()

        return self._mean(total, BATCH_SIZE)

    def _mean(self, total: Callable[[Batch, int], float], most: int) -> float:
        """The weighted mean over all rows of a score.

        Args:
            total: The sum of the score over a chunk of rows; its second argument is its place.
            most: Rows in a chunk.
        """
        size = len(self._rows.x)
        chunks = -(-size // most)

        def at(k: int) -> float:
            first, last = k * size // chunks, (k + 1) * size // chunks
            return total(self._rows.map(lambda value: value[first:last]), k)

        return sum(shared(at, chunks, self.fabric)) / _total_weight(self._rows)

    @property
    def _rows(self) -> Batch:
        assert self.held_out is not None
        return self.held_out

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "done": self.done,
            "stale": self.stale,
            "best": self.best,
            "first": self.first,
            "weights": self.best_weights,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.done, self.stale = int(state["done"]), int(state["stale"])
        self.best, self.best_weights = float(state["best"]), state["weights"]
        self.first = float(state.get("first", math.inf))


def _drawn_by(generator: Generator, divergence: Divergence | None) -> Divergence | None:
    """The same divergence, with its probes drawn by the generator if it has any."""
    if not isinstance(divergence, Hutchinson):
        return divergence
    return replace(divergence, generator=generator)


def _rows_at_once(rows: Batch) -> int:
    """How many rows are scored at once: by themselves alone, not by who is to share them."""
    most, numbers = AT_ONCE if rows.x.is_cpu else AT_ONCE_ON_GPU
    return max(1, min(most, numbers // math.prod(rows.x.shape[1:])))


def _total_weight(rows: Batch) -> float:
    """The sum of the rows' weights; each counts as one where there are none."""
    return len(rows.x) if rows.weight is None else rows.weight.double().sum().item()
