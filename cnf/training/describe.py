"""What made the numbers: a run's configuration and its machine, in words that start it again."""

import os
import platform
import subprocess
from dataclasses import asdict, fields, is_dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cnf.objectives import OBJECTIVES, Objective
from cnf.training.config import TrainConfig

PACKAGES = ("cnf", "torch", "torchdiffeq", "numpy", "lightning-fabric")


def configuration(
    module: nn.Module, objective: Objective, data: Any, config: TrainConfig
) -> dict[str, Any]:
    """What config.yaml says: the arguments of `cnf train`, less where to write."""
    spec = getattr(module, "spec", None) or {"model": type(module).__name__, "options": {}}
    train = {k: v for k, v in asdict(config).items() if k not in ("folder", "resume")}
    return {
        "data": str(getattr(data, "name", type(data).__name__)),
        **spec,
        "objective": objective_name(objective),
        "objective_options": _settings(objective),
        **train,
    }


def objective_name(objective: Objective) -> str:
    """The registered name, or the class's where it has none."""
    names = [name for name, kind in OBJECTIVES.items() if kind is type(objective)]
    return names[0] if names else type(objective).__name__


def _settings(objective: Objective) -> dict[str, Any]:
    """The objective's fields that differ from their defaults, as YAML holds them."""
    if not is_dataclass(objective):
        return {}
    default = type(objective)()
    changed = {
        field.name: getattr(objective, field.name)
        for field in fields(objective)
        if getattr(objective, field.name) != getattr(default, field.name)
    }
    plain = {k: asdict(v) if is_dataclass(v) else v for k, v in changed.items()}  # pyright: ignore
    kinds = str | int | float | dict | list
    return {k: v if isinstance(v, kinds) else repr(v) for k, v in plain.items()}


def machine() -> dict[str, Any]:
    """Versions, git revision, processor, threads."""
    return {
        "revision": _revision(),
        "python": platform.python_version(),
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
