"""Pictures as data points: their pixels as whole numbers, from files as they lie on disk."""

import copy
import gzip
import io
import math
import pickle
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.data.arrays import as_numbers
from cnf.data.columns import Columns
from cnf.data.downloads import find
from cnf.data.pictures import PICTURES
from cnf.data.tabular import Points, expect_writable, unwritable
from cnf.errors import abbreviated, optional
from cnf.registry import Registry

PIXELS = (".png", ".npy", ".npz")  # files that pictures are written to
CLASSES = 1_000  # that labels may have of however few pictures
NUMBERED = "number the classes: numpy.unique(labels, return_inverse=True)[1]"
LABELS = ("labels", "label", "targets", "target", "y")
LIMIT = 10_000**2  # pixels of one picture: a larger one is refused before it is unpacked
IDX_TYPE = 8  # unsigned bytes

IMAGE_SETS = Registry("image set")


class Images(Points):
    """Pictures of one size as a data source: `Points` of shape (C, H, W).

    Args:
        x: Pixels, whole numbers of dtype uint8, shape (N, C, H, W), or (N, H, W) of gray ones.
        name: Name of the data.
        labels: A whole number for each picture, from 0.
        levels: How many values a pixel may have.

    Attributes:
        x: The pixels, uint8, (N, C, H, W); in memory, or mapped from a file.
        labels: int64, shape (N,), or None.
        context: Labels as columns of zeros and ones, (N, classes), where `conditional` made them.
        levels: How many values a pixel may have.
        validation: Pictures that the data set holds out for validation, or None.
        test: Those that it holds out as a test, or None.

    Raises:
        ValueError: Other shapes or dtypes, no pictures, labels of another length.
    """

    columns = None
    rowwise = ("x", "context", "weight", "labels")

    def __init__(
        self,
        x: Tensor | np.ndarray,
        name: str = "images",
        labels: Sequence[int] | Tensor | np.ndarray | None = None,
        levels: int = 256,
    ) -> None:
        x = as_numbers("Images", "x", x)
        _expect_channels_first(tuple(x.shape))
        x = x[:, None] if x.dim() == 3 else x
        if x.dim() != 4 or x.dtype != torch.uint8 or not x.numel():
            raise ValueError(
                "Images: expected pixels of dtype uint8 and shape (N, C, H, W), got "
                f"{x.dtype} and {tuple(x.shape)}"
            )
        self.x, self.name, self.levels = x, name, levels
        self.dim = math.prod(x.shape[1:])
        self.context: Tensor | None = None
        self.weight: Tensor | None = None
        self.labels: Tensor | None = None if labels is None else _labels(labels, len(x))
        self.reading = Columns()

    @property
    def sizes(self) -> dict[str, Any]:
        """Options of a model for these pictures: sizes, and what makes pixels real numbers."""
        context = {} if self.context is None else {"context": self.context.shape[1]}
        uniform = {"name": "uniform", "levels": self.levels}
        return {
            "shape": tuple(self.x.shape[1:]),
            **context,
            "dequantization": uniform,
            "preprocess": ["logit", "standardize"],
        }

    def conditional(self, classes: int | None = None) -> "Images":
        """The same pictures with their labels as the context, in columns of zeros and ones.

        Args:
            classes: Number of columns; one more than the largest label if None.

        Raises:
            ValueError: They have no labels, or larger ones.
        """
        if self.labels is None:
            raise ValueError(
                f"{self.name}: expected labels to condition on, whole numbers from 0, one for "
                "each picture, and there are none; in a .npz they are an array called labels"
            )
        parts = [part for part in (self, self.validation, self.test) if part is not None]
        most = max(int(part.labels.max()) for part in parts if part.labels is not None)
        if classes is None:
            classes = most + 1
            if classes > max(CLASSES, len(self.x) // 2):
                raise ValueError(
                    f"{self.name}: expected labels that number classes from 0, got labels up to "
                    f"{most} of {len(self.x)} pictures; {NUMBERED}"
                )
        if most >= classes:
            raise ValueError(f"{self.name}: expected labels below {classes}, got {most}")
        made = [_with_context(part, classes) for part in parts]
        first, rest = made[0], iter(made[1:])
        first.validation = self.validation and next(rest)
        first.test = self.test and next(rest)
        return first

    def __repr__(self) -> str:
        shape = "×".join(map(str, self.x.shape[1:]))
        return f"Images({self.name!r}, {len(self.x)} pictures of {shape})"


def _expect_channels_first(shape: tuple[int, ...]) -> None:
    """Raise ValueError for channels at the end, which would be taken for a width of 1 to 4."""
    one = len(shape) == 3 and shape[1] > 4 and shape[2] in (1, 3)
    if one or (len(shape) == 4 and min(shape[1:3]) > 4 >= shape[3]):
        remedy = "give two pictures or more" if one else "give x.movedim(-1, 1), without alpha"
        raise ValueError(
            f"Images: expected pixels of shape (N, C, H, W), got {shape}, "
            f"{'one picture' if one else 'pictures'} with channels last; {remedy}"
        )


def _labels(labels: Any, n: int) -> Tensor:
    if not isinstance(labels, Tensor) and np.asarray(labels).dtype.kind in "USO":
        raise ValueError(
            f"Images: expected labels to be whole numbers from 0, got texts; {NUMBERED}"
        )
    found = as_numbers("Images", "labels", labels)
    if found.shape != (n,) or found.is_floating_point() or (n and int(found.min()) < 0):
        raise ValueError(
            f"Images: expected a whole number from 0 for each of {n} pictures in labels, got "
            f"{found.dtype} of shape {tuple(found.shape)}"
        )
    return found.long()


def _with_context(images: Images, classes: int) -> Images:
    assert images.labels is not None
    made = copy.copy(images)
    labels = [str(k) for k in range(classes)]
    made.reading = Columns(context=["labels"], labels={"labels": labels})
    made.context = torch.nn.functional.one_hot(images.labels, classes).float()
    return made


def read_images(path: str | Path, labels: str | Path | None = None) -> Images:
    """Read pictures of one size from a file or a folder.

    An idx file (MNIST's, also .gz), a .npy or .npz of unsigned bytes ((N, H, W), or with three
    channels first or last), CIFAR's archive or folder of batches, or a folder of picture files,
    whose folders within, if there are any, are the classes.

    Args:
        path: The file or folder.
        labels: An idx file, a .npy or a .txt of their labels, for files without.

    Raises:
        FileNotFoundError: There is nothing at the path.
        ValueError: It holds something else, which the message names.
        ImportError: Pillow, which picture files need, is not installed.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"load: expected pictures at {path}, where nothing is")
    read = next((read for matches, read in READERS if matches(path)), None)
    if read is None:
        raise ValueError(f"load: expected idx, .npy, .npz, CIFAR or picture files, got {path}")
    pixels, own = read(path)
    given = own if labels is None else _read_labels(Path(labels))
    images = Images(pixels, path.name.split(".")[0], given)
    images.source = str(path.resolve())
    return images


def write_images(path: str | Path, x: Tensor, levels: int | None = 256) -> None:
    """Write pictures to a new file: a grid of them as a .png, or their pixels as .npy or .npz.

    Args:
        path: The file, which must not exist; its folder is created if necessary.
        x: Pixels, shape (N, C, H, W).
        levels: How many values a pixel may have; None for real numbers, which a .png shows from
            the lowest (black) to the highest.

    Raises:
        ValueError: The ending is another, or the file exists.
        ImportError: Pillow, which a .png needs, is not installed.
        OSError: The file cannot be written.
    """
    path = expect_writable("write_images", path, PIXELS)
    whole = levels is not None and levels <= 256
    pixels = (x.to(torch.uint8) if whole else x).cpu().numpy()
    try:
        if path.suffix == ".png":
            optional("PIL.Image", "data").fromarray(image_grid(x, levels)).save(path)
        elif path.suffix == ".npy":
            np.save(path, pixels)
        else:
            np.savez_compressed(path, x=pixels)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise unwritable("write_images", path, error) from error


def image_grid(x: Tensor, levels: int | None = 256, columns: int | None = None) -> np.ndarray:
    """One picture of many: a grid in reading order with white lines, uint8.

    Args:
        x: Pixels, shape (N, C, H, W), with one channel or three; NaN is shown black.
        levels: How many values a pixel may have; None for real numbers, of which the lowest is
            shown black and the highest white.
        columns: Pictures in a row; about as many as there are rows if None.

    Returns:
        Shape (rows, columns) of gray pictures, (rows, columns, 3) of colored ones.

    Raises:
        ValueError: Another shape, or another number of channels.
    """
    if x.dim() != 4 or x.shape[1] not in (1, 3) or not len(x):
        raise ValueError(
            "image_grid: expected pictures of shape (N, C, H, W) with C of 1 or 3, got "
            f"{tuple(x.shape)}"
        )
    values = x.detach().cpu().double().nan_to_num(0.0)
    low, high = (0.0, levels - 1) if levels else (values.min().item(), values.max().item())
    shades = ((values - low) * (255 / max(high - low, 1e-12))).round().clamp(0, 255)
    n, channels, height, width = x.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    rows = math.ceil(n / columns)
    grid = np.full((channels, rows * (height + 1) - 1, columns * (width + 1) - 1), 255, np.uint8)
    for k, picture in enumerate(shades.to(torch.uint8).numpy()):
        top, left = k // columns * (height + 1), k % columns * (width + 1)
        grid[:, top : top + height, left : left + width] = picture
    return grid[0] if channels == 1 else np.moveaxis(grid, 0, 2)


def is_images(path: Path) -> bool:
    """Whether `read_images` reads a path: for arrays it looks at the shape."""
    return path.exists() and any(matches(path) for matches, _ in READERS)


def read_idx(path: Path) -> np.ndarray:
    """The array in an idx file of unsigned bytes, as MNIST's are.

    Source: LeCun et al., The MNIST database, http://yann.lecun.com/exdb/mnist/.

    Args:
        path: The file, which may be compressed by gzip.

    Raises:
        ValueError: It is truncated, or something else.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError) as error:
        raise ValueError(f"load: expected an idx file, got {path} ({error})") from error
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] != IDX_TYPE or not data[3]:
        raise ValueError(f"load: expected an idx file of unsigned bytes, got {path}")
    shape = np.frombuffer(data, ">u4", data[3], 4) if len(data) >= 4 + 4 * data[3] else None
    start = 4 + 4 * data[3]
    if shape is None or len(data) - start != math.prod(map(int, shape)):
        told = "its sizes" if shape is None else f"{math.prod(map(int, shape)):,} bytes"
        raise ValueError(
            f"load: {path} is truncated or damaged: expected {told}, got "
            f"{max(0, len(data) - start):,} bytes of data"
        )
    return np.frombuffer(data, np.uint8, offset=start).reshape(tuple(map(int, shape)))


