"""Rows read ahead by a thread are those of the step, however the steps come."""

import threading

import pytest
import torch

import cnf
from cnf.data import tabular
from cnf.training.prefetch import Prefetched

ROWS = range(1)


def test_batches_are_those_of_their_steps_in_any_order():
    ahead = Prefetched(lambda step, rows: cnf.Batch(torch.full((1, 1), float(step))))
    found = [ahead(step, ROWS).x.item() for step in (0, 1, 2, 7, 8, 3, 4)]
    assert found == [0, 1, 2, 7, 8, 3, 4]


def test_rows_read_ahead_are_those_asked_for():
    ahead = Prefetched(lambda step, rows: cnf.Batch(torch.tensor([*rows])[:, None]))
    for rows in (range(4), range(2, 4), range(2, 4)):  # the first step has all
        assert ahead(0, rows).x.flatten().tolist() == [*rows]
    assert ahead(1, range(2, 4)).x.flatten().tolist() == [2, 3]


def test_the_next_batch_is_read_while_this_one_is_used():
    read = [threading.Event() for _ in range(3)]

    def reading(step, rows):
        read[step].set()
        return cnf.Batch(torch.zeros(1, 1))

    ahead = Prefetched(reading)
    ahead(0, ROWS)
    assert read[1].wait(5) and not read[2].is_set()


def test_what_reading_raises_is_raised_in_its_step():
    def reading(step, rows):
        if step == 2:
            raise ValueError("row 5 is NaN")
        return cnf.Batch(torch.zeros(1, 1))

    ahead = Prefetched(reading)
    ahead(0, ROWS), ahead(1, ROWS)
    with pytest.raises(ValueError, match="row 5 is NaN"):
        ahead(2, ROWS)


def test_the_thread_ends_with_its_batches():
    def count():
        return sum("next step" in thread.name for thread in threading.enumerate())

    before = count()
    ahead = Prefetched(lambda step, rows: cnf.Batch(torch.zeros(1, 1)))
    ahead(0, ROWS)
    threads = [thread for thread in threading.enumerate() if "next step" in thread.name]
    assert count() == before + 1
    del ahead
    for thread in threads:
        thread.join(5)
    assert count() == before


def test_a_large_file_trains_as_the_same_rows_in_memory(config, small, points, monkeypatch, same):
    in_memory, large = small(), small()
    cnf.fit(in_memory, "flow-matching", points, config(validations=0))
    monkeypatch.setattr(tabular, "LARGE", 0)
    cnf.fit(large, "flow-matching", points, config(validations=0))
    assert same(in_memory, large)
