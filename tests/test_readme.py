"""What README.md says is true: its Python example runs."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"


def example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return next(block for block in blocks if "cnf.fit" in block)


def test_readme_example_has_about_ten_lines():
    assert 8 <= len(example().strip().splitlines()) <= 14


@pytest.mark.slow
def test_readme_example_runs(capsys):
    shorter, swaps = re.subn(r"(steps|seconds)=[\d_]+", "steps=20", example())
    assert swaps >= 2
    exec(compile(shorter, "README.md", "exec"), {})
    assert "✓" in capsys.readouterr().out