def _read_labels(path: Path) -> np.ndarray:
    if path.suffix not in (".npy", ".txt"):
        return read_idx(path)
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        return np.loadtxt(path, dtype=np.int64, ndmin=1)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"load: expected labels in {path}, a whole number from 0 for each picture: {error}"
        ) from None


def _is_idx(path: Path) -> bool:
    return path.is_file() and "idx" in path.name and "ubyte" in path.name


def _idx(path: Path) -> tuple[np.ndarray, None]:
    array = read_idx(path)
    if array.ndim not in (3, 4):
        raise ValueError(f"load: expected pictures in {path}, got an array of {array.ndim} axes")
    return array, None


def _arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays of a .npz, or the one of a .npy, which is mapped and not read."""
    if path.suffix == ".npy":  # a copy where it is written to: torch wants memory it may write
        return {"x": np.load(path, mmap_mode="c", allow_pickle=False)}
    # Opened here, as numpy does not close a broken .npz.
    with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


def _is_array(path: Path) -> bool:
    if path.suffix not in (".npy", ".npz") or not path.is_file():
        return False
    try:
        return any(_pictures(array) for array in _arrays(path).values())
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile):
        return False  # of a broken file the reader of tables tells


def _pictures(array: np.ndarray) -> bool:
    return array.dtype == np.uint8 and array.ndim in (3, 4)


def _array(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    arrays = _arrays(path)
    pictures = [name for name, array in arrays.items() if _pictures(array)]
    if len(pictures) != 1:
        raise ValueError(
            f"load: expected one array of pictures in {path}, got {', '.join(pictures)}; save "
            "the one you mean in a file of its own"
        )
    pixels = arrays.pop(pictures[0])
    if pixels.ndim == 4 and pixels.shape[1] not in (1, 3) and pixels.shape[3] in (1, 3):
        pixels = np.moveaxis(pixels, 3, 1)
    return pixels, _labels_among(arrays, len(pixels))


def _labels_among(arrays: Mapping[str, np.ndarray], n: int) -> np.ndarray | None:
    """The array of n whole numbers that is called labels, or else the only one there is."""
    whole = {
        name.lower(): array.reshape(n)
        for name, array in arrays.items()
        if array.shape in ((n,), (n, 1)) and array.dtype.kind in "iu"
    }
    called = [whole[name] for name in LABELS if name in whole]
    return next(iter(called or (whole.values() if len(whole) == 1 else ())), None)


class _Batches(pickle.Unpickler):
    """Reads what CIFAR's files hold, arrays and plain containers, and executes nothing else."""

    KNOWN = {
        ("numpy.core.multiarray", "_reconstruct"), ("numpy", "ndarray"), ("numpy", "dtype"),
        ("numpy._core.multiarray", "_reconstruct"), ("_codecs", "encode"),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.KNOWN:
            raise ValueError(f"holds a {module}.{name}, which is not executed")
        return super().find_class(module, name)


def _is_cifar(path: Path) -> bool:
    if path.is_dir():
        return any(path.glob("data_batch_*"))
    return path.name.startswith("cifar-10") and path.name.endswith((".tar.gz", ".tgz", ".tar"))


def _cifar(path: Path) -> tuple[np.ndarray, np.ndarray]:
    return _cifar_part(path, "data_batch_")


def _cifar_part(path: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of the batches of CIFAR's whose names begin with `part`."""
    pixels, labels = [], []
    for name, data in _cifar_files(path, part):
        try:
            held = _Batches(io.BytesIO(data), encoding="bytes").load()
            pixels.append(np.asarray(held[b"data"], np.uint8).reshape(-1, 3, 32, 32))
            labels += held[b"labels"]
        except Exception as error:  # a pickle that is broken may raise anything
            raise ValueError(
                f"load: expected a batch of CIFAR-10 in {name}, got {error}"
            ) from None
    if not pixels:
        raise ValueError(f"load: expected {part}… of CIFAR-10 in {path}, found none")
    return np.concatenate(pixels), np.asarray(labels)


def _cifar_files(path: Path, part: str) -> Iterator[tuple[str, bytes]]:
    if path.is_dir():
        for file in sorted(path.glob(f"{part}*")):
            yield str(file), file.read_bytes()
        return
    try:
        with tarfile.open(path) as archive:
            for member in sorted(archive.getmembers(), key=lambda member: member.name):
                file = archive.extractfile(member)
                if file is not None and Path(member.name).name.startswith(part):
                    yield f"{path}: {member.name}", file.read()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise ValueError(f"load: expected CIFAR-10's archive, got {path} ({error})") from error


def _is_folder(path: Path) -> bool:
    return path.is_dir() and next(_picture_files(path), None) is not None


def _picture_files(path: Path) -> Iterator[Path]:
    found = (file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
    inner = ((file, file.relative_to(path).parts) for file in found)
    # Hidden files are not the user's pictures: macOS puts a ._1.png beside a 1.png.
    return (f for f, parts in inner if len(parts) <= 2 and not any(p[0] == "." for p in parts))


def _folder(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    files = sorted(_picture_files(path))
    first = _pixels(files[0])
    pixels = np.empty((len(files), *first.shape), np.uint8)
    for k, file in enumerate(files):
        found = _pixels(file)
        if found.shape != first.shape:
            raise ValueError(
                f"load: expected pictures of one size, {_told(first)} as {files[0].name}, got "
                f"{_told(found)} in {file}; scale or crop them to one size and kind"
            )
        pixels[k] = found
    folders = [file.parent.name if file.parent != path else None for file in files]
    classes = sorted(set(filter(None, folders)))
    if not classes:
        return pixels, None
    if None in folders:
        outside = [file.name for file, name in zip(files, folders, strict=True) if name is None]
        raise ValueError(
            f"load: expected all pictures of {path} in folders, one for each class, or none, got "
            f"{abbreviated(outside)} beside the folders {abbreviated(classes)}"
        )
    return pixels, np.asarray([classes.index(name) for name in folders if name is not None])


def _pixels(file: Path) -> np.ndarray:
    """Pixels of a picture file, uint8, shape (1 or 3, H, W)."""
    image, ops = optional("PIL.Image", "data"), optional("PIL.ImageOps", "data")
    try:
        with image.open(file) as opened:
            why = _refusal(opened)
            if why is None:
                picture = ops.exif_transpose(opened)
                picture = picture.convert("L" if picture.mode in ("L", "1") else "RGB")
                array = np.asarray(picture)
                return array[None] if array.ndim == 2 else np.moveaxis(array, 2, 0)
    except (OSError, SyntaxError, ValueError, image.DecompressionBombError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ValueError(f"load: expected a picture of 8 bits in {file}, got {why}")


def _refusal(opened: Any) -> str | None:
    width, height = opened.size
    if width * height > LIMIT:
        return f"{width}×{height} pixels; cut it into pieces"
    if getattr(opened, "n_frames", 1) > 1:
        return f"{opened.n_frames} frames; save each as a picture"
    if opened.mode.startswith(("I", "F")):
        return f"a deeper one (mode {opened.mode}); save it with 8 bits"
    if opened.mode in ("RGBA", "LA", "PA") or "transparency" in opened.info:
        return f"one with transparency (mode {opened.mode}); save it without"
    return None


def _told(pixels: np.ndarray) -> str:
    kind = "gray" if pixels.shape[0] == 1 else "color"
    return f"{pixels.shape[2]}×{pixels.shape[1]} {kind}"


Reader = Callable[[Path], tuple[np.ndarray, np.ndarray | None]]
READERS: list[tuple[Callable[[Path], bool], Reader]] = [
    (_is_idx, _idx),
    (_is_array, _array),
    (_is_cifar, _cifar),
    (_is_folder, _folder),
]

MNIST = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}
FASHION_MNIST = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}


@IMAGE_SETS.register("mnist")
def mnist() -> Images:
    """MNIST: 50,000 pictures of 1×28×28 to train on, 10,000 to validate, 10,000 to test.

    Source: LeCun et al. (1998), https://doi.org/10.1109/5.726791; split as MAF's.
    """
    files = find("mnist", MNIST, "https://ossci-datasets.s3.amazonaws.com/mnist/")
    return _idx_set("mnist", files)


@IMAGE_SETS.register("fashion-mnist")
def fashion_mnist() -> Images:
    """Fashion-MNIST: 50,000 pictures of 1×28×28 to train on, 10,000 to validate, 10,000 to test.

    Source: Xiao et al. (2017), https://arxiv.org/abs/1708.07747.
    """
    address = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
    return _idx_set("fashion-mnist", find("fashion-mnist", FASHION_MNIST, address))


@IMAGE_SETS.register("cifar10")
def cifar10() -> Images:
    """CIFAR-10: 45,000 pictures of 3×32×32 to train on, 5,000 to validate, 10,000 to test.

    Source: Krizhevsky (2009), Learning multiple layers of features from tiny images; split as
    MAF's.
    """
    archive = {"cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a"}
    (path,) = find("cifar10", archive, "https://www.cs.toronto.edu/~kriz/")
    train, test = (_cifar_part(path, part) for part in ("data_batch_", "test_batch"))
    return _parts("cifar10", train, test, validation=5_000)


def _idx_set(name: str, files: Sequence[Path]) -> Images:
    pixels, labels, test, test_labels = (read_idx(file) for file in files)
    return _parts(name, (pixels, labels), (test, test_labels), validation=10_000)


def _parts(
    name: str,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    validation: int,
) -> Images:
    """The pictures to train on, of which the last ones are held out for validation."""
    whole = Images(train[0], name, train[1])
    rows = torch.arange(len(whole.x))
    images = whole.take(rows[:-validation])
    images.validation = whole.take(rows[-validation:])
    images.test = Images(test[0], name, test[1])
    return images
