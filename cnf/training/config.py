"""What a training run is made of: every setting with its default and unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

import numpy as np
import torch

from cnf.dynamics.divergence import DIVERGENCES, Learned
from cnf.errors import expect_choice, expect_counts, expect_positive, warn
from cnf.registry import expect_options, options_of

BATCH_SIZE = 1024
TICKS = 200  # a seconds budget moves on in so many ticks: its record is what makes it repeat
PICTURES = 64  # a batch of them
DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = {
    "32-true": torch.float32, "64-true": torch.float64, "bf16-mixed": torch.float32,
    "tf32": torch.float32,
}  # fmt: skip
TF32 = {"32-true": False, "tf32": True}  # others leave it as torch is set
SHARDED = "fsdp"  # the strategy whose processes hold a part of the weights each
REFUSED = (SHARDED, "deepspeed", "model_parallel")

_LEAST = {  # of the whole numbers
    **dict.fromkeys(
        ("steps", "batch_size", "accumulate", "validation_rows", "patience", "devices"), 1
    ),
    "validations": 0,
    "seed": -(2**63),
}
_REAL = ("seconds", "lr", "weight_decay", "warmup", "clip", "ema")


@dataclass
class TrainConfig:
    """Settings of `fit`; the budget is in steps, which repeat bit for bit, or in seconds.

    Args:
        steps: Budget in optimizer steps.
        seconds: Budget in seconds of training, validation and saving not counted; 60 if neither
            is given.
        batch_size: Rows per step, over all processes together; null for 1,024, of
            pictures 64, or as many as a smaller table has.
        accumulate: Parts in which a batch's gradient is added up: memory is that of one part, and
            the numbers are those of the whole batch, but for adaptive solvers and batch
            normalization, which see the rows of a part.
        lr: Highest learning rate; null for the objective's own, 6e-3 for flow matching and 2e-3
            for likelihood (5e-3 for that of a discrete solver), or the model's (otflow's: 0.1).
        optimizer: "adam" or "adamw".
        weight_decay: Weight decay of the optimizer.
        schedule: Learning rate after the warm-up: "cosine" (to zero) or "constant".
        warmup: Part of the budget in which the learning rate rises.
        clip: Largest norm of the gradient; "auto" for the objective's own, 10, or 1 for flow maps
            and the likelihood of a discrete solver; null for no clipping.
        ema: Decay of the moving average of the weights; null for none. What is validated and kept
            is the average.
        seed: Of every draw; what step k draws depends on the seed and k alone.
        validations: How many times, evenly over the budget, held-out data are scored; 0 for never.
            Without `patience`, one waits while validation has taken longer than training (and
            more than 5 s); the last is always made.
        validation_rows: Rows scored at most; of one's own data a tenth at most is held out.
        validation_divergence: How held-out data are scored by a continuous flow: "exact", or an
            estimator such as "hutchinson". Null for what trains the flow where the exact
            divergence takes more than 128 directions for each evaluation, as for images, which
            the score's name then says; exact elsewhere.
        patience: Stop after so many validations without a better one, and keep the best weights,
            those before training included; null to go on.
        checkpoint_seconds: Seconds between checkpoints.
        folder: The run's folder, which must not exist; null to write nothing.
        resume: Go on with the run in `folder` from its last checkpoint; "auto" for going on if
            there is one, else beginning.
        device: "auto", "cpu", "cuda", or "mps".
        devices: Processes, one for each device.
        strategy: How several processes share the work: "ddp", or another of Lightning Fabric's
            in which each holds all weights; or "fsdp", with which each holds a part of the
            field's weights, gradients, moments and averages (FSDP2). That is for flow matching.
        precision: "bf16-mixed" computes a float32 module's fields and nets in bfloat16, by
            autocast; data, preprocessing, ODE states, log-determinants, losses and weights stay
            float32, validation too. "tf32" takes training's products and convolutions of float32
            on a CUDA device in TF32, "32-true" none of them. Null, "32-true" and "64-true" are the
            module's own dtype; null leaves TF32 as torch is set, which takes convolutions in it.
        compile: Compile a step. On a CPU, outside of the budget, the loss and its gradient become
            one program, or where an ODE is solved, its dynamics or solver's step do: small models
            train 1.2 to 2.5 times as fast, after 5 to 40 s of compilation, a few where the machine
            has done it before. On one CUDA device a step is captured as a CUDA graph; that
            takes a solver of fixed steps, or none. "auto" compiles on a CPU where a budget is so
            long that it should save twice its time, but not for pictures, whose convolutions gain
            little, and captures where it can; True raises an error where neither is possible;
            False does neither.
        progress: Show a progress bar.
        ticks: Steps at which each 1/200 of a seconds budget was used, as such a run records them;
            with its `steps` it repeats. With other steps they are left out, with a warning.

    Raises:
        ValueError: A setting is out of its range, or two contradict each other.
    """

    steps: int | None = None
    seconds: float | None = None
    batch_size: int | None = None
    accumulate: int = 1
    lr: float | None = None
    optimizer: str = "adam"
    weight_decay: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.02
    clip: float | Literal["auto"] | None = "auto"
    ema: float | None = 0.999
    seed: int = 0
    validations: int = 10
    validation_rows: int = 10_000
    validation_divergence: str | None = None
    patience: int | None = None
    checkpoint_seconds: float = 60.0
    folder: Path | None = None
    resume: bool | Literal["auto"] = False
    device: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    precision: str | None = None
    compile: bool | Literal["auto"] = "auto"
    progress: bool = True
    ticks: list[int] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is None and NoneType not in get_args(field.type):
                raise ValueError(f"TrainConfig: expected {field.name} to be given, got None")
        self._settle_numbers()
        self._expect_ranges()
        self._expect_engine()
        self._expect_run()

    def _settle_numbers(self) -> None:
        """Make NumPy's scalars Python's, as YAML cannot hold them; 60 seconds without a budget."""
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, float | np.floating) and value.is_integer():
                value = int(value)  # 1e4 is meant for a whole number
            expect_counts("TrainConfig", least, **{name: value})
            setattr(self, name, None if value is None else int(value))
        if self.seed >= 2**64:
            raise ValueError(f"TrainConfig: expected seed < 2^64, got {self.seed}")
        for name in _REAL:
            value = getattr(self, name)
            if value is not None and (name, value) != ("clip", "auto"):
                setattr(self, name, _real(name, value))
        if self.steps is None and self.seconds is None:
            self.seconds = 60.0

    def _expect_ranges(self) -> None:
        """Raise unless budget, optimizer and averaging are possible."""
        if self.steps is not None and self.seconds is not None:
            raise ValueError(
                "TrainConfig: expected a budget in steps or in seconds, not both, "
                f"got steps={self.steps}, seconds={self.seconds}"
            )
        expect_positive(
            "TrainConfig", seconds=self.seconds, lr=self.lr,
            clip=None if isinstance(self.clip, str) else self.clip,
            checkpoint_seconds=self.checkpoint_seconds,
        )  # fmt: skip
        if self.patience is not None and not self.validations:
            raise ValueError(
                f"TrainConfig: patience={self.patience} counts validations, got validations=0; "
                "drop patience, or validate"
            )
        if self.validation_divergence is not None:
            if isinstance(DIVERGENCES.build(self.validation_divergence), Learned):
                raise ValueError(
                    "TrainConfig: expected validation_divergence to be exact or unbiased, got "
                    "'learned', by which the score could rise with the error of the head"
                )
        expect_choice("TrainConfig", "optimizer", self.optimizer, ("adam", "adamw"))
        expect_choice("TrainConfig", "schedule", self.schedule, ("cosine", "constant"))
        for name, value in (("warmup", self.warmup), ("ema", self.ema)):
            if value is not None and not 0 <= value < 1:
                raise ValueError(f"TrainConfig: expected 0 <= {name} < 1, got {value!r}")
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"TrainConfig: expected weight_decay >= 0, got {self.weight_decay!r}")

    def _expect_engine(self) -> None:
        """Raise unless precision, device and strategy are known; a device is kept as text."""
        if self.precision is not None and self.precision not in PRECISIONS:
            raise ValueError(
                f"TrainConfig: expected precision to be one of {', '.join(map(repr, PRECISIONS))},"
                f" or None for the module's own, got {self.precision!r}; float16, and bfloat16 "
                "throughout, are too narrow for log-determinants: take 'bf16-mixed'"
            )
        expect_choice("TrainConfig", "compile", self.compile, ("auto", True, False))
        expect_choice("TrainConfig", "device", str(self.device), DEVICES)
        self.device = str(self.device)
        if not isinstance(self.strategy, str):
            raise ValueError(
                "TrainConfig: expected strategy to be a name, such as 'ddp', got "
                f"{self.strategy!r}"
            )
        if self.strategy != SHARDED and any(name in self.strategy for name in REFUSED):
            raise ValueError(
                f"TrainConfig: expected strategy='ddp', or {SHARDED!r} to shard a field that flow "
                f"matching trains, got {self.strategy!r}; against too little memory take "
                "accumulate=…, precision='bf16-mixed' or smaller batches"
            )
        if "spawn" in self.strategy or "fork" in self.strategy:
            raise ValueError(
                "TrainConfig: expected a strategy that reruns the script, such as 'ddp', "
                f"got {self.strategy!r}"
            )

    def _expect_run(self) -> None:
        """Raise unless folder, resuming and processes fit together; a folder is kept as a path."""
        if self.ticks is not None and self.seconds is not None:
            raise ValueError(
                "TrainConfig: ticks repeat a run that had seconds; give them with steps"
            )
        if self.ticks is not None and not _recorded_for(self.steps, self.ticks):
            warn(
                f"TrainConfig: the {len(self.ticks)} ticks are a record of another number of "
                f"steps than steps={self.steps}: they are left out, and the learning rate follows "
                "the steps"
            )
            self.ticks = None
        expect_choice("TrainConfig", "resume", self.resume, (True, False, "auto"))
        if self.resume and self.folder is None:
            raise ValueError(
                f"TrainConfig: resume={self.resume!r} needs folder=…, the run to go on with"
            )
        if not isinstance(self.folder, str | PathLike | None):
            raise ValueError(f"TrainConfig: expected folder to be a path, got {self.folder!r}")
        self.folder = None if self.folder is None else Path(self.folder)


def _recorded_for(steps: int | None, ticks: Sequence[int]) -> bool:
    """Whether so many steps are what a run recorded the ticks in.

    One that `patience` ended may have taken some steps after its last tick.
    """
    if steps is None or not ticks:
        return False
    return steps == ticks[-1] or (len(ticks) < TICKS and ticks[-1] < steps < 2 * ticks[-1])


def as_config(config: TrainConfig | Mapping[str, Any] | None) -> TrainConfig:
    """The settings themselves, or made from a mapping of them; the defaults for None."""
    if isinstance(config, TrainConfig):
        return config
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(
            "fit: expected config to be a TrainConfig or a mapping of its settings, got "
            f"{config!r}; write cnf.TrainConfig(steps=1000)"
        )
    expect_options("TrainConfig", config or {}, options_of(TrainConfig))
    return TrainConfig(**(config or {}))


def _real(name: str, value: Any) -> float:
    try:
        if not isinstance(value, bool | np.bool_):
            return float(value)
    except (TypeError, ValueError, RuntimeError):
        pass
    raise ValueError(f"TrainConfig: expected {name} to be a number, got {value!r}")
