"""Roles of the columns of a table, and warnings about columns without a density."""

import numpy as np
import pandas
import pytest
import torch

from cnf.data import Columns, Points, load

PETS = "pet,weight,u,age\ncat,1,.5,3\ndog,2,.25,4\n,1,.1,5\ndog,0,na,6\nape,1,.75,7\n"


@pytest.fixture
def pets(tmp_path):
    (tmp_path / "pets.csv").write_text(PETS)
    return tmp_path / "pets.csv"


def test_columns_context_and_weight_are_taken_by_name(pets):
    points = load(pets, Columns(["age"], ["u", "pet"], "weight", drop_missing=True))
    assert points.columns == ("age",) and points.x.tolist() == [[3], [4], [7]]
    assert points.weight.tolist() == [1, 2, 1]
    # ape, cat, dog: in alphabetical order
    assert points.context.tolist() == [[0.5, 0, 1, 0], [0.25, 0, 0, 1], [0.75, 1, 0, 0]]
    assert points.reading.labels == {"pet": ["ape", "cat", "dog"]}


def test_all_columns_without_another_role_are_modeled_by_default(pets):
    points = load(pets, Columns(context=["pet"], drop_missing=True))
    assert points.columns == ("weight", "u", "age")


def test_columns_without_names_have_numbers(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6.0).reshape(2, 3))
    points = load(tmp_path / "x.npy", Columns(["3", "1"]))
    assert points.x.tolist() == [[2, 0], [5, 3]] and points.columns is None


def test_labels_keep_their_encoding_in_another_file(pets, tmp_path):
    (tmp_path / "new.csv").write_text("pet,age\ndog,1\ndog,2\n")
    reading = load(pets, Columns(["age"], ["pet"], drop_missing=True)).reading
    assert load(tmp_path / "new.csv", reading).context.tolist() == [[0, 0, 1]] * 2
    (tmp_path / "new.csv").write_text("pet,age\ndog,1\ncow,2\n")
    with pytest.raises(ValueError, match="in line 3: unknown pet 'cow'; known: ape, cat, dog"):
        load(tmp_path / "new.csv", reading)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_missing_values_are_refused_by_place_or_dropped(kind, pets, tmp_path):
    where = "line 4"
    if kind == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        pet, age = ["cat", "dog", None, "dog", "ape"], [3.0, 4.0, 5.0, 6.0, 7.0]
        parquet.write_table(arrow.table({"pet": pet, "age": age}), tmp_path / "pets.parquet")
        pets, where = tmp_path / "pets.parquet", "row 2"
    columns = Columns(["age"], ["pet"])
    with pytest.raises(ValueError, match=rf"in 1 of 5 rows, first in pet \({where}\)"):
        load(pets, columns)
    columns.drop_missing = True
    assert load(pets, columns).x[:, 0].tolist() == [3, 4, 6, 7]


def test_line_numbers_are_those_of_the_file_after_rows_are_dropped(tmp_path):
    (tmp_path / "x.csv").write_text("pet,age\ncat,1\n,2\ndog,old\n")
    with pytest.raises(ValueError, match=r"others in age \('old' in line 4\)"):
        load(tmp_path / "x.csv", Columns(["age"], ["pet"], drop_missing=True))


