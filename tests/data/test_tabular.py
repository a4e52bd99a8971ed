import errno
import gzip

import numpy as np
import pytest
import torch

import cnf
from cnf.data import Columns, Points, load, read_table, write_table

TABLE = np.array([[1.0, 2.5], [3.0, -4.0], [5e-3, 6.0]])
EXPECTED = torch.tensor(TABLE)


@pytest.fixture
def text(tmp_path):
    def write(content, name="t.csv"):
        path = tmp_path / name
        opened = gzip.open if name.endswith(".gz") else open
        with opened(path, "wt", encoding="utf-8") as file:
            file.write(content)
        return path

    return write


def rows(delimiter):
    return "\n".join(delimiter.join(str(v) for v in row) for row in TABLE)


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.txt", "t.txt.gz", "T.CSV"])
@pytest.mark.parametrize("delimiter", [",", ", ", ";", "\t", " ", "   ", " \t"])
@pytest.mark.parametrize("header", ["", "a{d}b\n", "# by hand\na{d}b\n", '"a"{d}"b"\n'])
def test_text_of_any_layout_is_read(text, name, delimiter, header):
    path = text(header.format(d=delimiter) + rows(delimiter) + "\n\n", name)
    x = read_table(path)
    assert x.dtype == torch.float64 and torch.equal(x, EXPECTED)


def test_tab_separated_names_may_hold_spaces(text):
    assert torch.equal(read_table(text("my a\tmy b\n" + rows("\t"))), EXPECTED)


def test_one_column_is_read(text):
    assert read_table(text("a\n1\n2\n3")).tolist() == [[1], [2], [3]]


def test_npy_and_npz_are_read(tmp_path):
    np.save(tmp_path / "t.npy", TABLE)
    np.savez(tmp_path / "one.npz", whatever=TABLE)
    np.savez(tmp_path / "named.npz", t=np.arange(3), x=TABLE)
    for name in ["t.npy", "one.npz", "named.npz"]:
        assert torch.equal(read_table(tmp_path / name), EXPECTED)
    np.save(tmp_path / "flat.npy", np.arange(4))
    assert read_table(tmp_path / "flat.npy").shape == (4, 1)


def test_parquet_is_read(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = arrow.table({"a": TABLE[:, 0], "b": TABLE[:, 1].astype(np.float32), "n": [1, 2, 3]})
    parquet.write_table(table, tmp_path / "t.parquet")
    want = torch.cat([EXPECTED, torch.tensor([[1.0], [2.0], [3.0]])], 1)
    assert torch.equal(read_table(tmp_path / "t.parquet"), want)


def test_parquet_of_words_names_the_columns(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"a": [1, 2], "who": ["x", "y"]}), tmp_path / "t.parquet")
    with pytest.raises(ValueError, match=r"got others in who \('x' in row 0\)"):
        read_table(tmp_path / "t.parquet")
    parquet.write_table(arrow.table({"a": [1, None], "b": [1.0, 2.0]}), tmp_path / "n.parquet")
    with pytest.raises(
        ValueError, match=r"missing values, .* in 1 of 2 rows, first in a \(row 1\)"
    ):
        read_table(tmp_path / "n.parquet")


BAD_TEXT = {
    "words": ("a,who\n1,ann\n2,bob", r"got others in who \('ann' in line 2\)"),
    "words, no header": ("1,2\n3,x", r"got others in 2 \('x' in line 2\)"),
    "gap": ("a,b\n1,\n2,3", r"no missing values, got some in 1 of 2 rows, first in b \(line 2\)"),
    "ragged": ("a,b\n1,2\n3,4,5", "expected 2 columns in every line, got 3 in line 3"),
    "nan": ("1,2\n3,nan\n5,6", r"some in 1 of 3 rows, first in 2 \(line 2\)"),
    "inf": ("1,2\n3,inf", "NaN or infinity"),
    "too big": ("1,2\n3,1e400", "NaN or infinity"),
    "empty": ("", "got an empty file"),
    "comments": ("# a\n# b\n", "got an empty file"),
    "header": ("a,b\n", "got a header line and none"),
}


