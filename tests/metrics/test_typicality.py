"""Scores of rows: exact ranks among held-out rows, and p-values that hold what they promise."""

import math

import pytest
import torch
from scipy.stats import norm

from cnf.metrics import row_scores


def test_p_value_is_twice_the_smaller_tail():
    reference = torch.arange(1.0, 10.0)  # nine held-out rows
    rows = torch.tensor([0.0, 1.0, 2.5, 5.0, 8.5, 9.0, 11.0])
    tails = [1, 2, 3, 6, 2, 2, 1]  # the row itself, and those as extreme or more, of ten
    expected = [min(1.0, 2 * tail / 10) for tail in tails]
    assert row_scores(rows, reference).p_value.tolist() == pytest.approx(expected)


def test_p_values_of_rows_like_the_held_out_ones_are_uniform(generator):
    """At 9,999 held-out rows the p-value is that of the normal distribution."""
    log_density = torch.randn(9_999, generator=generator)
    rows = torch.linspace(-2.5, 2.5, 9)
    exact = 2 * norm.sf(rows.abs().numpy())
    assert row_scores(rows, log_density).p_value.numpy() == pytest.approx(exact, abs=0.02)


def test_a_small_p_value_is_as_rare_as_it_says_whatever_the_number_of_held_out_rows(generator):
    for count in (9, 19, 50):
        draws = torch.randn(4_000, count + 1, generator=generator)
        least = [row_scores(row[:1], row[1:]).p_value.item() <= 0.2 for row in draws]
        assert sum(least) / len(least) <= 0.2 + 3 * math.sqrt(0.2 * 0.8 / 4_000)


def test_arrays_of_scikit_learn_are_scored_as_tensors():
    rows, reference = torch.tensor([2.5, 11.0]), torch.arange(1.0, 10.0)
    found = row_scores(rows.double().numpy(), reference.numpy())  # pyright: ignore
    assert torch.equal(found.p_value, row_scores(rows, reference).p_value)


def test_ties_make_a_row_no_more_unusual():
    scores = row_scores(torch.tensor([2.0]), torch.full((99,), 2.0))
    assert scores.p_value.item() == 1


def test_rows_without_a_density_come_last_and_have_no_p_value():
    rows = torch.tensor([math.nan, 0.0, -math.inf, 1.0])
    scores = row_scores(rows, torch.arange(39.0))
    assert scores.rank.tolist() == [4, 2, 1, 3]
    assert scores.p_value.isnan().tolist() == [True, False, False, False]
    assert scores.p_value[2] == 2 / 40


@pytest.mark.parametrize(
    "rows, reference, message",
    [
        (torch.zeros(3, 2), torch.zeros(3), r"log_density of shape \(N,\).*\(3, 2\)"),
        (torch.zeros(3), torch.zeros(0), r"reference of shape \(N,\).*\(0,\)"),
        (torch.zeros(3), torch.tensor([0.0, math.nan]), "NaN in 1 of 2"),
    ],
)
def test_wrong_input_is_refused(rows, reference, message):
    with pytest.raises(ValueError, match=message):
        row_scores(rows, reference)
