"""`explain`: method and cost of the exact divergence."""

import pytest
import torch

from cnf.dynamics.divergence import DIVERGENCES, Exact, explain
from cnf.fields import Adapter, ConvField, EndTime, MLPField, Piecewise, PotentialField


def cost(field, rows=4096):
    return float(explain(field, rows).split(" take ")[1].split(" ×")[0])


def test_closed_form_of_two_hidden_layers_costs_one_more_product_for_any_dimension():
    # v: width² + 2·D·width products; the trace: width² more, and D·width²/rows for W₁W₃
    for dim in (2, 16, 64):
        forward = 128**2 + 2 * dim * 128
        own = MLPField(dim, (128, 128), frequencies=0)
        assert cost(own) == pytest.approx(1 + 128**2 / forward, abs=0.2)


def test_forward_mode_costs_one_pass_per_dimension():
    for dim in (2, 5):
        found = cost(Adapter(MLPField(dim, (64, 64)), (dim,)))
        assert dim + 0.9 < found < dim + 2.1  # torch may count a product with zero


@pytest.mark.parametrize(
    ("field", "method"),
    [
        (MLPField(3, (8, 8), context_dim=2), "MLPField: its own closed form"),
        (PotentialField(3, 8), "PotentialField: its own closed form"),
        (EndTime(MLPField(3, (8, 8))), "MLPField: its own closed form"),
        (EndTime(ConvField((1, 4, 4), (4,))), "ConvField: 16 tangents in forward mode"),
        (Piecewise([MLPField(3, (8,)), MLPField(3, (8,))]), "MLPField: its own closed form"),
        (ConvField((1, 4, 4), (4,)), "ConvField: 16 tangents in forward mode"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_explain_names_the_method(field, method):
    assert explain(field).startswith(method)


def test_auto_is_the_exact_divergence():
    assert DIVERGENCES.build("auto") == Exact() == DIVERGENCES.build("exact")


def test_explain_accepts_float64_and_leaves_gradients_and_default_dtype_alone():
    field = MLPField(2, (8, 8)).double()
    explain(field)
    assert all(p.grad is None for p in field.parameters())
    assert torch.get_default_dtype() == torch.float32
