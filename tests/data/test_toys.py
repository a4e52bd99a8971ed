import math
import subprocess
import sys

import pytest
import torch

from cnf.data import TOYS, toy
from cnf.data.noisy_curves import Curves
from cnf.data.pinwheel import TURN, preimages, twist

# ± .002: the published table (closed form for the checkerboard, quadrature for the others)
PUBLISHED = {
    "8gaussians": 2.8319,
    "checkerboard": math.log(32),
    "circles": 3.2681,
    "rings": 2.6232,
    "moons": 2.3935,
    "swissroll": 2.6696,
    "2spirals": 2.6454,
    "pinwheel": 2.3178,
}
CURVED = [name for name in TOYS if isinstance(toy(name), Curves)]
SMOOTH = [name for name in TOYS if name != "checkerboard"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", PUBLISHED)
def test_entropy_is_the_published_value(name):
    assert toy(name).entropy == pytest.approx(PUBLISHED[name], abs=0.002)


def test_far_apart_gaussians_have_the_closed_form_entropy():
    # 25 modes that do not overlap: entropy of the choice plus that of one normal
    closed = math.log(25) + 1 + math.log(2 * math.pi * (0.05 / 2.828) ** 2)
    assert toy("25gaussians").entropy == pytest.approx(closed, abs=1e-5)  # mass beyond the box


@pytest.mark.parametrize("name", TOYS)
def test_density_integrates_to_one(name):
    points, area = toy(name).grid()
    mass = float(toy(name).log_prob(points).exp().sum() * area)
    assert mass == pytest.approx(1, abs=1e-5)  # what the box leaves out


@pytest.mark.parametrize("name", TOYS)
def test_density_agrees_with_samples(name):
    """Counts in blocks of cells against the mass that the density puts there."""
    density, n, blocks = toy(name), 200_000, 24
    low, high = (torch.tensor(corner, dtype=torch.float64) for corner in box(density))
    edges = [torch.linspace(float(low[k]), float(high[k]), blocks + 1) for k in (0, 1)]
    sample = density.sample(n, seeded())
    index = [torch.bucketize(sample[:, k].contiguous(), edges[k]) - 1 for k in (0, 1)]
    counts = torch.zeros(blocks, blocks, dtype=torch.float64)
    counts.index_put_(tuple(index), torch.ones(n, dtype=torch.float64), accumulate=True)
    fine = 10 if name != "25gaussians" else 30
    steps = (torch.arange(blocks * fine, dtype=torch.float64) + 0.5) / (blocks * fine)
    axes = [low[k] + (high[k] - low[k]) * steps for k in (0, 1)]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    area = float((high - low).prod()) / (blocks * fine) ** 2
    mass = density.log_prob(points).exp().reshape(blocks, fine, blocks, fine).sum((1, 3)) * area
    expected = n * mass
    z = ((counts - expected) / expected.clamp(min=5).sqrt()).flatten()
    assert z.abs().max() < 5  # 576 cells: the largest of as many normals is about 3.2
    big = expected.flatten() >= 5
    chi2, cells = float(z[big].square().sum()), int(big.sum())
    assert abs(chi2 - cells) < 5 * math.sqrt(2 * cells)


def box(density):
    return density.support.double().tolist()


@pytest.mark.parametrize("name", TOYS)
def test_mean_negative_log_prob_is_the_entropy(name):
    surprise = -toy(name).log_prob(toy(name).sample(20_000, seeded(1)).double())
    error = float(surprise.std()) / math.sqrt(len(surprise))
    # 1e-6 for the checkerboard, whose surprise does not vary
    assert abs(float(surprise.mean()) - toy(name).entropy) < 4 * error + 1e-6


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("n", [0, 1, 7, 203])
def test_sample_has_exactly_n_float32_rows(name, n):
    sample = toy(name).sample(n, seeded())
    assert sample.shape == (n, 2) and sample.dtype == torch.float32


@pytest.mark.parametrize("name", TOYS)
def test_sample_depends_on_the_generator_alone(name):
    torch.manual_seed(0)
    first = toy(name).sample(50, seeded(3))
    torch.manual_seed(1)
    assert torch.equal(first, toy(name).sample(50, seeded(3)))
    assert not torch.equal(first, toy(name).sample(50, seeded(4)))
    torch.manual_seed(2)
    unseeded = toy(name).sample(50)
    torch.manual_seed(2)
    assert torch.equal(unseeded, toy(name).sample(50))


@pytest.mark.parametrize("name", TOYS)
def test_rows_are_independent(name):
    x = toy(name).sample(100_000, seeded(5)).double()
    x = (x - x.mean(0)) / x.std(0)
    neighbors = (x[1:].T @ x[:-1]) / len(x)
    assert neighbors.abs().max() < 4.5 / math.sqrt(len(x))


@pytest.mark.parametrize("name", TOYS)
def test_support_holds_all_but_a_negligible_part(name):
    density = toy(name)
    low, high = density.support
    sample = density.sample(100_000, seeded(6))
    outside = ((sample < low) | (sample > high)).any(-1)
    assert density.support.shape == (2, 2) and int(outside.sum()) <= 3  # below 1e-5 of the mass


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_prob_follows_dtype_and_batch_shape(name, dtype):
    x = toy(name).sample(6, seeded()).to(dtype)
    rows = toy(name).log_prob(x)
    assert rows.dtype == dtype and rows.isfinite().all()
    for shape in [(), (4,), (2, 3), (0,)]:
        count = math.prod(shape)
        value = toy(name).log_prob(x[:count].reshape(*shape, 2))
        assert value.shape == shape and value.dtype == dtype
        # atol: the order of sums depends on the number of rows
        torch.testing.assert_close(value.flatten(), rows[:count], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", TOYS)
def test_float32_log_prob_is_computed_in_float64(name):
    x = toy(name).sample(300, seeded(7))
    torch.testing.assert_close(
        toy(name).log_prob(x), toy(name).log_prob(x.double()).float(), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", TOYS)
def test_log_prob_does_not_depend_on_chunks(name, monkeypatch):
    x = toy(name).sample(50, seeded(8)).double()
    whole = toy(name).log_prob(x)
    monkeypatch.setattr(type(toy(name)), "_chunk", 7)
    torch.testing.assert_close(toy(name).log_prob(x), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in CURVED if toy(name).nodes > 1])
def test_quadrature_does_not_change_with_twice_the_nodes(name):
    curves = toy(name)
    finer = Curves(name, curves.arms, curves.noise, 2 * curves.nodes, curves.power)
    spread = max(2.5, curves.sample(500, seeded()).std().item())
    wide = torch.randn(1000, 2, dtype=torch.float64, generator=seeded()) * spread
    x = torch.cat([wide, curves.sample(500, seeded()).double()])
    coarse, fine = curves.log_prob(x), finer.log_prob(x)
    tail = fine > -100  # nats: no other tail was ever seen in a sample
    assert (fine < -40).any()
    torch.testing.assert_close(coarse[tail], fine[tail], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CURVED)
def test_curves_agree_with_a_brute_force_mixture(name):
    """Each u of a fine midpoint rule is a mixture component; the noise is torch's own normal."""
    curves = toy(name)
    n = 20_000 if curves.nodes > 1 else 1  # one: constant curves
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    points = curves.arms(u ** (1 / curves.power)).flatten(0, 1)
    x = curves.sample(20, seeded(9)).double()
    normal = torch.distributions.Normal(0, torch.tensor(curves.noise.sigma, dtype=torch.float64))
    offset = x[:, None] - points
    if width := getattr(curves.noise, "width", None):
        density = (normal.cdf(offset + width / 2) - normal.cdf(offset - width / 2)) / width
    else:
        density = normal.log_prob(offset).exp()
    brute = density.prod(-1).mean(-1).log()
    # atol: midpoint rule with a kink at u = 0 where the root is taken
    torch.testing.assert_close(curves.log_prob(x), brute, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["circles", "rings"])
def test_rings_agree_with_an_average_over_the_angle(name):
    rings = toy(name)
    angle = 2 * math.pi * torch.arange(4000, dtype=torch.float64) / 4000
    circle = torch.stack([angle.cos(), angle.sin()], -1)
    x = torch.cat([rings.sample(20, seeded(10)).double(), torch.zeros(1, 2).double()])
    centers = torch.cat([radius * circle for radius in rings.radii])
    square = (x[:, None] - centers).square().sum(-1) / (2 * rings.sigma**2)
    brute = (-square).logsumexp(-1) - math.log(len(centers) * 2 * math.pi * rings.sigma**2)
    torch.testing.assert_close(rings.log_prob(x), brute, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SMOOTH)
def test_gradient_is_that_of_finite_differences(name):
    x = toy(name).sample(30, seeded(11)).double().requires_grad_()
    (gradient,) = torch.autograd.grad(toy(name).log_prob(x).sum(), x)
    step, x = 1e-6, x.detach()
    for axis in (0, 1):
        shift = step * torch.eye(2, dtype=torch.float64)[axis]
        slope = (toy(name).log_prob(x + shift) - toy(name).log_prob(x - shift)) / (2 * step)
        # 1e-5 · gradients of up to 100: cancellation at step 1e-6
        torch.testing.assert_close(gradient[:, axis], slope, rtol=1e-5, atol=1e-5)


def test_gradient_of_the_checkerboard_is_zero():
    x = toy("checkerboard").sample(9, seeded()).requires_grad_()
    (gradient,) = torch.autograd.grad(toy("checkerboard").log_prob(x).sum(), x)
    assert torch.equal(gradient, torch.zeros(9, 2))


def test_checkerboard_has_its_eight_squares():
    centers = torch.tensor([-3.0, -1.0, 1.0, 3.0])
    board = toy("checkerboard").log_prob(torch.cartesian_prod(centers, centers)).reshape(4, 4)
    held = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]] * 2, dtype=torch.bool)  # rows are x1
    assert torch.equal(board.isfinite(), held)
    torch.testing.assert_close(board[held], torch.full((8,), -math.log(32)))
    assert toy("checkerboard").log_prob(torch.tensor([-4.1, -3.0])) == -math.inf