@pytest.mark.parametrize("case", BAD_TEXT)
def test_malformed_text_is_refused_with_a_one_line_message(text, case):
    content, message = BAD_TEXT[case]
    with pytest.raises(ValueError, match=message) as caught:
        read_table(text(content))
    assert str(caught.value).startswith("read_table(t.csv): expected")
    assert "\n" not in str(caught.value)


def test_one_row_is_read_and_none_is_refused(text):
    assert read_table(text("a,b\n1,2\n")).tolist() == [[1.0, 2.0]]
    with pytest.raises(ValueError, match="a row without a missing value, got none of 2"):
        load(text("a,b\n1,\n,2\n"), Columns(drop_missing=True))


def test_objects_are_never_unpickled(tmp_path):
    np.save(tmp_path / "t.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="objects are not unpickled"):
        read_table(tmp_path / "t.npy")
    np.savez(tmp_path / "t.npz", x=np.array([{}, 1], dtype=object))
    with pytest.raises(ValueError, match="objects are not unpickled"):
        read_table(tmp_path / "t.npz")


@pytest.mark.parametrize("name", ["t.npy", "t.npz", "t.parquet", "t.csv.gz"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04garbage", b"\x80\xff\x00"])
def test_broken_binary_is_refused(tmp_path, name, content):
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=r"read_table\(t") as caught:
        read_table(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_binary_under_a_text_name_is_refused(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match="expected readable text"):
        read_table(tmp_path / "t.csv")


def test_ambiguous_npz_lists_its_arrays(tmp_path):
    np.savez(tmp_path / "t.npz", a=TABLE, b=TABLE)
    with pytest.raises(ValueError, match="expected one array or one called x, got a, b"):
        read_table(tmp_path / "t.npz")


def test_missing_file_and_unknown_kind_give_different_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="which is no file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"ending in \.csv, .*got \.xlsx"):
        read_table(tmp_path / "t.xlsx")


def test_points_draw_their_own_rows_with_replacement():
    points = Points(EXPECTED, "mine")
    sample = points.sample(3001, torch.Generator().manual_seed(0))
    assert sample.shape == (3001, 2) and sample.dtype == torch.float64
    matches = (sample[:, None] == EXPECTED).all(-1)
    assert matches.any(-1).all()
    # binomial of 3001 with chance 1/3: standard deviation 26
    assert (matches.sum(0) - 1000).abs().max() < 110
    assert torch.equal(sample, points.sample(3001, torch.Generator().manual_seed(0)))
    assert points.sample(0).shape == (0, 2)


def test_support_leaves_a_margin_around_the_bulk():
    x = torch.linspace(0, 1, 1001)[:, None].repeat(1, 2)
    x[:, 1] = 5
    x[0, 0] = -1e6  # a stray point does not stretch the window
    low, high = Points(x).support
    assert -0.2 < low[0] < 0 and 1 < high[0] < 1.2
    assert (low[1], high[1]) == (4.5, 5.5)


def test_support_extends_the_extreme_quantiles_by_a_tenth():
    low, high = Points(torch.linspace(0, 1, 1001, dtype=torch.float64)).support
    assert low.item() == pytest.approx(0.001 - 0.0998) and high.item() == pytest.approx(
        0.999 + 0.0998
    )


def test_log_prob_of_points_is_refused():
    points = Points(EXPECTED, "mine")
    assert points.entropy is None and points.dim == 2
    with pytest.raises(ValueError, match="mine.log_prob: the density .* is not known"):
        points.log_prob(EXPECTED)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 2, 2), r"of shape \(N, D\), got \(3, 2, 2\)"),
        (torch.zeros(()), r"of shape \(N, D\), got \(\)"),
        (torch.zeros(3, 0), r"of shape \(N, D\), got \(3, 0\)"),
        (torch.zeros(0, 2), "one row or more, got none"),
        (torch.tensor([[0.0], [float("nan")]]), "finite, got NaN or infinity in 1 of 2 rows"),
        (torch.zeros(3, 2, dtype=torch.complex64), "real numbers"),
        (np.array([["a"], ["b"]]), "array of numbers"),
        (np.array([object(), None]), "array of numbers"),
    ],
)
def test_points_of_another_shape_or_dtype_are_refused(x, message):
    with pytest.raises(ValueError, match="Points: expected .*" + message):
        Points(x)


