"""How far a run is, in steps or in seconds, and the learning rate that follows from it."""

import math
from bisect import bisect_right
from typing import Any

from cnf.training.config import TICKS, TrainConfig


class Budget:
    """The part of the budget that is used: steps taken of all steps, or ticks of a seconds budget.

    Attributes:
        step: Steps taken.
        seconds: Seconds spent in training steps.
        ticks: Step at which each tick of a seconds budget began.
        fraction: Part of the budget used, in [0, 1].
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.step, self.seconds, self.fraction = 0, 0.0, 0.0
        self.ticks: list[int] = list(config.ticks or [])

    @property
    def done(self) -> bool:
        """Whether nothing is left."""
        if self.config.steps is not None:
            return self.step >= self.config.steps
        assert self.config.seconds is not None
        return self.seconds >= self.config.seconds

    def spend(self, seconds: float) -> None:
        """Count one step that took so long."""
        self.step += 1
        self.charge(seconds)

    def charge(self, seconds: float) -> None:
        """Count training that was no step."""
        self.seconds += seconds
        self.refresh()

    def refresh(self) -> None:
        """Find `fraction` again from step, seconds and ticks."""
        if self.config.seconds is not None:
            self.ticks += [self.step] * (self._reached - len(self.ticks))
        if self.config.seconds is None and self.config.ticks is None:
            assert self.config.steps is not None
            self.fraction = min(1.0, self.step / self.config.steps)
        else:
            self.fraction = bisect_right(self.ticks, self.step) / TICKS

    @property
    def _reached(self) -> int:
        """Ticks of a seconds budget that have begun."""
        assert self.config.seconds is not None
        return min(TICKS, int(TICKS * self.seconds / self.config.seconds))

    def lr_factor(self) -> float:
        """Learning rate now, as a part of the highest: warm-up, then cosine or constant."""
        warmup = self.config.warmup
        if self.fraction < warmup:
            return (self.fraction + 1 / TICKS) / (warmup + 1 / TICKS)
        if self.config.schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * (self.fraction - warmup) / (1 - warmup)))

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"step": self.step, "seconds": self.seconds, "ticks": self.ticks}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint's state."""
        self.step, self.seconds = int(state["step"]), float(state["seconds"])
        self.ticks = [int(tick) for tick in state["ticks"]]
        if self.config.seconds is not None:  # more than there were: fewer have passed
            del self.ticks[self._reached :]
        self.refresh()
