"""Checkpoints: a flow's weights with how to build it, and the state that training goes on from."""

import contextlib
import difflib
import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cnf import models
from cnf.data import TOYS, table_kind
from cnf.errors import CheckpointError, expect_device, optional
from cnf.flow import Flow

FORMAT = "cnf-flow-2"
UNHASHED = "cnf-flow-1"  # of files written before they carried a hash
FLOW_FILE = "flow.safetensors"
STATE_FILE = "state.pt"
STATE_MARK = b"cnf-state-2 "  # then the hash of the rest, then a newline
TEMPORARY = ".tmp"
PICKLED = (".pt", ".pth", ".ckpt", ".bin")  # names that torch.save's files go by
ANEW = "take another copy of the run, or train into another folder from its config.yaml"
NO_HASH = "0" * 64  # stands for the hash while it is computed


def save(flow: nn.Module, path: str | Path) -> Path:
    """Write weights, and the recipe of a flow made by `models.build`, to one safetensors file.

    The file is written beside the old one and then takes its place, so that a failure leaves the
    old one as it was. It carries a hash of all its bytes.

    Args:
        flow: Any module.
        path: The file; a folder gets `flow.safetensors`.

    Raises:
        CheckpointError: A weight is NaN or infinite, or the file cannot be written (no permission,
            a full disk).
    """
    if not isinstance(flow, nn.Module):
        raise TypeError(
            f"save: expected a flow, or another torch.nn.Module, got {type(flow).__name__}; the "
            "order is save(flow, path)"
        )
    path = _as_path("save", path)
    path = path / FLOW_FILE if path.is_dir() else path
    safetensors = optional("safetensors.torch", "train")
    if bad := non_finite(flow):
        raise CheckpointError(
            f"save: the weight {bad} is NaN or infinite; {path} was not written. Training that "
            "ends so has diverged: lower lr"
        )
    state = flow.state_dict().items()
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in state}
    # One key: the library writes several in an order that differs between runs.
    about = json.dumps({"sha256": NO_HASH, "spec": getattr(flow, "spec", None)})
    data = safetensors.save(tensors, metadata={FORMAT: about})
    data = data.replace(NO_HASH.encode(), _sha256(data).encode(), 1)
    return write_whole(path, data)


def load(path: str | Path, into: Flow | None = None, device: str | torch.device = "cpu") -> Flow:
    """Read a flow that `fit` or `save` has written, in eval mode. Nothing in it is executed.

    Args:
        path: A `.safetensors` file, a run's folder, or its checkpoint folder.
        into: The flow to fill, needed for one that was not made by `models.build`.
        device: Where the flow is put.

    Raises:
        CheckpointError: The file is missing, broken, of another program, or does not fit `into`.
    """
    if not isinstance(into, nn.Module | None):
        raise TypeError(
            f"load: expected into to be the flow to fill, got {type(into).__name__}; write "
            "load(path, into=flow), load(path, device=…)"
        )
    expect_device("load", device)
    path = _find(_as_path("load", path), FLOW_FILE)
    spec, tensors = _opened(path)
    flow = into if into is not None else _built(spec, tensors, path)
    _fill(flow, tensors, path)
    return flow.to(device).eval()


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write training state (tensors and plain containers) whole, after a hash of its bytes."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    write_whole(path, STATE_MARK, _sha256(data).encode(), b"\n", data)


def load_state(folder: str | Path) -> dict[str, Any]:
    """Read training state; only tensors and plain containers are admitted.

    Raises:
        CheckpointError: There is none, or it is broken, or something else.
    """
    path = _find(Path(folder), STATE_FILE)
    try:
        data = path.read_bytes()
        if data.startswith(STATE_MARK):
            told, _, data = data.removeprefix(STATE_MARK).partition(b"\n")
            if told != _sha256(data).encode():
                raise CheckpointError("expected bytes of the hash that it carries, got others")
        elif not data.startswith(b"PK"):  # files without a hash were what torch.save writes
            raise CheckpointError(f"expected a training state of cnf, got {bytes(data[:8])!r}")
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise CheckpointError(f"expected a dictionary, got a {type(state).__name__}")
    except CheckpointError as error:
        raise CheckpointError(f"resume: {path} is broken: {error}; {ANEW}") from None
    except Exception as error:  # torch has no one error for a file that it cannot read
        raise CheckpointError(
            f"resume: {path} is broken: expected a training state of cnf, got what torch cannot "
            f"read; {ANEW}"
        ) from error
    return state


def non_finite(module: nn.Module) -> str | None:
    """The name of the first parameter that holds NaN or infinity, if there is one."""
    named = module.named_parameters()
    return next((name for name, value in named if not torch.isfinite(value).all()), None)


