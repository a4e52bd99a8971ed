"""The race: same start, same data, same evaluation; what it returns and writes."""

import csv
import importlib
import json
import math
import shutil
from dataclasses import replace

import pandas
import pytest
import torch
from rich.console import Console
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
)

import cnf
from cnf import metrics
from cnf.metrics import METRICS
from cnf.race import runs
from cnf.race.contestants import CONTESTANTS, RACE, Contestant, Stage
from cnf.race.judge import TIGHT, Judge
from cnf.race.report import write_report
from cnf.race.tables import results_table
from cnf.training import checkpoint
from cnf.training.stream import as_stream

racing = importlib.import_module("cnf.race.compare")  # the name is the function's too
DRAW = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(racing, "VALIDATION_POINTS", 300)


def race(contestants, data, tmp_path=None, **settings):
    settings = {"steps": 20, "progress": False, "w2_points": 100, "test_points": 400, **settings}
    return cnf.compare(data, contestants, folder=tmp_path and tmp_path / "race", **settings)


@pytest.mark.slow
def test_every_contestant_runs_and_every_score_is_there(tmp_path):
    results = race(list(CONTESTANTS), "moons", tmp_path, steps=10)
    assert results.contestants == list(CONTESTANTS)
    rows = csv.DictReader((tmp_path / "race" / "results.csv").read_text().splitlines())
    assert [row["contestant"] for row in rows] == list(CONTESTANTS)
    entry = results.of("cnf-both")[0]
    assert entry.scores["steps"] == 10 and len(entry.curve) >= 8
    finite = {k for k, v in results.of("realnvp")[0].scores.items() if math.isfinite(v)}
    # RealNVP has no paths, and ten steps are not worth a compilation.
    assert set(entry.scores) - finite == {"path_energy", "straightness", "compile_seconds"}
    assert [nfe for nfe, _ in entry.few_steps[:-1]] == [1, 2, 4, 8, 16, 32]


def test_contestants_with_patience_stop_early_and_keep_the_best_weights_of_a_small_table(tmp_path):
    x = cnf.data.toy("moons").sample(60, generator=torch.Generator().manual_seed(0))
    settings = {"steps": 400, "folder": tmp_path / "race", "patience": 1, "progress": False}
    results = cnf.compare(x, ["nsf"], w2_points=10, **settings)
    assert results.settings["patience"] == 1
    entry = results.of("nsf")[0]
    assert entry.scores["steps"] < 400
    assert sum(entry.log_prob) / 12 == pytest.approx(-entry.scores["nll"], abs=1e-4)
    again = cnf.compare(x, ["nsf"], w2_points=10, **settings, resume=True)
    assert again.of("nsf")[0].log_prob == entry.log_prob
    with pytest.raises(ValueError, match="patience was 1, is None"):
        cnf.compare(x, ["nsf"], w2_points=10, **{**settings, "patience": None}, resume=True)


def test_results_json_holds_what_made_the_numbers(tmp_path):
    race(["realnvp"], "moons", tmp_path, seeds=[3])
    told = json.loads((tmp_path / "race" / "results.json").read_text())
    assert told["settings"]["seeds"] == [3] and told["machine"]["torch"]
    assert told["entries"][0]["scores"]["gap"] > 0
    again = cnf.load(tmp_path / "race" / "runs" / "realnvp-seed-3")
    assert again.spec["model"] == "realnvp"


def test_gap_is_the_mean_difference_to_the_truth_at_the_test_points():
    results = race(["realnvp"], "circles")
    flow, toy = results.of("realnvp")[0].flow, cnf.data.toy("circles")
    test, _ = racing.draw_test_points(toy, 400)
    expected = (toy.log_prob(test).double() - flow.log_prob(test).double()).mean().item()
    assert results.mean("realnvp", "gap")[0] == pytest.approx(expected, abs=1e-6)


