"""Training steps of several processes that hold a part of the weights each (FSDP2)."""

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_map

from cnf.fields import Piecewise, VectorField
from cnf.flow import evaluating, require_field
from cnf.objectives import Batch, FlowMatching, Loss, Objective
from cnf.objectives.base import as_flow
from cnf.objectives.batch import Prepared
from cnf.training.config import SHARDED, TrainConfig
from cnf.training.learner import Learner


class ShardedLearner(Learner):
    """A learner whose processes hold a part of weights, gradients, moments and averages each.

    PyTorch gathers the weights of a block of the field when it computes, and frees them
    afterwards. What is trained is a copy: the module that was given stays whole in each process,
    on the host while steps are taken. It gets the averages where they are scored or saved. All
    processes must ask for `ema_module` and `state` together. A checkpoint is that of a `Learner`.

    Raises:
        ValueError: The objective is not flow matching, or the field is one that cannot be sharded.
    """

    can_save_alone = False

    def __init__(
        self, module: nn.Module, objective: Objective, config: TrainConfig, fabric: Fabric
    ) -> None:
        _expect_shardable(module, objective)
        self._given, self._given_weights = module, list(objective.parameters(module))
        super().__init__(copy.deepcopy(module).train(), objective, config, fabric)
        self._weights, self._buffers = self.parameters, list(self.module.buffers())
        self._kept_buffers = [buffer.clone() for buffer in self._buffers]
        self._ema_weights = self.parameters
        if config.ema is not None:
            self._ema_weights = [weight.detach().clone() for weight in self.parameters]

    def _set_up(self) -> nn.Module:
        mesh = init_device_mesh(self.fabric.device.type, (self.fabric.world_size,))
        field = _field_of(self.module)
        names = [name for name, _ in self.module.named_parameters()]
        for block in list(_blocks(field, _called(field))):
            fully_shard(block, mesh=mesh)
        trained = set(self.objective.parameters(self.module))
        others = {weight for weight in self.module.parameters() if weight not in trained}
        fully_shard(self._loss, mesh=mesh, ignored_params=others)
        if names != [name for name, _ in self.module.named_parameters()]:
            raise _refusal("a field two blocks of which share a weight")
        return self._loss.to(self.fabric.device)

    def _averaged(self) -> nn.Module:
        return self._given

    @property
    @torch.no_grad()
    def ema_module(self) -> nn.Module:
        given = self._given.to(self.fabric.device)
        for weight, average in zip(self._given_weights, self._ema_weights, strict=True):
            weight.copy_(average.full_tensor())
        for own, trained in zip(given.buffers(), self.module.buffers(), strict=True):
            own.copy_(trained)
            torch.distributed.broadcast(own, 0)  # statistics of rows are each process's own
        return given

    def expect_same_parts(self) -> None:
        """FSDP itself replaces parameters, by whole ones while a block computes."""

    def agree_on_buffers(self) -> None:
        """`ema_module` does."""

    def initialize(self, batch: Batch, generator: torch.Generator) -> None:
        """A flow that has a field has no `ActNorm`."""

    def step(self, rows: Prepared, lr: float, share: float = 1.0) -> Loss:
        self._given.cpu()
        return super().step(rows, lr, share)

    def _gradient(self, rows: Prepared, share: float = 1.0) -> tuple[Loss, Tensor]:
        loss, norm = super()._gradient(rows, share)
        assert isinstance(norm, DTensor)
        return loss, norm.full_tensor()

    def _loss_of(self, rows: Prepared) -> Loss:
        try:
            return super()._loss_of(rows)
        except RuntimeError as error:
            if "DTensor" not in str(error):
                raise
            raise _refusal("a field that takes weights out of a block that it calls") from error

    def _apart(self) -> AbstractContextManager[Any]:
        return nullcontext()  # the gradient of a part is sharded at once, so that none is whole

    def state(self) -> dict[str, Any]:
        def gathered(value: Any) -> Any:
            if not isinstance(value, DTensor):
                return value
            whole = value.full_tensor()
            return whole.cpu() if self.fabric.is_global_zero else None  # which alone writes it

        return tree_map(gathered, super().state())

    def restore(self, state: dict[str, Any]) -> None:
        own = self.module.state_dict()
        module = {name: _sharded(value, own.get(name)) for name, value in state["module"].items()}
        moments = {
            k: {name: _sharded(value, self.parameters[k]) for name, value in of_one.items()}
            for k, of_one in state["optimizer"]["state"].items()
        }
        super().restore({**state, "module": module, "optimizer": {"state": moments}})
        if self.config.ema is None:  # the parameters themselves, which are in place
            return
        with torch.no_grad():
            for average, weight in zip(self._ema_weights, self._given_weights, strict=True):
                average.copy_(_sharded(weight.detach(), average))


def _sharded(value: Any, like: Any) -> Any:
    """This process's part of a tensor of one axis or more; anything else as it is."""
    if not isinstance(value, Tensor) or not isinstance(like, DTensor) or not value.dim():
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def _field_of(module: nn.Module) -> VectorField:
    return require_field("fit", as_flow("fit", module), "train it by likelihood").field


def _called(field: VectorField) -> set[nn.Module]:
    """The parts that the field calls, rather than taking weights out of them."""
    called: set[nn.Module] = set()
    zeros = next(field.parameters()).new_zeros
    context = zeros(1, field.context_dim) if field.context_dim else None
    watch = register_module_forward_pre_hook(lambda part, _: called.add(part))
    with watch, evaluating(field), torch.no_grad():
        field(zeros(1), zeros(1, *field.event_shape), context)
    return called


def _blocks(module: nn.Module, called: set[nn.Module]) -> Iterator[nn.Module]:
    """The outermost members of lists that are called and have weights: gathered one by one."""
    for child in module.children():
        listed = isinstance(module, nn.ModuleList | nn.Sequential) and child in called
        if listed and any(True for _ in child.parameters()):
            yield child
        else:
            yield from _blocks(child, called)


def _expect_shardable(module: nn.Module, objective: Objective) -> None:
    if not isinstance(objective, FlowMatching):
        raise _refusal(f"{type(objective).__name__}")
    field = _field_of(module)
    if any(isinstance(part, Piecewise) for part in field.modules()):
        raise _refusal("a field of stacked blocks, of which a process may need only some")
    if not all(weight.dim() for weight in field.parameters()):
        raise _refusal("a field with a weight that is one number")


def _refusal(got: str) -> ValueError:
    return ValueError(
        f"fit: strategy={SHARDED!r} shards a field that FlowMatching trains, got {got}; take "
        "strategy='ddp', and against too little memory accumulate=… or smaller batches"
    )
