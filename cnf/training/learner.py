"""What learns: a module with its optimiser and the running average of its weights."""

from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from cnf.objectives import Batch, Loss, Objective
from cnf.training.config import TrainConfig

BAD_STEPS = 20  # gradients in a row that may be NaN or infinite before training gives up


class _Step(nn.Module):
    """What Fabric sets up: DDP sees every gradient, whatever the objective calls inside."""

    def __init__(self, module: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.module, self.objective = module, objective

    def forward(self, batch: Batch) -> Loss:
        return self.objective(self.module, batch)


class Learner:
    """One optimiser step at a time.

    Attributes:
        module: The module in training.
        kept: The module with averaged weights: what is validated and kept.
        skipped: Steps left out because their gradient was NaN or infinite.
    """

    def __init__(
        self, module: nn.Module, objective: Objective, config: TrainConfig, fabric: Fabric
    ) -> None:
        self.config, self.fabric, self.module = config, fabric, module
        self.parameters = list(objective.parameters(module))
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        optimizer = kind(
            self.parameters, lr=config.lr, weight_decay=config.weight_decay, fused=True
        )
        self._step = fabric.setup_module(_Step(module, objective))
        self._optimizer: Any = fabric.setup_optimizers(optimizer)
        self.average: AveragedModel | None = None
        if config.ema is not None:
            self.average = AveragedModel(module, multi_avg_fn=_averaging(config.ema))
        self.skipped = self._bad_in_a_row = 0

    @property
    def kept(self) -> nn.Module:
        return self.module if self.average is None else self.average.module

    def step(self, batch: Batch, lr: float) -> Loss:
        """Take one step on this process's rows; a step whose gradient is not finite is left
        out."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        loss = self._step(batch)
        self._optimizer.zero_grad(set_to_none=True)
        self.fabric.backward(loss.value)
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
        if not torch.isfinite(norm):
            self._skip(loss)
            return loss
        self._bad_in_a_row = 0
        if self.config.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, norm)
        self._optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.module)
        return loss

    def _skip(self, loss: Loss) -> None:
        self.skipped += 1
        self._bad_in_a_row += 1
        if self._bad_in_a_row == BAD_STEPS:
            raise ValueError(
                f"fit: the gradient was NaN or infinite in {BAD_STEPS} steps in a row "
                f"(loss {loss.value.item():.4g}); lower lr={self.config.lr:g}, clip harder, or "
                "check the data's scale"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "module": self.module.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "skipped": self.skipped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's state."""
        self.module.load_state_dict(state["module"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.skipped = state["skipped"]


def _averaging(decay: float) -> Any:
    """torch's exponential average; its decay begins low, so that the first weights are
    forgotten."""

    def update(averages: list[Tensor], weights: list[Tensor], count: Tensor) -> None:
        step = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))(averages, weights, count)

    return update
