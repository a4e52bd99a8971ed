"""How a number is written: with the digits that its error supports."""

import math

import pytest
import torch

from cnf.metrics.estimate import Estimate, number


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (0.1 + 0.2, math.nan, "0.3"),
        (13378.0, math.nan, "13,378"),
        (-0.0002271, math.nan, "−0.000227"),
        (1.5e-6, math.nan, "1.5·10⁻⁶"),
        (0.0123, 0.0031, "0.012 ± 0.003"),
        (2.5, 0.14, "2.50 ± 0.14"),
        (2.34519, 0.0117, "2.345 ± 0.012"),
        (1234.5, 31.4, "1,234 ± 31"),
        (1.29635, 0.00019, "1.296 ± <0.001"),
        (-0.0004, 0.003, "0.000 ± 0.003"),
        (math.nan, 0.1, "–"),
        (math.inf, math.nan, "∞"),
    ],
)
def test_numbers_are_written_with_the_digits_they_support(value, error, text):
    assert number(value, error) == str(Estimate(value, error)) == text


def test_error_of_the_mean_is_the_spread_over_the_root_of_the_count():
    assert Estimate.of(torch.tensor([1.0, 3.0])) == pytest.approx((2.0, 1.0))
    assert math.isnan(Estimate.of(torch.tensor([1.0])).error)


def test_weights_count_as_repetitions_do():
    value, _ = Estimate.of(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0]))
    assert value == pytest.approx(2.0)
