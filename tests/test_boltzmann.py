"""The energies of experiments/boltzmann: quadrature against other integrals, and error bars."""

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch

import cnf
from cnf.transforms import LU

FOLDER = Path(__file__).parent.parent / "experiments" / "boltzmann"


@pytest.fixture
def systems():
    """The module experiments/boltzmann/systems.py."""
    spec = importlib.util.spec_from_file_location("systems", FOLDER / "systems.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["systems"] = module  # where its dataclass looks for its annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["systems"]


def test_double_well_is_a_line_integral_times_a_gaussian_one(systems):
    quad = pytest.importorskip("scipy.integrate").quad
    system = systems.double_well(a=1.2, b=5.0, c=0.7, d=2.0)

    def density(x):
        return math.exp(-(0.3 * x**4 - 2.5 * x**2 + 0.7 * x))

    ends = (-6, system.split, 6)
    left, right = (quad(density, *ends[k : k + 2], epsabs=0, epsrel=1e-11)[0] for k in (0, 1))
    gaussian = math.sqrt(2 * math.pi / 2.0)
    expected = math.log((left + right) * gaussian)
    assert system.log_evidence() == pytest.approx(expected, abs=1e-9)
    assert system.difference() == pytest.approx(math.log(left / right), abs=1e-9)
    edges = torch.tensor([-2.6, -2.4])
    bin_mass = quad(density, *edges.tolist(), epsrel=1e-11)[0] / (left + right)
    assert system.profile(edges).item() == pytest.approx(-math.log(bin_mass), abs=1e-9)


def test_mueller_brown_integrals_are_those_of_a_fine_grid(systems):
    """The midpoint rule on axes x and y, whose cells make stairs of the line between basins."""
    system, spacing = systems.mueller_brown(), 0.004
    ends = torch.arange(-2.5, 3.5, spacing, dtype=torch.float64) + spacing / 2
    points = torch.cartesian_prod(ends - 0.5, ends)
    log_p = system.log_density(points)
    expected = float(log_p.logsumexp(0)) + 2 * math.log(spacing)
    assert system.log_evidence() == pytest.approx(expected, abs=1e-9)
    left = system.coordinate(points) < system.split
    expected = float(log_p[left].logsumexp(0) - log_p[~left].logsumexp(0))
    assert system.difference() == pytest.approx(expected, abs=1e-4)


def test_mueller_brown_has_its_published_stationary_points(systems):
    """Minima -146.70, -108.17 and -80.77, saddles -40.66 and -72.25, in the paper's units."""
    system = systems.mueller_brown(temperature=1.0)
    points = torch.tensor(
        [[-0.558, 1.442], [0.623, 0.028], [-0.050, 0.467], systems.SADDLE, [0.212, 0.293]],
        dtype=torch.float64, requires_grad=True,
    )  # fmt: skip
    energy = system.energy(points)
    (slope,) = torch.autograd.grad(energy.sum(), points)
    told = torch.tensor([-146.70, -108.17, -80.77, -40.66, -72.25], dtype=torch.float64)
    torch.testing.assert_close(energy.detach(), told, rtol=0, atol=0.01)
    assert slope.abs().max() < 2  # within the three digits of the points, of curvatures to 2,600


def test_basins_are_two_parts_of_the_density(systems):
    for build in systems.SYSTEMS.values():
        system = build()
        basins = [system.log_density_in(k)(system.minima) for k in (0, 1)]
        inside = torch.stack(basins) > -math.inf
        assert torch.equal(inside, torch.eye(2, dtype=torch.bool))
        assert sum(math.exp(-f) for f in system.free_energies()) == pytest.approx(
            math.exp(system.log_evidence())
        )


def test_difference_by_weights_is_exact_within_its_error(systems):
    """Of a base of known density: 40 estimates scatter as each says."""
    system = systems.double_well(b=2.0, c=0.3)
    base = torch.distributions.Normal(torch.zeros(2), torch.tensor([1.5, 1.0]))
    flow = cnf.Flow(base, LU(2))
    found = []
    for seed in range(40):
        own = torch.Generator().manual_seed(seed)
        parts = [
            cnf.metrics.log_evidence(flow, system.log_density_in(k), 400, generator=own)
            for k in (0, 1)
        ]
        error = math.hypot(*(float(part.error) for part in parts))
        found.append((float(parts[0].value - parts[1].value) - system.difference()) / error)
    scatter = torch.tensor(found)
    assert scatter.std().item() == pytest.approx(1, abs=0.34)  # 3 errors of 40 draws
    assert abs(scatter.mean()) < 0.47


def test_metropolis_counts_what_quadrature_does(systems):
    """A low barrier, which chains cross: half start in each basin, 70 % end in the first."""
    system = systems.double_well(b=2.0, c=0.3)
    path = systems.metropolis(system, 200, 1_000, 1.2, torch.Generator().manual_seed(0))
    assert path.shape == (90, 200, 2)
    share = (system.coordinate(path[30:]) >= system.split).double().mean().item()
    exact = 1 / (1 + math.exp(system.difference()))
    assert exact < 0.4 and share == pytest.approx(exact, abs=0.02)