def test_contestants_with_one_field_start_from_the_same_weights(monkeypatch):
    seen = []

    def remember(flow, objective, data, config):
        seen.append([p.clone() for p in flow.parameters()])
        return cnf.training.History(steps=1, seconds=1.0)

    monkeypatch.setattr(runs, "fit", remember)
    race(["cnf-likelihood", "cnf-flow-matching"], "moons")
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_every_model_of_vectors_is_a_contestant():
    models = {contestant.model for contestant in CONTESTANTS.values()}
    assert models == set(cnf.models.MODELS.taking("dim"))
    made = runs.build(CONTESTANTS["made"], cnf.data.toy("moons"), 0)
    assert made.spec["model"] == "made"


def test_each_seed_starts_from_weights_of_its_own():
    toy = cnf.data.toy("moons")
    first, again, other = (
        torch.cat([p.flatten() for p in runs.build(CONTESTANTS["maf"], toy, k).parameters()])
        for k in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("budget", [{"seconds": 100.0}, {"steps": 100}], ids=str)
def test_stages_share_the_budget_and_the_largest_memory_counts(budget, monkeypatch):
    shares, peaks = [], iter((5.0, 3.0))

    def remember(flow, objective, data, config):
        shares.append(config.seconds or config.steps)
        return cnf.training.History(steps=4, seconds=1.0, memory=next(peaks))

    monkeypatch.setattr(runs, "fit", remember)
    toy = cnf.data.toy("moons")
    run = runs.Run("cnf-both", "Both", CONTESTANTS["cnf-both"], cnf.TrainConfig(**budget))
    trained = run.train(toy)
    assert shares == [75, 25] and trained.memory == 5
    costs = racing._training_costs(trained)
    assert costs["train_seconds"] == 2 and costs["ms_per_step"] == 250


def test_curve_is_the_gap_on_the_validation_points_over_the_seconds_of_all_stages():
    toy, seed = cnf.data.toy("moons"), 3
    settings = cnf.TrainConfig(
        steps=1, seed=seed, validation_rows=racing.VALIDATION_POINTS, progress=False
    )
    held_out = as_stream(toy, settings).validation.x
    entropy = -toy.log_prob(held_out).mean().item()
    stages = [
        cnf.training.History([{"seconds": 1.0, "val_nll": entropy + 0.5}, {"seconds": 9.0}]),
        cnf.training.History([{"seconds": 2.0, "val_nll": entropy + 0.25}]),
        cnf.training.History([{"seconds": 3.0, "val_nll": entropy + 0.125}]),
    ]
    stages[0].seconds, stages[1].seconds = 10.0, 5.0
    seconds, gaps = zip(*racing._curve(stages, toy, seed), strict=True)
    assert seconds == (1, 12, 18)
    assert gaps == pytest.approx((0.5, 0.25, 0.125), abs=1e-6)


def test_seeds_have_a_mean_and_an_error():
    results = race(["realnvp"], "moons", seeds=[0, 1])
    gaps = [entry.scores["gap"] for entry in results.of("realnvp")]
    points = [entry.scores["gap_error"] for entry in results.of("realnvp")]
    mean, error = results.mean("realnvp", "gap")
    assert mean == pytest.approx(sum(gaps) / 2)
    assert error == pytest.approx(max(abs(gaps[0] - gaps[1]) / 2**0.5, *points))
    assert min(results.floor["w2"], results.floor["sliced_w2"]) > 0  # of two sets of points
    results.entries[0].scores["w2"] = math.inf
    mean, error = results.mean("realnvp", "w2")
    assert mean == math.inf and math.isnan(error)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(results_table(results))
    lines = capture.get().splitlines()
    assert any("RealNVP" in line for line in lines) and "±" in capture.get()
    assert all(len(line) <= 80 and "…" not in line for line in lines)


def test_own_points_are_scored_by_nll_on_rows_that_were_not_trained_on(monkeypatch):
    points = torch.randn(300, 3, generator=DRAW)
    trained_on = []
    real = runs.fit

    def watch(flow, objective, data, config):
        trained_on.append(data)
        return real(flow, objective, data, config)

    monkeypatch.setattr(runs, "fit", watch)
    results = race(["realnvp"], points)
    assert results.score == "nll" and results.entropy is None
    assert len(trained_on[0].x) == 240 and results.settings["test_points"] == 60


@pytest.mark.parametrize("name", ["ffjord", "rnode"])
def test_published_settings_are_for_toys_and_ones_own_points_are_standardized(name):
    def trained(data):
        source, config = cnf.data.load(data), cnf.TrainConfig(steps=1, progress=False)
        return runs.Run(name, name, CONTESTANTS[name], config).train(source).flow

    assert trained("moons").preprocess is None
    points = torch.tensor([4e4, 0.03]) + torch.tensor([1e4, 0.01]) * torch.randn(300, 2)
    gaussian = points.std(0).log().sum().item() + 1 + math.log(2 * math.pi)
    nll = metrics.nll(trained(points), points).value
    assert abs(nll - gaussian) < 2  # hundreds of millions where they are as they are


def test_a_contestant_that_fails_does_not_stop_the_race(monkeypatch):
    real = runs.train

    def fails(flow, *rest):
        if flow.spec["model"] == "ffjord":
            raise cnf.SolverError("stiff", "loosen", t=0.5, nfe=3, settings="dopri5")
        return real(flow, *rest)

    monkeypatch.setattr(runs, "train", fails)
    results = race(["ffjord", "realnvp"], "moons")
    assert results.contestants == ["realnvp"]
    assert "stiff" in results.settings["failed"]["FFJORD, as published, seed 0"]


def test_ranking_puts_nan_last_and_the_table_shows_it():
    results = race(["realnvp", "cnf-flow-matching"], "moons")
    results.of("realnvp")[0].scores["gap"] = math.nan
    assert results.ranking() == ["cnf-flow-matching", "realnvp"]
    console = Console(width=200)
    with console.capture() as capture:
        console.print(results_table(results))
    lines = [line for line in capture.get().splitlines() if "RealNVP" in line or "CNF" in line]
    assert "flow matching" in lines[0] and "–" in lines[1]


def test_ones_own_contestant_races_by_its_name():
    mine = Contestant("Mine", "realnvp", (Stage(cnf.MaximumLikelihood()),), {"layers": 2})
    results = race({"mine": mine}, "moons")
    assert results.of("mine")[0].title == "Mine"


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({"contestants": ["realnvpp"]}, "Did you mean 'realnvp'"),
        ({"steps": -1}, "steps > 0"),
        ({"seconds": 5.0}, "not both"),
        ({"contestants": []}, "expected contestants, "),
        ({"seeds": ()}, "expected seeds to be numbers, "),
        ({"seeds": 3}, "expected seeds to be numbers, "),
        ({"seeds": (0, 1, 0)}, r"expected seeds that differ, got \[0, 1, 0\]"),
        ({"workers": 0}, "compare: expected workers > 0, got 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(arguments, words, tmp_path):
    contestants = arguments.pop("contestants", ["realnvp"])
    with pytest.raises(ValueError, match=words):
        race(contestants, "moons", tmp_path, **arguments)
    assert not (tmp_path / "race").exists()


def test_existing_folder_is_not_overwritten(tmp_path):
    (tmp_path / "race").mkdir()
    (tmp_path / "race" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        race(["realnvp"], "moons", tmp_path)


def test_settings_for_a_known_density_come_before_those_for_all_data():
    mine = Contestant("Mine", "planar", (), {"layers": 2}, {"layers": 3})
    known, rows = (cnf.data.load(data) for data in ("moons", torch.randn(50, 2, generator=DRAW)))
    counts = [len(runs.build(mine, source, 0).transform.transforms) for source in (known, rows)]
    assert counts == [3, 2]


def test_each_seed_is_scored_on_samples_of_its_own():
    judge = Judge(torch.randn(100, 2, generator=DRAW), torch.randn(100, 2, generator=DRAW))
    flow = cnf.models.realnvp(2, layers=2)
    first, again, other = (judge.trial(flow, seed).drawn for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_perfect_flow_scores_the_floor():
    normal = torch.randn(1000, 2, generator=DRAW)
    judge = Judge(normal[:500], normal[500:], w2_points=300)
    identity = cnf.models.build("realnvp", dim=2, layers=2)  # the identity at initialization
    scores = judge.scores(identity)
    assert scores["w2"] == pytest.approx(judge.floor["w2"], rel=0.5)
    assert scores["nll"] == pytest.approx(2.8379, abs=4 * scores["nll_error"])


def test_own_points_are_judged_in_their_spread_and_by_their_weights(monkeypatch):
    """The second half has weight 0, so that it counts in no score."""
    monkeypatch.setattr(Judge, "distance", lambda *_: 0.0)  # the floor takes long
    draw = torch.Generator().manual_seed(6)
    x, drawn, other = torch.randn(3, 60, 2, generator=draw, dtype=torch.float64)
    x = torch.cat([x, x + 50])
    weight = torch.cat([torch.rand(60, generator=draw).double(), torch.zeros(60)])
    units, flow = torch.tensor([1e3, 1e-2], dtype=torch.float64), cnf.models.build("maf", dim=2)
    judge, scaled = (
        Judge(cnf.data.Points(x * unit, weight=weight), other) for unit in (1.0, units)
    )
    assert scaled.sliced(drawn * units) == pytest.approx(judge.sliced(drawn), rel=1e-9)
    assert judge.sliced(judge.target.x[:60]) < 1
    with torch.no_grad():
        told = METRICS["nll"].function(judge.trial(flow.double())).value
        expected = -(weight * flow.log_prob(x)).sum() / weight.sum()
    assert told == pytest.approx(expected.item(), rel=1e-9)


def test_nobody_named_means_the_race(tmp_path, monkeypatch):
    monkeypatch.setattr("cnf.race.contestants.RACE", ("realnvp",))
    assert race(None, "moons", steps=2).contestants == ["realnvp"]
    assert set(RACE) <= set(CONTESTANTS)


def test_race_that_was_stopped_goes_on_without_those_who_finished(monkeypatch, tmp_path):
    whole = race(["realnvp", "maf"], "moons")
    real, ran = runs.train, []

    def stops(flow, *rest):
        ran.append(flow.spec["model"])
        if ran == ["realnvp", "maf"]:
            raise KeyboardInterrupt
        return real(flow, *rest)

    monkeypatch.setattr(runs, "train", stops)
    with pytest.raises(KeyboardInterrupt):
        race(["realnvp", "maf"], "moons", tmp_path)
    with pytest.raises(ValueError, match="maf-seed-0 ran in another race: steps was 20, is 30"):
        race(["maf"], "moons", tmp_path, resume=True, steps=30)  # which it began
    resumed = race(["realnvp", "maf"], "moons", tmp_path, resume=True)
    assert ran == ["realnvp", "maf", "maf"]
    assert resumed.contestants == ["realnvp", "maf"]
    for name in ("realnvp", "maf"):
        assert resumed.mean(name, "gap")[0] == pytest.approx(whole.mean(name, "gap")[0], rel=1e-6)
    assert resumed.of("realnvp")[0].few_steps == whole.of("realnvp")[0].few_steps
    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="another race: random streams was 4, is 5"),
    ):
        patch.setattr(racing, "VERSION", racing.VERSION + 1)
        race(["realnvp", "maf"], "moons", tmp_path, resume=True)
    with pytest.raises(ValueError, match="another race: steps was 20, is 30"):
        race(["realnvp"], "moons", tmp_path, resume=True, steps=30)


def test_race_killed_in_the_middle_of_training_goes_on_to_the_very_weights(monkeypatch, tmp_path):
    """What lies on the disk is all that SIGKILL leaves: here a copy, made while the MAF trains."""
    fit, train, trained = runs.fit, runs.train, []

    def copying(flow, objective, data, config):
        def copy(record):
            if flow.spec["model"] == "maf" and record["step"] == 10:
                shutil.copytree(tmp_path / "race", tmp_path / "left" / "race")

        return fit(
            flow, objective, data, replace(config, checkpoint_seconds=1e-9), callbacks=[copy]
        )

    monkeypatch.setattr(runs, "fit", copying)
    whole = race(["realnvp", "maf"], "moons", tmp_path)
    state = checkpoint.load_state(tmp_path / "left/race/runs/maf-seed-0/stage-1")
    assert state["budget"]["step"] == 9
    monkeypatch.setattr(runs, "fit", fit)
    monkeypatch.setattr(
        runs, "train", lambda f, *rest: (trained.append(f.spec["model"]), train(f, *rest))[1]
    )
    resumed = race(["realnvp", "maf"], "moons", tmp_path / "left", resume=True)
    assert trained == ["maf"]
    for one, other in zip(whole.entries, resumed.entries, strict=True):
        pairs = zip(one.flow.parameters(), other.flow.parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)
        assert one.scores["gap"] == pytest.approx(other.scores["gap"], rel=1e-6)


def test_contestant_that_fails_for_any_reason_is_left_out_with_it(monkeypatch):
    real = runs.train

    def fails(flow, *rest):
        if flow.spec["model"] == "maf":
            raise MemoryError("no room for $x$ [/b]")
        return real(flow, *rest)

    monkeypatch.setattr(runs, "train", fails)
    results = race(["maf", "realnvp"], "moons", steps=2)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(results_table(results))
    assert "Left out: MAF, seed 0: no room for $x$ [/b]" in capture.get()
    with pytest.raises(ValueError, match="every contestant failed: MAF, seed 0: no room"):
        race(["maf"], "moons", steps=2)


def test_couplings_on_one_dimension_are_left_out_before_training(monkeypatch):
    trained = []
    real = runs.train
    monkeypatch.setattr(
        runs, "train", lambda f, *rest: (trained.append(f.spec["model"]), real(f, *rest))[1]
    )
    results = race(["realnvp", "nsf-ar"], torch.randn(200, 1, generator=DRAW), steps=2)
    assert trained == ["nsf-ar"] and results.contestants == ["nsf-ar"]
    assert "nsf-ar takes one" in results.settings["failed"]["RealNVP"]


def test_contestant_and_data_of_any_name_have_a_page(tmp_path):
    odd = "$x$ [/b] <i>/../%"
    mine = Contestant(odd, "realnvp", (Stage(cnf.MaximumLikelihood()),), {"layers": 2})
    points = cnf.data.Points(torch.randn(200, 3, generator=DRAW), odd)
    results = race({odd: mine}, points, tmp_path, steps=2)
    page = write_report(results, tmp_path / "race").read_text()
    assert "<i>/" not in page and "&lt;i&gt;/../%" in page
    assert {path.name for path in tmp_path.iterdir()} == {"race"}
    Console(width=200).print(results_table(results))


GAUSSIAN = MultivariateNormal(torch.tensor([4e4, 0.03]), torch.tensor([[1e8, 50.0], [50.0, 1e-4]]))


def test_torch_distribution_races_by_its_gap_and_is_standardized(tmp_path):
    results = race(["rnode"], GAUSSIAN, tmp_path, steps=1)
    assert results.data == "MultivariateNormal" and results.score == "gap"
    assert results.entropy == pytest.approx(GAUSSIAN.entropy().item())
    flow = results.of("rnode")[0].flow
    assert flow.preprocess is not None  # a toy needs none
    test = racing.draw_test_points(racing.DistributionData(GAUSSIAN), 400)[0]
    tight = flow.with_solver(TIGHT)
    expected = (GAUSSIAN.log_prob(test) - tight.log_prob(test)).double().mean().item()
    assert results.mean("rnode", "gap")[0] == pytest.approx(expected, abs=1e-4)
    assert "MultivariateNormal" in write_report(results, tmp_path / "race").read_text()
    other = MultivariateNormal(torch.zeros(2), torch.eye(2))
    with pytest.raises(ValueError, match="another race: rows was"):
        race(["rnode"], other, tmp_path, steps=1, resume=True)


def test_entropy_without_a_formula_is_a_mean_over_draws():
    parts = Independent(Normal(torch.tensor([[-50.0, 0.0], [50.0, 0.0]]), torch.ones(2, 2)), 1)
    mixture = racing.DistributionData(MixtureSameFamily(Categorical(torch.ones(2)), parts))
    exact = math.log(2) + 1 + math.log(2 * math.pi)  # of two Gaussians that never meet
    assert mixture.entropy == pytest.approx(exact, abs=0.02)  # 1/√100,000 = 0.003 a draw
    assert mixture.support[0, 0] < -50 and mixture.support[1, 0] > 50


def test_flow_can_be_raced_against(tmp_path):
    teacher = cnf.models.build("realnvp", dim=2, layers=2, hidden=(8,))
    assert race(["realnvp"], teacher, steps=1).score == "gap"
    with pytest.raises(ValueError, match=r"Normal: expected a distribution of vectors.*got \(\)"):
        race(["realnvp"], Normal(0.0, 1.0), steps=1)


def test_frame_and_array_race_like_the_tensor(tmp_path):
    x = torch.randn(200, 2, generator=DRAW, dtype=torch.float64)
    frame = pandas.DataFrame(x.numpy(), columns=["height", "weight"])
    given = [x, x.numpy(), frame, x.tolist()]
    scores = [race(["realnvp"], data, steps=2).mean("realnvp", "nll")[0] for data in given]
    assert math.isfinite(scores[0]) and len(set(scores)) == 1
    assert race(["realnvp"], frame, steps=1).density.columns == ("height", "weight")


def test_own_points_race_under_their_contexts(tmp_path):
    draw = torch.Generator().manual_seed(3)
    context = torch.randn(200, 1, generator=draw, dtype=torch.float64)
    x = context + 0.1 * torch.randn(200, 1, generator=draw, dtype=torch.float64)
    results = race(["nsf-ar"], cnf.data.Points(x, context=context), tmp_path, steps=5)
    assert math.isfinite(results.of("nsf-ar")[0].scores["w2"])
    assert results.of("nsf-ar")[0].flow.context_dim == 1
    other = {"contexts": {"context": context + 1}, "weights": {"context": context, "weight": x**2}}
    for parts in other.values():
        with pytest.raises(ValueError, match="another race: rows was"):
            points = cnf.data.Points(x, **parts)
            race(["nsf-ar"], points, tmp_path, steps=5, resume=True)


def test_ones_own_flow_model_and_stages_run_beside_named_ones(tmp_path):
    flow = cnf.Flow(None, cnf.models.realnvp(2, layers=2).transform, event_shape=(2,))
    before = [p.clone() for p in flow.parameters()]
    stages = [Stage(cnf.FlowMatching(), 0.5), Stage(cnf.MaximumLikelihood(), 0.5)]
    mine = [
        "nsf",
        ("Hand-made", flow, cnf.MaximumLikelihood()),
        ("Wide", lambda dim: cnf.models.nsf(dim, hidden=(8,), layers=2), "maximum-likelihood"),
        ("Both", "cnf", stages),
    ]
    results = race(mine, "moons", tmp_path, steps=4)
    assert results.contestants == ["nsf", "Hand-made", "Wide", "Both"]
    assert all(torch.equal(*pair) for pair in zip(before, flow.parameters(), strict=True))
    again = race(mine, "moons", tmp_path, steps=4, resume=True)
    for one, other in zip(results.entries, again.entries, strict=True):
        assert one.scores["gap"] == other.scores["gap"]
    with pytest.raises(TypeError, match=r"a contestant to be a name, .* \(title, model, obj"):
        race([flow], "moons", steps=4)
    with pytest.raises(ValueError, match="of names that differ, got"):
        race(["nsf", "nsf"], "moons", steps=4)


def test_a_race_goes_on_with_the_very_contestants_that_it_had(tmp_path):
    def mine(seed, lr=1e-3):
        torch.manual_seed(seed)
        flow = cnf.Flow(None, cnf.models.realnvp(2, layers=2).transform, event_shape=(2,))
        return {"mine": ("Mine", flow, [Stage(cnf.MaximumLikelihood(), settings={"lr": lr})])}

    race(mine(0), "moons", tmp_path, steps=2)
    race(mine(0), "moons", tmp_path, steps=2, resume=True)
    for other in (mine(1), mine(0, lr=1e-2)):
        with pytest.raises(ValueError, match="in another race: another contestant of this name"):
            race(other, "moons", tmp_path, steps=2, resume=True)
    entry = next((tmp_path / "race").rglob("entry.json"))  # as version 0.1 wrote it
    kept = json.loads(entry.read_text())
    del kept["race"]["contestant"]
    entry.write_text(json.dumps(kept))
    race(mine(1), "moons", tmp_path, steps=2, resume=True)


def test_a_contestant_without_stages_and_one_of_ones_own_in_one_dimension_are_told_why():
    with pytest.raises(TypeError, match="compare: expected objective to be one of .* got a list"):
        race([("Mine", "realnvp", [])], "moons", steps=2)
    with pytest.raises(ValueError, match="Mine: no net for one dimension"):
        race([("Mine", refusing, "flow-matching")], torch.randn(200, 1), steps=2)


def test_a_contestant_of_the_title_of_one_that_cannot_be_built_races_all_the_same():
    mine = {name: ("Mine", model, "maximum-likelihood") for name, model in
            (("a", refusing), ("b", "planar"), ("c", refusing))}  # fmt: skip
    results = race(mine, "moons", steps=2)
    assert results.contestants == ["b"]
    assert list(results.settings["failed"]) == ["Mine (a)", "Mine (c)"]


def test_every_contestant_runs_with_every_seed_of_a_generator():
    results = race(["planar", "radial"], "moons", steps=2, seeds=(seed for seed in (3, 5)))
    assert [entry.seed for entry in results.entries] == [3, 5, 3, 5]
    assert results.settings["seeds"] == [3, 5]


@pytest.mark.parametrize("title", [None, 3, ("Mine",)])
def test_a_title_that_is_no_text_is_refused(title):
    with pytest.raises(TypeError, match="compare: expected names and titles to be text, got"):
        race([(title, "planar", "maximum-likelihood")], "moons", steps=2)


def refusing(dim):
    raise ValueError("no net for one dimension")


def test_evaluations_are_counted_once_for_both_scores(monkeypatch):
    calls = []
    judge_module = importlib.import_module("cnf.race.judge")
    count = judge_module.nfe
    monkeypatch.setattr(judge_module, "nfe", lambda *a: calls.append(a) or count(*a))
    toy = cnf.data.toy("moons")
    judge = judge_module.Judge(toy.sample(50), toy.sample(50), toy, w2_points=20)
    scores = judge.scores(cnf.models.cnf(2, hidden=(8,), solver=cnf.Solver("rk4", steps=3)))
    assert len(calls) == 1 and scores["nfe_sample"] == scores["nfe_log_prob"] == 12


def test_metric_that_fails_is_nan_and_named_and_the_race_goes_on(monkeypatch):
    entries = dict(METRICS)

    def broken(true, drawn):
        raise ZeroDivisionError("boom")

    score = metrics.Score("broken", "Broken", "A metric that fails")
    monkeypatch.setattr(METRICS, "_entries", entries)
    metrics.metric("samples", score)(broken)
    with pytest.warns(UserWarning, match="the metric 'broken' failed: ZeroDivisionError: boom"):
        results = race(["realnvp"], "moons", steps=2)
    assert math.isnan(results.mean("realnvp", "broken")[0])
    assert math.isfinite(results.mean("realnvp", "w2")[0])


def test_results_print_as_the_table_and_names_are_suggested():
    results = race(["realnvp"], "moons", steps=2)
    text = repr(results)
    assert "RealNVP" in text and max(map(len, text.splitlines())) <= 80 and "0x" not in text
    with pytest.raises(ValueError, match="unknown contestant 'realnpv'.*Did you mean 'realnvp'"):
        results.mean("realnpv", "gap")


def test_one_contestant_of_ones_own_needs_no_list():
    flow = cnf.models.realnvp(2, layers=2, hidden=(4,))
    results = race(("Mine", flow, cnf.MaximumLikelihood()), "moons", steps=2)
    assert results.contestants == ["Mine"]


def test_results_have_a_repr_without_rich(monkeypatch):
    results = race(["realnvp"], "moons", steps=2)

    def missing(results):
        raise ImportError("rich")

    monkeypatch.setattr("cnf.race.tables.as_text", missing)
    assert repr(results) == "Results('moons', realnvp)"
