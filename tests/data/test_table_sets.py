"""Tables by name: MAF's recipes, written out by hand, and the parts that training keeps."""

import gzip
import pickle
import tarfile
from io import BytesIO

import numpy as np
import pandas
import pytest
import torch
from PIL import Image

import cnf
from cnf.cli import main
from cnf.data import TABLE_SETS, bsds300, load
from cnf.data.patches import _gray, patches
from cnf.data.table_sets import UCI, gas_rows, uci_rows


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder for data, and a home without any."""
    monkeypatch.setenv("CNF_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


def saved(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def parts_of(points):
    return [part.x.numpy() for part in (points, points.validation, points.test)]


def numbered(n, d):
    """Rows that tell themselves and their columns apart: 1000·row + column."""
    return 1000.0 * np.arange(n)[:, None] + np.arange(d)


@pytest.mark.parametrize("name", TABLE_SETS)
def test_missing_set_says_where_to_put_it(name, here):
    with pytest.raises(FileNotFoundError, match=r"expected .* of .* in .*CNF_DATA") as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_miniboone_is_standardized_by_training_and_validation(here):
    data = np.random.default_rng(0).normal(3, 2, (57, 43))
    saved(here / "miniboone" / "data.npy", data)
    train, validation, test = parts_of(load("miniboone"))
    assert (len(train), len(validation), len(test)) == (47, 5, 5)  # of 57, 52
    mean, std = data[:52].mean(0), data[:52].std(0)
    expected = ((data - mean) / std).astype(np.float32)
    assert train.dtype == np.float32
    np.testing.assert_array_equal(np.vstack([train, validation, test]), expected)


def test_power_is_shuffled_loses_two_columns_and_gets_noise(here):
    saved(here / "power" / "data.npy", numbered(100, 8))
    points = load("power")
    rng = np.random.RandomState(42)
    rows = numbered(100, 8)
    rng.shuffle(rows)
    rows = rows[:, [0, 2, 4, 5, 6, 7]]
    for column, width in ((1, 0.01), (0, 0.001)):
        rows[:, column] += width * rng.rand(100)
    rows[:, 2:5] += rng.rand(100, 3)
    expected = (rows - rows[:90].mean(0)) / rows[:90].std(0)
    np.testing.assert_array_equal(np.vstack(parts_of(points)), expected.astype(np.float32))
    assert [len(part) for part in parts_of(points)] == [81, 9, 10]


def test_gas_keeps_one_of_the_columns_that_are_alike(here):
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 200))
    near = a + 0.05 * rng.normal(size=200)  # correlation 0.999
    frame = pandas.DataFrame(
        {"Time": np.arange(200.0), "Meth": a, "Eth": b, "s1": a, "s2": b, "s3": 5 - 3 * a,
         "s4": 2 * near + 1, "s5": c, "s6": -7 * b}
    )  # fmt: skip
    (here / "gas").mkdir()
    frame.to_parquet(here / "gas" / "ethylene_CO.parquet")
    kept = frame[["s2", "s3", "s4", "s5", "s6"]]  # of s1 and s4 the first goes; -1 is not alike
    expected = ((kept - kept.mean()) / kept.std()).to_numpy(np.float32)
    found = parts_of(load("gas"))
    assert [len(part) for part in found] == [162, 18, 20]
    np.testing.assert_allclose(np.vstack(found), expected, rtol=1e-6)


def test_gas_drops_columns_one_at_a_time():
    """Of a chain, in which neighbors are alike, the ends stay."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(2, 5_000))
    chain = [np.cos(w) * left + np.sin(w) * right for w in (0.0, 0.18, 0.36)]
    found = gas_rows(np.stack(chain, 1))
    kept = np.stack([chain[1], chain[2]], 1)  # the first is like one, so it goes first
    kept = kept[:, 1:]  # and these two are alike still
    np.testing.assert_allclose(found, (kept - kept.mean(0)) / kept.std(0, ddof=1), rtol=1e-8)


