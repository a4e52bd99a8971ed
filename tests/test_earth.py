"""The problems of experiments/sphere: charts, kernels and angles with a known density."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import special, stats

F64 = torch.float64


@pytest.fixture
def earth():
    """The module experiments/sphere/earth.py."""
    path = Path(__file__).parent.parent / "experiments" / "sphere" / "earth.py"
    spec = importlib.util.spec_from_file_location("earth", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_places_are_unit_vectors_by_hand(earth):
    places = torch.tensor([[0.0, 0.0], [90.0, 30.0], [0.0, 90.0], [-30.0, 180.0]], dtype=F64)
    expected = [[1, 0, 0], [0, 0, 1], [0, 1, 0], [-(3**0.5) / 2, 0, -0.5]]
    torch.testing.assert_close(earth.unit_vectors(places), torch.tensor(expected, dtype=F64))


def test_cylinder_has_the_area_of_the_sphere(earth):
    """The Jacobian of its inverse has columns whose cross product has the length e^log_scale."""

    def point(angles):
        z = angles[1] / math.pi
        across = (1 - z * z).sqrt()
        return torch.stack([across * angles[0].cos(), across * angles[0].sin(), z])

    angles = torch.tensor([2.0, -1.3], dtype=F64)
    back, log_scale = earth.cylinder(point(angles)[None])
    torch.testing.assert_close(back[0], angles)
    columns = torch.func.jacrev(point)(angles).T
    area = torch.linalg.cross(*columns).norm().log()
    assert log_scale == pytest.approx(area.item())


def test_kernels_are_scipys_von_mises_fisher_densities(earth):
    rng = np.random.default_rng(0)
    x, centers = (stats.uniform_direction(3).rvs(n, random_state=rng) for n in (6, 4))
    for k in (1.5, 300.0):
        each = [stats.vonmises_fisher(center, k).pdf(x) for center in centers]
        got = earth.kernel_log_density(torch.from_numpy(x), torch.from_numpy(centers), k)
        torch.testing.assert_close(got, torch.from_numpy(np.mean(each, 0)).log())
    spiked = earth.spiked_log_density(*map(torch.from_numpy, (x, centers)), 1.5, spike=300.0)
    both = [
        earth.kernel_log_density(*map(torch.from_numpy, (x, centers)), k) for k in (1.5, 300.0)
    ]
    torch.testing.assert_close(spiked.exp(), (both[0].exp() + both[1].exp()) / 2)


def test_parts_of_a_split_are_all_rows_once_and_new_rows_are_found(earth):
    places = torch.rand(50, 2, dtype=F64) * 90
    places[7] = places[8]
    parts = earth.split(places, 3)
    assert [len(part) for part in parts] == [40, 5, 5]
    together = torch.cat(parts)
    assert sorted(together.tolist()) == sorted(earth.unit_vectors(places).tolist())
    assert not torch.equal(parts.train, earth.split(places, 4).train)
    assert earth.is_new(together[:3], together[1:3]).tolist() == [True, False, False]


def test_entropy_of_angles_is_that_of_von_mises(earth):
    """Of one product it is Σ -κ I1(κ)/I0(κ) + log 2πI0(κ)."""
    part = torch.distributions.VonMises(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 9.0]]))
    one = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(1)), torch.distributions.Independent(part, 1)
    )
    k = np.array([2.0, 9.0])
    expected = (
        math.log(2 * math.pi) + np.log(special.i0(k)) - k * special.i1(k) / special.i0(k)
    ).sum()
    assert earth.entropy(one, 64) == pytest.approx(expected, abs=1e-5)  # VonMises is in float32
    density = earth.angles_with_known_density()
    x = density.sample((20_000,))
    log_p = density.log_prob(x)
    error = 5 * log_p.std().item() / 20_000**0.5
    assert abs(log_p.mean().item() + earth.entropy(density, 256)) < error
