"""Results of a race: one mean, one error, one ranking, and one way to write them."""

import csv
import dataclasses
import math

import pytest
import torch
from rich.console import Console

from cnf.metrics.estimate import number
from cnf.race import verdict
from cnf.race.report import page_of
from cnf.race.results import shortened
from cnf.race.runs import Trained
from cnf.race.tables import results_table
from cnf.training import History


def test_error_is_the_larger_of_seeds_and_points(race):
    assert race().mean("cnf", "gap").error == pytest.approx(0.01 / math.sqrt(2))
    assert race(seeds=(0,)).mean("cnf", "gap") == (0.1, 0.004)
    results = race()
    results.entries[0].scores["gap"] = math.nan
    assert all(map(math.isnan, results.mean("cnf", "gap")))


def test_standard_error_of_the_mean_is_of_seeds_and_points_together(race):
    """Gaps of .10, .11, .12, each ± .004 over points that are the same for all seeds."""
    error = race(seeds=(0, 1, 2)).standard_error("cnf", "gap")
    assert error == pytest.approx(math.hypot(0.004, 0.01 / math.sqrt(3)))
    assert race(seeds=(0,)).standard_error("cnf", "gap") == 0.004


def test_difference_over_the_same_points_is_told_where_the_scores_errors_overlap(race):
    """log q of the second is 0.3 ± 0.1 below that of the first; both vary by 5 over points."""
    draw = torch.Generator().manual_seed(0)
    hard, noise = 5 * torch.randn(400, generator=draw), 0.1 * torch.randn(400, generator=draw)
    results = race(seeds=(0,))
    for entry, behind in zip(results.entries, (0.0, 0.3 + noise), strict=True):
        entry.log_prob = (hard - behind).tolist()
        entry.scores |= {"gap": 1.0 + float(torch.as_tensor(behind).mean()), "gap_error": 0.25}
    value, error = results.paired_difference("realnvp", "cnf")
    assert value == pytest.approx(0.3 + noise.mean().item(), abs=1e-5)
    assert error == pytest.approx(noise.std().item() / 20, rel=1e-3)
    gap = results.columns[0]
    assert gap.key == "gap" and not verdict.tie(results, gap, "cnf", "realnvp")
    assert f"is next, {number(value, error)} nats behind" in verdict.lead(results)[0]
    results.entries[1].log_prob[3] = -math.inf
    assert results.paired_difference("realnvp", "cnf") is None
    assert verdict.tie(results, gap, "cnf", "realnvp")


def test_paired_error_adds_that_of_the_seeds(race):
    results = race()
    for entry in results.entries:
        entry.log_prob = [1.0 + 0.2 * entry.seed, 2.0 + 0.2 * entry.seed]
    error = results.paired_difference("cnf", "realnvp").error
    assert error == pytest.approx(math.sqrt(2) * 0.1)  # the stdev of 0 and 0.2 over √2, of each


def test_cell_of_a_score_that_an_older_races_entry_lacks_is_empty(race, tmp_path):
    results = race(names=("cnf", "realnvp", "maf"), seeds=(0,))
    del results.entries[0].scores["w2"], results.entries[1].scores["nll_error"]
    results.save(tmp_path)
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["w2"] for row in rows] == ["", "0.6", "0.9"]
    assert [row["nll_error"] for row in rows] == ["0.01", "", "0.01"]


def test_seconds_of_compilation_have_a_column_where_something_was_compiled(race):
    results = race(names=("cnf", "realnvp"), seeds=(0,))
    histories = [
        [History(compiling=3.0, compiled=True), History(compiling=0.5)],
        [History(compiling=0.5)],  # found not to be worth it
    ]
    for entry, stages in zip(results.entries, histories, strict=True):
        entry.scores["compile_seconds"] = Trained(entry.flow, stages, 0.0).compiling
    assert "compile_seconds" in [score.key for score in results.columns]
    assert results.mean("cnf", "compile_seconds").value == 3.5
    assert math.isnan(results.mean("realnvp", "compile_seconds").value)
    results.entries[0].scores["compile_seconds"] = math.nan
    assert "compile_seconds" not in [score.key for score in results.columns]


def test_two_seeds_read_the_same_in_terminal_page_pictures_and_verdict(race):
    """.010 and .020, each ± .05: the error over points is the larger, and has one digit."""
    results = race(names=("cnf",))
    for entry, gap in zip(results.entries, (0.010, 0.020), strict=True):
        entry.scores |= {"gap": gap, "gap_error": 0.05}
    written = number(*results.mean("cnf", "gap"))
    assert written == "0.01 ± 0.05" or written == "0.02 ± 0.05"
    console = Console(width=80)
    with console.capture() as terminal:
        console.print(results_table(results))
    mean, error = written.split(" ± ")
    assert f" {mean} " in terminal.get() and f"± {error}" in terminal.get()
    assert f">{written}<" in page_of(results, {})
    assert results.score_text("cnf") == f"gap {written} nats"
    assert f"a gap of {written} nats" in verdict.lead(results)[0]


def test_derived_scores_follow_from_the_others(race):
    results = race()
    assert results.mean("realnvp", "few_steps").value == 0.2  # in its one pass
    assert results.mean("cnf", "few_steps").value == 0.9 / 4
    assert results.mean("cnf", "steps_per_second").value == pytest.approx(1000 / 3)


def test_colors_differ_and_do_not_depend_on_the_ranking(results):
    assert len(set(results.colors.values())) == 2
    assert list(results.colors) == results.contestants


def test_contestants_of_one_title_are_told_apart_by_their_names(results):
    entries = [dataclasses.replace(entry, title="Flow") for entry in results.entries]
    twins = dataclasses.replace(results, entries=entries)
    assert twins.titles == {"cnf": "Flow (cnf)", "realnvp": "Flow (realnvp)"}
    assert len(twins.flows) == 2


def test_ranking_puts_those_without_a_finite_score_last(race):
    results = race(names=("cnf", "realnvp", "maf"))
    results.of("cnf")[0].scores["gap"] = math.nan
    results.of("realnvp")[1].scores["gap"] = math.inf
    assert results.ranking() == ["maf", "cnf", "realnvp"]
    assert results.failed() == ["cnf", "realnvp"]


def test_many_runs_of_one_share_are_counted():
    titles = [f"NSF, seed {seed}" for seed in range(6)]
    assert shortened(titles[:2]) == "NSF, seed 0 / NSF, seed 1"
    assert shortened(titles[:5]).count("/") == 4
    assert shortened(titles) == (
        "NSF, seed 0 / NSF, seed 1 / NSF, seed 2 / NSF, seed 3 and 2 more"
    )
