"""The command line: every command on one run, repetition from config.yaml, and errors."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import cnf
from cnf import cli
from cnf.metrics import row_scores
from cnf.race.contestants import CONTESTANTS, RACE
from cnf.sampling import guided
from cnf.training.interrupt import Interrupted

SMALL = ["--data", "moons", "--options.hidden", "[8]", "--device", "cpu", "--progress", "false"]
SMALL += ["--batch_size", "32", "--validation_rows", "100"]
TRAIN = [*SMALL, "--options.solver", "{method: rk4, steps: 4}"]


@pytest.fixture
def call(capsys):
    """(arguments) → (exit code, standard output, standard error)."""

    def run(*arguments):
        capsys.readouterr()
        try:
            cli.main([str(argument) for argument in arguments])
            code = 0
        except SystemExit as end:
            code = 0 if end.code is None else end.code
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def refused(call):
    """(arguments) → the one line on standard error; exit code 2."""

    def run(*arguments):
        code, _, said = call(*arguments)
        assert code == 2
        assert "Traceback" not in said
        lines = said.strip().splitlines()
        assert len(lines) == 1, said
        return lines[0]

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a small trained run."""
    folder = tmp_path_factory.mktemp("cli") / "run"
    cli.main(["train", *TRAIN, "--steps", "30", "--seed", "3", "--folder", str(folder)])
    return folder


def test_train_prints_steps_score_and_folder(call, tmp_path):
    code, said, errors = call("train", *TRAIN, "--steps", "5", "--folder", tmp_path / "run")
    assert (code, errors) == (0, "")
    assert "5 steps" in said and "NLL" in said and str(tmp_path / "run") in said
    assert (tmp_path / "run" / "checkpoints" / "flow.safetensors").is_file()


