"""Loggers and callbacks get every record once, and their errors stop a run."""

import csv
import errno

import pytest
import torch
from lightning_fabric.loggers import CSVLogger

import cnf


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_loggers_and_callbacks_get_every_record(small, config, tmp_path):
    records, logger = [], CSVLogger(tmp_path)
    toy, objective = cnf.data.toy("moons"), cnf.FlowMatching()
    history = cnf.fit(
        small(), objective, toy, config(), loggers=[logger], callbacks=[records.append]
    )
    assert records == history.records
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), float(row["loss"])) for row in rows] == [
        (record["step"], record["loss"]) for record in records
    ]
    assert float(rows[-1]["val_nll"]) == records[-1]["val_nll"]


class Ending:
    """A logger that remembers how it ended."""

    status = None

    def log_metrics(self, metrics, step):
        metrics.clear()

    def finalize(self, status):
        self.status = status


def test_exception_of_a_callback_stops_the_run_and_marks_loggers_as_failed(small, config):
    def refuse(record):
        record.clear()
        raise RuntimeError("enough")

    logger = Ending()
    with pytest.raises(RuntimeError, match="enough"):
        cnf.fit(small(), "flow-matching", "moons", config(), loggers=[logger], callbacks=[refuse])
    assert logger.status == "failed"
    history = cnf.fit(small(), "flow-matching", "moons", config(), loggers=[logger])
    assert logger.status == "success" and "loss" in history.records[-1]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loggers": Ending()}, "expected a list in loggers"),
        ({"loggers": [print]}, "a function goes into callbacks"),
        ({"callbacks": [Ending()]}, "expected functions of a record"),
    ],
)
def test_invalid_loggers_and_callbacks_are_refused(given, message, small, config):
    with pytest.raises(TypeError, match=message):
        cnf.fit(small(), "flow-matching", "moons", config(), **given)


class FullDisk:
    """A logger whose disk is full at its third record, and when it is finalized."""

    def __init__(self, at="third"):
        self.at, self.records = at, 0

    def log_metrics(self, metrics, step):
        self.records += 1
        if self.at == "third" and self.records == 3:
            raise OSError(errno.ENOSPC, "No space left on device")

    def finalize(self, status):
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.filterwarnings("ignore:fit. the logger FullDisk cannot write its last records")
def test_error_names_a_logger_that_cannot_write_and_the_run_resumes(small, config, tmp_path):
    folder, whole = tmp_path / "run", small()
    cnf.fit(whole, "flow-matching", "moons", config())
    message = "fit: the logger FullDisk cannot write its record of step 3 .*No space left.*resume"
    with pytest.raises(OSError, match=message):
        cnf.fit(small(), "flow-matching", "moons", config(folder=folder), loggers=[FullDisk()])
    resumed = small()
    history = cnf.fit(resumed, "flow-matching", "moons", config(folder=folder, resume=True))
    assert [record["step"] for record in history.records] == [1, 2, 3, 4, 5, 6]
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_logger_that_fails_at_the_end_warns(small, config):
    with pytest.warns(UserWarning, match="the logger FullDisk cannot write its last records"):
        history = cnf.fit(small(), "flow-matching", "moons", config(), loggers=[FullDisk("end")])
    assert history.steps == 6


def test_error_names_tensorboard_that_cannot_write_and_frees_the_run_folder(
    small, config, tmp_path, monkeypatch
):
    folder = tmp_path / "run"

    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr("torch.utils.tensorboard.writer.SummaryWriter.add_scalar", denied)
        with pytest.raises(
            OSError, match="TensorBoard cannot write its record of step 1 .*denied"
        ):
            cnf.fit(small(), "flow-matching", "moons", config(folder=folder))
    with monkeypatch.context() as patched:
        patched.setattr("torch.utils.tensorboard.writer.SummaryWriter.close", denied)
        with pytest.warns(UserWarning, match="TensorBoard cannot write its last records"):
            cnf.fit(small(), "flow-matching", "moons", config(folder=folder, resume=True))
    cnf.fit(small(), "flow-matching", "moons", config(folder=folder, resume=True))


def test_error_keeps_its_type_if_the_run_cannot_be_saved(small, config, monkeypatch, tmp_path):
    class Enough(Exception):
        pass

    def refuse(record):
        def full(*_):
            raise cnf.CheckpointError("save: cannot write")

        monkeypatch.setattr("cnf.training.run.Run.save", full)
        raise Enough

    with pytest.raises(Enough) as raised:
        cnf.fit(
            small(), "flow-matching", "moons", config(folder=tmp_path / "run"), callbacks=[refuse]
        )
    assert raised.value.__notes__ == ["Nor could the run be saved: save: cannot write"]
