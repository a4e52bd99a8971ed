"""Warnings about columns of the user's data before training."""

import pytest
import torch

import cnf
from cnf.training.column_checks import warn_of_degenerate, warn_of_numbering, warn_of_outliers

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


def rooms(x):
    x[:, 2] = (torch.arange(len(x)) % 20).double()


CASES = {
    rooms: r"\(column 'c': 20 different values or fewer\)",
    ages: r"\(column 'c': more than 50% of the rows have a value that others have too",
    constant: r"\(column 'c': constant\)",
    duplicated: r"\(column 'c': follows from column 'a'\)",
    scaled_and_rounded: r"\(column 'c': follows from column 'a'\)",
    sum_of_two: r"\(column 'c': follows from columns 'a', 'b'\)",
    zeros: r"\(column 'c': one value in more than 10% of the rows\)",
}


@pytest.mark.parametrize("spoil", CASES)
def test_warning_names_columns_without_a_density(spoil):
    x = rows() * torch.tensor([1e-3, 1, 1e4, 1]) + torch.tensor([0, 1e6, 0, 0])
    warn_of_degenerate(x, NAMES)
    spoil(x)
    with pytest.warns(UserWarning, match=CASES[spoil]):
        warn_of_degenerate(x, NAMES)


def test_warning_lists_two_faults_separately_by_column_number():
    x = rows()
    x[:, 0], x[:, 3] = 1.0, x[:, 1]
    message = r"\(column 0: constant; column 3: follows from column 1\)"
    with pytest.warns(UserWarning, match=message):
        warn_of_degenerate(x, None)


def test_copies_of_a_column_are_reported_as_functions_of_the_original():
    x = rows()
    x[:, 2], x[:, 3] = x[:, 0], -x[:, 0]
    message = r"\(column 'c': follows from column 'a'; column 'd': follows from column 'a'\)"
    with pytest.warns(UserWarning, match=message):
        warn_of_degenerate(x, NAMES)


def test_correlated_columns_do_not_warn():
    x = rows()
    x[:, 2] = x[:, 0] + 1e-3 * x[:, 2]
    x[:120, 3] = x[120:240, 3]  # 240 of 500 rows have a value that another has
    warn_of_degenerate(x, NAMES)  # warnings are errors here
    warn_of_degenerate(torch.nn.functional.pad(x.view(500, 1, 2, 2), [1] * 4), None)  # images


def test_constant_or_copied_column_of_few_rows_warns():
    x = rows(12)[:, :2]
    warn_of_degenerate(x, None)
    with pytest.warns(UserWarning, match=r"\(column 1: constant\)"):
        warn_of_degenerate(torch.cat([x[:, :1], torch.ones(12, 1)], 1), None)
    with pytest.warns(UserWarning, match=r"\(column 2: follows from column 0\)"):
        warn_of_degenerate(torch.cat([x, 2 * x[:, :1]], 1), None)


@pytest.mark.parametrize("levels", [1, 255, 256])
def test_images_with_integer_gray_levels_warn(levels, generator):
    gray = torch.randint(0, 256, (60, 1, 4, 4), generator=generator) / levels
    with pytest.warns(UserWarning, match="whole gray levels.*with dequantization=.uniform."):
        warn_of_degenerate(gray, None)
    warn_of_degenerate(gray + torch.rand(gray.shape, generator=generator) / levels, None)


def test_outlier_warns_and_does_not_make_columns_dependent():
    x = rows()
    warn_of_outliers(x, NAMES)
    x[17, :2] = 1e9
    warn_of_degenerate(x, NAMES)
    with pytest.warns(UserWarning, match=r"columns 'a', 'b': a few rows are so far out \(the far"):
        warn_of_outliers(x, NAMES)


def test_fit_warns_once_and_about_user_data_only(small, config):
    x = rows()[:, :2].clone()
    x[:, 1] = 2 * x[:, 0]
    points = cnf.data.Points(x, columns=["time", "twice"])
    with pytest.warns(UserWarning, match="'twice': follows from column 'time'") as caught:
        cnf.fit(small(), cnf.FlowMatching(), points, config())
    assert len(caught) == 1


@pytest.mark.parametrize("kind", ["pyarrow", "pandas"])
def test_warning_names_columns_of_a_table(kind, small, config):
    library = pytest.importorskip(kind)
    x = rows()[:, :2].clone()
    x[:, 1] = 7.1
    make = library.table if kind == "pyarrow" else library.DataFrame
    table = make({"time": x[:, 0].numpy(), "rate": x[:, 1].numpy()})
    with pytest.warns(UserWarning, match=r"\(column 'rate': constant\)"):
        cnf.fit(small(), cnf.FlowMatching(), table, config())


def shuffled(n, first=0):
    """Some of first, first + 1, …, out of order."""
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    return (first + order[: n * 8 // 10])[:, None].double()


@pytest.mark.parametrize(("n", "first"), [(70, 1), (1000, 2**40)])
def test_column_that_numbers_the_rows_warns_in_any_order(n, first):
    x = torch.cat([rows(n * 8 // 10)[:, :2], shuffled(n, first)], 1)
    with pytest.warns(UserWarning, match="fit: column 'c' numbers the rows, as an index does"):
        warn_of_numbering(x, ["a", "b", "c"])


def test_random_distinct_integers_are_not_taken_for_row_numbers():
    draw = torch.Generator().manual_seed(0)
    cents = torch.randint(0, 10**9, (500, 1), generator=draw).double()
    assert len(cents.unique()) == 500  # no two alike, as is likely among so many
    prices = torch.randint(0, 600, (500, 1), generator=draw).double()
    warn_of_numbering(torch.cat([cents, prices, rows()[:, :1]], 1), None)
    warn_of_numbering(torch.arange(49.0)[:, None], None)  # too few to tell
    warn_of_numbering(torch.zeros(500, 1, 4, 4), None)  # images


def test_table_warns_once_at_training(small, config, tmp_path):
    draw = rows(400)
    lines = [f"{k},{k % 3},{v:.9f}" for k, v in enumerate(draw[:, 0].tolist())]
    (tmp_path / "x.csv").write_text(",rooms,income\n" + "\n".join(lines))
    points = cnf.data.load(tmp_path / "x.csv")
    with pytest.warns(UserWarning) as caught:
        cnf.fit(cnf.models.build("realnvp", dim=3), "maximum-likelihood", points, config())
    said = sorted(str(warning.message) for warning in caught)
    assert len(said) == 2
    assert "fit: column 'column-1' numbers the rows" in said[0]
    assert "(column 'rooms': 20 different values or fewer)" in said[1]
    cnf.data.load(tmp_path / "x.csv", cnf.data.Columns(["income"], ["rooms"]))
