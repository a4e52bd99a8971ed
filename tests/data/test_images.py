"""Pictures from their files, and what is no picture."""

import gzip
import math
import pickle
import struct
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import cnf
from cnf.data import Columns, Images, image_grid, load, read_images, write_images
from cnf.data.downloads import find

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (6, 5, 4), dtype=np.uint8)
COLOR = RNG.integers(0, 256, (6, 3, 5, 4), dtype=np.uint8)


def idx(array):
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def cifar_batch(pixels, labels):
    held = {b"data": pixels.reshape(len(pixels), -1), b"labels": labels}
    return pickle.dumps(held, protocol=2)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder for data, and a home without any."""
    monkeypatch.setenv("CNF_DATA", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize("packed", [False, True])
def test_idx_files_are_read_as_they_lie(packed, tmp_path):
    path = tmp_path / ("six-images-idx3-ubyte" + ".gz" * packed)
    path.write_bytes(gzip.compress(idx(PIXELS)) if packed else idx(PIXELS))
    images = load(path)
    assert isinstance(images, Images) and images.name == "six-images-idx3-ubyte"
    assert torch.equal(images.x, torch.from_numpy(PIXELS[:, None]))
    uniform = {"name": "uniform", "levels": 256}
    expected = {
        "shape": (1, 5, 4),
        "dequantization": uniform,
        "preprocess": ["logit", "standardize"],
    }
    assert images.sizes == expected and images.dim == 20 and images.entropy is None


BROKEN = {
    "truncated": idx(PIXELS)[:-1],
    "too long": idx(PIXELS) + b"0",
    "cut in the header": idx(PIXELS)[:9],
    "another type": b"\0\0\x0d\x03" + idx(PIXELS)[4:],
    "no idx": b"P5 5 4 255",
    "other first bytes": b"\1\0" + idx(PIXELS)[2:],
    "empty": b"",
    "broken gzip": gzip.compress(idx(PIXELS))[:-9],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_damaged_idx_files_are_refused_by_name(kind, tmp_path):
    path = tmp_path / "six-images-idx3-ubyte"
    path.write_bytes(BROKEN[kind])
    with pytest.raises(ValueError, match=r"^load: .*six-images-idx3-ubyte"):
        load(path)


def test_arrays_with_channels_first_or_last_and_labels(tmp_path):
    last = np.moveaxis(COLOR, 1, 3)
    np.savez(tmp_path / "a.npz", images=last, labels=np.arange(6))
    np.save(tmp_path / "b.npy", COLOR)
    first, second = load(tmp_path / "a.npz"), load(tmp_path / "b.npy")
    assert torch.equal(first.x, torch.from_numpy(COLOR))
    assert torch.equal(second.x, first.x) and second.labels is None
    assert first.labels.tolist() == [0, 1, 2, 3, 4, 5]


def test_labels_are_the_array_of_that_name_or_the_only_whole_numbers(tmp_path):
    index, labels = np.arange(6)[::-1], np.arange(6) % 3
    np.savez(tmp_path / "a.npz", index=index, images=PIXELS, labels=labels)
    assert load(tmp_path / "a.npz").labels.tolist() == labels.tolist()
    np.savez(tmp_path / "b.npz", images=PIXELS, y=labels[:, None])  # a column, as Keras has it
    assert load(tmp_path / "b.npz").labels.tolist() == labels.tolist()
    np.savez(tmp_path / "c.npz", index=index, images=PIXELS, other=labels)
    assert load(tmp_path / "c.npz").labels is None
    with pytest.raises(ValueError, match="there are none; in a .npz they are an array called lab"):
        load(tmp_path / "c.npz", Columns(context=["labels"]))


def test_labels_that_number_no_classes_are_refused_before_memory_is_asked_for():
    with pytest.raises(ValueError, match="labels up to 5000 of 6 pictures; number the cla"):
        Images(PIXELS, labels=np.arange(6) * 1_000).conditional()


def test_a_class_of_the_test_part_alone_is_a_class():
    images = Images(PIXELS, labels=[0, 1, 0, 1, 0, 1])
    images.test = Images(PIXELS, labels=[0, 1, 2, 3, 2, 1])
    made = images.conditional()
    assert made.context.shape == (6, 4) and made.test.context.shape == (6, 4)


@pytest.mark.parametrize("name", ["cut.npz", "cut.npy"])
def test_a_cut_file_of_arrays_is_refused_in_one_line(name, tmp_path):
    (np.savez if name.endswith("z") else np.save)(tmp_path / name, PIXELS)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"read_table\({name}\): expected an array") as caught:
        load(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_arrays_of_other_numbers_say_what_pixels_are(tmp_path):
    np.savez(tmp_path / "a.npz", PIXELS / 255)
    with pytest.raises(
        ValueError, match="got float64 of shape .6, 5, 4.; of pictures, give .*uin"
    ):
        load(tmp_path / "a.npz")


def test_hidden_files_are_no_pictures(tmp_path):
    for k in range(2):
        Image.fromarray(PIXELS[k]).save(tmp_path / f"{k}.png")
    (tmp_path / "._0.png").write_bytes(b"\0\5\x16\7")
    (tmp_path / ".thumbnails").mkdir()
    Image.fromarray(PIXELS[0, :2]).save(tmp_path / ".thumbnails" / "0.png")
    assert torch.equal(load(tmp_path).x, torch.from_numpy(PIXELS[:2, None]))


@pytest.mark.parametrize("content", ["cat\ndog\n", None])
def test_unreadable_labels_are_refused_by_name(content, tmp_path):
    np.save(tmp_path / "x.npy", PIXELS)
    if content:
        (tmp_path / "y.txt").write_text(content)
    with pytest.raises(ValueError, match=r"^load: expected labels in .*y\.txt, a whole number"):
        read_images(tmp_path / "x.npy", labels=tmp_path / "y.txt")


def test_a_home_that_holds_no_folder_is_told_as_what_is_missing(here, monkeypatch):
    (here / "home").write_text("a file, under which nothing can be made")
    with pytest.raises(FileNotFoundError, match="expected cifar-10-python.tar.gz of cifar10 in"):
        load("cifar10")


def test_a_large_array_is_mapped_and_not_read(tmp_path):
    file = np.lib.format.open_memmap(
        tmp_path / "large.npy", "w+", dtype=np.uint8, shape=(2**20, 1, 32, 32)
    )
    file[-1] = 7
    del file
    before = resident()
    images = load(tmp_path / "large.npy")
    assert images.x[-1].float().mean() == 7 and len(images.x) == 2**20
    assert resident() - before < 100e6  # bytes, of 1.07e9


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_two_arrays_of_pictures_are_ambiguous(tmp_path):
    np.savez(tmp_path / "a.npz", first=PIXELS, second=PIXELS)
    with pytest.raises(ValueError, match=r"one array of pictures in .*a\.npz, got first, second"):
        load(tmp_path / "a.npz")


def test_tables_in_npz_are_tables_still(tmp_path):
    np.savez(tmp_path / "a.npz", x=RNG.normal(size=(9, 3)))
    assert not isinstance(load(tmp_path / "a.npz"), Images)


def cifar_pixels(n, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, 3, 32, 32), dtype=np.uint8)


@pytest.mark.parametrize("archive", [False, True])
def test_cifars_batches_are_read_from_a_folder_and_from_the_archive(archive, tmp_path):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    whole = cifar_pixels(6)
    for k in (2, 1):
        part = whole[3 * (k - 1) : 3 * k]
        (folder / f"data_batch_{k}").write_bytes(cifar_batch(part, [k] * 3))
    path = folder
    if archive:
        path = tmp_path / "cifar-10-python.tar.gz"
        with tarfile.open(path, "w:gz") as file:
            file.add(folder, arcname=folder.name)
    images = load(path)
    assert torch.equal(images.x, torch.from_numpy(whole))
    assert images.labels.tolist() == [1, 1, 1, 2, 2, 2]


def test_a_pickle_is_not_executed(tmp_path):
    (tmp_path / "data_batch_1").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(ValueError, match=r"data_batch_1, got holds a os\.system, which is not"):
        load(tmp_path)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"labels": [1]}))
    with pytest.raises(ValueError, match=r"expected a batch of CIFAR-10 in .*data_batch_1"):
        load(tmp_path)


def picture(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array, **options).save(path)


def test_folders_are_classes(tmp_path):
    for k, name in enumerate(["cat", "cat", "dog"]):
        picture(tmp_path / name / f"{k}.png", np.moveaxis(COLOR[k], 0, 2))
    images = load(tmp_path)
    assert torch.equal(images.x, torch.from_numpy(COLOR[:3]))
    assert images.labels.tolist() == [0, 0, 1]
    conditional = load(tmp_path, Columns(context=["labels"]))
    assert conditional.context.tolist() == [[1, 0], [1, 0], [0, 1]]
    assert conditional.sizes["shape"] == (3, 5, 4) and conditional.sizes["context"] == 2
    more = load(tmp_path, Columns(context=["labels"], labels={"labels": ["0", "1", "2"]}))
    assert more.context.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0]]
    with pytest.raises(ValueError, match="expected labels below 1, got 1"):
        images.conditional(classes=1)
    picture(tmp_path / "stray.png", np.moveaxis(COLOR[0], 0, 2))
    with pytest.raises(ValueError, match=r"stray\.png beside the folders cat, dog"):
        load(tmp_path)


def animation(path):
    frames = [Image.fromarray(PIXELS[k]) for k in range(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def huge(path):
    """A valid header of 30,000² pixels, with next to no data."""
    chunk = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 0, 0, 0, 0)
    import zlib

    crc = struct.pack(">I", zlib.crc32(b"IHDR" + chunk))
    data = struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + chunk + crc + data)


WRONG = {
    "another size": (
        lambda p: picture(p, PIXELS[0][:3]),
        r"one size, 4×5 gray as 0\.png, got 4×3",
    ),
    "color": (lambda p: picture(p, np.moveaxis(COLOR[0], 0, 2)), "4×5 gray as .*, got 4×5 color"),
    "transparency": (
        lambda p: picture(p, RNG.integers(0, 256, (5, 4, 4), dtype=np.uint8)),
        "with transparency .mode RGBA.",
    ),
    "sixteen bits": (
        lambda p: picture(p, PIXELS[0].astype(np.uint16)),
        r"a deeper one .mode I;16",
    ),
    "frames": (animation, "3 frames; save each"),
    "a huge one": (huge, "30000×30000 pixels|exceeds limit"),
    "no picture": (lambda p: p.write_text("hello"), "cannot identify"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_pictures_that_do_not_fit_are_refused_in_one_line(kind, tmp_path):
    make, words = WRONG[kind]
    picture(tmp_path / "0.png", PIXELS[0])
    make(tmp_path / ("1.gif" if kind == "frames" else "1.png"))
    with pytest.raises(ValueError, match=words) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value) and "/1." in str(caught.value)


def test_a_palette_and_one_bit_are_pictures_too(tmp_path):
    Image.fromarray(PIXELS[0]).convert("1").save(tmp_path / "0.png")
    Image.fromarray(PIXELS[1]).convert("1").save(tmp_path / "1.png")
    assert load(tmp_path).x.shape == (2, 1, 5, 4)


@pytest.mark.parametrize(
    ("x", "labels", "words"),
    [
        (PIXELS.astype(np.float32), None, "dtype uint8"),
        (PIXELS[:, 0], None, "shape .N, C, H, W."),
        (PIXELS[:0], None, r"and shape \(N, C, H, W\), got .*\(0, "),
        (PIXELS, [0, 1], r"each of 6 pictures in labels, got torch.int64 of shape \(2,\)"),
        (PIXELS, [0.5] * 6, "whole number"),
        (PIXELS, [-1] * 6, "from 0"),
        (PIXELS, list("abcabc"), r"got texts; number the classes: numpy\.unique"),
        (np.zeros((6, 5, 8, 3), np.uint8), None, r"pictures with channels last; give x\.movedim"),
        (np.zeros((6, 5, 8, 4), np.uint8), None, "pictures with channels last.*without alpha"),
        (np.zeros((32, 16, 3), np.uint8), None, "one picture with channels last"),
    ],
)
def test_images_of_wrong_arrays_are_refused(x, labels, words):
    with pytest.raises(ValueError, match=words):
        Images(x, labels=labels)


def small_mnist(folder):
    """Files of MNIST's names with 10,200 and 30 pictures of 2×2."""
    folder.mkdir(parents=True)
    for name, n in (("train", 10_200), ("t10k", 30)):
        pixels = np.random.default_rng(n).integers(0, 256, (n, 2, 2), dtype=np.uint8)
        labels = (np.arange(n) % 10).astype(np.uint8)
        (folder / f"{name}-images-idx3-ubyte").write_bytes(idx(pixels))
        (folder / f"{name}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))


def test_mnist_by_name_keeps_its_own_parts(here):
    small_mnist(here / "mnist")
    images = load("mnist", Columns(context=["labels"]))
    assert [len(part.x) for part in (images, images.validation, images.test)] == [200, 10_000, 30]
    assert images.split(0.5) == (images, images.test)
    assert images.context.shape == (200, 10) and images.test.context.shape == (30, 10)
    pixels = np.random.default_rng(10_200).integers(0, 256, (10_200, 2, 2), dtype=np.uint8)
    whole = torch.cat([images.x, images.validation.x])[:, 0]  # MAF validates on the last ones
    assert torch.equal(whole, torch.from_numpy(pixels))
    flow = cnf.Flow(
        None,
        cnf.models.glow(shape=(1, 2, 2), layers=1, levels=1, hidden=(4, 4), context=10).transform,
        event_shape=(1, 2, 2),
        dequantization=cnf.dequantization.UniformDequantization(),
        preprocess=cnf.transforms.logit((1, 2, 2), levels=256),
    )
    config = cnf.TrainConfig(steps=2, batch_size=50, validation_rows=70, progress=False)
    history = cnf.fit(flow, "maximum-likelihood", images, config)
    assert np.isfinite(history.column("val_nll")).all()
    x, context = images.validation.x[:70], images.validation.context[:70]
    assert flow.log_prob(x, context).shape == (70,)


def test_unknown_folder_and_missing_set_say_what_to_do(here):
    with pytest.raises(FileNotFoundError, match=r"set CNF_DATA to the folder that holds digits/"):
        find("digits", {"a.gz": "0"}, "file:///nowhere/")
    (here / "source").mkdir()
    (here / "source" / "a.gz").write_bytes(b"hello")
    address = f"file://{here}/source/"
    with pytest.raises(ValueError, match="expected a file with MD5 00, got|with MD5 00 at"):
        find("digits", {"a.gz": "00"}, address)
    (path,) = find("digits", {"a.gz": "5d41402abc4b2a76b9719d911017c592"}, address)
    assert path.read_bytes() == b"hello"
    assert find("digits", {"a.gz": "never looked at again"}, "file:///nowhere/") == [path]
    with pytest.raises(ValueError, match="folder .* without any"):
        load(here / "source")


def test_names_of_image_sets_are_suggested():
    with pytest.raises(ValueError, match="Did you mean 'mnist'"):
        load("mnits")


def test_frames_of_bytes_are_not_pictures(tmp_path):
    """A table of bytes, (N, D), has two axes, and is a table."""
    np.save(tmp_path / "t.npy", PIXELS[0])
    assert not isinstance(load(tmp_path / "t.npy"), Images)


@pytest.mark.parametrize("name", ["some.npy", "some.npz"])
@pytest.mark.parametrize("pixels", [PIXELS[:, None], COLOR], ids=["gray", "color"])
def test_pixels_that_are_written_are_read_again(name, pixels, tmp_path):
    write_images(tmp_path / "deep" / name, torch.from_numpy(pixels).float())
    assert torch.equal(load(tmp_path / "deep" / name).x, torch.from_numpy(pixels))


def test_real_numbers_stay_so_in_a_file_of_arrays(tmp_path):
    x = torch.rand(2, 1, 3, 3)
    write_images(tmp_path / "x.npz", x, levels=None)
    with np.load(tmp_path / "x.npz") as file:
        assert np.array_equal(file["x"], x.numpy())


def test_grid_shows_the_pictures_in_reading_order_between_white_lines(tmp_path):
    write_images(tmp_path / "grid.png", torch.from_numpy(COLOR))
    with Image.open(tmp_path / "grid.png") as image:
        grid = np.asarray(image)
    assert grid.shape == (2 * 5 + 1, 3 * 4 + 2, 3)
    for k in range(6):
        top, left = k // 3 * 6, k % 3 * 5
        tile = grid[top : top + 5, left : left + 4]
        assert np.array_equal(np.moveaxis(tile, 2, 0), COLOR[k])
    assert (grid[5] == 255).all() and (grid[:, [4, 9]] == 255).all()


def test_levels_and_real_numbers_span_black_to_white():
    coarse = torch.tensor([0.0, 3.0, 7.0, math.nan]).reshape(1, 1, 2, 2)
    assert image_grid(coarse, levels=8).tolist() == [[0, 109], [255, 0]]
    real = torch.tensor([-2.0, 0.0, 1.0, 2.0]).reshape(1, 1, 2, 2)
    assert image_grid(real, levels=None).tolist() == [[0, 128], [191, 255]]


def test_other_files_and_shapes_of_pictures_are_refused(tmp_path):
    pixels = torch.from_numpy(COLOR)
    with pytest.raises(ValueError, match=r"expected a \.png, \.npy or \.npz file, got x\.csv"):
        write_images(tmp_path / "x.csv", pixels)
    (tmp_path / "there.png").touch()
    with pytest.raises(ValueError, match="exists already"):
        write_images(tmp_path / "there.png", pixels)
    with pytest.raises(ValueError, match=r"C of 1 or 3, got \(6, 2, 5, 4\)"):
        image_grid(pixels[:, :2])
