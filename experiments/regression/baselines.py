"""Baselines of scikit-learn, each as a function from features to predictive distributions."""

from collections.abc import Callable, Sequence

import numpy as np
from predictive import Mixture
from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from sklearn.model_selection import cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from cnf.data import Points

Predict = Callable[[np.ndarray], Mixture]


def arrays(points: Points) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features and targets to train on, and those for validation."""
    assert points.validation is not None
    parts = [(p.context.double().numpy(), p.x[:, 0].double().numpy())
             for p in (points, points.validation)]  # fmt: skip
    return *parts[0], *parts[1]


def gaussian(mean: np.ndarray, std: np.ndarray | float) -> Mixture:
    return Mixture(
        np.ones((len(mean), 1)), mean[:, None], np.broadcast_to(std, mean.shape)[:, None]
    )


def gaussian_process(points: Points, seed: int, tuned: int, rows: int) -> Predict:
    """A squared exponential kernel with a scale for each feature, and white noise.

    It needs no validation, and learns from those rows, too.

    Args:
        points: The data.
        seed: Of the random subsets.
        tuned: Rows whose marginal likelihood is maximized.
        rows: Rows that predictions are conditioned on.
    """
    x, y, vx, vy = arrays(points)
    x, y = np.concatenate([x, vx]), np.concatenate([y, vy])
    order = np.random.default_rng(seed).permutation(len(x))
    kernel = ConstantKernel() * RBF(np.ones(x.shape[1]), (1e-2, 1e4)) + WhiteKernel(0.1)
    optimizer = "fmin_l_bfgs_b"
    for many in (tuned, rows):
        process = GaussianProcessRegressor(kernel, normalize_y=True, optimizer=optimizer)
        model = make_pipeline(StandardScaler(), process)
        model.fit(x[order[:many]], y[order[:many]])
        kernel, optimizer = process.kernel_, None

    return lambda features: gaussian(*model.predict(features, return_std=True))


def boosting(
    points: Points, seed: int, varying: bool, floors: Sequence[float] = (), **options: float
) -> Predict:
    """Gradient boosting of the mean, and of the variance if it varies.

    The residuals that the variance is learned from are those of five-fold cross-validation.

    Args:
        points: The data.
        seed: Of scikit-learn's draws.
        varying: Whether the variance depends on the features (boosting with the gamma deviance of
            squared residuals), or is one number.
        floors: Least variances as parts of the mean one, of which validation chooses.
        options: Of `HistGradientBoostingRegressor`.
    """
    x, y, vx, vy = arrays(points)
    early = {**options, "early_stopping": True, "random_state": seed}
    mean = HistGradientBoostingRegressor(**early).fit(x, y, X_val=vx, y_val=vy)
    fixed = {**options, "max_iter": mean.n_iter_, "early_stopping": False, "random_state": seed}
    again = HistGradientBoostingRegressor(**fixed)
    squared = (y - cross_val_predict(again, x, y, cv=5)) ** 2
    if not varying:
        return lambda features: gaussian(mean.predict(features), squared.mean() ** 0.5)
    of_validation = (vy - mean.predict(vx)) ** 2
    least = 1e-6 * squared.mean()  # the deviance is of numbers above 0
    variance = HistGradientBoostingRegressor(loss="gamma", **early)
    variance.fit(x, squared + least, X_val=vx, y_val=of_validation + least)

    def told(features: np.ndarray, floor: float) -> Mixture:
        spread = np.maximum(variance.predict(features), floor * squared.mean())
        return gaussian(mean.predict(features), spread**0.5)

    chosen = min(floors, key=lambda floor: -told(vx, floor).log_prob(vy).mean())
    return lambda features: told(features, chosen)


def forest(
    points: Points, seed: int, leaves: list[int], widths: list[float], trees: int
) -> Predict:
    """A quantile forest, smoothed: the leaves and the kernel that validation likes best.

    Args:
        points: The data.
        seed: Of the forest.
        leaves: Least rows in a leaf, to choose from.
        widths: Standard deviations of the kernel in units of the target's, to choose from.
        trees: Their number.
    """
    x, y, vx, vy = arrays(points)
    best, chosen = np.inf, None
    for leaf in leaves:
        trained = RandomForestRegressor(trees, min_samples_leaf=leaf, random_state=seed).fit(x, y)
        atoms = forest_quantiles(trained, x, y, vx)
        for width in np.array(widths) * y.std():
            nll = -smoothed(atoms, width).log_prob(vy).mean()
            if nll < best:
                best, chosen = nll, (trained, width)
    assert chosen is not None
    trained, width = chosen
    return lambda features: smoothed(forest_quantiles(trained, x, y, features), width)


def smoothed(atoms: np.ndarray, width: float) -> Mixture:
    return Mixture(np.full(atoms.shape, 1 / atoms.shape[1]), atoms, np.full(atoms.shape, width))


def forest_quantiles(
    trained: RandomForestRegressor, x: np.ndarray, y: np.ndarray, features: np.ndarray,
    number: int = 200,
) -> np.ndarray:  # fmt: skip
    r"""Quantiles of a forest at the midpoints of `number` equal parts, shape (N, number).

    The weight of a training row j for a new row is the mean over trees of 1[same leaf] divided by
    the training rows in that leaf; quantiles are those of the training targets under the weights.

    Source: Meinshausen (2006), Quantile Regression Forests,
    https://jmlr.org/papers/v7/meinshausen06a.html.
    """
    order = np.argsort(y, kind="stable")
    encoder = OneHotEncoder(handle_unknown="ignore").fit(trained.apply(x))
    inside = encoder.transform(trained.apply(x[order]))  # (rows, leaves of all trees)
    sizes = np.asarray(inside.sum(0)).ravel()
    now = encoder.transform(trained.apply(features)).multiply(1 / sizes).tocsr()
    weights = (now @ inside.T).tocsr() / len(trained.estimators_)
    weights.sort_indices()  # of targets in ascending order
    levels, found = (np.arange(number) + 0.5) / number, []
    for start, end in zip(weights.indptr[:-1], weights.indptr[1:], strict=True):
        reached = np.cumsum(weights.data[start:end])
        place = np.searchsorted(reached, levels * reached[-1])
        found.append(y[order[weights.indices[start:end][place]]])
    return np.array(found)


BASELINES = {
    "gaussian-process": gaussian_process, "boosting": boosting, "forest": forest,
}  # fmt: skip