@pytest.mark.parametrize("dtype", ["int16", "int64", "uint8", "bool", ">f8", "float64", "float32"])
def test_points_keep_the_value_of_every_number(dtype):
    x = np.array([[1, 0], [127, 1], [4, 9]]).astype(dtype)
    for given in (x, torch.from_numpy(x.astype(x.dtype.newbyteorder("=")))):
        points = Points(given)
        assert points.x.dtype == (torch.float32 if dtype == "float32" else torch.float64)
        assert points.x.tolist() == x.tolist() and points.sample(1).dtype == points.x.dtype


@pytest.mark.parametrize("start", [2459000.5, 1.7e9], ids=["Julian dates", "Unix seconds"])
def test_dates_stay_distinct_when_written_and_read_again(start, tmp_path):
    drawn = start + 0.01 * np.random.default_rng(0).standard_normal((500, 2))
    np.savetxt(tmp_path / "t.csv", drawn, delimiter=",", fmt="%.6f")
    points = load(tmp_path / "t.csv")
    assert len(np.unique(points.x[:, 0])) == len(np.unique(drawn[:, 0].round(6))) > 480
    low, high = points.support
    assert ((low < points.x.quantile(0.01, 0)) & (points.x.quantile(0.99, 0) < high)).all()
    write_table(tmp_path / "again.csv", points.x)
    assert torch.equal(read_table(tmp_path / "again.csv"), points.x)


def test_masked_entries_are_refused_by_row_and_column():
    x = np.ma.masked_array(np.arange(12.0).reshape(4, 3))
    assert Points(x).x.tolist() == x.tolist()
    x[1, 2] = x[3, 0] = np.ma.masked
    message = (
        r"Points: expected x without masked .*2 of 4 rows with some \(rows 1, 3, columns 0, 2\)"
    )
    with pytest.raises(ValueError, match=message):
        Points(x)


def test_points_are_detached():
    assert not Points(torch.zeros(2, 2, requires_grad=True)).x.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["x.csv", "x.npy"])
def test_written_points_are_read_back_exactly(name, dtype, tmp_path):
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=dtype)
    write_table(tmp_path / name, x)
    assert torch.equal(read_table(tmp_path / name).to(dtype), x)


def test_write_table_refuses_other_kinds_and_existing_files(tmp_path):
    with pytest.raises(ValueError, match=r"\.npy or \.csv"):
        write_table(tmp_path / "x.xlsx", torch.zeros(2, 2))
    write_table(tmp_path / "x.npy", torch.zeros(2, 2))
    with pytest.raises(ValueError, match="exists already"):
        write_table(tmp_path / "x.npy", torch.zeros(2, 2))


def test_columns_keep_the_names_that_the_table_gives_them(text, tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table({"a b": [1.0, 2.0], "c": [3, 4]}), tmp_path / "t.parquet")
    assert load(tmp_path / "t.parquet").columns == ("a b", "c")
    assert load(text('time,"my, own"\n1,2\n3,4')).columns == ("time", "my, own")
    assert load(text("1,2\n3,4")).columns is None
    twice = load(text("a,a,\n1,2,3\n4,5,6"))  # a column that is named like another is no less
    assert twice.columns == ("a", "a-2", "column-3") and twice.x.tolist() == [[1, 2, 3], [4, 5, 6]]
    assert Points(EXPECTED, columns=["a", "b"]).columns == ("a", "b")


def test_number_of_names_must_equal_number_of_columns(text):
    with pytest.raises(ValueError, match="got 3 names in line 1 and 2 columns"):
        read_table(text("a,b,c\n1,2\n3,4"))
    with pytest.raises(ValueError, match="Points: expected 2 names in columns, got 1"):
        Points(EXPECTED, columns=["a"])


def test_written_csv_names_its_columns(tmp_path):
    write_table(tmp_path / "x.csv", torch.ones(2, 2), ["my, own", "b"])
    assert (tmp_path / "x.csv").read_text().splitlines()[0] == '"my, own",b'
    assert load(tmp_path / "x.csv").columns == ("my, own", "b")


