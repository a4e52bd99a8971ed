"""Layers of the package, from its imports, and the effects of `import cnf`."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import cnf

ROOT = Path(cnf.__file__).parent

FLOORS = {
    "cli": 10,
    "arguments": 1,
    "catalog": 9,
    "race": 9,
    "plotting": 8,
    "adapters": 9,
    "checks": 8,
    "metrics": 7,
    "training": 7,
    "models": 6,
    "objectives": 6,
    "sampling": 6,
    "flow": 5,
    "transforms": 4,
    "dequantization": 4,
    "fields": 3,
    "dynamics": 3,
    "nets": 2,
    "distributions": 2,
    "errors": 1,
    "expectation_maximization": 1,
    "precision": 1,
    "printing": 1,
    "random": 1,
    "registry": 1,
    "rematerialize": 2,
    "rows": 1,
    "matching": 1,
    "data": 1,
}
MODULES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
INNER = [path for path in MODULES if path.parts[0] not in ("__init__.py", "__main__.py")]


def imports(tree, package):
    """Every dotted name that a module imports, its own package's names made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def imported_by(path):
    tree = ast.parse((ROOT / path).read_text())
    return set(imports(tree, ("cnf", *path.parts[:-1])))


def unit(path):
    return path.parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", INNER, ids=str)
def test_every_module_has_a_layer(path):
    assert unit(path) in FLOORS


@pytest.mark.parametrize("path", INNER, ids=str)
def test_modules_import_lower_layers_only(path):
    own = FLOORS[unit(path)]
    for name in imported_by(path):
        parts = name.split(".")
        if parts[0] != "cnf" or name == "cnf.__version__":
            continue
        assert parts[1] in FLOORS, f"{path} imports {name}: import from the module itself"
        assert FLOORS[parts[1]] <= own, f"{path} (floor {own}) imports {name}"


def test_import_parser_finds_every_form_of_import():
    source = "import a.b\nfrom cnf import flow\nfrom . import x\nfrom ..nets import MLP\n"
    found = set(imports(ast.parse(source), ("cnf", "fields")))
    assert found == {"a.b", "cnf.flow", "cnf.fields.x", "cnf.nets.MLP"}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_the_solver_of_odes_imports_torchdiffeq(path):
    touches = any(name.split(".")[0] == "torchdiffeq" for name in imported_by(path))
    assert touches == (path.as_posix() in ("dynamics/ode.py", "dynamics/adaptive.py"))


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_only_random_forks_and_seeds_torchs_generators(path):
    if path.as_posix() not in ("random.py", "cli.py"):  # a command has its process for itself
        source = (ROOT / path).read_text()
        assert "fork_rng" not in source and "torch.manual_seed(" not in source


PROBE = """
import json, sys
import torch, torchdiffeq

def settings():
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    return {
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "gradients": torch.is_grad_enabled(),
        "anomaly": torch.is_anomaly_enabled(),
        "tf32": [cuda.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision()],
        "cudnn": [cudnn.enabled, cudnn.benchmark, cudnn.deterministic],
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "validation": torch.distributions.Distribution._validate_args,
        "random state": torch.get_rng_state().tolist(),
    }

before, loaded = settings(), set(sys.modules)
import cnf
print(json.dumps({
    "before": before,
    "after": settings(),
    "new": sorted(set(sys.modules) - loaded),
}))
"""


@pytest.fixture(scope="module")
def imported():
    """What `import cnf` loads and changes, in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-c", PROBE],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT.parent,
    )
    return json.loads(run.stdout)


def test_import_loads_no_heavy_package(imported):
    third_party = {name.split(".")[0] for name in imported["new"]} - set(sys.stdlib_module_names)
    assert third_party == {"cnf"}  # torch and torchdiffeq, with all of theirs, are there already


def test_import_changes_no_torch_default(imported):
    assert imported["after"] == imported["before"]


@pytest.mark.parametrize("name", cnf.__all__)
def test_every_public_name_resolves(name):
    assert getattr(cnf, name) is not None


def test_unknown_attribute_raises_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = cnf.nonsense
