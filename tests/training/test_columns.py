"""What is said of one's own columns before training."""

import pytest
import torch

import cnf
from cnf.training.columns import warn_of_degenerate

F64 = torch.float64
NAMES = ["a", "b", "c", "d"]


def rows(n=500):
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(0), dtype=F64)


def constant(x):
    x[:, 2] = 7.1


def duplicated(x):
    x[:, 2] = x[:, 0]


def scaled_and_rounded(x):
    x[:, 2] = (1e6 * x[:, 0]).round(decimals=2) - 1e6


def sum_of_two(x):
    x[:, 2] = 3 * x[:, 1] - 500 * x[:, 0] + 2


def zeros(x):
    x[::5, 2] = 0.0


def ages(x):
    """Some 60 values, none in a tenth of the rows."""
    x[:, 2] = (30 * x[:, 2] / x[:, 2].abs().max()).round()


CASES = {
    ages: r"\(column 'c': more than 50% of the rows have a value that others have too",
    constant: r"\(column 'c': constant\)",
    duplicated: r"\(column 'c': follows from column 'a'\)",
    scaled_and_rounded: r"\(column 'c': follows from column 'a'\)",
    sum_of_two: r"\(column 'c': follows from columns 'a', 'b'\)",
    zeros: r"\(column 'c': one value in more than 10% of the rows\)",
}


@pytest.mark.parametrize("spoil", CASES)
def test_columns_without_a_density_are_told_by_name(spoil):
    x = rows() * torch.tensor([1e-3, 1, 1e4, 1]) + torch.tensor([0, 1e6, 0, 0])
    warn_of_degenerate(x, NAMES)
    spoil(x)
    with pytest.warns(UserWarning, match=CASES[spoil]):
        warn_of_degenerate(x, NAMES)


def test_two_faults_are_told_apart_and_without_names_by_number():
    x = rows()
    x[:, 0], x[:, 3] = 1.0, x[:, 1]
    told = r"\(column 0: constant; column 3: follows from column 1\)"
    with pytest.warns(UserWarning, match=told):
        warn_of_degenerate(x, None)


def test_what_only_resembles_another_column_is_no_fault():
    x = rows()
    x[:, 2] = x[:, 0] + 1e-3 * x[:, 2]
    x[:120, 3] = x[120:240, 3]  # 240 of 500 rows have a value that another has
    warn_of_degenerate(x, NAMES)  # warnings are errors here
    warn_of_degenerate(torch.zeros(500, 1, 4, 4), None)  # images


def test_fit_tells_once_and_of_own_data_only(small, config):
    x = rows()[:, :2].clone()
    x[:, 1] = 2 * x[:, 0]
    points = cnf.data.Points(x, columns=["time", "twice"])
    with pytest.warns(UserWarning, match="'twice': follows from column 'time'") as told:
        cnf.fit(small(), cnf.FlowMatching(), points, config())
    assert len(told) == 1