@pytest.mark.parametrize("kind", [".csv", ".npy", ".parquet"])
def test_integers_of_a_file_that_float64_does_not_resolve_are_refused_unless_left_out(
    text, tmp_path, kind
):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"t": 1_700_000_000_000_000_000 + np.arange(60), "x": np.arange(60)})
    path = tmp_path / f"t{kind}"
    if kind == ".npy":
        np.save(path, frame.to_numpy())
    else:
        getattr(frame.assign(x=frame["x"] / 7), f"to_{kind[1:]}")(path, index=False)
    name, other = ("1", "2") if kind == ".npy" else ("t", "x")
    with pytest.raises(ValueError, match=f"float64 merges different integers in column '{name}'"):
        load(path, Columns(columns=[other], context=[name]))
    assert load(path, Columns(columns=[other])).x.shape == (60, 1)


@pytest.mark.parametrize("kind", ["csv", "parquet", "decimals"])
def test_integers_that_float64_does_not_resolve_are_refused_with_missing_values(kind, tmp_path):
    stamps = [2**60 + k if k % 5 else None for k in range(60)]
    few = [None if stamp is None else stamp % 1000 for stamp in stamps]
    path = tmp_path / ("x.csv" if kind == "csv" else "x.parquet")
    if kind == "csv":
        rows = [f"{'' if a is None else a},{'' if b is None else b},{k}.5" for k, (a, b) in
                enumerate(zip(stamps, few, strict=True))]  # fmt: skip
        path.write_text("\n".join(["ns,few,y", *rows]))
    else:
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        ns = arrow.array(stamps, arrow.int64())
        ns = ns.cast(arrow.decimal128(20, 0)) if kind == "decimals" else ns
        y = [k + 0.5 for k in range(60)]
        parquet.write_table(arrow.table({"ns": ns, "few": few, "y": y}), path)
    message = r"float64 merges different integers in column 'ns', which are beyond 2\^53"
    with pytest.raises(ValueError, match=message):
        load(path, Columns(["ns", "y"], drop_missing=True))
    with pytest.raises(ValueError, match=r"no missing values, got some in 12 of 60 rows"):
        load(path, Columns(["ns", "y"]))
    points = load(path, Columns(["few", "y"], drop_missing=True))  # the other is not asked for
    assert points.x[:, 0].tolist() == [value for value in few if value is not None]


def test_large_integers_exact_in_float64_are_read_from_columns_with_missing_values(tmp_path):
    (tmp_path / "x.csv").write_text("n,y\n" + "\n".join(f"{2**60 * k},{k}" for k in range(1, 6)))
    with (tmp_path / "x.csv").open("a") as file:
        file.write("\n,7")
    points = load(tmp_path / "x.csv", Columns(drop_missing=True))
    assert points.x[:, 0].tolist() == [2.0**60 * k for k in range(1, 6)]


def test_write_table_creates_the_folder_or_explains_why_not(tmp_path):
    write_table(tmp_path / "new" / "deep" / "x.csv", torch.ones(2, 2))
    assert read_table(tmp_path / "new" / "deep" / "x.csv").shape == (2, 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"write_table: cannot write .*x.npy \(.*\); choose a file"):
        write_table(tmp_path / "file" / "x.npy", torch.ones(2, 2))


