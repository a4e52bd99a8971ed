"""What a training run has done."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """What a run has done.

    Attributes:
        records: One dict per logged step: step, seconds, loss, lr, nfe, the objective's metrics,
            and val_nll where it was scored.
        steps: Steps taken.
        seconds: Seconds of training.
        preparing: Of these, seconds in which the objective prepared itself, such as a coupling's
            fit to the data.
        pairing: Of these, seconds in which batches were drawn and paired.
        validating: Seconds of validation, which no budget counts.
        reason: Why it ended: "budget", "patience" or "interrupted".
        signal: Number of the signal that interrupted it; 0 for none.
        skipped: Steps left out because their loss or gradient was NaN or infinite.
        ticks: See `TrainConfig.ticks`.
    """

    records: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    preparing: float = 0.0
    pairing: float = 0.0
    validating: float = 0.0
    reason: str = "budget"
    signal: int = 0
    skipped: int = 0
    ticks: list[int] = field(default_factory=list)

    def __repr__(self) -> str:
        told = f"{self.steps:,} steps in {self.seconds:.3g} s, ended by {self.reason}"
        scores = [
            (name, r[name]) for r in self.records for name in ("val_nll", "val_loss") if name in r
        ]
        return f"History({told}{''.join(f', {n} {v:.4g}' for n, v in scores[-1:])})"

    def column(self, name: str) -> list[float]:
        """The values of one metric, where it was logged."""
        return [record[name] for record in self.records if name in record]

    def interrupt(self, number: int) -> None:
        """Note the signal that ends the run."""
        self.reason, self.signal = "interrupted", number

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"records": self.records, "preparing": self.preparing, "pairing": self.pairing}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up a checkpoint's state."""
        self.records = [dict(record) for record in state["records"]]
        self.preparing = float(state.get("preparing", 0.0))  # older checkpoints hold records only
        self.pairing = float(state.get("pairing", 0.0))
