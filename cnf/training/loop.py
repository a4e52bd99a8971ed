"""Training: one loop for every objective, in plain sight."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import nn

from cnf.data import Points, load
from cnf.data.arrays import column_names
from cnf.distributions import FromTorch, expect_volume
from cnf.dynamics import ode
from cnf.errors import CheckpointError, DivergedError, SolverError, optional
from cnf.flow import Flow
from cnf.objectives import OBJECTIVES, Batch, Loss, Objective
from cnf.precision import widest
from cnf.random import mixed, reseed, seeded, untouched
from cnf.training import checkpoint
from cnf.training.batches import check_event_shape
from cnf.training.budget import Budget
from cnf.training.columns import (
    expect_resolved,
    warn_of_degenerate,
    warn_of_numbering,
    warn_of_outliers,
)
from cnf.training.config import TrainConfig, as_config
from cnf.training.history import Callback, History, Listeners
from cnf.training.interrupt import interruptible
from cnf.training.origin import Origin, configuration, environment, objective_name
from cnf.training.preprocessing import fit_preprocessing
from cnf.training.progress import ProgressBar
from cnf.training.run import Part, Run, restore
from cnf.training.stream import DensityStream, IterableStream, as_stream, shared
from cnf.training.validation import Validation

RECORDS = 200  # rows of metrics.csv over a budget
SLOW = 5  # seconds of validation that are told of where training took less


def fit(
    module: nn.Module,
    objective: Objective | type[Objective] | str,
    data: Any,
    config: TrainConfig | Mapping[str, Any] | None = None,
    *,
    context: Any = None,
    weight: Any = None,
    validation: Any = None,
    loggers: Sequence[Any] = (),
    callbacks: Sequence[Callback] = (),
) -> History:
    """Train `module` by `objective`; afterwards it holds the averaged (EMA) weights.

    It trains in train mode and comes back in eval mode, whatever it was handed in.

    Ctrl-C, SIGTERM and SIGHUP end training after the step in hand; it saves, and returns with
    reason "interrupted".

    Args:
        module: A flow, or any module that the objective understands.
        objective: `MaximumLikelihood()`, `FlowMatching()`, …, such a class, or a name in
            `OBJECTIVES`.
        data: A density, a torch distribution or a flow (fresh draws each step); rows in memory: a
            tensor, an array or a table (N, D), `Points`, a `Batch`; a name or a file, as
            `cnf.data.load` takes them; a map-style dataset; an iterable of batches, or a generator
            function of them; None where the objective needs none. A batch is x, (x, context), a
            `Batch`, or a mapping with a `Batch`'s names.
        config: Budget, optimizer, averaging, where to write, or a mapping of these settings;
            `TrainConfig()`, a minute, if None.
        context: Condition of each row of an array, shape (N, C), or (N,) for one number each;
            labels one-hot.
        weight: Weight of each row of an array, at least 0, shape (N,): how much it counts in the
            loss and in held-out scores.
        validation: Held-out rows: whatever `data` may be, or a pair (x, context); of a dataset and
            of batches the first `validation_rows`. Drawn from the density, or a tenth of one's own
            data, if None.
        loggers: Fabric's loggers, or whatever has `log_metrics(metrics, step)`: told of each of
            some 200 records over the budget. Of several processes the first one tells.
        callbacks: Functions of such a record, a dict with "step", "loss", …; what they or a logger
            raise ends the run, after a checkpoint.
    Returns:
        What was logged, and why training ended.
    Raises:
        ValueError: Data that are too few, of the wrong shape, NaN; weights that are negative, NaN
            or all 0; a folder that exists.
        CheckpointError: The run's folder cannot be written or resumed.
        OSError: A logger cannot write.
        DivergedError: The gradient or the weights are no numbers any more, or training has led to
            an ODE that cannot be solved. The last checkpoint is kept.
    """
    goal: Objective = OBJECTIVES.build(objective, "fit")
    config = as_config(config)
    _expect_trainable(module, goal)
    data = load(data) if isinstance(data, str | PathLike) else data
    listeners = Listeners(loggers, callbacks)
    trainer = _Trainer(module, goal, data, config, context, weight, validation, listeners)
    with trainer.folder, trainer.listeners:
        trainer.take_up()
        try:
            return trainer.run()
        except BaseException as error:
            trainer.fail(error)
            raise
        finally:
            module.eval()


def _expect_trainable(module: Any, objective: Objective) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"fit: expected a flow, or another torch.nn.Module, got {_kind(module)}; build one: "
            "cnf.models.build('realnvp', dim=2)"
        )
    if not any(parameter.requires_grad for parameter in objective.parameters(module)):
        raise ValueError(
            f"fit: expected a parameter to train, got a {type(module).__name__} of which none "
            "requires a gradient; call flow.requires_grad_()"
        )


def _kind(value: Any) -> str:
    """What a value is, in an error: text and classes as they are, else its type's name."""
    return repr(value) if isinstance(value, str | type) else type(value).__name__


