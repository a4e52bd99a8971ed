"""What made the numbers: a run's configuration and its machine, in words that start it again."""

import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnf.dynamics.divergence import DIVERGENCES
from cnf.errors import DISTRIBUTION
from cnf.matching import COUPLINGS, PATHS, TIMES
from cnf.objectives import OBJECTIVES, Objective
from cnf.training.config import TrainConfig

PACKAGES = ("torch", "torchdiffeq", "numpy", "lightning-fabric")


def configuration(
    module: nn.Module, objective: Objective, data: Any, config: TrainConfig
) -> dict[str, Any]:
    """What config.yaml says: the arguments of `cnf train`, less where to write."""
    spec = getattr(module, "spec", None) or {"model": type(module).__name__, "options": {}}
    train = {k: v for k, v in asdict(config).items() if k not in ("folder", "resume")}
    return {
        "data": str(getattr(data, "source", None) or getattr(data, "name", type(data).__name__)),
        **spec,
        "objective": objective_name(objective),
        "objective_options": _settings(objective),
        **train,
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """In words, what differs of all that must be the same for a run to go on as itself."""
    names = ("model", "options", "objective", "objective_options", "seed", "batch_size")
    changed = [name for name in names if before.get(name) != now[name]]
    return ", ".join(f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in changed)


def objective_name(objective: Objective) -> str:
    """The registered name, or the class's where it has none."""
    names = [name for name, kind in OBJECTIVES.items() if kind is type(objective)]
    return names[0] if names else type(objective).__name__


def _settings(value: Any) -> dict[str, Any]:
    """A dataclass's fields, as YAML holds them; those left at None or empty are left out."""
    if not is_dataclass(value):
        return {}
    values = {field.name: getattr(value, field.name) for field in fields(value)}
    return {name: _plain(v) for name, v in values.items() if v is not None and v != {}}


def _plain(value: Any) -> Any:
    """A setting as YAML holds it; a registered divergence, path, … by its name and fields."""
    if isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if not is_dataclass(value) or isinstance(value, type):
        return repr(value)
    names = [
        name
        for registry in (COUPLINGS, DIVERGENCES, PATHS, TIMES, OBJECTIVES)
        for name, kind in registry.items()
        if kind is type(value)
    ]
    return {"name": names[0], **_settings(value)} if names else _settings(value)


def machine() -> dict[str, Any]:
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
