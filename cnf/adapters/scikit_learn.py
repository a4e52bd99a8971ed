"""Flows as density estimators of scikit-learn: in pipelines, searches and cross-validation."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, DensityMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from cnf.data.arrays import as_numbers
from cnf.models import build
from cnf.objectives import Objective
from cnf.random import preserved, reseed, stream
from cnf.training import TrainConfig, fit
from cnf.training.config import as_config
from cnf.training.interrupt import Interrupted

DEFAULTS = {"steps": 2_000, "validations": 20, "patience": 4, "progress": False}
CHUNK = 10_000  # rows at once
CPU = torch.device("cpu")


class FlowDensity(DensityMixin, BaseEstimator):
    """A named model as an estimator of scikit-learn, with the methods of its `KernelDensity`.

    The score is the mean log-density, as of `GaussianMixture`, so that folds of other sizes can be
    compared. Rounding in float32 depends on the number of rows scored at once.

    >>> from sklearn.datasets import make_moons
    >>> x, _ = make_moons(500, noise=0.1, random_state=0)
    >>> density = FlowDensity("realnvp", config={"steps": 100}, random_state=0).fit(x)
    >>> density.score_samples(x[:3]).shape, density.sample(5).shape
    ((3,), (5, 2))

    `options` and `config` are each one parameter to a search, which tries whole mappings; the
    names in them, as in `config__steps`, are no parameters. What a mapping leaves out is as below.

    >>> from sklearn.model_selection import GridSearchCV
    >>> grid = {"config": [{"steps": 1}, {"steps": 20}]}
    >>> search = GridSearchCV(FlowDensity("maf", random_state=0), grid, cv=2).fit(x)
    >>> search.best_params_
    {'config': {'steps': 20}}

    Args:
        model: A name in `cnf.models.MODELS`.
        objective: What trains it, or its name.
        options: Options of the model, beside `dim`.
        config: Training's settings: a mapping of those that differ from 2,000 steps without a
            progress bar that end early, as a tenth of the rows that is held out says; or a whole
            `TrainConfig`.
        random_state: Seed of the weights, of the training unless `config` has one, and of samples.

    Attributes:
        flow_: The trained `cnf.Flow`, in eval mode.
        history_: What was logged, of `cnf.fit`.
        n_features_in_: Number of columns.
    """

    def __init__(
        self,
        model: str = "nsf",
        objective: Objective | str = "maximum-likelihood",
        *,
        options: Mapping[str, Any] | None = None,
        config: TrainConfig | Mapping[str, Any] | None = None,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.model = model
        self.objective = objective
        self.options = options
        self.config = config
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, sample_weight: Any = None) -> "FlowDensity":
        """Train a new flow.

        Args:
            X: Rows, shape (N, D).
            y: Not used.
            sample_weight: How much each row counts, at least 0, shape (N,).

        Raises:
            ValueError: Rows that are NaN, too few, or not of two axes; and as of `cnf.fit`.
            KeyboardInterrupt: A signal, such as that of Ctrl-C, ended training.
        """
        X = validate_data(self, X, dtype=[np.float64, np.float32], ensure_min_samples=2)
        seed = int(check_random_state(self.random_state).randint(2**31))
        with preserved(CPU):
            reseed(seed, CPU)
            self.flow_ = build(self.model, dim=X.shape[1], **(self.options or {}))
        settings = self.config or {}
        if not isinstance(settings, TrainConfig):
            settings = as_config({"seed": seed, **_defaults_beside(settings), **settings})
        self.history_ = fit(self.flow_, self.objective, X, settings, weight=sample_weight)
        if self.history_.signal:  # else a search would go on with a flow that is half trained
            raise Interrupted(self.history_.signal)
        return self

    def score_samples(self, X: Any) -> np.ndarray:
        """Log-densities in nats, shape (N,).

        Args:
            X: Rows, shape (N, D).
        """
        check_is_fitted(self)
        X = validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        rows = as_numbers("FlowDensity", "X", X).split(CHUNK)
        with torch.no_grad():
            parts = [self.flow_.log_prob(part.to(self.flow_.device)).cpu() for part in rows]
        return torch.cat(parts).double().numpy()

    def score(self, X: Any, y: Any = None) -> float:
        """The mean log-density of rows, in nats, which a search makes large.

        Args:
            X: Rows, shape (N, D).
            y: Not used.
        """
        return float(self.score_samples(X).mean())

    def sample(
        self, n_samples: int = 1, random_state: int | np.random.RandomState | None = None
    ) -> np.ndarray:
        """Samples, shape (n_samples, D).

        Args:
            n_samples: How many.
            random_state: Their seed.
        """
        check_is_fitted(self)
        state = self.random_state if random_state is None else random_state
        seed = int(check_random_state(state).randint(2**31))
        return (
            self.flow_.sample(n_samples, generator=stream(seed, "samples for scikit-learn"))
            .cpu()
            .numpy()
        )


def _defaults_beside(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that the settings leave room for."""
    left_out = {"steps"} if settings.get("seconds") is not None else set()
    left_out |= {"patience"} if settings.get("validations") == 0 else set()
    return {name: value for name, value in DEFAULTS.items() if name not in left_out}