class _Trainer:
    def __init__(
        self, module: nn.Module, objective: Objective, data: Any, config: TrainConfig,
        context: Any, weight: Any, validation: Any, listeners: Listeners,
    ) -> None:  # fmt: skip
        optional("lightning_fabric", "train")  # here, since `cnf.load` can do without it
        from cnf.training.learner import Learner, launched

        self.module, self.objective, self.config = module, objective, config
        self.dtype = next((p.dtype for p in module.parameters()), torch.get_default_dtype())
        missing = getattr(getattr(module, "transform", None), "optional_context", False)
        self.stream = as_stream(data, config, context, weight, validation, missing)
        if data is None and objective.needs_data:
            raise ValueError(f"fit: {type(objective).__name__} learns from data, got None")
        head = self.stream.head
        check_event_shape(module, None if head is None else head.x)
        held_out = self.stream.validation
        check_event_shape(module, None if held_out is None else held_out.x, "validation")
        self.fabric = launched(config, self.dtype)
        self.listeners = listeners if self.fabric.is_global_zero else Listeners((), ())
        names = data.columns if isinstance(data, Points) else column_names(data)
        own = not isinstance(self.stream, DensityStream)
        continuous = isinstance(module, Flow) and module.dequantization is None
        if head is not None and own and continuous and self.fabric.is_global_zero:
            warn_of_degenerate(head.x, names)
            warn_of_numbering(head.x, names)
            warn_of_outliers(head.x, names)
        source = getattr(getattr(self.stream, "density", None), "inner", None)
        if continuous and isinstance(source, FromTorch):
            expect_volume(source.distribution, "fit", "data")
        wide = widest(self.fabric.device) == torch.float64
        self.keeps_digits = {
            name
            for name, part in (("x", "preprocess"), ("context", "context_preprocess"))
            if wide and getattr(module, part, None) is not None
        }
        for name, columns in (("x", names), ("context", None)):
            if head is not None and name not in self.keeps_digits:
                expect_resolved(name, getattr(head, name), self.dtype, columns)
        fit_preprocessing(module, head)
        self.learner = Learner(module, objective, config, self.fabric)
        data_hash = self.stream.fingerprint() if config.folder else None
        description = configuration(module, objective, data, config)
        self.origin = Origin(description, data_hash, self.fabric.device)
        self.folder = Run(config.folder if self.fabric.is_global_zero else None, config.resume)
        self.budget, self.history = Budget(config), History()
        held_out = None if held_out is None else self._placed(held_out)
        self.validation = Validation(objective, config, held_out)
        self.saved_at = time.perf_counter()
        self.recorded_at = 0.0  # fraction of the budget

    def take_up(self) -> None:
        """Go on from the folder's checkpoint, if that is wanted; say what runs."""
        self.resumes = self.fabric.broadcast(self.folder.resumes)
        if self.resumes:
            assert self.config.folder is not None
            restore(self.config.folder, self._parts())
            self.recorded_at = self.budget.fraction  # of the budget as it is now
            self.validation.count_done(self.recorded_at)
        self.first_step = self.budget.step
        self._describe("running")

    def run(self) -> History:
        show = self.config.progress and self.fabric.is_global_zero
        self.module.train()
        self._save()  # from now on the run can be resumed
        with (
            untouched(self.fabric.device),
            interruptible() as interrupted,
            ProgressBar(show, objective_name(self.objective)) as bar,
        ):
            self._begin(bar)
            loss = None
            while not (self.budget.done or self.validation.exhausted):
                with ode.record() as stats:
                    start = time.perf_counter()
                    batch, part = self._rows(self.budget.step)
                    paired = time.perf_counter()
                    lr = self.learner.lr * self.budget.lr_factor()
                    loss = self.learner.step(batch, lr, part)
                    self.history.pairing += paired - start
                    self._spend(time.perf_counter() - start)
                nfe = stats.forward + stats.backward
                if bar.due:
                    self._show(bar, loss.value.item(), nfe)
                scored = None
                if self.validation.due(self.budget.fraction) or self.budget.done:
                    scored = self._validate(bar)
                self._record(loss, nfe, scored)
                if number := self._agreed(interrupted()):
                    self.history.interrupt(number)
                    break
                if time.perf_counter() - self.saved_at > self.config.checkpoint_seconds:
                    self._save()
            if self.validation.exhausted:
                self.history.reason = "patience"
            if loss is not None:
                self.learner.refuse_divergence(loss, self.budget.step)
            self.validation.warn_of_worsening(self.history.records)
            self._compare_on_training_rows()
            if self.history.records:
                last = self.history.records[-1]
                self._show(bar, last["loss"], int(last["nfe"]))
            self._finish(bar)
        return self.history

    def _begin(self, bar: ProgressBar) -> None:
        """What is done once: fit a coupling to the data, which counts as training; compile."""

        def rows(n: int) -> Batch | None:
            found = self.stream.rows(n)
            return None if found is None else self._placed(found)

        start = time.perf_counter()
        with bar.doing("preparing"):
            begun = self.objective.begin(self.module, rows, seeded(self.config.seed, -7))
        if begun is not self.objective:
            self.objective = begun
            self.learner.begin(begun)
            if not self.resumes:
                self.history.preparing = time.perf_counter() - start
                self.budget.charge(self.history.preparing)
        if self.learner.compiles:
            self.learner.warm_up(self._like_a_step())

    def _show(self, bar: ProgressBar, loss: float, nfe: int) -> None:
        pairing = self.history.pairing / self.budget.seconds
        bar.update(self.budget.fraction, self.budget.step, loss, nfe, pairing)

    def _rows(self, step: int) -> tuple[Batch, float]:
        """This process's part of a step's batch, and the weight of its loss."""
        config, fabric = self.config, self.fabric
        # For what the module itself draws (dropout).
        reseed(mixed(config.seed, step, fabric.global_rank, 1), fabric.device)
        generator = seeded(config.seed, step)
        batch = self._placed(self.stream.batch(step, generator))
        if step == 0:
            self.learner.initialize(batch, seeded(config.seed, -11))
        return self._prepared(batch, generator)

    def _like_a_step(self) -> Batch:
        """Rows of a step's shape, which a stream does not lose for it."""
        generator = seeded(self.config.seed, -13)
        stream = self.stream
        only_once = isinstance(stream, IterableStream)
        batch = stream.head if only_once else stream.batch(0, generator)
        assert batch is not None
        return self._prepared(self._placed(batch), generator)[0]

    def _prepared(self, batch: Batch, generator: torch.Generator) -> tuple[Batch, float]:
        batch = self.objective.prepare(self.module, batch, generator)
        # Everything was drawn for the whole batch, so a row's numbers do not hang on who has it.
        return shared(batch, self.fabric.global_rank, self.fabric.world_size)

    def _agreed(self, signal: int) -> int:
        """The signal that process 0 received: all must leave after the same step."""
        return self.fabric.broadcast(signal) if self.fabric.world_size > 1 else signal

    def _placed(self, batch: Batch) -> Batch:
        """On the device, in the module's dtype; what is standardized keeps its digits so far."""

        def placed(value: torch.Tensor) -> torch.Tensor:
            if not value.is_floating_point():
                return value.to(self.fabric.device)
            wide = any(value is getattr(batch, name) for name in self.keeps_digits)
            dtype = torch.promote_types(value.dtype, self.dtype) if wide else self.dtype
            return value.to(self.fabric.device, dtype)

        return batch.map(placed)

    def _spend(self, seconds: float) -> None:
        if self.fabric.world_size > 1 and self.config.seconds is not None:
            seconds = self.fabric.broadcast(seconds)  # one clock, so that all stop at one step
        self.budget.spend(seconds)

    def _validate(self, bar: ProgressBar) -> float | None:
        if self.validation.held_out is None or not self.config.validations:
            return None
        start = time.perf_counter()
        with bar.doing("validating"):
            score = self.validation.score(self.learner.kept, self.budget.fraction)
        self.history.validating += time.perf_counter() - start
        bar.validated(self.validation.name, score)
        return score

    def _compare_on_training_rows(self) -> None:
        """Where nothing was held out to compare them on: whether likelihood's fixed steps were
        enough."""
        module: Any = self.learner.kept
        head = self.stream.head
        if self.validation.done or head is None or not self.objective.solves:
            return
        if isinstance(module, Flow) and module.base.has_density:
            self.validation.compare_solvers(module, self._placed(head), "training")

    def _record(self, loss: Loss, nfe: int, scored: float | None) -> None:
        records, budget = self.history.records, self.budget
        due = int(budget.fraction * RECORDS) > int(self.recorded_at * RECORDS)
        if not due and scored is None and not budget.done:
            return
        self.recorded_at = budget.fraction
        record = {
            "step": budget.step, "seconds": round(budget.seconds, 4), "fraction": budget.fraction,
            "lr": self.learner.lr * budget.lr_factor(), "loss": loss.value.item(), "nfe": nfe,
            **{name: value.item() for name, value in loss.metrics.items()},
        }  # fmt: skip
        if scored is not None:
            record[self.validation.name] = scored
        records.append(record)
        try:
            self.folder.log(record)
            self.listeners.tell(record)
        except Exception as error:  # of a full disk, a service, a callback: no step may be lost
            try:
                self._save()
            except (CheckpointError, DivergedError) as unsaved:
                error.add_note(f"Nor could the run be saved: {unsaved}")
            raise

    def _finish(self, bar: ProgressBar) -> None:
        history, budget = self.history, self.budget
        history.steps, history.seconds, history.ticks = budget.step, budget.seconds, budget.ticks
        history.skipped = self.learner.skipped
        self._save()
        self.module.load_state_dict(self.validation.best_weights or self.learner.kept.state_dict())
        if self.folder.folder is not None:
            checkpoint.save(self.module, self.folder.checkpoints)
        self._describe(history.reason)
        if history.reason == "interrupted":
            kept = self.config.folder and f"saved; resume it in {self.config.folder}"
            bar.say(f"Interrupted at step {budget.step}: {kept or 'not saved'}.")
        if history.validating > max(SLOW, history.seconds):
            bar.say(
                f"Validation took {history.validating:.0f} s, training {history.seconds:.1f} s: "
                f"lower validations={self.config.validations} or "
                f"validation_rows={self.config.validation_rows}."
            )

    def fail(self, error: BaseException) -> None:
        """Write how far the run came and why it ended; its last checkpoint stays.

        Raises:
            DivergedError: It was training that made the ODE unsolvable.
        """
        diverged = isinstance(error, SolverError) and self.budget.step > self.first_step
        ended = "diverged" if diverged or isinstance(error, DivergedError) else "failed"
        if isinstance(error, KeyboardInterrupt):
            ended = "interrupted"
        with contextlib.suppress(CheckpointError):  # the error itself is to be told, not the disk
            self.folder.write_metrics(self.history.records)
            self._describe(ended, f"{type(error).__name__}: {error}")
        if diverged:
            assert isinstance(error, SolverError)
            raise DivergedError(
                f"fit: training diverged: with the weights of step {self.budget.step} the ODE "
                f"cannot be solved ({error.cause}); lower lr={self.learner.lr:g}, clip harder, or "
                "give likelihood penalties={'kinetic': 0.01}"
            ) from error

    def _parts(self) -> dict[str, Part]:
        """What a checkpoint holds, and a resumed run takes up in this order."""
        return {
            "origin": self.origin,
            "learner": self.learner,
            "budget": self.budget,
            "validation": self.validation,
            "history": self.history,
        }

    def _save(self) -> None:
        self.saved_at = time.perf_counter()
        for module in (self.learner.module, self.learner.kept):
            if bad := checkpoint.non_finite(module):  # a good checkpoint must outlive it
                raise DivergedError(
                    f"fit: training diverged: the weight {bad} is NaN or infinite at step "
                    f"{self.budget.step}; lower lr={self.learner.lr:g}"
                )
        self.folder.write_metrics(self.history.records)
        self.folder.save(self.learner.kept, self._parts())

    def _describe(self, ended: str, error: str | None = None) -> None:
        budget, config = self.budget, self.config
        description = self.origin.description
        if config.seconds is not None and ended in ("budget", "patience"):  # the file repeats it
            spent = {"seconds": None, "steps": budget.step, "ticks": budget.ticks}
            description = {**description, **spent}
        self.folder.describe(
            description,
            {
                **environment(),
                "device": str(self.fabric.device),
                "processes": self.fabric.world_size,
                "seed": config.seed,
                "rows": self.origin.data if isinstance(self.origin.data, str) else None,
                "parameters": sum(p.numel() for p in self.module.parameters()),
                "budget": {"steps": config.steps, "seconds": config.seconds},
                "steps": budget.step,
                "seconds": round(budget.seconds, 3),
                "validation_seconds": round(self.history.validating, 3),
                "skipped_steps": self.learner.skipped,
                "ended": ended,
                **({"error": error} if error else {}),
            },
        )
