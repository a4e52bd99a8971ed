"""The experiments' scripts use names that the package has: they are run by hand, and seldom."""

import ast
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent / "experiments"
SCRIPTS = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def exists(module, name):
    found = importlib.import_module(module)
    if hasattr(found, name):
        return True
    try:
        importlib.import_module(f"{module}.{name}")
    except ImportError:
        return False
    return True


@pytest.mark.parametrize("script", SCRIPTS, ids=str)
def test_script_uses_names_that_exist(script):
    missing = []
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cnf":
            missing += [n.name for n in node.names if not exists(node.module, n.name)]
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "cnf" and not exists("cnf", node.attr):
                missing.append(f"cnf.{node.attr}")
    assert missing == []


@pytest.fixture
def budgets():
    """The script experiments/toy/budgets.py."""
    spec = importlib.util.spec_from_file_location("budgets", ROOT / "toy" / "budgets.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["budgets"] = module  # where its dataclass looks for its annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["budgets"]


def gaps(contestant, *values, budget="15"):
    """Rows of budgets.csv of a contestant on moons, one for each seed."""
    return [
        {
            "data": "moons", "budget": budget, "contestant": contestant, "seed": str(seed),
            "gap": str(value), "gap_error": "0.004", "steps": str(100 + seed),
            "compile_seconds": "nan", "processor": "a core", "threads": "1", "torch": "2",
            "revision": "abc",
        }
        for seed, value in enumerate(values)
    ]  # fmt: skip


def test_table_of_budgets_has_means_with_their_errors_and_names_what_is_missing(budgets, tmp_path):
    """Gaps of .10, .11, .12, each ± .004 over the same points: √(.004² + .01²/3) = .007."""
    names = ["cnf-likelihood", "nsf", "maf"]
    plan = budgets.Plan(["moons", "rings"], names, [15, 60], [0, 1, 2], tmp_path)
    rows = gaps("cnf-likelihood", 0.1, 0.11, 0.12) + gaps("nsf", 0.05, 0.05, 0.05)
    assert plan.lacks(rows, 15, "moons")
    rows += gaps("maf", 0.01, math.nan, 0.01)
    assert not plan.lacks(rows, 15, "moons") and plan.lacks(rows, 15, "rings")
    lines = budgets.table(plan, rows).splitlines()
    assert lines[2] == "| CNF, likelihood | 15 s | 100–102 | none | 0.110(7) | not run |"
    assert lines[3] == "| NSF | 15 s | 100–102 | none | **0.050(4)** | not run |"
    assert lines[4] == "| MAF | 15 s | 100–102 | none | 1 of 3 failed | not run |"
    assert lines[5] == "| CNF, likelihood | 60 s | – | – | not run | not run |"
    assert "Not run yet: 15 s on rings; 60 s on all." in budgets.about(plan, rows)
    assert budgets.not_drawn(plan, rows, "moons") == "not run: 60 s\nMAF, 15 s: failed"


def test_text_of_budgets_replaces_its_own_between_the_marks_of_a_page(budgets, tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"Before\n{budgets.BEGIN}old{budgets.END}\nAfter\n")
    for text in ("new", "newer"):
        budgets.fill_readme(page, [text])
    assert page.read_text() == f"Before\n{budgets.BEGIN}\nnewer\n\n{budgets.END}\nAfter\n"


@pytest.fixture
def scaling(monkeypatch):
    """The modules model and gpus of experiments/scaling."""
    monkeypatch.syspath_prepend(str(ROOT / "scaling"))
    own = [path.stem for path in (ROOT / "scaling").glob("*.py")]
    yield tuple(importlib.import_module(name) for name in ("model", "gpus"))
    for name in own:
        sys.modules.pop(name, None)


def test_fitted_cost_model_is_the_machine_that_took_the_time(scaling):
    model, _ = scaling
    machine, link = model.Machine(2e-5, 1e-10, 3e-10), model.Link(1e-4, 2e-9)
    costs = [
        model.Cost(150, 5e7, 2e7, 7e4), model.Cost(150, 2e9, 6e8, 7e4),
        model.Cost(7_000, 1e9, 4e8, 7e4), model.Cost(1_200, 3e10, 1e9, 7e6),
    ]  # fmt: skip
    one = [machine.step(cost) for cost in costs]
    two = [a + link.all_reduce(cost.gradient, 2) for a, cost in zip(one, costs, strict=True)]
    assert one[0] == pytest.approx(150 * 2e-5 + 5e7 * 1e-10 + 2e7 * 3e-10)
    assert two[0] - one[0] == pytest.approx(1e-4 + 7e4 * 2e-9)
    assert model.fitted_machine(costs, one) == pytest.approx(machine)
    assert model.fitted_link(costs, two, one) == pytest.approx(link)


def test_all_reduce_of_many_gpus_is_by_hand(scaling):
    """4.4 + 2 · 7 · 1.2 μs in a node of eight; 2 · 6 · 8.5 more among 64; four of a step."""
    _, gpus = scaling
    assert gpus.all_reduce(7e6, 1) == 0
    assert gpus.all_reduce(0, 8) == pytest.approx(4 * 21.2e-6)
    assert gpus.all_reduce(0, 512) == pytest.approx(4 * 123.2e-6)
    sent = gpus.all_reduce(4e8, 512) - gpus.all_reduce(0, 512)
    assert sent == pytest.approx(2 * 511 / 512 * 4e8 / 400e9)


CASES = """
import multiprocessing
from types import SimpleNamespace

COPY = multiprocessing.current_process().name != "MainProcess"
CASES = QUICK = {"case": SimpleNamespace(rows={8: 1, 16: 1})}
assert not (COPY and WHERE == "import")


def train(case, rows, steps, devices):
    assert not (COPY and WHERE == f"training {rows}")
    return 0.0
"""


@pytest.mark.parametrize(
    "where, longest", [("import", 3), ("training 8", 600), ("training 16", 600)]
)
def test_a_copy_that_fails_ends_the_other(where, longest, tmp_path):
    """At once where it can tell, else when the longest time is over."""
    (tmp_path / "cases.py").write_text(CASES.replace("WHERE", repr(where)))
    code = (
        f"import job; job.LONGEST = {longest}\n"
        "if __name__ == '__main__': job.main('beside a copy', True)"
    )
    (tmp_path / "main.py").write_text(code)
    paths = os.pathsep.join([str(tmp_path), str(ROOT / "scaling"), str(ROOT.parent)])
    run = subprocess.run(
        [sys.executable, str(tmp_path / "main.py")], env={**os.environ, "PYTHONPATH": paths},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 1 and "job.py: the copy failed" in run.stderr
    assert not run.stdout


@pytest.fixture
def gpu(monkeypatch):
    """The script experiments/gpu/run.py."""
    monkeypatch.syspath_prepend(str(ROOT / "gpu"))
    own = [path.stem for path in (ROOT / "gpu").glob("*.py")] + ["measure", "tables"]
    for name in own:
        sys.modules.pop(name, None)
    yield importlib.import_module("run")
    for name in own:
        sys.modules.pop(name, None)


def test_a_question_that_failed_is_asked_again_at_another_revision(gpu, monkeypatch, tmp_path):
    options, asked = gpu.Options("cpu", 1, 1, 1.0, True), []
    assert all(part.questions(options) for part in gpu.PARTS.values())

    def fails():
        asked.append("fails")
        raise ValueError("no room")

    def measure(question, revision):
        part = SimpleNamespace(questions=lambda _: {"new": question}, table=str, __doc__="A part.")
        monkeypatch.setattr(gpu, "PARTS", {"part": part})
        gpu.measure(["part"], options, tmp_path, "cpu", math.inf, revision)
        return json.loads((tmp_path / "results-cpu.json").read_text())

    for revision in ("one", "one", "two"):
        results = measure(fails, revision)
    assert asked == ["fails", "fails"]
    assert results["failed"] == {"new": {"revision": "two", "error": "ValueError: no room"}}
    assert "- new: ValueError: no room (revision two)" in (tmp_path / "tables-cpu.md").read_text()
    results = measure(lambda: {"ms": 1.0}, "three")
    assert results == {"failed": {}, "part": {"new": {"revision": "three", "ms": 1.0}}}