def test_a_pickle_is_not_read(here):
    (here / "gas").mkdir()
    (here / "gas" / "ethylene_CO.pickle").write_bytes(pickle.dumps([1]))
    with pytest.raises(FileNotFoundError, match="if you trust it: pandas.read_pickle"):
        load("gas")
    pandas.DataFrame({"a": [1.0, 2.0], "Meth": 0.0}).to_csv(here / "gas" / "ethylene_CO.csv")
    with pytest.raises(ValueError, match="expected columns Meth, Eth and Time in"):
        load("gas")


def test_hepmass_keeps_class_one_and_columns_without_a_repeated_least(here):
    rng = np.random.default_rng(0)
    train, test = rng.normal(size=(2, 60, 4))
    train[:6, 1] = test[:6, 1] = -9.0  # six times the smallest value: dropped
    train[:5, 2] = -9.0  # five times: kept
    kind = (np.arange(63) % 21 != 20).astype(float)  # three rows of the other class

    def rows(values):
        made = rng.normal(size=(63, 5))
        made[:, 0] = kind
        made[kind == 1, 1:] = values
        return made

    folder = here / "hepmass"
    folder.mkdir()
    header = "# label,f0,f1,f2,f3"
    np.savetxt(folder / "1000_train.csv", rows(train), delimiter=",", header=header, comments="")
    longer = np.hstack([rows(test), np.full((63, 1), 1000.0)])
    np.savetxt(folder / "1000_test.csv", longer, delimiter=",", header=header, comments="")
    found = parts_of(load("hepmass"))
    mean, std = train.mean(0), train.std(0, ddof=1)
    expected = [((x - mean) / std)[:, [0, 2, 3]] for x in (train[:54], train[54:], test)]
    for part, right in zip(found, expected, strict=True):
        np.testing.assert_allclose(part, right, rtol=1e-6)


def test_wrong_files_are_told_by_name(here):
    saved(here / "miniboone" / "data.npy", np.zeros((50, 42)))
    with pytest.raises(ValueError, match=r"expected 43 columns in .*miniboone/data\.npy, got 42"):
        load("miniboone")
    (here / "hepmass").mkdir()
    for part in ("train", "test"):
        (here / "hepmass" / f"1000_{part}.csv").write_text("# label,f0\n1.0,2.0\n1.0,x\n")
    with pytest.raises(ValueError, match=r"rows of 2 numbers in .*1000_train\.csv"):
        load("hepmass")


def test_uci_rows_get_noise_of_their_steps_and_lose_constant_columns():
    data = np.stack([np.arange(40) % 4, np.full(40, 7.0), 0.5 * np.arange(40)], 1)
    found = uci_rows(data)
    assert found.shape == (40, 2)
    assert sorted(np.floor(found[:, 1] / 0.5)) == list(range(40))  # a half, and less than a half
    assert np.bincount(np.floor(found[:, 0]).astype(int)).tolist() == [10] * 4
    assert len(np.unique(found[:, 0] % 1)) == 40


def test_uci_noise_is_as_wide_as_the_smallest_step_of_uneven_ones():
    data = np.tile([0.0, 1.0, 11.0, 100.0], 50)[:, None]
    assert sorted(np.floor(uci_rows(data)[:, 0])) == sorted(data[:, 0])


def small_yacht(folder):
    rows = np.random.default_rng(0).normal(size=(308, 7)).round(2)
    folder.mkdir()
    text = "\n".join(" ".join(map(str, row)) for row in rows)
    (folder / f"{UCI['yacht'][0]}.txt.gz").write_bytes(gzip.compress(text.encode()))


def test_parts_are_kept_by_train_and_evaluate(here, capsys):
    small_yacht(here / "uci_small")
    points = load("yacht")
    assert points.split(0.5) == (points, points.test) and points.test_share == 0
    flow = cnf.models.build("realnvp", dim=7, layers=1, hidden=(4,))
    config = cnf.TrainConfig(steps=2, batch_size=50, validations=1, progress=False)
    history = cnf.fit(flow, "maximum-likelihood", points, config)
    nll = -flow.log_prob(points.validation.x).double().mean().item()
    assert history.column("val_nll")[-1] == pytest.approx(nll, rel=1e-5)

    run = str(here / "run")
    words = "--model realnvp --options.hidden 4,4 --options.layers 1 --steps 2 --no-progress"
    main(["train", "yacht", *words.split(), "--batch-size", "50", "--folder", run])
    main(["evaluate", run])
    assert "30 rows that training never saw" in " ".join(capsys.readouterr().out.split())


