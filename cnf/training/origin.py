"""What made the numbers: a run's configuration, its data and its machine."""

import hashlib
import math
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnf.data import Columns, Points
from cnf.errors import DISTRIBUTION, CheckpointError, warn
from cnf.objectives import OBJECTIVES, Batch, Objective
from cnf.random import VERSION, stream
from cnf.registry import spec
from cnf.training.config import TrainConfig

FIXED = {"model", "options", "objective", "objective_options", "seed", "batch_size"}
READING = {"data", "test", *(field.name for field in fields(Columns))}  # which rows they are
BUDGETS = ("steps", "seconds", "ticks")  # a run in seconds is told as one in steps afterwards
UNREPORTED = {
    "progress", "device", "devices", "strategy", "checkpoint_seconds", "ticks", "compile",
}  # fmt: skip
PACKAGES = ("torch", "torchdiffeq", "numpy", "lightning-fabric")
WHOLE = 64_000_000  # bytes; of larger tensors the first and last rows are hashed
ENDS = 1_000  # rows
DRAWS = 8


def configuration(
    module: nn.Module, objective: Objective, data: Any, config: TrainConfig
) -> dict[str, Any]:
    """What config.yaml says: the arguments of `cnf train`, less where to write."""
    model = getattr(module, "spec", None) or {"model": type(module).__name__, "options": {}}
    told = spec(objective)
    options = {k: v for k, v in told.items() if k != "name"} if isinstance(told, dict) else {}
    train = {k: v for k, v in asdict(config).items() if k not in ("folder", "resume")}
    return {
        "data": str(getattr(data, "source", None) or getattr(data, "name", type(data).__name__)),
        **_read_as(data),
        **model,
        "objective": objective_name(objective),
        "objective_options": options,
        **train,
    }


class Origin:
    """What a run is made from: its settings, its data, torch and the device.

    Restoring it compares them with those of the run that goes on.

    Args:
        description: What `configuration` says.
        data: The data's `fingerprint`.
        device: Where training runs.
    """

    def __init__(self, description: dict[str, Any], data: Any, device: torch.device) -> None:
        self.description, self.data = description, data
        self.made_by = {"torch": str(torch.__version__), "device": device.type}
        self.random = VERSION

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return vars(self)

    def restore(self, state: dict[str, Any]) -> None:
        """Refuse what is another run, and tell what else differs.

        Raises:
            CheckpointError: Model, objective, seed, batch size or data are others, or a version of
                cnf with other random streams began it.
        """
        if state.get("random") != self.random:
            raise CheckpointError(
                "was begun by a version of cnf that drew other random numbers and held out other "
                "rows; begin a new run, which may start from these weights: flow = cnf.load(run)"
            )
        changed = _changes(_flat(state["description"]), _flat(self.description))
        fixed = [words for name, words in changed.items() if name.split(".")[0] in FIXED]
        if fixed:
            raise CheckpointError(f"is another run: {', '.join(fixed)}")
        if not same_data(state["data"], self.data):
            reading = [words for name, words in changed.items() if name.split(".")[0] in READING]
            why = ", ".join(reading) or f"{self.description.get('data')!r} is not what it was"
            raise CheckpointError(
                f"was trained on other data than these ({why}); give it the same, or begin a new "
                "run"
            )
        made = {n: (a, self.made_by[n]) for n, a in (state["made_by"] or {}).items()}
        others = [f"{n} was {a}, is {b}" for n, (a, b) in made.items() if a != b]
        words = [*changed.values(), *others]
        if words:
            warn(f"fit: the run goes on with other settings than it had: {', '.join(words)}")


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Settings that differ, by dotted name, in words; a budget only where both runs have it."""
    both = [name for name in BUDGETS if None not in (before.get(name), now.get(name))]
    return {
        name: f"{name} was {before.get(name)!r}, is {now.get(name)!r}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
        and name.split(".")[0] not in UNREPORTED
        and (name not in BUDGETS or name in both)
    }


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        inner = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else None
        found |= {f"{prefix}{name}": value} if inner is None else inner
    return found


def _read_as(data: Any) -> dict[str, Any]:
    """How one's own table was read, and the part of it that is kept from training."""
    if not isinstance(data, Points) or data.reading is None:
        return {}
    return {**asdict(data.reading), "test": data.test_share}


def objective_name(objective: Objective) -> str:
    """The registered name, or the class's where it has none."""
    return OBJECTIVES.name_of(objective) or type(objective).__name__


def environment() -> dict[str, Any]:
    """Versions, git revision, processor, threads."""
    return {
        "revision": _revision(),
        "python": platform.python_version(),
        "cnf": _version(DISTRIBUTION),
        **{name: _version(name) for name in PACKAGES},
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    """The git revision of this package's checkout, "+" if files differ; None outside one."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(
            git("status", "--porcelain", "-uno")
        )
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(": ", 1)[1] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def hash_of_rows(batch: Batch) -> str:
    """A hash of rows: names, shapes, dtypes and bytes; of large tensors those at both ends."""
    return _hash({name: value for name, value in vars(batch).items() if value is not None}, WHOLE)


def hash_of_weights(module: nn.Module) -> str:
    """A hash of a module's parameters and buffers: names, shapes, dtypes and bytes."""
    return _hash(module.state_dict())


def _hash(tensors: Mapping[str, Tensor], whole: float = math.inf) -> str:
    digest = hashlib.sha256()
    for name, value in tensors.items():
        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
        rows = value if value.nbytes <= whole else torch.cat([value[:ENDS], value[-ENDS:]])
        flat = rows.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def draws_of(density: Any) -> Tensor | None:
    """A few draws: numbers rather than a hash, since machines differ in their last digits.

    None where a density draws otherwise each time, whatever the generator.
    """
    one, two = (density.sample(DRAWS, stream(0, "fingerprint")).cpu().double() for _ in range(2))
    return one if torch.equal(one, two) else None


def same_data(before: Any, now: Any) -> bool:
    """Whether two fingerprints are of the same data; one that is not known may be of any."""
    if before is None or now is None:
        return True
    if isinstance(before, Tensor) and isinstance(now, Tensor):
        if before.shape != now.shape:
            return False
        scale = now.abs().max().item()
        return torch.allclose(before, now, rtol=1e-3, atol=1e-3 * scale)
    return isinstance(before, str) and isinstance(now, str) and before == now
