"""Checkpoints: a flow's weights with how to build it, and the state that training goes on from."""

import contextlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnf import models
from cnf.errors import CheckpointError, optional
from cnf.flow import Flow

FORMAT = "cnf-flow-1"
FLOW_FILE = "flow.safetensors"
STATE_FILE = "state.pt"


def save(flow: nn.Module, path: str | Path) -> Path:
    """Write weights, and the recipe of a flow made by `models.build`, to one safetensors file.

    The file is written beside the old one and then takes its place, so that a failure leaves the
    old one as it was.

    Args:
        flow: Any module.
        path: The file; a folder gets `flow.safetensors`.
    Raises:
        CheckpointError: It cannot be written (no permission, a full disk).
    """
    path = Path(path)
    path = path / FLOW_FILE if path.is_dir() else path
    safetensors = optional("safetensors.torch", "train")
    state = flow.state_dict().items()
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state}
    # One key: the library writes several in an order that differs between runs.
    metadata = {FORMAT: json.dumps(getattr(flow, "spec", None))}
    data = safetensors.save(tensors, metadata=metadata)
    return _replace(path, lambda temporary: temporary.write_bytes(data))


def load(path: str | Path, into: Flow | None = None, device: str | torch.device = "cpu") -> Flow:
    """Read a flow that `fit` or `save` has written. Nothing in the file is executed.

    Args:
        path: A `.safetensors` file, a run's folder, or its checkpoint folder.
        into: The flow to fill, needed for one that was not made by `models.build`.
        device: Where the flow is put.
    Raises:
        CheckpointError: The file is missing, broken, of another program, or does not fit `into`.
    """
    path = _find(Path(path), FLOW_FILE)
    safetensors, torch_side = (
        optional(name, "train") for name in ("safetensors", "safetensors.torch")
    )
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors: dict[str, Tensor] = torch_side.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"load: {path} is no readable safetensors file ({error})") from error
    if FORMAT not in metadata:
        raise CheckpointError(
            f"load: {path} was not written by cnf (expected {FORMAT!r} in its header, "
            f"got {sorted(metadata)})"
        )
    flow = into if into is not None else _built(json.loads(metadata[FORMAT]), tensors, path)
    _fill(flow, tensors, path)
    return flow.to(device)


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write training state (tensors and plain containers) atomically."""
    _replace(path, lambda temporary: torch.save(state, temporary))


def load_state(folder: str | Path) -> dict[str, Any]:
    """Read training state; only tensors and plain containers are admitted."""
    path = _find(Path(folder), STATE_FILE)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        pickle.UnpicklingError,
    ) as error:
        message = f"resume: {path} is broken, or no training state written by cnf"
        raise CheckpointError(message) from error


def _replace(path: Path, write: Callable[[Path], Any]) -> Path:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        message = f"save: cannot write {path} ({error}); what was there is kept"
        raise CheckpointError(message) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def _find(path: Path, name: str) -> Path:
    places = [path, path / name, path / "checkpoints" / name]
    for place in places:
        if place.is_file():
            return place
    raise CheckpointError(f"load: no {name} in {path}" if path.is_dir() else f"load: no {path}")


def _built(spec: dict[str, Any] | None, tensors: dict[str, Tensor], path: Path) -> Flow:
    if spec is None:
        raise CheckpointError(
            f"load: {path} holds a flow that was built by hand; "
            "build it again and call load(path, into=flow)"
        )
    try:
        flow = models.build(spec["model"], **spec["options"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"load: cannot build the flow in {path}: {error}") from error
    _without_later_defaults(flow, tensors)
    return flow


def _without_later_defaults(flow: Flow, tensors: dict[str, Tensor]) -> None:
    """Take out preprocessing that a model did not have by default when the file was written."""
    part = flow.preprocess
    saved = any(name.startswith("preprocess.") for name in tensors)
    if part is not None and part.state_dict() and not saved:
        assert flow.spec is not None
        flow.preprocess, flow.spec["options"]["preprocess"] = None, None


def _fill(flow: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    dtypes = (value.dtype for value in tensors.values() if value.is_floating_point())
    try:
        flow.to(next(dtypes, None)).load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(
            f"load: the weights in {path} do not fit the flow: {first_line(error)}"
        ) from error


def first_line(error: Exception) -> str:
    """The first thing that load_state_dict complains of; its whole text fills a screen."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else str(error)
