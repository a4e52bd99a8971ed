"""Which learner takes the steps: a plain, captured (GPU), compiled (CPU) or sharded one."""

import math

from lightning_fabric import Fabric
from torch import nn

from cnf.flow import Flow
from cnf.objectives import Objective
from cnf.training.capture import CapturedLearner
from cnf.training.compiled import CompiledLearner, CompiledSolveLearner
from cnf.training.config import SHARDED, TrainConfig
from cnf.training.learner import Learner
from cnf.training.sharded import ShardedLearner
from cnf.transforms.continuous import odes_in

# Below these no model's compilation pays, so that none is recorded to find out.
LEAST_STEPS, LEAST_SECONDS = 2_000, 20.0
LEAST_SOLVES, LEAST_SOLVE_SECONDS = 2_500, 190.0  # for each ODE of the flow


def learner_for(
    module: nn.Module, objective: Objective, config: TrainConfig, fabric: Fabric
) -> Learner:
    """The learner that the settings ask for.

    Args:
        module: The module to train.
        objective: What is minimized.
        config: Its `compile` is read, and its budget.
        fabric: The processes.

    Raises:
        ValueError: `compile=True` where a step cannot be compiled or captured.
    """
    kind, obstacle = _kind(module, objective, config, fabric)
    if config.compile is True and obstacle:
        raise ValueError(
            f"fit: compile=True compiles a step on a CPU and captures one on a CUDA device, got "
            f"{obstacle}; leave compile='auto'"
        )
    return kind(module, objective, config, fabric)


def _kind(
    module: nn.Module, objective: Objective, config: TrainConfig, fabric: Fabric
) -> tuple[type[Learner], str | None]:
    """The class of the learner, and what keeps steps from being compiled, if anything does."""
    if config.strategy == SHARDED:
        return ShardedLearner, f"strategy={SHARDED!r}"
    if fabric.device.type == "cuda":
        obstacle = why_not_captured(module, objective, fabric)
        return (CapturedLearner if config.compile and not obstacle else Learner), obstacle
    if obstacle := why_not_compiled(objective, config, fabric):
        return Learner, obstacle
    return (_compiled(module, objective, config) if config.compile else Learner), None


def _compiled(module: nn.Module, objective: Objective, config: TrainConfig) -> type[Learner]:
    """The learner that compiles what takes the time, if the budget may be long enough for it."""
    flow = module if isinstance(module, Flow) else None
    odes = len(odes_in(flow.transform)) if flow is not None and objective.solves else 0
    pictures = flow is not None and len(flow.event_shape) == 3  # whose convolutions take the time
    if config.compile == "auto" and (pictures or not _is_long(config, odes)):
        return Learner
    return CompiledSolveLearner if odes else CompiledLearner


def why_not_compiled(objective: Objective, config: TrainConfig, fabric: Fabric) -> str | None:
    """Why a step is not compiled, in words for a message; None where it may be.

    Args:
        objective: What is minimized.
        config: Its `accumulate` is read.
        fabric: The processes.
    """
    if why := _common_obstacle("cpu", objective, fabric):
        return why
    if config.accumulate > 1:
        return f"accumulate={config.accumulate}"
    return None


def why_not_captured(module: nn.Module, objective: Objective, fabric: Fabric) -> str | None:
    """Why a step cannot be captured, in words for a message; None where it may be.

    Args:
        module: The module to train.
        objective: What is minimized.
        fabric: The processes.
    """
    if why := _common_obstacle("cuda", objective, fabric):
        return why
    if not objective.solves or not isinstance(module, Flow):
        return None
    for ode in odes_in(objective.as_trained(module).transform):
        solver = ode.solver
        if not solver.fixed:
            return f"the method {solver.method}, which reads its errors"
        if solver.discrete and solver.explicit == "sample":
            return f"{solver}, whose steps are inverted by iteration"
        if solver.discrete and math.prod(ode.field.event_shape) > 2:
            return f"{solver}, whose determinants the host factorizes"
        if solver.compile or solver.gradient not in ("auto", "backprop"):
            return f"{solver}, which is compiled or whose gradient is not backprop"
    return None


def _common_obstacle(device: str, objective: Objective, fabric: Fabric) -> str | None:
    """What keeps a step from being compiled as from being captured."""
    if fabric.device.type != device:
        return f"the device {fabric.device}"
    if fabric.world_size > 1:
        return f"{fabric.world_size} processes"
    if not objective.capturable:
        return f"{type(objective).__name__}, of which capturable is False"
    return None


def _is_long(config: TrainConfig, odes: int) -> bool:
    if config.steps is not None:
        return config.steps >= (odes * LEAST_SOLVES or LEAST_STEPS)
    assert config.seconds is not None
    return config.seconds >= (odes * LEAST_SOLVE_SECONDS or LEAST_SECONDS)
