"""The documentation: its code runs, its commands parse, and its reference is complete."""

import re
import shlex
from inspect import ismodule
from pathlib import Path

import pytest

import cnf
from cnf import cli, registry

DOCS = Path(__file__).parent.parent / "docs"
PAGES = [
    page
    for page in sorted(DOCS.rglob("*.md"))
    if page.relative_to(DOCS).parts[0] not in ("_build", "experiments", "notebooks")
]
QUICKER = {  # how long is trained, and by which net, and on how many points all is measured
    r"\b(steps|seconds)=\d[\d_]{2,}|\bseconds=\d+": "steps=4",
    r"TrainConfig\(": "TrainConfig(validations=1, validation_rows=50, ",
    r"\b(\d+)_000\b": r"\g<1>00",
    r"\b500\b": "60",
    r"seeds=\[0, 1\]": "seeds=[0]",
    r"models\.cnf\(2": "models.cnf(2, hidden=(8, 8), fourier=0",
}


def blocks(page, language):
    """The fenced blocks of a language; those inside of a list are moved to the left."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", page.read_text(), re.S | re.M)
    return [re.sub(f"^{indent}", "", block, flags=re.M) for indent, block in found]


@pytest.fixture
def registries():
    """The tables of names are afterwards as they were, whatever an example has added."""
    before = [(table, dict(table._entries)) for table in registry._TABLES]
    yield
    for table, entries in before:
        table._entries.clear()
        table._entries.update(entries)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")  # of fits that are cut short
@pytest.mark.filterwarnings("ignore::FutureWarning")  # Lightning's own
@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem
)
def test_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    for client in ("sbi", "lightning", "datasets"):
        if f"from {client}" in page.read_text():
            pytest.importorskip(client)
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks(page, "python"):
        for slow, quick in QUICKER.items():
            block = re.sub(slow, quick, block)
        exec(compile(block, str(page), "exec"), names)


def commands():
    for page in PAGES:
        for block in blocks(page, "console"):
            for line in block.replace("\\\n", " ").splitlines():
                if line.startswith("$ cnf "):
                    yield line.removeprefix("$ cnf ")


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_command_of_the_documentation_parses(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "pinwheel-cnf-flow-matching"  # what some of them go on with
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("data: pinwheel\n")
    name, *words = shlex.split(command)
    assert cli._options(name, words)


@pytest.mark.parametrize("name", [name for name in cnf.__all__ if ismodule(getattr(cnf, name))])
def test_public_module_has_a_page_in_the_reference(name):
    assert f"automodule:: cnf.{name}\n" in (DOCS / "api" / f"{name}.md").read_text()