def test_text_with_numbers_in_its_first_row_is_no_header(tmp_path):
    (tmp_path / "x.csv").write_text("1,a\n2,b\n3,a\n")
    points = load(tmp_path / "x.csv", Columns(context=["2"]))
    assert points.x[:, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("first", ["1.0,", "1.0,NA", "NA,2.0", "cat,na"])
def test_a_row_with_a_missing_cell_is_no_header(first, tmp_path):
    below = ["dog,1", "dog,2"] if first.startswith("cat") else ["3,4", "5,6"]
    (tmp_path / "x.csv").write_text("\n".join([first, *below]))
    with pytest.raises(ValueError, match=r"some in 1 of 3 rows, first in [12] \(line 1\)"):
        load(tmp_path / "x.csv", Columns(context=["1"]) if first.startswith("cat") else None)


@pytest.mark.parametrize("cells", [("1_0", "1_1"), ("1_0", "2")])
def test_a_label_with_an_underscore_is_text(cells, tmp_path):
    (tmp_path / "x.csv").write_text(
        "u,plot\n" + "".join(f"{k},{c}\n" for k, c in enumerate(cells))
    )
    points = load(tmp_path / "x.csv", Columns(context=["plot"]))
    assert points.reading.labels == {"plot": list(cells)} and points.context.tolist() == [
        [1, 0],
        [0, 1],
    ]
    with pytest.raises(ValueError, match=r"others in plot \('1_0' in line 2\)"):
        load(tmp_path / "x.csv", Columns(["plot"]))


@pytest.mark.parametrize("kind", ["csv", "parquet", "npy"])
def test_labels_that_are_numbers_keep_every_digit(kind, tmp_path):
    reading = Columns(["2"], ["1"], labels={"1": ["1234567", "1234568", "A"]})
    if kind == "csv":
        (tmp_path / "x.csv").write_text("1234567,0.5\n1234568,1.5\n")
    elif kind == "npy":
        np.save(tmp_path / "x.npy", np.array([[1234567, 0.5], [1234568, 1.5]]))
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        table = arrow.table({"1": [1234567, 1234568], "2": [0.5, 1.5]})
        parquet.write_table(table, tmp_path / "x.parquet")
    points = load(tmp_path / f"x.{kind}", reading)
    assert points.context.tolist() == [[1, 0, 0], [0, 1, 0]] and points.x.tolist() == [
        [0.5],
        [1.5],
    ]


def test_labels_of_equal_value_and_different_spelling_stay_apart(tmp_path):
    (tmp_path / "x.csv").write_text("x,code\n1,007\n2,7\n")
    reading = Columns(["x"], ["code"], labels={"code": ["007", "7"]})
    assert load(tmp_path / "x.csv", reading).context.tolist() == [[1, 0], [0, 1]]


@pytest.mark.parametrize(
    "columns, message",
    [
        (Columns(["agee"]), "unknown column 'agee'; known: .*Did you mean 'age'"),
        (Columns(context=["pte"]), "unknown column 'pte'.*Did you mean 'pet'"),
        (Columns(["age"], ["age"]), "expected one purpose for each column"),
        (Columns(["age"], weight="age"), "expected one purpose for each column"),
        (Columns([]), "one to model at least"),
        (Columns(["pet"], drop_missing=True), r"others in pet \('cat' in line 2\).*a context"),
        (Columns(["age"], weight="pet", drop_missing=True), r"others in pet \('cat' in line 2\)"),
    ],
)
def test_invalid_roles_are_refused_by_name(columns, message, pets):
    with pytest.raises(ValueError, match=message):
        load(pets, columns)


def test_text_that_differs_in_every_row_is_refused_as_a_label(tmp_path):
    (tmp_path / "x.csv").write_text("who,x\n" + "".join(f"n{k},{k}\n" for k in range(9)))
    with pytest.raises(
        ValueError, match="expected labels in who, got 9 different texts in 9 rows"
    ):
        load(tmp_path / "x.csv", Columns(context=["who"]))


def test_roles_of_columns_without_a_table_are_refused():
    with pytest.raises(ValueError, match="chosen of a table in a file, got moons"):
        load("moons", Columns(["x"]))


@pytest.mark.parametrize(
    "values, said",
    [
        (["dog", "3"], [0, 1, 3]),
        (["u=3", "pet=dog"], [0, 1, 3]),
        (["pet=a=b", "u=3"], "unknown pet 'a=b'; known: cat, dog"),
        (["dog"], "expected a context of pet, u, got dog, without u; write --context pet=…,u=…"),
        (["u=3"], "expected a context of pet, u, got u=3, without pet; write"),
        (["pet=dog", "pet=cat"], "expected a context of pet, u, .*, without u; write"),
        (["dog", "3", "4"], "expected a context of pet, u, got dog, 3, 4; write"),
        (["dog", "old"], r"got others in u \('old'"),
    ],
)
def test_context_is_read_as_typed(values, said):
    columns = Columns(context=["pet", "u"], labels={"pet": ["cat", "dog"]})
    if isinstance(said, list):
        assert columns.parse("sample", values) == said
        return
    with pytest.raises(ValueError, match=said):
        columns.parse("sample", values)


def test_error_shows_how_to_write_a_label_with_a_comma():
    columns = Columns(context=["eyes"], labels={"eyes": ["blue, dark", "green"]})
    with pytest.raises(ValueError, match=r"--context '\[\"blue, dark\"\]'"):
        columns.parse("sample", ["blue", " dark"])
    assert columns.parse("sample", ["blue, dark"]) == [1.0, 0.0]


def test_reading_does_not_give_the_warnings_of_training(tmp_path):
    lines = [f"{k},{k % 3},{k * k + 0.5}" for k in range(60)]
    (tmp_path / "x.csv").write_text(",rooms,income\n" + "\n".join(lines))
    points = load(tmp_path / "x.csv")  # warnings are errors here
    assert points.columns == ("column-1", "rooms", "income")


def test_split_parts_have_no_row_in_common():
    x = torch.arange(50.0)
    points = Points(x, context=2 * x, weight=x + 1)
    train, test = points.split(0.2)
    assert len(test.x) == 10
    assert sorted([*train.x[:, 0].tolist(), *test.x[:, 0].tolist()]) == x.tolist()
    assert torch.equal(test.context, 2 * test.x) and torch.equal(test.weight, test.x[:, 0] + 1)
    assert torch.equal(points.split(0.2)[1].x, test.x)


def test_context_keeps_float64_beside_points_in_float32():
    times = 1_700_000_000 + torch.arange(50.0, dtype=torch.float64)
    points = Points(torch.arange(50.0), context=times, weight=torch.ones(50))
    assert points.x.dtype == torch.float32 and torch.equal(points.context[:, 0], times)


def test_weighted_points_are_drawn_by_their_weights():
    points = Points(torch.arange(3.0), weight=torch.tensor([0.0, 1.0, 3.0]))
    drawn = points.sample(4000, torch.Generator().manual_seed(0))[:, 0]
    shares = torch.bincount(drawn.long(), minlength=3) / 4000
    # binomial: a standard deviation of 0.007
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.25, 0.75]), rtol=0, atol=0.028)


