from pathlib import Path

import numpy as np
import pytest
import torch

from cnf.data import TOYS, Picture, Points, Toy, load, toy


@pytest.mark.parametrize("name", TOYS)
def test_name_gives_its_toy(name):
    assert load(name) is toy(name) and isinstance(load(name), Toy) and load(name).name == name


def test_source_is_returned_unchanged():
    for source in (toy("moons"), Points(torch.randn(5, 3))):
        assert load(source) is source


@pytest.mark.parametrize("points", [torch.randn(5, 3), np.random.randn(5, 3), torch.randn(5)])
def test_tensor_gives_points(points):
    loaded = load(points)
    assert isinstance(loaded, Points) and loaded.dim == (points.shape[1:] or (1,))[0]


@pytest.mark.parametrize("kind", [str, Path])
def test_table_gives_points(tmp_path, kind):
    (tmp_path / "mine.v2.csv").write_text("a,b\n1,2\n3,4\n")
    loaded = load(kind(tmp_path / "mine.v2.csv"))
    assert isinstance(loaded, Points) and loaded.name == "mine.v2"
    assert loaded.x.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize("name", ["p.png", "p.JPG"])
def test_picture_gives_a_density(tmp_path, name):
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16).save(tmp_path / name)
    loaded = load(tmp_path / name)
    assert isinstance(loaded, Picture) and loaded.name == "p"


def test_every_source_has_the_same_interface(tmp_path):
    for source in (load("rings"), load(torch.randn(9, 2))):
        assert source.sample(7).shape == (7, source.dim)
        assert source.support.shape == (2, source.dim)
        assert source.support.dtype == torch.float32
        assert source.entropy is None or isinstance(source.entropy, float)


def test_error_for_an_unknown_string_lists_names_and_kinds_of_files():
    with pytest.raises(ValueError) as caught:
        load("pinweel")
    message = str(caught.value)
    assert "Did you mean 'pinwheel'?" in message and all(name in message for name in TOYS)
    assert ".png" in message and ".parquet" in message


def test_file_of_unknown_kind_and_folder_are_refused(tmp_path):
    (tmp_path / "t.xlsx").write_text("")
    with pytest.raises(ValueError, match=r"file of a known kind, got .*xlsx; .*\.png.*\.csv"):
        load(tmp_path / "t.xlsx")
    with pytest.raises(ValueError, match="got the folder"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["none.csv", "none.png", "none.npz"])
def test_missing_file_is_named(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=name):
        load(tmp_path / name)


@pytest.mark.parametrize("source", [None, 3, [1.0, 2.0], dict()])
def test_anything_else_is_a_type_error(source):
    with pytest.raises(TypeError, match="load: expected a name, a path"):
        load(source)