def test_pinwheel_density_is_the_jacobian_of_the_twist():
    """Where (a, b, k) is the only preimage with mass, autograd's Jacobian gives the density."""
    a = 1 + 0.3 * torch.randn(400, dtype=torch.float64, generator=seeded())
    b = 0.1 * torch.randn(400, dtype=torch.float64, generator=seeded(1))
    turn = TURN * torch.randint(5, (400,), generator=seeded(2)).double()
    x = twist(a, b, turn)
    jacobian = torch.vmap(torch.func.jacrev(lambda p, t: twist(p[0], p[1], t)))
    ladj = torch.linalg.slogdet(jacobian(torch.stack([a, b], -1), turn)).logabsdet
    scale = torch.tensor([0.3, 0.1], dtype=torch.float64)
    normal = torch.distributions.Normal(torch.zeros_like(scale), scale)
    one = normal.log_prob(torch.stack([a - 1, b], -1)).sum(-1) - ladj - math.log(5)
    value = toy("pinwheel").log_prob(x)
    assert (value >= one - 1e-9).all()  # the other preimages only add
    alone = value < one + 1e-3
    assert alone.float().mean() > 0.7
    torch.testing.assert_close(value[alone], one[alone], rtol=0, atol=1e-3)


def test_pinwheel_preimages_are_those_of_a_fine_scan():
    y = torch.randn(200, 2, dtype=torch.float64, generator=seeded(12)) * 1.3
    point, a, turn = preimages(y)
    found = torch.zeros(200, 5)
    arm = (turn / TURN).round().long() % 5
    found.index_put_((point, arm), torch.ones(len(a)), accumulate=True)
    grid = torch.linspace(-6, 6, 100_001, dtype=torch.float64)
    for k in range(5):
        angle = TURN * k + grid.exp() / 4
        for i in range(0, 200, 10):
            inside = grid.abs() <= y[i].norm() + 1e-3
            gap = (grid - y[i, 0] * angle.cos() + y[i, 1] * angle.sin())[inside]
            assert int((gap[1:].sign() != gap[:-1].sign()).sum()) == int(found[i, k])
    b = y[point, 0] * (turn + a.exp() / 4).sin() + y[point, 1] * (turn + a.exp() / 4).cos()
    torch.testing.assert_close(twist(a, b, turn), 2 * y[point], rtol=0, atol=1e-7)
    assert (torch.bincount(point) > 5).any()  # folds are among the points


