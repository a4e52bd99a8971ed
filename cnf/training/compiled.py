"""Training steps on a CPU, of which the costly part is compiled before training begins."""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor

from cnf.errors import warn
from cnf.objectives import Loss
from cnf.objectives.batch import Prepared, tensors_of
from cnf.training.config import TrainConfig
from cnf.training.flat import FlatAdam
from cnf.training.learner import Learner
from cnf.training.program import Program
from cnf.training.recorded import Conditions, agrees
from cnf.transforms.continuous import compiled_solves

# Measured on one core of an AMD EPYC with models of 200 to 2,500 operations, batches of 1,024.
SECONDS = (4.0, 0.015)  # to compile: in any case, and for each operation
SAVED = 6e-6  # seconds of a step for each operation
SPEEDUP = 1.6


class CompiledLearner(Learner):
    """A learner whose loss and gradient are one compiled program.

    With `compile="auto"` it compiles where that is expected to save twice its time, and else, or
    where it fails, takes the steps of `Learner`.
    """

    _program: Program | None = None
    _flat: FlatAdam | None = None
    _flat_gradient: Tensor | None = None  # of this step, if a program computed it
    _others: tuple[list[Tensor], list[Tensor]] = [], []  # weights not in it, and their averages

    @property
    def compiles(self) -> bool:
        return True

    def warm_up(self, rows: Prepared) -> None:
        try:
            program = Program(self._loss, self.parameters, rows, self.clip)
            if self.config.compile is True or pays(self.config, program):
                program.compile()
                self._flat = self._flattened(program)
                program.conditions = Conditions(self._loss, rows, draws_alike=True)
                self._program, self.compiled = program, True
                _remember(program)
        except Exception as error:  # of any kind: if it is the objective's own, a step raises it
            _go_on_without(self.config, error)

    def _flattened(self, program: Program) -> FlatAdam:
        pairs = zip(self._weights, self._ema_weights, strict=True)
        average_of = {weight: average for weight, average in pairs if weight is not average}
        averages = [average_of.pop(p) for p in program.parameters if p in average_of]
        self._others = list(average_of), list(average_of.values())
        return FlatAdam(self._adam, program.parameters, averages)

    def _gradient(self, rows: Prepared, share: float = 1.0) -> tuple[Loss, Tensor]:
        program, self._flat_gradient = self._program, None
        if program is None or not program.conditions.hold(rows):
            if self._flat is not None and not self._flat.in_place:
                self._forget_flat("a weight was given another memory (param.data = …)")
            return super()._gradient(rows, share)
        plain = program.conditions.plain_loss_if_due(rows)
        loss, norm, gradient = program(rows)
        if plain is not None and not agrees(loss.value, plain):
            self._program, self.compiled = None, False
            return super()._gradient(rows, share)
        self._flat_gradient = gradient
        return loss, norm

    def _move(self) -> None:
        if self._flat is not None and self._flat_gradient is not None:
            return self._flat.step(self._flat_gradient)
        super()._move()
        if self._flat is not None and not self._flat.in_step:
            self._forget_flat("some weights were frozen for some steps, which Adam counts")

    def _forget_flat(self, why: str) -> None:
        """Take plain steps from here on, as weights cannot be moved side by side any more."""
        assert self._flat is not None
        self._flat.release()
        self._program, self._flat, self.compiled = None, None, False
        warn(f"fit: {why}; steps are not compiled from here on")

    def _average_weights(self, decay: float) -> None:
        if self._flat is None:
            return super()._average_weights(decay)
        self._flat.average(decay)
        weights, averages = self._others
        if weights:
            torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore

    def release(self) -> None:
        if self._flat is not None:
            self._flat.release()


class CompiledSolveLearner(Learner):
    """A learner that compiles each ODE's dynamics, or the whole step of a fixed-step solver."""

    compiled = True
    _shapes: Sequence[torch.Size] = ()  # of the rows for which it has compiled

    @property
    def compiles(self) -> bool:
        return True

    def warm_up(self, rows: Prepared) -> None:
        self._shapes = _shapes_of(rows)
        try:
            super().warm_up(rows)
        except Exception as error:  # as above
            _go_on_without(self.config, error)
            self.compiled = False
            self._optimizer.zero_grad(set_to_none=True)

    def _loss_of(self, rows: Prepared) -> Loss:
        # Other rows, such as a last batch that is smaller, would compile inside of the budget.
        compiles = self.compiled and _shapes_of(rows) == self._shapes
        with compiled_solves() if compiles else nullcontext():
            return super()._loss_of(rows)


def _shapes_of(rows: Prepared) -> list[torch.Size]:
    return [value.shape for value in tensors_of(rows)]


def _go_on_without(config: TrainConfig, error: Exception) -> None:
    """Warn that steps are not compiled; raise the error if they must be."""
    if config.compile is True:
        raise error
    first = str(error).strip().split("\n")[0]
    warn(
        f"fit: steps are not compiled, as that failed: {first}; compile=False does without the "
        "attempt"
    )


def pays(config: TrainConfig, program: Program) -> bool:
    """Whether compilation is expected to save twice the time that it takes.

    A budget in steps repeats bit for bit, so that the answer depends on nothing else; for one in
    seconds it also depends on whether this machine has the program already.

    Args:
        config: Its budget is read.
        program: The program.
    """
    always, each = SECONDS
    cost = always + each * program.size
    if config.steps is not None:
        return config.steps * SAVED * program.size >= 2 * cost
    assert config.seconds is not None
    cost = always if _known(program).exists() else cost
    return config.seconds * (1 - 1 / SPEEDUP) >= 2 * cost


def _known(program: Program) -> Path:
    """A file that is there if TorchInductor has compiled the program before."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    key = f"{torch.__version__} {torch.get_num_threads()} {program.code}"
    return Path(cache_dir()) / "cnf" / hashlib.sha256(key.encode()).hexdigest()


def _remember(program: Program) -> None:
    with suppress(OSError):  # a folder that cannot be written
        file = _known(program)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
