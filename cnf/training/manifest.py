"""What manifest.json tells of a run: where it ran, how far it came, and what that took."""

import math
from typing import TYPE_CHECKING, Any

from torch import nn

from cnf.dynamics.monitor import Stats
from cnf.training.budget import Budget
from cnf.training.config import TrainConfig
from cnf.training.history import History
from cnf.training.origin import Origin, environment

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from cnf.training.learner import Learner


class Manifest:
    """Counts what training does since it began, or was taken up again, and tells it.

    Args:
        module: The module in training.
        config: The settings.
        origin: What the run began with.
        fabric: The processes.
    """

    def __init__(
        self, module: nn.Module, config: TrainConfig, origin: Origin, fabric: "Fabric"
    ) -> None:
        self._config, self._origin, self._fabric = config, origin, fabric
        self._parameters = sum(parameter.numel() for parameter in module.parameters())
        self._first = 0, 0.0  # step, and seconds of training before it
        self._rows, self._forward, self._backward = 0, 0, 0

    def begin(self, budget: Budget) -> None:
        """Count from here on."""
        self._first = budget.step, budget.seconds

    def count_rows(self, rows: int) -> None:
        """Count a step's rows, those of all processes."""
        self._rows += rows

    def count_evaluations(self, stats: Stats) -> None:
        """Count a step's evaluations of ODEs."""
        self._forward += stats.forward
        self._backward += stats.backward

    def told(
        self, ended: str, budget: Budget, history: History, learner: "Learner", peak: float
    ) -> dict[str, Any]:
        """The manifest.

        Args:
            ended: Why training ended, or "running".
            budget: What was spent.
            history: What was logged.
            learner: What learns.
            peak: The most memory that training has held, in MB; NaN if unknown.
        """
        config, data = self._config, self._origin.data
        where = "gpu" if self._fabric.device.type == "cuda" else "process"
        return {
            **environment(),
            "device": str(self._fabric.device),
            "processes": self._fabric.world_size,
            "seed": config.seed,
            "rows": data if isinstance(data, str) else None,
            "parameters": self._parameters,
            "learning_rate": learner.lr,  # that of the settings may be null, for the objective's
            "budget": {"steps": config.steps, "seconds": config.seconds},
            "steps": budget.step,
            "seconds": round(budget.seconds, 3),
            **({f"peak_{where}_bytes": round(1e6 * peak)} if math.isfinite(peak) else {}),
            "validation_seconds": round(history.validating, 3),
            **self._speed(budget),
            "compiled": learner.compiled,
            "compilation_seconds": round(history.compiling, 3),
            "skipped_steps": learner.skipped,
            "ended": ended,
        }

    def _speed(self, budget: Budget) -> dict[str, Any]:
        """Rows a second of training, and evaluations of the ODEs in a step."""
        steps, seconds = budget.step - self._first[0], budget.seconds - self._first[1]
        if not steps or not seconds:
            return {}
        evaluations = {"forward": self._forward / steps, "backward": self._backward / steps}
        return {
            "rows_per_second": round(self._rows / seconds, 1), "evaluations_per_step": evaluations,
        }  # fmt: skip
