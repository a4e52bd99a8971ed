"""Flows and options saved by version 0.1."""

import json
from pathlib import Path

import pytest
import torch

import cnf

FOLDER = Path(__file__).parent / "before_layout"
EXPECTED = json.loads((FOLDER / "log_prob.json").read_text())


@pytest.mark.parametrize("name", EXPECTED)
def test_flow_saved_by_version_0_1_has_its_log_prob(name):
    flow = cnf.load(FOLDER / f"{name}.safetensors")
    assert flow.preprocess is not None and flow.preprocess.fitted
    x = torch.tensor(EXPECTED[name]["x"], dtype=torch.float64)
    context = torch.tensor([[0.5, -1.0]] * 3, dtype=torch.float64) if flow.context_dim else None
    with torch.no_grad():
        found = flow.double().log_prob(x, context)
    expected = torch.tensor(EXPECTED[name]["log_prob"], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)  # of a few hundred layers


def test_options_saved_by_version_0_1_are_read():
    assert type(cnf.models.nsf(2, preprocess="standardise").preprocess).__name__ == "Standardize"
