"""The experiments' scripts use names that the package has: they are run by hand, and seldom."""

import ast
import importlib
from pathlib import Path

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