def test_train_without_a_folder_chooses_an_unused_one(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("moons-cnf-flow-matching", "moons-cnf-flow-matching-2"):
        assert call("train", *TRAIN, "--steps", "2")[0] == 0
        assert (tmp_path / "runs" / name / "manifest.json").is_file()


def test_train_repeats_to_the_same_bytes_from_its_config(call, run, tmp_path):
    config = run / "config.yaml"
    assert call("train", "--config", config, "--folder", tmp_path / "new")[0] == 0
    file = "checkpoints/flow.safetensors"
    assert (tmp_path / "new" / file).read_bytes() == (run / file).read_bytes()


def test_run_with_a_budget_in_seconds_repeats_to_the_same_bytes_from_its_config(call, tmp_path):
    assert call("train", *TRAIN, "--seconds", "0.3", "--folder", tmp_path / "one")[0] == 0
    config = tmp_path / "one" / "config.yaml"
    assert call("train", "--config", config, "--folder", tmp_path / "two")[0] == 0
    one, two = (tmp_path / name / "checkpoints" / "flow.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_a_run_in_seconds_goes_on_or_repeats_with_another_budget(call, tmp_path):
    """The learning rate comes to zero at its end, and not before."""
    assert call("train", *TRAIN, "--seconds", "0.3", "--folder", tmp_path / "one")[0] == 0
    steps = int(metrics_of(tmp_path / "one")[-1]["step"])
    more = ["--steps", 2 * steps]
    with pytest.warns(UserWarning, match="a record of another number of steps") as told:
        code, _, said = call("train", "--resume", tmp_path / "one", *more)
    assert code == 0, said
    assert not any("compile was" in str(warning.message) for warning in told)
    rates = {int(row["step"]): float(row["lr"]) for row in metrics_of(tmp_path / "one")}
    assert max(rate for step, rate in rates.items() if step > steps) > 0
    config = tmp_path / "one" / "config.yaml"
    more = ["--seconds", "0.3", "--folder", tmp_path / "two"]
    code, _, said = call("train", "--config", config, *more)
    assert code == 0, said


def test_a_run_of_a_file_made_in_python_goes_on_from_the_command_line(call, tmp_path):
    x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    np.savetxt(tmp_path / "x.csv", x.numpy(), delimiter=",", header="a,b", comments="")
    data = cnf.data.load(str(tmp_path / "x.csv"))
    flow = cnf.models.build("realnvp", dim=2, hidden=(8,), layers=2)
    folder = tmp_path / "run"
    settings = {"folder": folder, "device": "cpu", "progress": False, "batch_size": 32}
    cnf.fit(flow, cnf.MaximumLikelihood(), data, cnf.TrainConfig(steps=4, **settings))
    with pytest.warns(UserWarning, match="steps was 4, is 6$"):  # and nothing else
        code, _, said = call("train", "--resume", folder, "--steps", 6)
    assert code == 0, said
    assert int(metrics_of(folder)[-1]["step"]) == 6


def metrics_of(run):
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "options",
    [
        ["--model", "realnvp", "--options.layers", "2"],
        ["--objective", "maximum-likelihood", "--objective_options.divergence", "hutchinson"],
        ["--objective", "maximum-likelihood", "--objective_options.penalties", "{kinetic: 0.1}"],
        ["--objective_options.path", "linear", "--objective_options.coupling", "independent"],
    ],
)
def test_models_objectives_and_their_options_repeat_from_the_config(options, call, tmp_path):
    first, second = tmp_path / "one", tmp_path / "two"
    code, _, said = call("train", *SMALL, *options, "--steps", "3", "--folder", first)
    assert code == 0, said
    code, _, said = call("train", "--config", first / "config.yaml", "--folder", second)
    assert code == 0, said
    one, two = (folder / "checkpoints" / "flow.safetensors" for folder in (first, second))
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("name", ["mine.npy", "mine.csv"])
def test_own_file_trains_repeats_and_evaluates(name, call, tmp_path):
    x, path = torch.randn(200, 2).numpy(), tmp_path / name
    np.save(path, x) if name.endswith("npy") else np.savetxt(path, x, delimiter=",")
    start = ["train", *TRAIN, "--data", path, "--steps", "3", "--folder", tmp_path / "one"]
    assert call(*start)[0] == 0
    config = tmp_path / "one" / "config.yaml"
    code, _, said = call("train", "--config", config, "--folder", tmp_path / "two")
    assert code == 0, said
    code, _, said = call("evaluate", tmp_path / "one", "--points", "100")
    assert code == 0, said


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A table with labels, and the folder of a run on it."""
    folder, draw = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    label, x = draw.integers(0, 2, 200), draw.normal(size=(200, 2))
    rows = [f"{a:.5f},{b:.5f},{'ab'[k]}" for k, (a, b) in zip(label, x, strict=True)]
    (folder / "own.csv").write_text("income,rate,kind\n" + "\n".join([*rows, "1,,a"]))
    budget = ["--model", "realnvp", "--options.layers", "2", "--steps", "2", "--no-progress"]
    columns = ["--columns", "income,rate", "--context", "kind", "--drop-missing"]
    cli.main(
        ["train", str(folder / "own.csv"), *columns, *budget, "--folder", str(folder / "run")]
    )
    return folder


def test_columns_context_and_test_part_are_kept_with_the_run(own, call):
    code, said, errors = call("evaluate", own / "run")
    assert code == 0, errors
    assert "20 rows that training never saw" in said and "standardized columns" in said
    code, said, errors = call("evaluate", own / "run", "--data", own / "own.csv")
    assert "200 of 200 rows of own, samples against half of them" in said, errors


def test_other_rows_are_all_scored_few_of_them_too_and_without_weights(own, call, tmp_path):
    flow = cnf.load(own / "run")
    for count in (2, 3, 40):
        x = torch.randn(count, 2, dtype=torch.float64)
        x[1::2] += 5  # alternating, so that half of the rows would be a biased part
        lines = [f"{a!r},{b!r},a" for a, b in x.tolist()]
        (tmp_path / "other.csv").write_text("\n".join(["income,rate,kind", *lines]))
        code, _, errors = call("evaluate", own / "run", "--data", tmp_path / "other.csv")
        assert code == 0, errors
        scores = json.loads((own / "run" / "evaluation.json").read_text())
        nll = -float(flow.log_prob(x, torch.tensor([1.0, 0.0])).mean().detach())
        assert scores["nll"] == pytest.approx(nll, abs=1e-4)
        assert math.isnan(scores["w2"]) == (count < 10)


def test_a_run_that_held_nothing_out_is_scored_on_all_of_its_rows(call, tmp_path):
    x = torch.randn(60, 2, dtype=torch.float64)
    x[1::2] += 5  # alternating, so that half of the rows would be a biased part
    (tmp_path / "own.csv").write_text("\n".join(f"{a!r},{b!r}" for a, b in x.tolist()))
    budget = ["--model", "realnvp", "--options.layers", "2", "--steps", "2", "--no-progress"]
    run = tmp_path / "run"
    assert call("train", tmp_path / "own.csv", "--test", "0", *budget, "--folder", run)[0] == 0
    code, said, errors = call("evaluate", run)
    assert code == 0 and "60 of 60 rows that training has seen" in said, errors
    scores = json.loads((run / "evaluation.json").read_text())
    nll = -float(cnf.load(run).log_prob(x).mean().detach())
    assert scores["nll"] == pytest.approx(nll, abs=1e-4)


def test_weights_may_be_missing_in_rows_to_score(call, tmp_path):
    rows = [f"{a:.5f},{b:.5f},1" for a, b in torch.randn(60, 2).tolist()]
    (tmp_path / "own.csv").write_text("\n".join(["a,b,w", *rows]))
    (tmp_path / "new.csv").write_text("\n".join(["a,b", *(row[:-2] for row in rows)]))
    budget = ["--model", "realnvp", "--options.layers", "2", "--steps", "2", "--no-progress"]
    run = tmp_path / "run"
    assert call("train", tmp_path / "own.csv", "--weight", "w", *budget, "--folder", run)[0] == 0
    code, said, errors = call("evaluate", run, "--data", tmp_path / "new.csv")
    assert code == 0 and "has no column w: every row counts the same" in said, errors


def test_another_test_part_is_named_when_a_run_goes_on(own, refused, tmp_path):
    run = shutil.copytree(own / "run", tmp_path / "run")
    said = refused("train", "--resume", run, "--test", "0.3")
    assert "on other data than these (test was 0.1, is 0.3); give it the same" in said


def test_error_for_a_moved_table_asks_for_it(own, call, refused, tmp_path):
    run = shutil.copytree(own / "run", tmp_path / "run")
    config, gone = run / "config.yaml", str(tmp_path / "gone.csv")
    config.write_text(config.read_text().replace(str(own / "own.csv"), gone))
    for command in (["evaluate", run], ["plot", run], ["train", "--resume", run]):
        assert "gone.csv, which is no file; the run was trained on it" in refused(*command)
        assert "--data FILE" in refused(*command)
    assert "was trained on it" not in refused("train", tmp_path / "other.csv")
    assert call("evaluate", run, "--data", own / "own.csv")[0] == 0


def test_rows_of_a_changed_file_are_not_reported_as_held_out(own, call, refused, tmp_path):
    run = shutil.copytree(own / "run", tmp_path / "run")
    rows = (own / "own.csv").read_text()
    (tmp_path / "own.csv").write_text(rows)
    config, manifest = run / "config.yaml", run / "manifest.json"
    config.write_text(config.read_text().replace(str(own / "own.csv"), str(tmp_path / "own.csv")))
    _, said, errors = call("evaluate", run)
    assert "20 rows that training never saw" in said, errors
    header, first = rows.split("\n", 1)
    (tmp_path / "own.csv").write_text(f"{header}\n0.1,0.2,a\n{first}")
    assert "other rows than those that the run was trained on" in refused("evaluate", run)
    told = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({k: v for k, v in told.items() if k != "rows"}))  # an old run
    _, said, errors = call("evaluate", run)
    assert "20 rows" in said and "never saw" not in said, errors
    assert "does not tell whether the file has changed" in " ".join(said.split())


def test_check_reads_a_table_as_the_run_did(own, call):
    code, said, errors = call("check", own / "run", "--data", own / "own.csv")
    assert errors == "" and "log-det" in said and "context: none was given" not in said
    assert said.startswith("Checked at 64 rows of own, with their contexts.")
    assert code in (0, 1)
    assert call("check", own / "run")[1] == said  # the run's own table, if it is still there


def test_check_without_the_runs_table_names_the_context_it_used(own, call, tmp_path):
    shutil.copytree(own / "run", tmp_path / "run")
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text().replace("own.csv", "moved.csv"))
    _, said, errors = call("check", tmp_path / "run")
    assert errors == "" and said.startswith("Checked at its own samples.")
    assert re.search(
        r"taken, \[\S+, \S+\], in scales from the mean, .*; .* or --data on the", said
    )


def test_training_leaves_out_the_rows_that_evaluate_scores(own, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "cnf.race.judge.Judge.scores",
        lambda self, flow, **_: seen.update(test=self.test.x, floor=self.floor) or {"nll": 0.0},
    )
    cli.main(["evaluate", str(own / "run")])
    monkeypatch.setattr(
        cli,
        "fit",
        lambda flow, goal, source, config: seen.update(train=source.x) or cnf.training.History(),
    )
    cli.main(["train", "--config", str(own / "run" / "config.yaml"), "--folder", "unused"])
    both = torch.cat([seen["train"], seen["test"]])
    assert len(seen["train"]) == 180 and len(torch.unique(both, dim=0)) == 200


def test_configuration_from_before_the_test_part_trains_on_every_row(own, monkeypatch, tmp_path):
    old = (own / "run" / "config.yaml").read_text().replace("test: 0.1\n", "")
    (tmp_path / "old.yaml").write_text(old)
    rows = []
    monkeypatch.setattr(
        cli,
        "fit",
        lambda flow, goal, source, config: rows.append(len(source.x)) or cnf.training.History(),
    )
    cli.main(["train", "--config", str(tmp_path / "old.yaml"), "--folder", "unused"])
    assert rows == [200]


def test_samples_have_the_names_of_the_columns_and_the_context_asked_for(own, call, tmp_path):
    run, flow = own / "run", cnf.load(own / "run")
    for number, word in enumerate(("b", "kind=b")):
        output = tmp_path / f"{number}.csv"
        code, _, errors = call("sample", run, output, "-n", "4", "--context", word, "--seed", "5")
        assert code == 0, errors
        assert output.read_text().splitlines()[0] == "income,rate"
        drawn = np.loadtxt(output, delimiter=",", skiprows=1)
        draw = torch.Generator().manual_seed(5)
        want = flow.sample((4,), torch.tensor([0.0, 1.0]), generator=draw)
        np.testing.assert_allclose(drawn, want.numpy(), rtol=1e-6)


def test_samples_are_guided_by_the_weight_asked_for(call, refused, tmp_path):
    torch.manual_seed(0)
    flow = cnf.models.cnf(2, context=1, null_context=True, hidden=(8,))
    with torch.no_grad():
        for weight in flow.parameters():
            weight += 0.3 * torch.randn_like(weight)
    file, output = cnf.save(flow, tmp_path / "flow.safetensors"), tmp_path / "x.npy"
    given = ["--context", "0.5", "--seed", "5", "-n", "4"]
    code, _, errors = call("sample", file, output, *given, "--guidance", "3")
    assert code == 0, errors
    draw = torch.Generator().manual_seed(5)
    want = guided(flow, 3.0).sample((4,), torch.tensor([0.5]), generator=draw)
    np.testing.assert_allclose(np.load(output), want.numpy(), rtol=1e-6)
    plain = flow.sample((4,), torch.tensor([0.5]), generator=torch.Generator().manual_seed(5))
    assert (want - plain).abs().max() > 1e-3
    without = cnf.save(cnf.models.cnf(2, context=1), tmp_path / "without.safetensors")
    message = refused("sample", without, tmp_path / "y.npy", *given, "--guidance", "3")
    assert "null_context=True" in message


def test_context_is_parsed_in_float64(call, tmp_path, monkeypatch):
    draw, start = np.random.default_rng(0), 1_700_000_000
    rows = [f"{start + k},{v:.4f}" for k, v in enumerate(draw.normal(size=150))]
    (tmp_path / "x.csv").write_text("\n".join(["time,x", *rows]))
    options = ["--context", "time", "--model", "realnvp", "--steps", "1", "--no-progress"]
    code, _, errors = call("train", tmp_path / "x.csv", *options, "--folder", tmp_path / "run")
    assert code == 0, errors
    given = []
    monkeypatch.setattr(
        cnf.Flow,
        "sample",
        lambda self, shape, context, **_: given.append(context) or torch.zeros(*shape, 1),
    )
    code, _, errors = call(
        "sample", tmp_path / "run", tmp_path / "drawn.csv", "--context", f"{start + 77}"
    )
    assert code == 0, errors
    assert given[0].tolist() == [start + 77]  # float32 has multiples of 128 there


def test_sample_checks_before_drawing_that_it_can_write(call, run, refused, tmp_path, monkeypatch):
    output = tmp_path / "new" / "x.csv"
    assert call("sample", run, output, "-n", "4")[0] == 0 and output.is_file()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(cnf.Flow, "sample", lambda *_, **__: pytest.fail("drew first"))
    said = refused("sample", run, tmp_path / "file" / "x.csv")
    assert "sample: cannot write" in said and "choose a file in a folder" in said
    assert "exists already; choose another name" in refused("sample", run, output)


def test_invalid_context_is_named(own, refused, tmp_path):
    run, output = own / "run", tmp_path / "x.csv"
    assert "conditioned on kind; give --context" in refused("sample", run, output)
    assert "unknown kind 'c'; known: a, b" in refused("sample", run, output, "--context", "c")
    assert not output.exists()


def test_interrupted_train_resumes_to_the_same_bytes(call, run, tmp_path, monkeypatch):
    folder, steps = tmp_path / "new", []
    seed = "cnf.training.loop.stream_seed"
    seeded = cnf.training.loop.stream_seed

    def press(*numbers):
        steps.append(numbers)
        if len(steps) == 10:
            signal.raise_signal(signal.SIGINT)
        return seeded(*numbers)

    with monkeypatch.context() as patch:
        patch.setattr(seed, press)
        code, said, _ = call("train", "--config", run / "config.yaml", "--folder", folder)
    assert code == 130
    assert str(folder) in said and "resume" in said.replace(str(folder), "")
    resume = ["--config", folder / "config.yaml", "--folder", folder, "--resume", "true"]
    assert call("train", *resume)[0] == 0
    file = "checkpoints/flow.safetensors"
    assert (folder / file).read_bytes() == (run / file).read_bytes()


def test_evaluate_prints_scores_and_keeps_them(call, run):
    code, said, _ = call("evaluate", run, "--points", "200")
    assert code == 0 and "gap" in said
    scores = json.loads((run / "evaluation.json").read_text())
    assert {"gap", "nll"} <= scores.keys()


def scores_in(path):
    """Columns of a table of scores, by name."""
    head, *rows = path.read_text().splitlines()
    columns = np.array([row.split(",") for row in rows], dtype=float).T
    return dict(zip(head.split(","), columns, strict=True))


def test_score_keeps_a_row_of_scores_for_each_complete_row(own, call, tmp_path):
    (tmp_path / "new.csv").write_text("kind,income,rate\na,0.5,0.5\nb,,1\nb,30,30\na,0,0\n")
    code, said, errors = call("score", own / "run", tmp_path / "new.csv")
    assert code == 0, errors
    assert "Calibrated on 20 rows that training never saw" in said
    assert "Left out, as a value is missing: 1 rows" in said
    found = scores_in(own / "run" / "new-scores.csv")
    assert found["row"].tolist() == [0, 2, 3]
    flow = cnf.load(own / "run")
    x = torch.tensor([[0.5, 0.5], [30, 30], [0, 0]], dtype=torch.float64)
    context = torch.tensor([[1.0, 0], [0, 1], [1, 0]])
    assert found["log_density"] == pytest.approx(flow.log_prob(x, context).tolist(), abs=1e-4)
    assert found["rank"][1] == 1 and found["p_value"][1] == pytest.approx(2 / 21)


def test_score_takes_one_row_and_refuses_none(own, call, refused, tmp_path):
    (tmp_path / "one.csv").write_text("kind,income,rate\nb,30,30\n")
    code, said, errors = call("score", own / "run", tmp_path / "one.csv")
    assert code == 0 and "0.0% of 1 rows have a p-value of at most" in said, errors
    (tmp_path / "none.csv").write_text("kind,income,rate\nb,,30\n")
    assert "expected a row without a missing value" in refused(
        "score", own / "run", tmp_path / "none.csv"
    )
    assert "one: expected 5 rows or more" in refused(
        "plot", own / "run", "--data", tmp_path / "one.csv"
    )


def test_score_of_a_density_is_calibrated_on_its_draws(run, call, tmp_path):
    np.savetxt(tmp_path / "x.csv", np.zeros((3, 2)), delimiter=",")
    code, said, errors = call("score", run, tmp_path / "x.csv", "--output", tmp_path / "s.csv")
    assert code == 0, errors
    assert "Calibrated on 10,000 rows drawn from" in said
    assert len(set(scores_in(tmp_path / "s.csv")["log_density"])) == 1


def test_score_says_that_rows_were_trained_on(own, call, tmp_path):
    _, said, _ = call("score", own / "run", own / "own.csv", "--output", tmp_path / "s.csv")
    assert "trained on most of these rows" in said


def test_score_needs_rows_that_were_held_out(own, run, call, refused, tmp_path):
    data, all_of_it = own / "own.csv", tmp_path / "all"
    columns = ["--columns", "income,rate", "--drop-missing", "--test", "0"]
    call("train", data, "--model", "maf", "--steps", "2", *columns, "--folder", all_of_it)
    assert "has held out no rows of own" in refused("score", all_of_it, data)
    np.savetxt(tmp_path / "x.csv", np.zeros((3, 2)), delimiter=",")
    assert "give a file of some: --reference" in refused(
        "score", own / "run" / "checkpoints" / "flow.safetensors", tmp_path / "x.csv"
    )
    code, said, errors = call("score", all_of_it, data, "--reference", data)
    assert code == 0, errors
    assert "Calibrated on 200 rows of own." in said
    assert "got moons, a density" in refused("score", own / "run", "moons")
    assert "exists already" in refused("score", own / "run", data, "--output", data)


@pytest.mark.parametrize("ending", [".npy", ".csv"])
def test_sample_writes_what_the_flow_samples(ending, call, run, tmp_path):
    output = tmp_path / f"x{ending}"
    code, said, _ = call("sample", run, output, "--n", "7", "--seed", "5")
    assert code == 0 and "7 points" in said and str(output) in said
    drawn = np.load(output) if ending == ".npy" else np.loadtxt(output, delimiter=",")
    expected = cnf.load(run).sample(7, generator=torch.Generator().manual_seed(5))
    np.testing.assert_allclose(drawn, expected, rtol=1e-6)  # eight digits in the csv


def test_check_prints_a_report(call, run):
    code, said, _ = call("check", run)
    assert code in (0, 1) and len(said.splitlines()) > 3


@pytest.mark.slow
def test_plot_draws_into_the_figures_folder(call, run):
    code, said, errors = call("plot", run)
    assert code == 0, errors
    assert os.listdir(run / "figures")
    assert all(os.path.isfile(line) for line in said.split())


@pytest.mark.slow
def test_compare_writes_table_and_page(call, tmp_path):
    folder = tmp_path / "race"
    budget = ["--steps", "3", "--w2_points", "50", "--device", "cpu", "--contestants"]
    budget.append(f"[{next(name for name in CONTESTANTS if 'nvp' in name)}]")
    code, said, errors = call("compare", "moons", *budget, "--folder", folder)
    assert code == 0, errors
    page = said.strip().splitlines()[-1].removeprefix("The report: ")
    assert os.path.getsize(page) > 1000
    assert list(folder.glob("*.csv"))


@pytest.mark.parametrize("kind", cli.KINDS)
def test_list_shows_every_name_of_a_kind(kind, call):
    code, said, _ = call("list", kind)
    assert code == 0
    names = cli.KINDS[kind]
    assert all(name in said for name in names) and said.strip()


def test_data_by_position_dashes_and_lists_repeat_the_run_of_underscores_and_flags(call, tmp_path):
    plain = ["--batch_size=32", "--options.hidden=[8, 8]", "--validation_rows=9"]
    habit = ["--batch-size", "32", "--options.hidden", "8,8", "--validation-rows", "9"]
    rest = ["--steps", "2", "--device", "cpu", "--model", "realnvp", "--folder"]
    code, _, said = call(
        "train", "--data", "moons", *plain, "--progress=false", *rest, tmp_path / "a"
    )
    assert code == 0, said
    code, _, said = call("train", "moons", *habit, "--no-progress", *rest, tmp_path / "b")
    assert code == 0, said
    one, two = (tmp_path / name / "checkpoints" / "flow.safetensors" for name in "ab")
    assert one.read_bytes() == two.read_bytes()
    configs = [(tmp_path / name / "config.yaml").read_text() for name in "ab"]
    assert configs[0] == configs[1] and "batch_size: 32" in configs[0]


def test_pipe_gets_no_progress_bar_and_warnings_of_one_line(tmp_path):
    table = tmp_path / "constant.csv"
    table.write_text("a,b\n" + "".join(f"{k % 7}.5,3\n" for k in range(80)))
    small = ["--model", "realnvp", "--options.layers", "2", "--steps", "3", "--device", "cpu"]
    with start("train", table, *small, "--folder", tmp_path / "run") as process:
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert len(said.splitlines()) == 1 and said.startswith("3 steps in ")
    assert errors.splitlines() and all(
        line.startswith("warning: ") for line in errors.splitlines()
    )


def test_compare_without_progress_shows_no_bar(monkeypatch, call, tmp_path):
    shown = []
    monkeypatch.setattr("cnf.race.compare", lambda *_, **told: shown.append(told))
    monkeypatch.setattr("cnf.race.tables.results_table", lambda _: "")
    monkeypatch.setattr("cnf.race.report.write_report", lambda *_: tmp_path)
    for words in ([], ["--no-progress"]):
        assert call("compare", "moons", *words, "--folder", tmp_path / "race")[0] == 0
    assert [told["progress"] for told in shown] == [True, False]


def test_interrupted_race_says_how_to_go_on(monkeypatch, call, tmp_path):
    def interrupted(*_, **__):
        raise Interrupted(signal.SIGTERM)

    monkeypatch.setattr("cnf.race.compare", interrupted)
    code, said, _ = call("compare", "moons", "--folder", tmp_path / "my race")
    assert code == 128 + signal.SIGTERM
    way = f"--folder '{tmp_path}/my race' --resume"
    assert said == f"Interrupted; go on with the same command and {way}\n"


def test_no_command_shows_help_and_exits_2(call):
    code, said, _ = call()
    assert code == 2 and all(name in said for name in cli.COMMANDS)


def test_help_of_compare_names_the_default_contestants(call):
    _, said, _ = call("compare", "--help")
    words = " ".join(said.split()).replace("- ", "-")  # as lines are broken
    assert ", ".join(RACE[:-1]) + f" and {RACE[-1]} if not given" in words


def test_list_describes_each_contestant(call):
    _, said, _ = call("list", "contestants")
    assert "the model ffjord, trained by maximum likelihood." in " ".join(said.split())
    assert "flow matching, then by maximum likelihood." in " ".join(said.split())


def parsers():
    commands = next(a for a in cli._parser()._actions if a.dest == "subcommand")
    return commands._name_parser_map.items()


@pytest.mark.parametrize("name, parser", parsers())
def test_every_argument_has_help(name, parser):
    actions = [action for action in parser._actions if action.help != "==SUPPRESS=="]
    assert len(actions) > 1
    for action in actions:
        text = (action.help or "").split("(type:")[0].split("(default:")[0].strip()
        assert len(text) > 5, f"cnf {name}: {action.dest} has no help"


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_every_command_is_shown(name, call):
    code, said, _ = call(name, "--help")
    assert code == 0 and said.startswith(f"usage: cnf {name}")
    assert "".join(cli._first_line(cli.COMMANDS[name])[:-1].split()) in "".join(said.split())


WRONG = {
    "misspelt option": (["train", *TRAIN, "--stpes", "3"], "Did you mean --steps?"),
    "flag without its value": (["train", *TRAIN, "--steps"], "a value behind --steps"),
    "a word too many": (["train", "moons", "pinwheel"], "unexpected 'pinwheel'"),
    "seeds that are no numbers": (["compare", "moons", "--seeds", "0,x"], "list of a whole"),
    "no data": (["train", "--steps", "3"], "expected DATA"),
    "unknown data": (["train", "--data", "mons"], "Did you mean 'moons'"),
    "missing file of data": (["train", "--data", "no.csv"], "no.csv"),
    "unknown model": (["train", *TRAIN, "--model", "cnff"], "Did you mean 'cnf'"),
    "unknown objective": (["train", *TRAIN, "--objective", "likelihood"], "maximum-likelihood"),
    "unknown model option": (["train", *TRAIN, "--options.hiden", "3"], "hidden"),
    "unknown solver": (["train", *TRAIN, "--options.solver", "{method: rk5}"], "rk5"),
    "unknown objective option": (["train", *TRAIN, "--objective_options.pth", "x"], "pth"),
    "unknown coupling": (["train", *TRAIN, "--objective_options.coupling", "x"], "independent"),
    "negative budget": (["train", *TRAIN, "--seconds", "-3"], "seconds > 0"),
    "zero budget": (["train", *TRAIN, "--steps", "0"], "steps > 0"),
    "both budgets": (["train", *TRAIN, "--steps", "3", "--seconds", "3"], "not both"),
    "budget that is no number": (
        ["train", *TRAIN, "--steps", "many"], "--steps to be a whole number or null, got many"
    ),
    "unknown device": (["train", *TRAIN, "--steps", "3", "--device", "gpu0"], "gpu0"),
    "missing config": (["train", "--config", "no.yaml"], "no.yaml"),
    "unknown command": (["trian"], "Did you mean 'train'"),
    "no run": (["evaluate", "nowhere"], "nowhere"),
    "no run to sample": (["sample", "nowhere", "x.npy"], "nowhere"),
    "no run to check": (["check", "nowhere"], "nowhere"),
    "unknown kind of sample file": (["sample", "RUN", "x.txt"], ".npy or .csv"),
    "sample under a file": (["sample", "RUN", "three.npy/x.npy"], "cannot write three.npy/x.npy"),
    "no samples": (["sample", "RUN", "x.npy", "-n", "0"], "--n to be at least 1, got 0"),
    "fewer than no samples": (["sample", "RUN", "x.npy", "-n", "-1"], "least 1, got -1"),
    "half a sample": (["sample", "RUN", "x.npy", "-n", "2.5"], "a whole number, got 2.5"),
    "no steps": (["sample", "RUN", "x.npy", "--steps", "0"], "steps > 0"),
    "data of another size": (["evaluate", "RUN", "--data", "three.npy"], "(*, 2)"),
    "folder that exists": (["train", *TRAIN, "--steps", "3", "--folder", "RUN"], "exists already"),
    "race to go on with, without its folder": (["compare", "moons", "--resume"], "--folder"),
    "unknown kind of names": (["list", "model"], "Did you mean 'models'"),
    "unknown contestant": (["compare", "moons", "--steps", "1", "--contestants", "[x]"], "x"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_user_errors_end_in_one_line_and_exit_code_2(kind, refused, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("three.npy", np.random.default_rng(0).normal(size=(50, 3)))
    arguments, word = WRONG[kind]
    said = refused(*(str(run) if part == "RUN" else part for part in arguments))
    assert word in said
    assert not (tmp_path / "runs").exists()


def test_unreadable_checkpoint_and_config_end_in_one_line(refused, run, tmp_path):
    broken = tmp_path / "flow.safetensors"
    broken.write_bytes(b"nonsense")
    assert "flow.safetensors" in refused("sample", broken, tmp_path / "x.npy")
    copy = tmp_path / "copy"
    (copy / "checkpoints").mkdir(parents=True)
    flow = (run / "checkpoints" / "flow.safetensors").read_bytes()
    (copy / "checkpoints" / "flow.safetensors").write_bytes(flow)
    for text in ("data: [", "steps: 3", "- a list", ""):
        (copy / "config.yaml").write_text(text)
        assert "config.yaml" in refused("evaluate", copy)
    (copy / "config.yaml").write_text("data: [")
    assert "config.yaml" in refused("train", "--config", copy / "config.yaml")


def start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "cnf", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)


def test_version_names_cnf_and_torch():
    with start("--version") as process:
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert cnf.__version__ in said and torch.__version__ in said


@pytest.mark.slow
def test_ctrl_c_in_train_exits_130_and_says_how_to_resume(tmp_path):
    folder = tmp_path / "run"
    with start("train", *TRAIN, "--seconds", "60", "--folder", folder) as process:
        deadline = time.monotonic() + 60
        while not list(folder.glob("tensorboard/*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert str(folder) in said + errors
    assert "resume" in (said + errors).replace(str(folder), "")
    assert "Traceback" not in errors
    assert (folder / "checkpoints" / "state.pt").is_file()


@pytest.mark.parametrize("how", ["run", "config"])
def test_resume_needs_nothing_but_the_run(how, call, run, tmp_path, monkeypatch):
    folder, seeded, steps = tmp_path / "my $run", cnf.training.loop.stream_seed, []

    def end(*numbers):
        steps.append(numbers)
        if len(steps) == 10:
            signal.raise_signal(signal.SIGTERM)
        return seeded(*numbers)

    with monkeypatch.context() as patch:
        patch.setattr("cnf.training.loop.stream_seed", end)
        code, said, _ = call("train", "--config", run / "config.yaml", "--folder", folder)
    assert code == 128 + signal.SIGTERM
    assert f"cnf train --resume '{folder}'" in said
    config = ["--config", folder / "config.yaml", "--resume", "true"]
    code, _, errors = call("train", *(["--resume", folder] if how == "run" else config))
    assert code == 0, errors
    file = "checkpoints/flow.safetensors"
    assert (folder / file).read_bytes() == (run / file).read_bytes()


def test_resume_without_a_run_ends_in_one_line(refused, tmp_path):
    assert "no run to resume" in refused("train", "--resume", tmp_path / "nowhere")


def test_unusual_rows_are_counted_by_their_tail(capsys):
    held_out = -torch.arange(1.0, 100.0)
    cli._print_unusual(row_scores(torch.tensor([-200.0, -50.0, 50.0, 60.0]), held_out), held_out)
    said = " ".join(capsys.readouterr().out.split())
    assert "75.0% of 4 rows" in said and "25.0% of low and 50.0% of high" in said
    assert said.endswith("there can be is 0.02.")