def test_full_disk_leaves_no_partial_table(tmp_path, monkeypatch):
    def full(path, *_, **__):
        path.write_text("1,2\n")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savetxt", full)
    with pytest.raises(OSError, match="write_table: cannot write .*No space left.*with room"):
        write_table(tmp_path / "x.csv", torch.ones(2, 2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("first", [0, 2019])
@pytest.mark.parametrize("index", [False, True])
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_numbered_header_above_decimals_is_not_read_as_a_row(first, index, columns, tmp_path):
    if columns == 1 and first:
        pytest.skip("one whole number may as well be a value")
    pandas = pytest.importorskip("pandas")
    values = np.random.default_rng(0).normal(size=(20, columns))
    frame = pandas.DataFrame(values, columns=range(first, first + columns))
    frame.to_csv(tmp_path / "x.csv", index=index)
    found = cnf.data.load(tmp_path / "x.csv")
    names = [*(["column-1"] if index else []), *map(str, range(first, first + columns))]
    assert found.columns == tuple(names)
    assert np.array_equal(found.x.numpy()[:, -columns:], values)


@pytest.mark.parametrize(
    "text",
    [
        "0,2\n0.1,0.2\n0.3,0.4\n",
        "0,1\n1,0\n2.5,3\n",
        "0\n0\n0.5\n",
        "1.0,2.0\n3.5,4.5\n",
        "7\n7.5\n",
        "1,2\n3.5,4.5\n",
    ],
)
def test_a_first_row_of_numbers_is_a_row(text, tmp_path):
    (tmp_path / "x.csv").write_text(text)
    found = cnf.data.load(tmp_path / "x.csv")
    assert found.columns is None and len(found.x) == text.count("\n")


def test_numbered_header_above_integers_warns(tmp_path):
    (tmp_path / "x.csv").write_text("0,1,2\n5,3,8\n4,4,1\n")
    with pytest.warns(UserWarning, match="first line, 0,1,…, is read as a row; if these are"):
        assert len(cnf.data.load(tmp_path / "x.csv").x) == 3


@pytest.mark.parametrize("name", [None, "person"])
def test_index_of_pandas_in_parquet_is_not_modeled(name, tmp_path):
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    rng = np.random.default_rng(0)
    frame = pandas.DataFrame(rng.normal(size=(20, 2)), columns=["a", "b"])
    frame.to_parquet(tmp_path / "whole.parquet")  # a RangeIndex, which has no column
    part = frame[frame.a > 0].rename_axis(name)
    part.to_parquet(tmp_path / "part.parquet")
    assert cnf.data.load(tmp_path / "whole.parquet").columns == ("a", "b")
    for source in (tmp_path / "part.parquet", arrow.Table.from_pandas(part), part):
        found = cnf.data.load(source)
        assert found.columns == ("a", "b")
        assert np.array_equal(found.x.numpy(), part.to_numpy())
    index = name or "__index_level_0__"  # where it is named, it is wanted
    chosen = cnf.data.load(tmp_path / "part.parquet", cnf.data.Columns(columns=[index, "a"]))
    assert np.array_equal(chosen.x[:, 0].numpy(), part.index.to_numpy())


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file beyond what is read whole, with one NaN, in its last row but one hundred."""
    monkeypatch.setattr("cnf.data.tabular.LARGE", 2**20)
    rows = np.random.default_rng(0).normal(size=(300_000, 2)).astype(np.float32)
    rows[-100, 1] = np.nan
    np.save(tmp_path / "large.npy", rows)
    return tmp_path / "large.npy", rows


def test_large_file_is_mapped_and_not_read(large):
    path, rows = large
    points = load(path)
    rest, aside = points.split(0.1)
    assert len(rest.x) == 270_000 and torch.equal(aside.x[:9], torch.tensor(rows[270_000:270_009]))
    whole = points.x.untyped_storage()
    assert rest.x.untyped_storage().data_ptr() == whole.data_ptr()
    assert aside.x.untyped_storage().data_ptr() == whole.data_ptr()
    box = load(torch.tensor(rows[:100_000])).support
    assert torch.allclose(points.first(200_000).support, points.support)
    assert (points.support - box).abs().max() < 0.2


def test_rows_of_a_large_file_are_checked_as_they_are_drawn(large):
    path, rows = large
    flow = cnf.models.build("realnvp", dim=2, layers=1, hidden=(4,))
    config = cnf.TrainConfig(steps=2, batch_size=64, validations=1, progress=False)
    clean, _ = load(path).split(0.1)
    cnf.fit(flow, "maximum-likelihood", clean, config)
    config = cnf.TrainConfig(steps=9, batch_size=60_000, validations=0, progress=False)
    with pytest.raises(ValueError, match=r"got NaN or infinity .*\(rows 299900\)"):
        cnf.fit(flow, "maximum-likelihood", load(path), config)


def test_columns_of_a_large_file_can_be_chosen_and_other_arrays_are_read(large):
    path, _ = large
    with pytest.raises(ValueError, match="missing values"):
        load(path, Columns(columns=["1", "2"]))
    np.save(path, np.arange(600_000).reshape(-1, 2))
    assert load(path).x.dtype == torch.float64
