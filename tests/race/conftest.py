"""Results as compare gives them, with numbers that need no training."""

import dataclasses
import math

import pytest
import torch

import cnf
from cnf.data import load
from cnf.metrics import METRICS
from cnf.race import Entry, Results


def small(name, seed, dim):
    """A flow with random weights, not the identity, of the named model."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        flow = cnf.models.build(name, dim=dim, hidden=(8, 8))
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.15 * torch.randn_like(parameter))
    return flow.eval()


def race(data="moons", names=("cnf", "realnvp"), seeds=(0, 1), **changes):
    density = load(data)
    known = density.entropy is not None
    entries = []
    for place, name in enumerate(names, 1):
        for seed in seeds:
            few = [(0, 0.2)] if name == "realnvp" else [(2**k, 0.9 / 2**k) for k in range(6)]
            few = few if name == "realnvp" else [*few, (44, 0.03)]
            scores = {
                "gap": 0.1 * place + 0.01 * seed, "gap_error": 0.004, "nll": 2.0 + place,
                "nll_error": 0.01, "w2": 0.3 * place, "sliced_w2": few[-1][1],
                "ms_per_step": 3.0 * place, "ms_sample": 20.0 / place, "ms_log_prob": 90.0,
                "peak_memory_mb": 400.0, "straightness": math.nan,
            }  # fmt: skip
            if not known:
                del scores["gap"], scores["gap_error"]
            curve = [(0.5 * k * (1 + seed), place / k) for k in range(1, 5)]
            flow = small(name, seed, density.dim)
            entries.append(Entry(name, name.upper(), seed, scores, curve, few, flow))
    results = Results(
        density.name, density, entries, {"w2": 0.1, "sliced_w2": 0.02}, density.entropy,
        {"steps": 5, "seconds": None, "seeds": list(seeds), "test_points": 100, "w2_points": 50},
        {"gpu": None, "threads": 1},
    )  # fmt: skip
    return dataclasses.replace(results, **changes)


@pytest.fixture(autouse=True, scope="session")
def _no_classifier():
    """C2ST takes seconds of scikit-learn."""
    known = METRICS["c2st"]
    METRICS._entries["c2st"] = dataclasses.replace(known, function=lambda x, y: 0.5)
    yield
    METRICS._entries["c2st"] = known


@pytest.fixture(name="race", scope="session")
def _race():
    """(data, names, seeds) → results of a race that was never run."""
    return race


@pytest.fixture(scope="module")
def results():
    return race()
