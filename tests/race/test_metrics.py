"""What a race measures: a metric is a function with its registration, and nothing else."""

import csv
import math

import pytest
import torch
from rich.console import Console

import cnf
from cnf.metrics import METRICS, Estimate, Score, metric
from cnf.race import verdict
from cnf.race.judge import Judge
from cnf.race.report import page_of
from cnf.race.tables import results_table, scores_table


@pytest.fixture
def registered():
    """The table of metrics, which is as it was afterwards."""
    before = dict(METRICS._entries)
    yield METRICS
    METRICS._entries.clear()
    METRICS._entries.update(before)


@pytest.fixture
def shift(registered, monkeypatch):
    """A metric of samples, as its author would write it; without what takes long."""
    for slow in ("c2st", "energy_distance", "mmd"):
        del registered._entries[slow]
    score = Score(
        "shift", "Shift", "Distance between the two means", "m", "exact", terminal="shift",
        contest="being in the middle",
    )  # fmt: skip

    @metric("samples", score, points=1)
    def shift(true, drawn):
        return float((true.mean(0) - drawn.mean(0)).norm())

    return shift


def test_metric_of_samples_shows_up_in_table_page_verdict_and_file(shift, tmp_path):
    options = {"steps": 3, "progress": False, "test_points": 300, "w2_points": 50}
    results = cnf.compare("moons", ["realnvp", "maf"], folder=tmp_path / "race", **options)
    (row, _) = csv.DictReader((tmp_path / "race" / "results.csv").read_text().splitlines())
    measured = results.of("realnvp")[0].scores["shift"]
    assert float(row["shift"]) == pytest.approx(measured, rel=1e-5) and measured > 0
    console = Console(width=120)
    with console.capture() as terminal:
        console.print(results_table(results))
        console.print(scores_table(results.entries[0].scores, results.floor))
    mean = str(results.mean("realnvp", "shift"))
    assert terminal.get().count("shift") == 2 and f" {mean} " in terminal.get()
    page = page_of(results, {})
    assert "Shift<small>m exact</small>" in page and f">{mean}<" in page
    assert "Distance between the two means; lower is better" in page
    assert "<h3>Being in the middle</h3>" in page
    assert "being in the middle" in " ".join(verdict.lead(results))
    assert results.floor["shift"] > 0  # of two sets of true samples


def test_metric_of_samples_has_its_error(registered):
    registered._entries.clear()

    @metric("samples", Score("apart", "Apart", "Distance between the two means"))
    def apart(true, drawn):
        return Estimate(float((true.mean(0) - drawn.mean(0)).norm()), 0.25)

    judge = Judge(torch.zeros(50, 2), torch.ones(50, 2), cnf.data.toy("moons"))
    assert judge.floor == {"apart": pytest.approx(2**0.5)}
    scores = judge.scores(cnf.models.realnvp(2).eval())
    assert scores["apart"] > 0 and scores["apart_error"] == 0.25


def test_metric_of_a_flow_has_its_error_and_is_left_out_where_it_does_not_apply(registered):
    registered._entries.clear()

    @metric("flow", Score("width", "Width", "Spread of the data"))
    def width(trial):
        return Estimate(trial.test.x.std().item(), 0.5)

    @metric("flow", Score("known", "Known", "Only where the density is known"))
    def known(trial):
        return None if trial.log_p is None else 1.0

    points = torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    scores = Judge(points, points).scores(cnf.models.build("realnvp", dim=2))
    assert scores == {"width": pytest.approx(points.std().item()), "width_error": 0.5}


def test_samples_are_true_ones_first_and_at_most_as_many_as_the_metric_takes(registered):
    registered._entries.clear()
    seen = []

    @metric("samples", Score("seen", "Seen", "What it is given"), points=2)
    def watch(true, drawn):
        seen.append((true, drawn))
        return 0.0

    points = 5 + 3 * torch.randn(50, 2, generator=torch.Generator().manual_seed(0))
    judge = Judge(points, points, w2_points=10)
    judge.scores(cnf.models.build("realnvp", dim=2))
    (true, other), (again, drawn) = seen  # for the floor, and of the flow
    standardized = ((points - points.mean(0)) / points.std(0)).double()
    assert torch.allclose(true, standardized[:20], atol=1e-5) and torch.equal(true, again)
    assert torch.equal(other, true) and drawn.shape == (20, 2) and not torch.equal(drawn, true)


def test_names_are_the_keys_of_the_file():
    keys = "gap nll w2 sliced_w2 mmd energy_distance c2st path_energy straightness round_trip "
    keys += "parameters bits_per_dim nfe_sample nfe_log_prob ms_sample ms_log_prob"
    assert set(METRICS) == set(keys.split())
    assert all(entry.score.key == name and entry.about for name, entry in METRICS.items())


def test_paths_of_a_discrete_flow_have_no_number(small_flow):
    points = torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    judge = Judge(points, points, w2_points=10)
    trial = judge.trial(small_flow("realnvp"))
    assert math.isnan(METRICS["path_energy"].function(trial))
    assert METRICS["nfe_sample"].function(trial) == 0
