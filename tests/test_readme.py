"""README.md: its Python examples run."""

import re
from pathlib import Path

import pytest
import torch

import cnf

README = Path(__file__).parent.parent / "README.md"


def example() -> str:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    return next(block for block in blocks if "cnf.fit" in block)


def test_readme_example_has_about_ten_lines():
    assert 8 <= len(example().strip().splitlines()) <= 14


@pytest.mark.slow
def test_readme_example_runs(capsys):
    quick = "steps=20, validations=1, validation_rows=500"
    shorter, swaps = re.subn(r"(?<=TrainConfig\()steps=[\d_]+", quick, example())
    assert swaps == 2
    exec(compile(shorter, "README.md", "exec"), {})
    assert "✓" in capsys.readouterr().out


def test_own_network_of_the_readme_learns_data_far_from_unit_scale():
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {"cnf": cnf}
    exec(
        compile(next(block for block in blocks if "Adapter(" in block), "README.md", "exec"), names
    )
    x = torch.tensor([5e4, 0.03]) + torch.tensor([1e4, 0.01]) * torch.randn(1_000, 2)
    settings = cnf.TrainConfig(steps=60, progress=False)
    cnf.fit(names["flow"], cnf.FlowMatching(), x, settings)
    truth = torch.distributions.Normal(torch.tensor([5e4, 0.03]), torch.tensor([1e4, 0.01]))
    y = truth.sample((500,))
    with torch.no_grad():
        gap = (truth.log_prob(y).sum(-1) - names["flow"].log_prob(y)).mean()
    assert gap < 0.5  # nats; a thousand and more where the data are not standardized