@pytest.mark.parametrize("name", TOYS)
def test_log_prob_far_away_is_not_nan(name):
    x = torch.tensor([[0.0, 0.0], [9.0, -9.0], [1e3, 0.0], [math.inf, 0.0], [math.nan, 0.0]])
    value = toy(name).log_prob(x)
    assert not value[:4].isnan().any() and value[4].isnan()
    assert (value[1:4].diff() <= 0).all() or name == "checkerboard"


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown density 'swisroll'.*Did you mean 'swissroll'"):
        toy("swisroll")


@pytest.mark.parametrize("n", [-1, 2.0, "3", True, None])
def test_sample_refuses_invalid_counts(n):
    with pytest.raises(ValueError, match="moons.sample: expected n"):
        toy("moons").sample(n)


@pytest.mark.parametrize("x", [torch.zeros(5, 3), torch.zeros(5, 2, dtype=torch.int64), 1.0])
def test_log_prob_refuses_invalid_points(x):
    with pytest.raises(ValueError, match="moons.log_prob: expected x"):
        toy("moons").log_prob(x)


def test_import_loads_no_heavy_package():
    code = (
        "import sys, torchdiffeq; before = set(sys.modules); import cnf.data; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; "
        "assert not new & {'scipy', 'pyarrow', 'PIL', 'matplotlib', 'sklearn'}, new"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
