"""Training steps on a CPU, of which the costly part is compiled before training begins."""

import hashlib
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from torch import Tensor

from cnf.errors import warn
from cnf.objectives import Loss
from cnf.objectives.batch import Prepared
from cnf.training.config import TrainConfig
from cnf.training.flat import FlatAdam
from cnf.training.learner import Learner
from cnf.training.program import Program
from cnf.transforms.continuous import compiled_solves

# Measured on one core of an AMD EPYC with models of 200 to 2,500 operations, batches of 1,024.
SECONDS = (4.0, 0.015)  # to compile: in any case, and for each operation
SAVED = 6e-6  # seconds of a step for each operation
SPEEDUP = 1.6

COMPARED = (10, 100)  # calls of a program after which its loss is compared with the plain one
EVERY = 1_000  # and every so many calls
AGREEMENT = 1e-3, 1e-3  # of the two, relative and absolute


class CompiledLearner(Learner):
    """A learner whose loss and gradient are one compiled program.

    With `compile="auto"` it compiles where that is expected to save twice its time, and else, or
    where it fails, takes the steps of `Learner`.
    """

    _program: Program | None = None
    _calls = 0
    _flat: FlatAdam | None = None
    _flat_gradient: Tensor | None = None  # of this step, if a program computed it

    @property
    def compiles(self) -> bool:
        return True

    def warm_up(self, rows: Prepared) -> None:
        try:
            program = Program(self._loss, self.parameters, rows, self.config.clip)
            if self.config.compile is True or pays(self.config, program):
                program.compile()
                self._flat = self._flattened(program)
                self._program, self.compiled = program, True
                _remember(program)
        except Exception as error:  # of any kind: if it is the objective's own, a step raises it
            _go_on_without(self.config, error)

    def _flattened(self, program: Program) -> FlatAdam:
        pairs = zip(self._weights, self._ema_weights, strict=True)
        average_of = {id(weight): average for weight, average in pairs if weight is not average}
        averages = [average_of[id(p)] for p in program.parameters if id(p) in average_of]
        return FlatAdam(self._adam, program.parameters, averages)

    def _gradient(self, rows: Prepared, share: float = 1.0) -> tuple[Loss, Tensor]:
        program, self._flat_gradient = self._program, None
        if program is None or not program.fits(rows):
            return super()._gradient(rows, share)
        self._calls += 1
        compares = self._calls in COMPARED or self._calls % EVERY == 0
        plain = program.plain_loss(rows) if compares and not program.draws else None
        loss, norm, gradient = program(rows)
        if plain is not None and not torch.allclose(loss.value, plain, *AGREEMENT, equal_nan=True):
            self._forget_program(loss.value.item(), plain.item())
            return super()._gradient(rows, share)
        self._flat_gradient = gradient
        return loss, norm

    def _forget_program(self, compiled: float, plain: float) -> None:
        """Take plain steps from here on: the program computes with a number that has changed."""
        self._program, self.compiled = None, False
        warn(
            f"fit: the loss of these rows is {plain:.4g}, and {compiled:.4g} as it was compiled: "
            "a number that it computes with, such as one that a callback sets, has changed since. "
            "Steps before this one were wrong, and those from here on are not compiled; keep such "
            "a number as a tensor (register_buffer), or take compile=False"
        )

    def _move(self) -> None:
        if self._flat is None or self._flat_gradient is None:
            return super()._move()
        self._flat.step(self._flat_gradient)

    def _average_weights(self, decay: float) -> None:
        if self._flat is None:
            return super()._average_weights(decay)
        self._flat.average(decay)

    def release(self) -> None:
        if self._flat is not None:
            self._flat.release()


class CompiledSolveLearner(Learner):
    """A learner that compiles each ODE's dynamics, or the whole step of a fixed-step solver."""

    compiled = True

    @property
    def compiles(self) -> bool:
        return True

    def warm_up(self, rows: Prepared) -> None:
        try:
            super().warm_up(rows)
        except Exception as error:  # as above
            _go_on_without(self.config, error)
            self.compiled = False
            self._optimizer.zero_grad(set_to_none=True)

    def _loss_of(self, rows: Prepared) -> Loss:
        with compiled_solves() if self.compiled else nullcontext():
            return super()._loss_of(rows)


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
