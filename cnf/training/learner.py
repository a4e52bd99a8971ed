"""What learns: a module with its optimizer and the running average of its weights."""

import copy
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from cnf.errors import CheckpointError, DivergedError, expect_device, explain_edit
from cnf.flow import Flow
from cnf.objectives import Batch, Loss, Objective
from cnf.objectives.batch import Prepared
from cnf.precision import widest
from cnf.training.checkpoint import non_finite
from cnf.training.config import PRECISIONS, SHARDED, TrainConfig
from cnf.training.diagnosis import outside_of_base
from cnf.training.shards import Shards, one_shard
from cnf.transforms.continuous import solvers_in

BAD_STEPS = 20  # steps in a row whose loss or gradient may be NaN or infinite before giving up


def launch_fabric(config: TrainConfig, dtype: torch.dtype) -> Fabric:
    """Fabric with this run's processes started.

    Never with its own mixed precision: that rounds the batch to bfloat16 before the step.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"fit: expected a module in float32 or float64, got {dtype}; call module.float(), and "
            "take TrainConfig(precision='bf16-mixed') for bfloat16 in its nets"
        )
    if config.precision is not None and PRECISIONS[config.precision] != dtype:
        raise ValueError(
            f"fit: precision={config.precision!r} expects a module in "
            f"{PRECISIONS[config.precision]}, got {dtype}; convert it: "
            f"module.to({PRECISIONS[config.precision]})"
        )
    expect_device("fit", config.device)
    accelerator = _accelerator(config.device, dtype)
    devices: int | list[int] = config.devices
    if config.device in ("auto", "cuda") and devices == 1 and torch.cuda.is_available():
        devices = [torch.cuda.current_device()]  # as "cuda" means elsewhere in torch
    fabric = Fabric(
        accelerator=accelerator,
        devices=devices,
        strategy="ddp" if config.strategy == SHARDED else config.strategy,  # PyTorch shards, then
        precision="64-true" if dtype == torch.float64 else "32-true",
    )
    fabric.launch()
    return fabric


def _accelerator(device: str, dtype: torch.dtype) -> str:
    """Fabric's name of the device; on a Mac float64 is for the CPU, as its GPU has none."""
    if dtype != torch.float64 or device not in ("auto", "mps"):
        return device
    if device == "mps":
        raise ValueError(
            "fit: device='mps' has no float64, got a module in float64; call module.float(), or "
            "take device='cpu'"
        )
    return "auto" if torch.cuda.is_available() else "cpu"


class _LossModule(nn.Module):
    """The loss as a module, which Fabric sets up: DDP sees every gradient, whatever it calls."""

    def __init__(self, module: nn.Module, objective: Objective, autocast: str | None) -> None:
        super().__init__()
        self.module, self.objective = module, objective
        self.autocast = autocast  # type of device

    def forward(self, rows: Prepared) -> Loss:
        with (
            nullcontext()
            if self.autocast is None
            else torch.autocast(self.autocast, torch.bfloat16)
        ):
            loss = self.objective(self.module, rows)
        if not isinstance(loss, Loss):
            raise TypeError(
                f"{type(self.objective).__name__}: expected a cnf.Loss, got a "
                f"{type(loss).__name__}; return cnf.Loss(value, {{}})"
            )
        return loss


