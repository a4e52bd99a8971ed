"""Loggers and callbacks hear of every record, once, and end a run that they refuse."""

import csv

import pytest
from lightning_fabric.loggers import CSVLogger

import cnf


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_loggers_and_callbacks_are_told_of_every_record(small, config, tmp_path):
    heard, logger = [], CSVLogger(tmp_path)
    toy, objective = cnf.data.toy("moons"), cnf.FlowMatching()
    history = cnf.fit(
        small(), objective, toy, config(), loggers=[logger], callbacks=[heard.append]
    )
    assert heard == history.records and [record["step"] for record in heard] == [1, 2, 3, 4, 5, 6]
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(int(row["step"]), float(row["loss"])) for row in rows] == [
        (record["step"], record["loss"]) for record in heard
    ]
    assert float(rows[-1]["val_nll"]) == heard[-1]["val_nll"]


class Ending:
    """A logger that remembers how it ended."""

    status = None

    def log_metrics(self, metrics, step):
        metrics.clear()

    def finalize(self, status):
        self.status = status


def test_what_a_callback_raises_ends_the_run_and_fails_its_loggers(small, config):
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
def test_what_cannot_be_told_anything_is_refused(given, message, small, config):
    with pytest.raises(TypeError, match=message):
        cnf.fit(small(), "flow-matching", "moons", config(), **given)
