"""Training: one loop for every objective, in plain sight."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from os import PathLike
from typing import Any

import torch
from torch import nn

from cnf.data import load
from cnf.dynamics import ode
from cnf.errors import CheckpointError, DivergedError, SolverError, optional, warn
from cnf.objectives import OBJECTIVES, Batch, Loss, Objective
from cnf.objectives.batch import Prepared, TrainingRows
from cnf.precision import tf32
from cnf.random import draws_itself, preserved, reseed, stream, stream_seed
from cnf.training import checkpoint
from cnf.training.batches import Placement, check_event_shape, dtype_of
from cnf.training.budget import Budget
from cnf.training.column_checks import check_columns
from cnf.training.config import TF32, TrainConfig, as_config
from cnf.training.history import Callback, History, Listeners
from cnf.training.interrupt import interruptible
from cnf.training.manifest import Manifest
from cnf.training.memory import peak_memory
from cnf.training.origin import Origin, configuration, objective_name
from cnf.training.preprocessing import expect_held_out_in_support, fit_preprocessing
from cnf.training.progress import ProgressBar
from cnf.training.run import Part, Run, restore
from cnf.training.shards import Shards, one_shard, shards_of
from cnf.training.stream import CPU, DensityStream, IterableStream, as_stream
from cnf.training.validation import Validation

RECORDS = 200  # rows of metrics.csv over a budget
SLOW = 5  # seconds of validation from which on it may not take longer than training


def fit(
    module: nn.Module,
    objective: Objective | type[Objective] | str,
    data: Any = None,
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

    Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 end training after the step in hand; it saves, and returns
    with reason "interrupted".

    Args:
        module: A flow, or any module that the objective understands.
        objective: `MaximumLikelihood()`, `FlowMatching()`, …, such a class, or a name in
            `OBJECTIVES`.
        data: A density, a torch distribution or a flow (fresh draws each step); rows in memory: a
            tensor, an array or a table (N, D), `Points`, a `Batch`; a name or a file, as
            `cnf.data.load` takes them; a map-style dataset; an iterable of batches, or a generator
            function of them; None where the objective needs none, or no more than a context. A
            batch is x, (x, context), a `Batch`, or a mapping with a `Batch`'s names.
        config: Budget, optimizer, averaging, where to write, or a mapping of these settings;
            `TrainConfig()`, a minute, if None.
        context: Condition of each row of an array, shape (N, C), or (N,) for one number each;
            labels one-hot.
        weight: Weight of each row of an array, at least 0, shape (N,): how much it counts in the
            loss and in held-out scores.
        validation: Held-out rows: whatever `data` may be, or a pair (x, context); of a dataset and
            of batches the first `validation_rows`. Drawn from the density, or a tenth of one's own
            data, if None.
        loggers: Fabric's loggers, or whatever has `log_metrics(metrics, step)`, called with each
            of about 200 records over the budget, in the first process only.
        callbacks: Functions of such a record, a dict with "step", "loss", …, called in the first
            process only: with several they must not change the module. What a callback or a
            logger raises ends the run, after a checkpoint (not with "fsdp").

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
        trainer.resume()
        try:
            return trainer.run()
        except BaseException as error:
            trainer.fail(error)
            raise
        finally:
            trainer.learner.release()
            module.eval()


def _expect_trainable(module: Any, objective: Objective) -> None:
    if not isinstance(module, nn.Module):
        kind = repr(module) if isinstance(module, str | type) else type(module).__name__
        raise TypeError(
            f"fit: expected a flow, or another torch.nn.Module, got {kind}; build one: "
            "cnf.models.build('realnvp', dim=2)"
        )
    if not any(parameter.requires_grad for parameter in objective.parameters(module)):
        raise ValueError(
            f"fit: expected a parameter to train, got a {type(module).__name__} of which none "
            "requires a gradient; call flow.requires_grad_()"
        )


class _Trainer:
    """One run: what it is made of, and the loop."""

    def __init__(
        self, module: nn.Module, objective: Objective, data: Any, config: TrainConfig,
        context: Any, weight: Any, validation: Any, listeners: Listeners,
    ) -> None:  # fmt: skip
        optional("lightning_fabric", "train")  # here, since `cnf.load` can do without it
        from cnf.training.learner import launch_fabric
        from cnf.training.learners import learner_for

        self.module, self.objective, self.config = module, objective, config
        missing = getattr(getattr(module, "transform", None), "optional_context", False)
        self.stream = as_stream(data, config, context, weight, validation, missing)
        if data is None and objective.needs_data:
            raise ValueError(f"fit: {type(objective).__name__} learns from data, got None")
        check_event_shape(module, self.stream.head)
        check_event_shape(module, self.stream.validation, "validation")
        self.fabric = launch_fabric(config, dtype_of(module))
        self.main = self.fabric.is_global_zero
        self.listeners = listeners if self.main else Listeners((), ())
        self.placed = Placement(module, self.fabric.device)
        self.drawing = self.fabric.device if draws_itself(self.fabric.device) else CPU
        self.numbers = 1 if self.stream.head is None else self.stream.head.x[0].numel()  # a row's
        if self.stream.head is not None:
            if self.numbers and not objective.uses_data:
                warn(
                    f"fit: {type(objective).__name__} does not depend on x, and takes no more of "
                    "the data than their contexts; leave them out: fit(flow, objective, context=…)"
                )
            own = self.main and not isinstance(self.stream, DensityStream)
            check_columns(module, self.stream.head, self.placed, data, own)
            fit_preprocessing(module, self.stream.head)
            expect_held_out_in_support(module, self.stream.validation)
        self.module = module = objective.settle(module)
        self.learner = learner_for(module, objective, config, self.fabric)
        self.origin = Origin(
            configuration(module, objective, data, config),
            self.stream.fingerprint() if config.folder else None,
            self.fabric.device,
        )
        self.stream.move(self.fabric.device)
        self.folder = Run(config.folder if self.main else None, config.resume)
        self.budget, self.history = Budget(config), History()
        held_out = self.stream.validation
        held_out = None if held_out is None else self.placed(held_out)
        self.validation = Validation(objective, config, held_out, self.fabric)
        self.bar = ProgressBar(config.progress and self.main, objective_name(objective))
        self.peak: Callable[[], float] = lambda: math.nan  # memory in MB
        self.rounding = _rounding(config, self.fabric.device.type)
        self.saved_at = time.perf_counter()
        self.recorded_at = 0.0  # fraction of the budget
        self.manifest = Manifest(module, config, self.origin, self.fabric)
        self.postponed = False  # whether it was told that validation waits

    def resume(self) -> None:
        """Go on from the folder's checkpoint, if that is wanted; say what runs."""
        self.resumes = self.fabric.broadcast(self.folder.resumes)
        if self.resumes:
            assert self.config.folder is not None
            restore(self.config.folder, self._parts())
            self.recorded_at = self.budget.fraction  # of the budget as it is now
            self.validation.count_done(self.recorded_at)
            words = f"Going on from step {self.budget.step} in {self.config.folder}."
            if self.validation.exhausted:
                words = (
                    f"Nothing is left to train in {self.config.folder}: patience="
                    f"{self.config.patience} ended the run at step {self.budget.step}; give a "
                    "larger one, or none, to go on."
                )
            self.bar.say(words)
        self.first_step = self.budget.step
        self.manifest.begin(self.budget)
        self._describe("running")

    def run(self) -> History:
        budget, learner, validation, history = (
            self.budget, self.learner, self.validation, self.history
        )  # fmt: skip
        self.module.train()
        self._save()  # from now on the run can be resumed
        device = self.fabric.device
        with (
            preserved(device), peak_memory(device) as self.peak, interruptible() as interrupted,
            self.bar,
        ):  # fmt: skip
            self._begin()
            loss = None
            while not (budget.done or validation.exhausted):
                with ode.record() as stats:
                    start = time.perf_counter()
                    rows, share = self._rows(budget.step)
                    history.pairing += time.perf_counter() - start
                    with self.rounding():
                        loss = learner.step(rows, learner.lr * budget.lr_factor(), share)
                    budget.spend(self._on_one_clock(time.perf_counter() - start))
                self.manifest.count_evaluations(stats)
                score = None
                if budget.done or (validation.due(budget.fraction) and self._affords_validation()):
                    score = self._validate()
                self._record(loss, stats.forward + stats.backward, score)
                late = time.perf_counter() - self.saved_at > self.config.checkpoint_seconds
                number, late = self._agreed(interrupted(), late)
                if number:
                    history.interrupt(number)
                    break
                if late:
                    self._save()
            self._finish(loss)
            if not history.signal:
                history.signal = interrupted()  # which came since, and is for the caller
        return history

    def _begin(self) -> None:
        """What is done once: fit a coupling, which counts as training; compile; a first score."""

        def rows(n: int) -> Batch | None:
            found = self.stream.rows(n)
            return None if found is None else self.placed(found)

        start, known = time.perf_counter(), TrainingRows(rows, self.stream.total)
        with self.bar.doing("preparing"):
            begun = self.objective.begin(self.module, known, stream(self.config.seed, "coupling"))
        self.objective = begun
        self.learner.begin(begun)
        if not self.resumes:
            self.history.preparing = self._on_one_clock(time.perf_counter() - start)
            self.budget.charge(self.history.preparing)
        if self.learner.compiles:
            self._warm_up()
        if self.budget.step == 0:
            self._score_first()

    def _score_first(self) -> None:
        """Score the weights as they came, for early stopping."""
        start = time.perf_counter()
        with self.bar.doing("validating"):
            self.validation.begin(self.learner.ema_module)
        self.history.validating += time.perf_counter() - start

    def _warm_up(self) -> None:
        """Compile, on the rows of the step to come, with other draws.

        Of batches that may vary in size it is the first of all, so that a resumed run compiles for
        the same size.
        """
        start = time.perf_counter()
        with self.bar.doing("compiling"):
            shards, batches = self._shards(self.budget.step), None
            if isinstance(self.stream, IterableStream) and self.stream.head is not None:
                head = self.placed(self.stream.head)
                shards, batches = one_shard(len(head.x)), [head]
            generators = [stream(self.config.seed, "warm-up", *place) for place in shards.ranges]
            batches = batches or self._batches(self.budget.step, shards, generators)
            rows, _ = self.learner.prepare_shards(shards, batches, generators)
            self.learner.warm_up(rows)
        self.history.compiling += time.perf_counter() - start
        self.history.compiled = self.learner.compiled or self.learner.compiles_dynamics

    def _rows(self, step: int) -> tuple[Prepared, float]:
        """This process's rows of a step, and the weight of their loss."""
        seed, device = self.config.seed, self.fabric.device
        reseed(stream_seed(seed, "module", step, self.fabric.global_rank), device)  # dropout
        shards, drawing = self._shards(step), self.drawing
        generators = [stream(seed, "step", step, *at, device=drawing) for at in shards.ranges]
        batches = self._batches(step, shards, generators)
        self.manifest.count_rows(shards.size)
        if step == 0:
            self.learner.initialize(shards.taken(batches), stream(seed, "initialization"))
        return self.learner.prepare_shards(shards, batches, generators)

    def _shards(self, step: int) -> Shards:
        """The shards with this process's rows of a step; all in the first, which sets ActNorms."""
        size = self.stream.size(step)
        if not self.objective.rowwise:
            return one_shard(size)
        shards, processes = shards_of(size, self.numbers, self.drawing), self.fabric.world_size
        if processes == 1 or step == 0:
            return shards
        return shards.of_process(self.fabric.global_rank, processes)

    def _batches(
        self, step: int, shards: Shards, generators: Sequence[torch.Generator]
    ) -> list[Batch]:
        return list(map(self.placed, self.stream.batches(step, shards, generators)))

    def _on_one_clock(self, seconds: float) -> float:
        """What the first process measured: all must have one learning rate, and stop together."""
        if self.fabric.world_size > 1 and self.config.seconds is not None:
            return self.fabric.broadcast(seconds)
        return seconds

    def _agreed(self, signal: int, late: bool) -> tuple[int, bool]:
        """The signal of any process and the first one's clock: all leave, and save, together."""
        if self.fabric.world_size == 1:
            return signal, late
        own = torch.tensor([signal, late and self.main], device=self.fabric.device)
        torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MAX)
        number, due = own.tolist()
        return number, bool(due)

    def _validate(self) -> float | None:
        if self.validation.held_out is None or not self.config.validations:
            return None
        start = time.perf_counter()
        self.learner.agree_on_buffers()
        with self.bar.doing("validating"):
            score = self.validation.score(self.learner.ema_module, self.budget.fraction)
        self.history.validating += time.perf_counter() - start
        self.bar.validated(self.validation.name, score)
        return score

    def _affords_validation(self) -> bool:
        """Whether validation may go on: it has taken less time than training, or stops it."""
        taken, trained = self.history.validating, self.budget.seconds
        affordable = self.config.patience is not None or taken <= max(SLOW, trained)
        if self.fabric.world_size > 1:  # one clock, so that all validate after one step
            affordable = self.fabric.broadcast(affordable)
        if not affordable and not self.postponed:
            self.postponed = True
            self.bar.say(
                f"Validation has taken {taken:.0f} s, training {trained:.1f} s: the next waits "
                f"until training has caught up, or ended. Score fewer rows or less often "
                f"(validation_rows={self.config.validation_rows}, "
                f"validations={self.config.validations})."
            )
        return affordable

    def _record(self, loss: Loss, nfe: int, score: float | None) -> None:
        """Show a step, and log each of some `RECORDS` over the budget, and those with a score."""
        history, budget = self.history, self.budget
        if self.bar.due:
            self._show(loss.value.item(), nfe)
        due = int(budget.fraction * RECORDS) > int(self.recorded_at * RECORDS)
        if not due and score is None and not budget.done:
            return
        self.learner.expect_same_parts()
        self.recorded_at = budget.fraction
        record = {
            "step": budget.step, "seconds": round(budget.seconds, 4), "fraction": budget.fraction,
            "lr": self.learner.lr * budget.lr_factor(), "loss": loss.value.item(), "nfe": nfe,
            **{name: value.item() for name, value in loss.metrics.items()},
        }  # fmt: skip
        if score is not None:
            record[self.validation.name] = score
        history.records.append(record)
        self._tell(record)

    def _tell(self, record: dict[str, float]) -> None:
        """Hand a record to TensorBoard, loggers and callbacks; where one fails, save the run."""
        try:
            self.folder.log(record)
            self.listeners.tell(record)
        except Exception as error:  # a full disk, a service, a callback: no step may be lost
            try:
                if self.learner.can_save_alone:  # else the others would have to save as well
                    self._save()
            except (CheckpointError, DivergedError) as unsaved:
                error.add_note(f"Nor could the run be saved: {unsaved}")
            raise

    def _show(self, loss: float, nfe: int) -> None:
        pairing = self.history.pairing / self.budget.seconds
        self.bar.update(self.budget.fraction, self.budget.step, loss, nfe, pairing)

    def _finish(self, loss: Loss | None) -> None:
        """Judge the end, save it, and put the weights that are kept into the module."""
        history, budget, validation = self.history, self.budget, self.validation
        if validation.exhausted:
            history.reason = "patience"
        if loss is not None:
            self.learner.refuse_divergence(loss, budget.step)
        validation.warn_of_worsening(history.records)
        validation.warn_of_untrained()
        self.learner.agree_on_buffers()
        head = self.stream.head
        if head is not None and not validation.done and self.objective.solves:
            validation.compare_on_training_rows(self.learner.ema_module, self.placed(head))
        if history.records:
            self._show(history.records[-1]["loss"], int(history.records[-1]["nfe"]))
        history.steps, history.seconds, history.ticks = budget.step, budget.seconds, budget.ticks
        history.skipped, history.memory = self.learner.skipped, self.peak()
        history.compiled = history.compiled or self.learner.compiled  # a GPU captured it later
        self._save()
        best = validation.best_weights if validation.done else None  # those of the start are none
        kept = best or self.learner.ema_module.state_dict()
        self.module.load_state_dict(kept)
        validation.compare_kept(self.module)
        if self.folder.folder is not None:
            checkpoint.save(self.module, self.folder.checkpoints)
        self._describe(history.reason)
        self._say_ended()

    def _say_ended(self) -> None:
        history = self.history
        if history.reason == "interrupted":
            saved = self.config.folder and f"saved; resume it in {self.config.folder}"
            self.bar.say(f"Interrupted at step {history.steps}: {saved or 'not saved'}.")
            if not self.config.progress:
                warn(
                    f"fit: {signal.Signals(history.signal).name} ended training at step "
                    f"{history.steps:,}; look at history.signal before going on with the flow"
                )
        if history.validating > max(SLOW, history.seconds):
            self.bar.say(
                f"Validation took {history.validating:.0f} s, training {history.seconds:.1f} s "
                f"(validations={self.config.validations}, "
                f"validation_rows={self.config.validation_rows})."
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
        for module in (self.learner.module, self.learner.ema_module):
            if bad := checkpoint.non_finite(module):  # a good checkpoint must outlive it
                raise DivergedError(
                    f"fit: training diverged: the weight {bad} is NaN or infinite at step "
                    f"{self.budget.step}; lower lr={self.learner.lr:g}"
                )
        self.folder.write_metrics(self.history.records)
        if self.config.folder is not None:  # all processes, since their shards are gathered
            state = {name: part.state() for name, part in self._parts().items()}
            self.folder.save(self.learner.ema_module, state)

    def _describe(self, ended: str, error: str | None = None) -> None:
        budget, config = self.budget, self.config
        description = self.origin.description
        if config.seconds is not None and ended in ("budget", "patience"):  # the file repeats it
            spent = {"seconds": None, "steps": budget.step, "ticks": budget.ticks}
            spent["compile"] = self.learner.compiled
            description = {**description, **spent}
        told = self.manifest.told(ended, budget, self.history, self.learner, self.peak())
        self.folder.describe(description, {**told, **({"error": error} if error else {})})


def _rounding(
    config: TrainConfig, device: str
) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """The context of a step, which says whether a CUDA device may compute in TF32."""
    allowed = TF32.get(config.precision or "")
    if allowed and device != "cuda":
        warn(
            f"fit: precision='tf32' is that of products on a CUDA device, got {device!r}: it has "
            "no effect there"
        )
    if device != "cuda" or allowed is None:
        return contextlib.nullcontext
    return partial(tf32, allowed)
