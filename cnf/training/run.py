"""A run's folder: its configuration, manifest, metrics and checkpoints."""

import csv
import io
import json
import os
from pathlib import Path
from typing import Any

from cnf.errors import CheckpointError, optional


class Run:
    """Writes a run's folder; files are replaced whole, so that each is readable at any time.

    Args:
        folder: The folder.
        resume: Whether it must be there already; else it must not.
    Raises:
        ValueError: It is there and `resume` is False, or the other way round.
        CheckpointError: It cannot be made.
    """

    def __init__(self, folder: Path, resume: bool = False) -> None:
        self.folder = folder
        if resume and not folder.is_dir():
            raise ValueError(f"fit: there is no run to resume in {folder}")
        if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(
                f"fit: {folder} exists already; choose another folder, or resume that run"
            )
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            (folder / "figures").mkdir(exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"fit: cannot make the run's folder {folder} ({error})"
            ) from error
        self._events: Any = None

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.folder / "checkpoints"

    def write_config(self, config: dict[str, Any]) -> None:
        """config.yaml, from which `cnf train --config` starts the same run again."""
        yaml = optional("yaml", "train")
        self._write("config.yaml", yaml.safe_dump(config, sort_keys=False))

    def write_manifest(self, facts: dict[str, Any]) -> None:
        """manifest.json: what made the numbers."""
        self._write("manifest.json", json.dumps(facts, indent=2) + "\n")

    def write_metrics(self, records: list[dict[str, float]]) -> None:
        """metrics.csv, one row per record."""
        columns = list(dict.fromkeys(name for record in records for name in record))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        self._write("metrics.csv", text.getvalue())

    def log(self, record: dict[str, float]) -> None:
        """One record to TensorBoard."""
        if self._events is None:
            tensorboard = optional("torch.utils.tensorboard.writer", "train")
            self._events = tensorboard.SummaryWriter(str(self.folder / "tensorboard"))
        for name, value in record.items():
            if name != "step":
                self._events.add_scalar(name, value, int(record["step"]))

    def close(self) -> None:
        """Flush what is open."""
        if self._events is not None:
            self._events.close()

    def _write(self, name: str, text: str) -> None:
        path = self.folder / name
        temporary = path.with_name(f".{name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(text)
            os.replace(temporary, path)
        except OSError as error:
            raise CheckpointError(f"fit: cannot write {path} ({error})") from error
        finally:
            temporary.unlink(missing_ok=True)


def free_folder(wanted: Path) -> Path:
    """`wanted`, or the first of wanted-2, wanted-3, … that is not there."""
    folder, number = wanted, 1
    while folder.exists():
        number += 1
        folder = wanted.with_name(f"{wanted.name}-{number}")
    return folder


def scored_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of a run's metrics.csv that hold a held-out NLL; none without that file."""
    path = folder / "metrics.csv"
    if not path.is_file():
        return []
    with path.open() as file:
        return [row for row in csv.DictReader(file) if row.get("val_nll")]


def trained_on(folder: Path) -> str:
    """The density or file that a run's config.yaml names; a ValueError where it names none."""
    path, yaml = folder / "config.yaml", optional("yaml", "train")
    if not path.is_file():
        raise ValueError(f"{folder} has no config.yaml that names its data; give --data")
    try:
        return str(yaml.safe_load(path.read_text())["data"])
    except (yaml.YAMLError, KeyError, TypeError):
        raise ValueError(f"{path} is broken: it names no data; give --data") from None
