"""Well-known tables by name, with the training, validation and test parts that others use."""

from pathlib import Path

import numpy as np

from cnf.data.downloads import lying
from cnf.data.tabular import Points, read_points
from cnf.registry import Registry

TABLE_SETS = Registry("table")
MAF = "it is in data.tar.gz at https://zenodo.org/records/1161203"
SEED = 42  # MAF's, of rows and noise

Parts = tuple[np.ndarray, np.ndarray, np.ndarray]  # training, validation and test rows


@TABLE_SETS.register("power")
def power() -> Points:
    """POWER: electricity of a household, 6 columns, 1,659,917 rows to train on.

    Source: Papamakarios et al. (2017), MAF, https://arxiv.org/abs/1705.07057, whose recipe is
    kept: rows shuffled, noise as wide as the steps between values, the last tenth the test, the
    last tenth of the rest validation, standardized by these two together.

    Raises:
        FileNotFoundError: `power/data.npy` is not there.
        ValueError: It holds something else.
    """
    data = _numbers(lying("power", ["data.npy"], MAF), columns=8)
    return _points("power", *_float32(standardized(*_tenths(power_rows(data)))))


@TABLE_SETS.register("gas")
def gas() -> Points:
    """GAS: sensors in a mixture of gases, 8 columns, 852,174 rows to train on.

    MAF's file is a pickle, which could execute anything, and is not read. Whoever trusts it
    converts it: `pandas.read_pickle("ethylene_CO.pickle").to_parquet("ethylene_CO.parquet")`.

    Source: Papamakarios et al. (2017), MAF, https://arxiv.org/abs/1705.07057, whose recipe is
    kept: of columns that are alike one is left, all rows are standardized together, the last
    tenth is the test, the last tenth of the rest validation.

    Raises:
        FileNotFoundError: `gas/ethylene_CO.parquet` (or .csv) is not there.
        ValueError: It has no columns Meth, Eth and Time.
    """
    convert = (
        "convert MAF's pickle, if you trust it: "
        "pandas.read_pickle('ethylene_CO.pickle').to_parquet('ethylene_CO.parquet'); "
    )
    path = lying("gas", ["ethylene_CO.parquet", "ethylene_CO.csv"], convert + MAF)
    table = read_points(path)
    names = table.columns or ()
    apart = {"Meth", "Eth", "Time"}
    if not apart <= set(names):
        raise ValueError(
            f"gas: expected columns Meth, Eth and Time in {path}, got {', '.join(names) or 'none'}"
        )
    kept = [k for k, name in enumerate(names) if name not in apart]
    rows = gas_rows(table.x.double().numpy()[:, kept])
    return _points("gas", *_float32(_tenths(rows)))


@TABLE_SETS.register("hepmass")
def hepmass() -> Points:
    """HEPMASS: collisions of particles, 21 columns, 315,123 rows to train on.

    Source: Papamakarios et al. (2017), MAF, https://arxiv.org/abs/1705.07057, whose recipe is
    kept: rows of class 1, columns with a value that recurs left out, the last tenth of the
    training file validation, standardized by that file.

    Raises:
        FileNotFoundError: `hepmass/1000_train.csv` or `1000_test.csv` is not there.
        ValueError: They hold something else.
    """
    files = [lying("hepmass", [f"1000_{part}.csv"], MAF) for part in ("train", "test")]
    with files[0].open() as file:
        width = file.readline().count(",") + 1
    # The lines of the test file are longer by one, MAF's "messed up" column.
    return _points("hepmass", *_float32(hepmass_rows(*(_csv(file, width) for file in files))))


@TABLE_SETS.register("miniboone")
def miniboone() -> Points:
    """MINIBOONE: neutrinos, 43 columns, 29,556 rows to train on.

    Source: Papamakarios et al. (2017), MAF, https://arxiv.org/abs/1705.07057, whose recipe is
    kept: the last tenth the test, the last tenth of the rest validation, standardized by training
    and validation rows together.

    Raises:
        FileNotFoundError: `miniboone/data.npy` is not there.
        ValueError: It holds something else.
    """
    data = _numbers(lying("miniboone", ["data.npy"], MAF), columns=43)
    return _points("miniboone", *_float32(standardized(*_tenths(data))))


@TABLE_SETS.register("miniboone-head")
def miniboone_head() -> Points:
    """The first 1,523 rows of MINIBOONE's training part, treated as if they were all.

    Nothing published compares with it.

    Raises:
        FileNotFoundError: `miniboone_head/miniboone_maf_train_first1523.npz` is not there.
        ValueError: It holds something else.
    """
    file = "miniboone_maf_train_first1523.npz"
    data = _numbers(lying("miniboone_head", [file], "make it from MINIBOONE"), columns=43)
    return _points("miniboone-head", *_float32(standardized(*_tenths(data))))


UCI = {  # file, and what it is about
    "power-plant": ("power-plant", "Power of a plant by the weather, 5 columns, 9,568 rows."),
    "protein": ("protein-tertiary-structure", "Structures of proteins, 10 columns, 45,730 rows."),
    "kin8nm": ("kin8nm", "Forward kinematics of a robot's arm, 9 columns, 8,192 rows."),
    "naval": ("naval-propulsion-plant", "A ship's gas turbine, 16 columns, 11,934 rows."),
    "wine": ("wine-quality-red", "Red wines and their quality, 12 columns, 1,599 rows."),
    "concrete": ("concrete", "Mixtures of concrete and their strength, 9 columns, 1,030 rows."),
    "energy": ("energy", "Buildings and their heating load, 9 columns, 768 rows."),
    "yacht": ("yacht", "Resistance of yachts, 7 columns, 308 rows."),
}