@pytest.mark.parametrize(
    "parts, message",
    [
        ({"weight": [1.0, -1.0, 1.0]}, "Points: .* at least 0, got -1 in row 1"),
        ({"weight": [0.0, 0.0, 0.0]}, "Points: expected a weight above 0"),
        ({"weight": [1e300, 1.0, 0.0]}, "Points: .*1e\\+300.*divide them by their mean"),
        ({"weight": [[1.0, 1.0]] * 3}, r"Points: expected one weight for each row.*\(3, 2\)"),
        ({"context": [1.0, 2.0]}, "expected 3 rows of context, got 2"),
    ],
)
def test_contexts_and_weights_fit_their_points(parts, message):
    with pytest.raises(ValueError, match=message):
        Points(torch.zeros(3), **{name: np.array(value) for name, value in parts.items()})


@pytest.mark.parametrize(
    ("cell", "remedy"),
    [
        ("2024-03-01", "write dates as numbers"),
        ("1.3.2024", "write dates as numbers"),
        ('"1,5"', "write decimals with a point"),
        ("red", "got others in b \\('red' in line 3\\); leave them out"),
    ],
)
def test_error_for_text_names_a_remedy(cell, remedy, tmp_path):
    (tmp_path / "t.csv").write_text(f"a,b\n1.5,2.5\n2.5,{cell}\n3.5,{cell}\n")
    with pytest.raises(ValueError, match=remedy):
        load(str(tmp_path / "t.csv"))


def test_columns_of_a_data_frame_are_refused_in_a_line_that_says_what_to_do():
    frame = pandas.DataFrame({"a": [1.0, 2.0], "b": ["x", "y"]})
    with pytest.raises(ValueError, match=r"got a DataFrame; write it to a \.csv or \.parquet fi"):
        load(frame, Columns(["a"], context=["b"]))