class Learner:
    """One optimizer step at a time.

    Attributes:
        module: The module in training.
        lr: Highest learning rate.
        clip: Largest norm of the gradient; None for no clipping.
        skipped: Steps left out because their loss or gradient was NaN or infinite.
        compiled: Whether steps are compiled or captured, as `TrainConfig.compile` says.
        can_save_alone: Whether this process has all weights, and saves without the others.
    """

    compiled = False
    can_save_alone = True

    def __init__(
        self, module: nn.Module, objective: Objective, config: TrainConfig, fabric: Fabric
    ) -> None:
        self.config, self.fabric, self.module = config, fabric, module
        self.objective = objective
        self.lr = config.lr or objective.learning_rate(module)
        given = config.clip
        self.clip = objective.largest_gradient(module) if isinstance(given, str) else given
        autocast = fabric.device.type if config.precision == "bf16-mixed" else None
        self._loss = _LossModule(module, objective, autocast)
        self._fabric_loss: Any = self._set_up()
        self.parameters = list(objective.parameters(module))
        kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        self._adam = kind(
            self.parameters, lr=self.lr, weight_decay=config.weight_decay, fused=True
        )
        self._optimizer: Any = fabric.setup_optimizers(self._adam)
        self._ema_module = self._averaged()
        self._ema_weights: list[Any] = list(self._ema_module.parameters())
        self._weights: list[Any] = list(module.parameters())
        self._buffers: list[Any] = list(module.buffers())
        self._kept_buffers = self._buffers_of_good_steps()
        self.steps = self.skipped = self._bad_in_a_row = 0
        self._batches: Sequence[Batch] = ()  # of this step, by shard
        self._skipped_batches: Sequence[Batch] = ()

    def _set_up(self) -> nn.Module:
        """The loss as the processes compute it together."""
        return self.fabric.setup_module(self._loss)

    def _averaged(self) -> nn.Module:
        """The module that is to hold averaged weights."""
        if self.config.ema is None:
            return self.module
        return copy.deepcopy(self.module).requires_grad_(False)

    def _buffers_of_good_steps(self) -> list[Any]:
        """Where the buffers are kept after each step that counts: those of the average, if any."""
        if self._ema_module is self.module:
            return [buffer.clone() for buffer in self._buffers]
        return list(self._ema_module.buffers())

    @property
    def ema_module(self) -> nn.Module:
        """The module with averaged weights: what is validated and kept."""
        return self._ema_module

    def initialize(self, batch: Batch, generator: torch.Generator) -> None:
        """Set a flow's `ActNorm`s from the first rows, which every process has whole."""
        if isinstance(self.module, Flow) and batch.x.shape[1:] == self.module.event_shape:
            self.module.initialize(batch.x, batch.context, generator=generator)
            self.ema_module.load_state_dict(self.module.state_dict())
            self._keep_buffers()

    def begin(self, objective: Objective) -> None:
        """Take the objective that has seen the data."""
        self.objective = self._loss.objective = objective

    @property
    def compiles(self) -> bool:
        """Whether the first step may compile something."""
        return self.compiles_dynamics

    @property
    def compiles_dynamics(self) -> bool:
        """Whether an ODE's solver was asked to compile its dynamics."""
        if not self.objective.solves or not isinstance(self.module, Flow):
            return False
        trained = self.objective.as_trained(self.module).transform
        return any(solver.compile for solver in solvers_in(trained))

    def prepare(self, batch: Batch, generator: torch.Generator) -> tuple[Prepared, float]:
        """`prepare_shards` of a batch that is one shard.

        Args:
            batch: The rows of all processes.
            generator: Source of draws.
        """
        return self.prepare_shards(one_shard(len(batch.x)), [batch], [generator])

    def prepare_shards(
        self, shards: Shards, batches: Sequence[Batch], generators: Sequence[torch.Generator]
    ) -> tuple[Prepared, float]:
        """This process's rows, prepared, and the weight of their loss in the mean over processes.

        All is drawn for whole shards, so that a row does not depend on who has it.

        Args:
            shards: Of the whole batch, or those that hold this process's rows.
            batches: The rows of each.
            generators: Source of draws of each.
        """
        self._batches = batches
        prepare = self.objective.prepare
        pairs = zip(batches, generators, strict=True)
        rows = shards.taken(prepare(self.module, *pair) for pair in pairs)
        if shards.whole:
            return rows.shared(self.fabric.global_rank, self.fabric.world_size)
        return rows, self._share(shards, batches)

    def _share(self, shards: Shards, batches: Sequence[Batch]) -> float:
        """The weight of this process's rows relative to the mean over processes."""
        weights = [batch.weight for batch in batches if batch.weight is not None]
        if not weights:
            return len(shards.own) * self.fabric.world_size / shards.size
        own = torch.cat([w[rows] for w, rows in zip(weights, shards.inside, strict=True)])
        part = own.sum(dtype=widest(own.device))
        mean: Any = self.fabric.all_reduce(part.clone())  # in place
        return (part / mean).item() if mean > 0 else 1.0  # as of `RowTensors.shared`

    def warm_up(self, rows: Prepared) -> None:
        """Compile what a step compiles, outside of the budget: a step, thrown away."""
        before = [buffer.clone() for buffer in self.module.buffers()]
        self._backward(self._loss_of(rows).value)
        self._optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in zip(self.module.buffers(), before, strict=True):
                buffer.copy_(value)  # a batch's statistics have moved the running ones

    def step(self, rows: Prepared, lr: float, share: float = 1.0) -> Loss:
        """Take one step, unless the loss or its gradient is NaN or infinite.

        Args:
            rows: What `prepare` gave.
            lr: Learning rate.
            share: The weight of their loss.

        Returns:
            The loss of the rows of all processes.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        loss, norm = self._gradient(rows, share)
        loss = self._over_processes(loss, share)
        if not torch.isfinite(norm + loss.value.detach()):
            _copy(self._kept_buffers, self._buffers)  # running statistics have seen its rows
            self._skip(loss)
            return loss
        self._bad_in_a_row = 0
        self._move()
        self._average()
        self._keep_buffers()
        return loss

    def expect_same_parts(self) -> None:
        """Raise RuntimeError where a parameter or a buffer of the module was replaced."""
        now = {*map(id, self.module.parameters()), *map(id, self.module.buffers())}
        known = {*map(id, self._weights), *map(id, self._buffers)}
        if now <= known:
            return
        parts = (*self.module.named_parameters(), *self.module.named_buffers())
        name = next(name for name, part in parts if id(part) not in known)
        raise RuntimeError(
            f"fit: {name} of the module was replaced by another tensor, which neither the "
            "optimizer nor the average knows; change it in place, as by "
            f"{name.split('.')[-1]}.copy_(…) under torch.no_grad()"
        )

    def agree_on_buffers(self) -> None:
        """Give all processes the first one's statistics of rows, of which each saw its own."""
        if self.fabric.world_size > 1:
            for buffer in self.ema_module.buffers():
                torch.distributed.broadcast(buffer, 0)

    def _keep_buffers(self) -> None:
        _copy(self._buffers, self._kept_buffers)

    def _move(self) -> None:
        """Move the weights by their gradient."""
        self._optimizer.step()

    def _gradient(self, rows: Prepared, share: float = 1.0) -> tuple[Loss, Tensor]:
        """The loss, and the norm of its gradient, which is left, clipped, in the parameters."""
        self._optimizer.zero_grad(set_to_none=True)
        loss = self._with_gradient(rows, share)
        return loss, nn.utils.clip_grad_norm_(self.parameters, self.clip or math.inf)

    def _with_gradient(self, rows: Prepared, share: float = 1.0) -> Loss:
        """The loss, its gradient added up in the parameters over the parts of the rows."""
        count = self.config.accumulate
        if count == 1:
            return self._backward_of(rows, share)
        parts = []
        for k in range(count):
            part, weight = rows.shared(k, count)
            with self._apart() if k + 1 < count else nullcontext():
                loss = self._backward_of(part, share * weight / count)
            # Without its graph, which may keep what the part's backward pass needed.
            parts.append((weight / count, loss._replace(value=loss.value.detach())))
        return _total(parts)

    def _apart(self) -> AbstractContextManager[Any]:
        """Inside, a process adds up its own gradient, which the others do not get yet."""
        return self.fabric.no_backward_sync(self._fabric_loss)

    def _backward_of(self, rows: Prepared, share: float) -> Loss:
        loss = self._loss_of(rows)
        self._backward(loss.value if share == 1.0 else share * loss.value)
        return loss

    def _loss_of(self, rows: Prepared) -> Loss:
        return self._fabric_loss(rows)

    def _backward(self, loss: Tensor) -> None:
        try:
            self.fabric.backward(loss)
        except RuntimeError as error:
            explain_edit(self.module, error)
            raise

    def _over_processes(self, loss: Loss, share: float) -> Loss:
        """The loss of the rows of all processes.

        It is NaN or infinite where that of any process is, and all skip the same steps: a NaN row
        has a gradient of 0, so that the gradient's norm does not tell.
        """
        if self.fabric.world_size == 1:
            return loss
        own = torch.stack([value.detach() for value in (loss.value, *loss.metrics.values())])
        mean: Any = self.fabric.all_reduce(share * own)
        return Loss(mean[0], dict(zip(loss.metrics, mean[1:], strict=True)))

    def _average(self) -> None:
        if self.config.ema is None:
            return
        self.steps += 1
        decay = min(self.config.ema, first_decay(self.steps))
        with torch.no_grad():
            self._average_weights(decay)

    def _average_weights(self, decay: float) -> None:
        # torch's AveragedModel collects the weights at each step: 0.46 ms instead of 0.04 for the
        # 56 of an nsf.
        get_ema_multi_avg_fn(decay)(self._ema_weights, self._weights, self.steps)

    def release(self) -> None:
        """Leave the modules as other code expects them; no step is taken any more."""

    def _skip(self, loss: Loss) -> None:
        self._skipped_batches = self._batches
        self.skipped += 1
        self._bad_in_a_row += 1
        if self._bad_in_a_row == BAD_STEPS:
            self.refuse_divergence(loss, 0)

    def refuse_divergence(self, loss: Loss, steps: int) -> None:
        """Raise where half of the steps, or more, were left out at the end."""
        if self._bad_in_a_row and 2 * self._bad_in_a_row >= steps:
            remedy = f"lower lr={self.lr:g}, clip harder, or check the data's scale"
            value = loss.value.item()
            if value == math.inf and isinstance(self.module, Flow) and self._skipped_batches:
                found = (outside_of_base(self.module, batch) for batch in self._skipped_batches)
                remedy = next(filter(None, found), remedy)
            raise DivergedError(
                f"fit: the loss or its gradient was NaN or infinite in {self._bad_in_a_row} steps "
                f"in a row (loss {value:.4g}); {remedy}"
            )

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {
            "module": self.module.state_dict(),
            "kept": self.ema_module.state_dict(),
            "steps": self.steps,
            "optimizer": self._optimizer.state_dict(),
            "skipped": self.skipped,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state; the optimizer's settings are this run's own.

        Raises:
            CheckpointError: A tensor is not of the shape and dtype that it must have.
        """
        pairs = [(self.module, state["module"])]
        if self.ema_module is not self.module:
            pairs.append((self.ema_module, state["kept"]))
        for module, saved in pairs:
            for name, weight in module.named_parameters():
                _expect_like(name, saved[name], weight.shape, weight.dtype)
            module.load_state_dict(saved)
            if bad := non_finite(module):
                raise CheckpointError(f"holds a weight {bad} that is NaN or infinite")
        moments = state["optimizer"]["state"]
        self._expect_moments(moments)
        own = self._optimizer.state_dict()
        self._optimizer.load_state_dict({**own, "state": moments})
        self.steps, self.skipped = int(state["steps"]), int(state["skipped"])
        self._keep_buffers()

    def _expect_moments(self, moments: dict[int, dict[str, Any]]) -> None:
        """The fused optimizers take a tensor of another size as it is, and write beyond it."""
        for number, found in moments.items():
            weight = self.parameters[number]
            if found.keys() != {"step", "exp_avg", "exp_avg_sq"}:
                raise CheckpointError(f"holds the state of another optimizer: {sorted(found)}")
            _expect_like("step", found["step"], torch.Size(), torch.float32)
            for name in ("exp_avg", "exp_avg_sq"):
                _expect_like(name, found[name], weight.shape, weight.dtype)


def first_decay(steps: Any) -> Any:
    """The average's decay while it is below that of the settings: first weights soon fade.

    Args:
        steps: Steps that count, a number or a tensor.
    """
    return steps / (steps + 9)


@torch.no_grad()
def _copy(values: list[Any], into: list[Any]) -> None:
    if values:
        torch._foreach_copy_(into, values)  # pyright: ignore


def _total(parts: list[tuple[float, Loss]]) -> Loss:
    """The loss of all rows, from the weights and losses of their parts."""
    weights, losses = zip(*parts, strict=True)

    def total(values: list[Tensor]) -> Tensor:
        return torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(0)

    names = losses[0].metrics
    metrics = {name: total([loss.metrics[name] for loss in losses]) for name in names}
    return Loss(total([loss.value for loss in losses]), metrics)


def _expect_like(name: str, value: Any, shape: torch.Size, dtype: torch.dtype) -> None:
    if not isinstance(value, torch.Tensor) or (value.shape, value.dtype) != (shape, dtype):
        got = type(value).__name__
        if isinstance(value, torch.Tensor):
            got = f"{tuple(value.shape)} and {value.dtype}"
        raise CheckpointError(
            f"holds a {name} of another model: expected {tuple(shape)} and {dtype}, got {got}"
        )