def small_bsds(path, counts=(200, 100)):
    """An archive of gray pictures, each of one level and its own: 10·part + number mod 200."""
    path.parent.mkdir()
    with tarfile.open(path, "w") as archive:
        for folder, count in zip(("train", "test"), counts, strict=True):
            for number in range(count):
                file = BytesIO()
                level = np.full((9, 12), number % 200, np.uint8)
                Image.fromarray(level).save(file, "JPEG", quality=95)
                info = tarfile.TarInfo(f"images/{folder}/{1000 * (number + 1)}.jpg")
                info.size = file.tell()
                file.seek(0)
                archive.addfile(info, file)


def test_bsds300_cuts_seeded_patches_from_parts_of_pictures(here):
    small_bsds(here / "bsds300" / "BSDS300-images.tar")
    points = bsds300(train=300, validation=40, test=50)
    assert [len(part) for part in parts_of(points)] == [300, 40, 50] and points.dim == 63
    for part in parts_of(points):  # of level pictures only the noise is left
        assert np.abs(part).max() < 1 / 256
        assert part.std() == pytest.approx(1 / 256 / 12**0.5, rel=0.05)
    again = bsds300(train=300, validation=40, test=50)
    assert torch.equal(again.x, points.x) and torch.equal(again.test.x, points.test.x)
    other = bsds300(train=300, validation=40, test=50, seed=1)
    assert not torch.equal(other.x, points.x)


def test_bsds300_validates_on_pictures_that_it_does_not_train_on(here, monkeypatch):
    small_bsds(here / "bsds300" / "BSDS300-images.tar")
    given = []

    def recorded(pictures, n, generator):
        given.append([int(picture[0, 0]) for picture in pictures])
        return torch.randn(n, 63)

    monkeypatch.setattr("cnf.data.patches.patches", recorded)
    bsds300(train=2, validation=2, test=2)
    first, last, test = given
    assert [len(part) for part in given] == [180, 20, 100]
    archive = here / "bsds300" / "BSDS300-images.tar"
    assert first + last == [int(p[0, 0]) for p in _gray(archive, "train")]
    assert test == [int(p[0, 0]) for p in _gray(archive, "test")]


def test_patches_are_pixels_of_the_picture_less_their_mean():
    picture = np.add.outer(10 * np.arange(12), np.arange(10)).astype(np.uint8)
    x = patches([picture], 400, torch.Generator().manual_seed(0))
    last = -x.sum(1, keepdim=True)
    whole = torch.cat([x, last], 1).reshape(-1, 8, 8) * 256
    ramp = torch.add(10.0 * torch.arange(8)[:, None], torch.arange(8.0)) - 38.5
    assert (whole - ramp).abs().max() < 1.0  # noise, less its mean
    assert (whole - ramp).std() == pytest.approx((63 / 64 / 12) ** 0.5, rel=0.02)
    noise = (whole - ramp).flatten(1)
    assert noise.mean(0).abs().max() < 0.06  # of a deviation of 0.29, over 400 patches


def test_patches_come_from_every_place():
    picture = np.zeros((9, 10), np.uint8)
    picture[0, 0] = 255  # in one of 2·3 places, where it is the patch's first pixel
    x = patches([picture, np.zeros((8, 8), np.uint8)], 6_000, torch.Generator().manual_seed(0))
    assert (x[:, 0] > 0.5).float().mean() == pytest.approx(1 / 12, abs=0.01)


def test_archive_of_other_pictures_is_refused(here):
    small_bsds(here / "bsds300" / "BSDS300-images.tar", (3, 2))
    with pytest.raises(ValueError, match=r"200 pictures in train/ .*got 3 and 2"):
        load("bsds300")
    (here / "bsds300" / "BSDS300-images.tar").write_bytes(b"hello")
    with pytest.raises(ValueError, match="expected BSDS300's pictures, got .*tar"):
        load("bsds300")
    with pytest.raises(ValueError, match="expected train >= 2, got 1"):
        bsds300(train=1)