def write_whole(path: Path, *parts: bytes | memoryview) -> Path:
    """Replace a file's bytes, all or none of them.

    Raises:
        CheckpointError: It cannot be written; what was there is kept.
    """
    if not path.parent.is_dir():
        raise CheckpointError(
            f"save: cannot write {path}: expected a folder that is there, got {path.parent}; make "
            "it first"
        )
    temporary = path.with_name(f".{path.name[:50]}.{os.getpid()}{TEMPORARY}")  # names have a limit
    try:
        with temporary.open("wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())  # else a machine that dies may leave a new, empty file
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError(
            f"save: cannot write {path} ({error}); what was there is kept. Make room, or choose "
            "another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def _as_path(who: str, path: Any) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{who}: expected the path of a file, got {type(path).__name__}")
    return Path(path)


def _sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _is_pickled(path: Path) -> bool:
    """Whether the file begins as what torch.save writes, a zip or, once, a pickle."""
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def _opened(path: Path) -> tuple[Any, dict[str, Tensor]]:
    """A flow file's recipe and tensors, after the check of its hash."""
    safetensors, torch_side = (
        optional(name, "train") for name in ("safetensors", "safetensors.torch")
    )
    if path.suffix in PICKLED and _is_pickled(path):
        raise CheckpointError(
            f"load: expected a .safetensors file written by cnf.save, got {path}, a file of "
            "torch.save, which does not say how to build the flow; build the flow, write "
            f"flow.load_state_dict(torch.load({path.name!r})), and keep it by cnf.save(flow, …)"
        )
    try:
        data = path.read_bytes()
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors: dict[str, Tensor] = torch_side.load(data)
        about = json.loads(metadata.get(FORMAT, metadata.get(UNHASHED, "null")))
    except Exception as error:  # of the library, of JSON, of the file system, too deep, too large
        raise CheckpointError(
            f"load: expected a readable safetensors file, got {path} ({error}); take another "
            "copy, or write it again by cnf.save"
        ) from error
    if not metadata.keys() & {FORMAT, UNHASHED}:
        raise CheckpointError(
            f"load: {path} was not written by cnf (expected {FORMAT!r} in its header, "
            f"got {sorted(metadata)}); build the flow, fill it by flow.load_state_dict("
            "safetensors.torch.load_file(…)), and keep it by cnf.save"
        )
    if FORMAT not in metadata:
        return about, tensors
    told = about.get("sha256") if isinstance(about, dict) else None
    if told != _sha256(data.replace(str(told).encode(), NO_HASH.encode(), 1)):
        raise CheckpointError(
            f"load: {path} is broken: expected bytes of the hash that it carries, got others; "
            "take another copy, or the run's last checkpoint"
        )
    return about["spec"], tensors


def _find(path: Path, name: str) -> Path:
    places = [path, path / name, path / "checkpoints" / name]
    for place in places:
        if place.is_file():
            return place
    if path.is_dir():
        held = ", ".join(sorted(part.name for part in path.iterdir())[:5]) or "nothing"
        raise CheckpointError(
            f"load: expected a run's folder with checkpoints/{name}, or a folder with {name}, got "
            f"{path}, which holds {held}; name the file or the run itself"
        )
    around = [part.name for part in path.parent.iterdir()] if path.parent.is_dir() else []
    close = [str(path.parent / part) for part in difflib.get_close_matches(path.name, around)]
    hint = f"did you mean {' or '.join(close)}?" if close else f"looked from {Path.cwd()}"
    if str(path) in TOYS or table_kind(path) is not None:
        hint = f"data are read by cnf.data.load({str(path)!r})"
    raise CheckpointError(
        f"load: expected a .safetensors file or a run's folder, got {path}, which is not there; "
        f"{hint}"
    )


def _built(spec: dict[str, Any] | None, tensors: dict[str, Tensor], path: Path) -> Flow:
    if spec is None:
        raise CheckpointError(
            f"load: expected a flow made by models.build, got {path}, which holds one that was "
            "built by hand; build it again and call load(path, into=flow)"
        )
    try:
        flow = models.build(spec["model"], **spec["options"])
    except Exception as error:  # a recipe without a hash may ask for anything
        raise CheckpointError(
            f"load: expected the recipe of a flow in {path}, got one that cannot be built "
            f"({first_line(error)}); build the flow by hand and call load(path, into=flow)"
        ) from error
    _without_later_defaults(flow, tensors)
    return flow


def _without_later_defaults(flow: Flow, tensors: dict[str, Tensor]) -> None:
    """Take out preprocessing that a model did not have by default when the file was written."""
    assert flow.spec is not None
    for name in ("preprocess", "context_preprocess"):
        part = getattr(flow, name)
        saved = any(key.startswith(f"{name}.") for key in tensors)
        if part is not None and part.state_dict() and not saved:
            setattr(flow, name, None)
            flow.spec["options"][name] = None


def _fill(flow: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    # Of the weights: preprocessing has float64 buffers whatever the flow's dtype is.
    dtypes = (tensors[name].dtype for name, _ in flow.named_parameters() if name in tensors)
    try:
        flow.to(next(dtypes, None)).load_state_dict(tensors)
    except (RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"load: the weights in {path} do not fit the flow: {first_line(error)}; "
            "build it as the one that was saved"
        ) from error
    if bad := non_finite(flow):
        raise CheckpointError(
            f"load: expected finite weights in {path}, got NaN or infinity in {bad}; take an "
            "earlier checkpoint"
        )


def first_line(error: Exception) -> str:
    """The first thing that load_state_dict complains of; its whole text fills a screen."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[1] if len(lines) > 1 else str(error)
