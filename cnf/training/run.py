"""A run's folder: its configuration, manifest, metrics and checkpoints."""

import csv
import io
import json
import os
import platform
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn

from cnf.errors import CheckpointError, optional
from cnf.training import checkpoint
from cnf.training.history import held_out_nll, naming, surviving

LOCK = ".lock"
FILES = {"checkpoints", "figures", "tensorboard", "config.yaml", "manifest.json", "metrics.csv"}


class Part(Protocol):
    """What a checkpoint holds a part of, such as the learner or the budget."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


class Run:
    """Writes a run's folder; files are replaced whole, so that each is readable at any time.

    As a context manager it makes the folder and holds its lock: two processes cannot train into
    one folder. The system lets go of the lock of a process that dies.

    Args:
        folder: The folder; None to write nothing.
        resume: Whether a run must be there already; else none may. "auto" takes either.
    """

    def __init__(self, folder: Path | None, resume: bool | Literal["auto"] = False) -> None:
        self.folder, self._resume = folder, resume
        self.resumes = False
        self._lock: Any = None
        self._events: Any = None

    def __enter__(self) -> "Run":
        """Make the folder, or take it up.

        Raises:
            ValueError: There is a run already, or there is none to resume.
            CheckpointError: The folder cannot be made, or another process trains into it.
        """
        if self.folder is None:
            return self
        folder, there = self.folder, (self.checkpoints / checkpoint.STATE_FILE).is_file()
        if self._resume is True and not folder.is_dir():
            raise ValueError(f"fit: there is no run to resume in {folder}")
        if self._resume is True and not there:
            raise CheckpointError(
                f"fit: there is no checkpoint state.pt to resume in {folder}; "
                'resume="auto" begins where there is none'
            )
        self.resumes = there and self._resume is not False
        if not self.resumes and not _free(folder):
            raise ValueError(
                f"fit: {folder} exists already; choose another folder, or resume that run"
            )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (folder / "figures").mkdir(exist_ok=True)
            self._lock = lock(folder)
            for place in (folder, self.checkpoints):  # of processes that died while writing
                for temporary in place.glob(f".*{checkpoint.TEMPORARY}"):
                    temporary.unlink()
        except OSError as error:
            self.__exit__()
            raise CheckpointError(
                f"fit: cannot make the run's folder {folder} ({error})"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._events is not None:
            with surviving("TensorBoard"):
                self._events.close()
        if self._lock is not None:
            self._lock.close()

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        assert self.folder is not None
        return self.folder / "checkpoints"

    def save(self, flow: nn.Module, state: dict[str, Any]) -> None:
        """A checkpoint: the flow, and the parts' states, from which `restore` goes on."""
        if self.folder is not None:
            checkpoint.save_state(state, self.checkpoints / checkpoint.STATE_FILE)
            checkpoint.save(flow, self.checkpoints)

    def describe(self, config: dict[str, Any], manifest: dict[str, Any]) -> None:
        """Write what made the numbers.

        Args:
            config: For config.yaml, from which `cnf train --config` starts the run again.
            manifest: For manifest.json.
        """
        if self.folder is not None:
            yaml = optional("yaml", "train")
            self._write("manifest.json", json.dumps(manifest, indent=2) + "\n")
            self._write("config.yaml", yaml.safe_dump(config, sort_keys=False))

    def write_metrics(self, records: list[dict[str, float]]) -> None:
        """Write metrics.csv, one row per record."""
        if self.folder is None:
            return
        columns = list(dict.fromkeys(name for record in records for name in record))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        self._write("metrics.csv", text.getvalue())

    def log(self, record: dict[str, float]) -> None:
        """One record to TensorBoard."""
        if self.folder is None:
            return
        step = int(record["step"])
        tensorboard = optional("torch.utils.tensorboard.writer", "train")
        with naming("TensorBoard", step):
            if self._events is None:
                self._events = tensorboard.SummaryWriter(str(self.folder / "tensorboard"))
            for name, value in record.items():
                if name != "step":
                    self._events.add_scalar(name, value, step)

    def _write(self, name: str, text: str) -> None:
        assert self.folder is not None
        checkpoint.write_whole(self.folder / name, text.encode())


def restore(folder: Path, parts: dict[str, Part]) -> None:
    """Put a checkpoint's state into the parts.

    Raises:
        CheckpointError: It is broken, or does not fit them.
    """
    state = checkpoint.load_state(folder)
    try:
        for name, part in parts.items():
            part.restore(state.get(name, {}))
    except CheckpointError as error:
        raise CheckpointError(f"resume: {folder} {error}") from None
    except Exception as error:  # a state that was made by hand may hold anything
        raise CheckpointError(
            f"resume: the state in {folder} is of another model or objective "
            f"({checkpoint.first_line(error)})"
        ) from error


def lock(folder: Path) -> Any:
    """A lock on the folder, held until it is closed or this process ends.

    Raises:
        CheckpointError: Another holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has none; a folder is not protected there
        return None
    file = (folder / LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        file.close()
        raise CheckpointError(
            f"fit: {folder} is being written by {owner}; wait for it, or choose another folder"
        ) from None
    except OSError:  # a file system without locks
        return file
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}\n")
    file.flush()
    return file


def _free(folder: Path) -> bool:
    """Whether nothing is there, or only what a run leaves that died before it could be resumed."""
    if not folder.exists():
        return True
    if not folder.is_dir() or any((folder / "checkpoints").glob("[!.]*")):
        return False
    names = {path.name for path in folder.iterdir() if path.suffix != checkpoint.TEMPORARY}
    names -= {LOCK, "checkpoints", "figures"}
    return not names or ("manifest.json" in names and names <= FILES)


def free_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, … that is not there."""
    wanted = wanted.with_name(wanted.name[:100])  # names have a limit
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def read_scores(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv that hold a held-out NLL; none without that file."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open() as file:
        return [row for row in csv.DictReader(file) if held_out_nll(row) is not None]


def read_manifest(folder: Path) -> dict[str, Any]:
    """What a run's manifest.json tells; nothing where it cannot be read."""
    try:
        return dict(json.loads((folder / "manifest.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def read_config(folder: Path) -> dict[str, Any]:
    """The settings in a run's config.yaml; a ValueError where there are none with its data."""
    path, yaml = folder / "config.yaml", optional("yaml", "train")
    if not path.is_file():
        raise ValueError(f"{folder} has no config.yaml that names its data; give --data")
    try:
        settings = yaml.safe_load(path.read_text())
        return {**settings, "data": str(settings["data"])}
    except (yaml.YAMLError, KeyError, TypeError):
        raise ValueError(f"{path} is broken: it names no data; give --data") from None