def uci(name: str) -> Points:
    """A small table of the UCI repository, with the target as its last column.

    Constant columns are left out. The numbers are rounded, so that no density of them is bounded;
    as in MAF's recipe for POWER, each column gets noise as wide as the smallest step between its
    values. A tenth of the rows, drawn, is the test, a tenth of the rest validation.

    Source: the UCI machine learning repository, https://archive.ics.uci.edu.

    Args:
        name: One of `UCI`.

    Raises:
        FileNotFoundError: Its file in `uci_small` is not there.
        ValueError: It holds something else.
    """
    file = f"{UCI[name][0]}.txt"
    remedy = "make it of the table at https://archive.ics.uci.edu, a row a line, the target last"
    table = read_points(lying("uci_small", [f"{file}.gz", file], remedy))
    return _points(name, *_tenths(uci_rows(table.x.numpy())))


def _register_uci(name: str, about: str) -> None:
    def read() -> Points:
        return uci(name)

    read.__doc__ = f"{about} See `uci`."
    TABLE_SETS.register(name)(read)


for _name, (_, _about) in UCI.items():
    _register_uci(_name, _about)


def power_rows(data: np.ndarray) -> np.ndarray:
    """The rows of POWER as MAF takes them: shuffled, without two columns, with noise.

    Args:
        data: Power, reactive power, voltage, intensity, three meters and time, shape (N, 8).
    """
    rng = np.random.RandomState(SEED)
    rows = data.astype(np.float64)  # a copy
    rng.shuffle(rows)
    rows = np.delete(np.delete(rows, 3, axis=1), 1, axis=1)
    n = len(rows)
    voltage = 0.01 * rng.rand(n, 1)  # in MAF's order of draws
    active = 0.001 * rng.rand(n, 1)
    submetering = rng.rand(n, 3)
    return rows + np.hstack([active, voltage, submetering, np.zeros((n, 1))])


def gas_rows(data: np.ndarray) -> np.ndarray:
    """The columns of GAS of which no other is a copy (correlation above 0.98), standardized.

    Args:
        data: Readings of the sensors, shape (N, 16).
    """
    kept = np.arange(data.shape[1])
    correlation = np.corrcoef(data.T)
    while True:
        alike = (correlation[np.ix_(kept, kept)] > 0.98).sum(1)
        if (alike <= 1).all():
            break
        kept = np.delete(kept, np.argmax(alike > 1))
    rows = data[:, kept]
    return (rows - rows.mean(0)) / rows.std(0, ddof=1)


def hepmass_rows(train: np.ndarray, test: np.ndarray) -> Parts:
    """The parts of HEPMASS from the rows of its two files, the class first.

    Args:
        train: Shape (N, 28).
        test: Shape (M, 28).
    """
    train, test = (rows[rows[:, 0] == 1, 1:] for rows in (train, test))
    mean, std = train.mean(0), train.std(0, ddof=1)
    kept = [k for k, column in enumerate(train.T) if _count_of_smallest(column) <= 5]
    train, test = (((rows - mean) / std)[:, kept] for rows in (train, test))
    n = len(train) - len(train) // 10
    return train[:n], train[n:], test


def uci_rows(data: np.ndarray) -> np.ndarray:
    """Rows in random order, without constant columns, with noise of the smallest steps.

    Args:
        data: Shape (N, D).
    """
    rng = np.random.RandomState(SEED)
    rows = data[rng.permutation(len(data))].astype(np.float64)
    rows = rows[:, rows.min(0) < rows.max(0)]
    steps = np.array([np.diff(np.unique(column)).min() for column in rows.T])
    return rows + steps * rng.rand(*rows.shape)


def standardized(train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> Parts:
    """All parts by mean and standard deviation of training and validation rows together."""
    both = np.vstack([train, validation])
    mean, std = both.mean(0), both.std(0)
    return (train - mean) / std, (validation - mean) / std, (test - mean) / std


def _tenths(rows: np.ndarray) -> Parts:
    """The last tenth is the test, the last tenth of the rest is for validation."""
    rest = len(rows) - len(rows) // 10
    n = rest - rest // 10
    return rows[:n], rows[n:rest], rows[rest:]


def _count_of_smallest(column: np.ndarray) -> int:
    return int((column == column.min()).sum())


def _float32(parts: Parts) -> Parts:
    train, validation, test = (part.astype(np.float32) for part in parts)
    return train, validation, test


def _points(name: str, train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> Points:
    """The training rows, which know the other parts."""
    points = Points(train, name)
    points.validation, points.test = Points(validation, name), Points(test, name)
    return points


def _numbers(path: Path, columns: int) -> np.ndarray:
    """The rows of a .npy or .npz, in float64."""
    rows = read_points(path).x
    if rows.shape[1] != columns:
        raise ValueError(f"load: expected {columns} columns in {path}, got {rows.shape[1]}")
    return rows.double().numpy()


def _csv(path: Path, width: int) -> np.ndarray:
    """The first `width` columns of the numbers below a header."""
    try:
        return np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(width), ndmin=2)
    except ValueError as error:
        raise ValueError(f"load: expected rows of {width} numbers in {path}: {error}") from None
