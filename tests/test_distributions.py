"""Base distributions against torch.distributions and closed forms."""

import math

import pytest
import torch
from torch import distributions as torchd
from torch.distributions import Gamma, Independent, MultivariateNormal, Normal

import cnf
from cnf import Flow
from cnf.distributions import (
    Empirical,
    FromDensity,
    FromTorch,
    GaussianMixture,
    StandardLogistic,
    StandardNormal,
    Uniform,
    UniformAngles,
    as_base,
)
from cnf.transforms import Coupling

F64 = torch.float64


class Stub:
    """The least that a density must have."""

    dim = 2

    def sample(self, n, generator=None):
        return 3 + torch.randn(n, 2, generator=generator)  # in float32, as toys draw

    def log_prob(self, x):
        return Normal(torch.tensor(3.0, dtype=F64), 1.0).log_prob(x).sum(-1)


MEANS = torch.tensor([[-2.0, 0.5], [2.0, 1.0], [0.0, -3.0]], dtype=F64)
SCALES = torch.tensor([[0.5, 1.0], [1.5, 0.3], [1.0, 1.0]], dtype=F64)
BASES = {
    "normal": lambda: StandardNormal((2,)).double(),
    "logistic": lambda: StandardLogistic((2,)).double(),
    "mixture": lambda: GaussianMixture(MEANS, SCALES),
    "angles": lambda: UniformAngles(2, 3.0).double(),
    "uniform": lambda: Uniform(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)),
    "torch": lambda: FromTorch(Gamma(torch.tensor([2.0, 3.0], dtype=F64), 1.5)),
    "density": lambda: FromDensity(Stub()).double(),
}


@pytest.mark.parametrize("shape", [(2,), (1, 2, 3), (5,)])
def test_standard_normal_equals_torchs(shape, generator):
    z = torch.randn(7, *shape, generator=generator, dtype=F64)
    reference = Independent(Normal(torch.zeros(shape, dtype=F64), 1.0), len(shape))
    torch.testing.assert_close(StandardNormal(shape).log_prob(z), reference.log_prob(z))


def test_logistic_samples_are_finite_at_the_ends_of_the_uniform(monkeypatch):
    base = StandardLogistic((2,))
    monkeypatch.setattr(base, "_drawn", lambda *_: torch.tensor([0.0, 1.0]))
    low, high = base.sample().tolist()
    assert -20 < low < -15 and 15 < high < 20


def test_standard_logistic_equals_a_transformed_uniform(generator):
    z = 9 * torch.randn(7, 2, 3, generator=generator, dtype=F64)
    uniform = torchd.Uniform(torch.zeros((), dtype=F64), 1.0)
    logistic = torchd.TransformedDistribution(uniform, [torchd.SigmoidTransform().inv])
    expected = logistic.log_prob(z).sum((1, 2))
    torch.testing.assert_close(StandardLogistic((2, 3)).log_prob(z), expected)
    z = StandardLogistic((1,)).sample((100_000,), generator)
    assert z.isfinite().all() and z.var().item() == pytest.approx(math.pi**2 / 3, rel=0.02)


def test_mixture_density_by_hand():
    weights = torch.tensor([1.0, 2.0, 3.0], dtype=F64)  # not normalized
    z = torch.tensor([[0.3, -0.4], [2.0, 1.0]], dtype=F64)
    parts = [
        MultivariateNormal(m, torch.diag(s**2)).log_prob(z).exp()
        for m, s in zip(MEANS, SCALES, strict=True)
    ]
    expected = (parts[0] + 2 * parts[1] + 3 * parts[2]) / 6
    actual = GaussianMixture(MEANS, SCALES, weights).log_prob(z)
    torch.testing.assert_close(actual, expected.log())


def test_uniform_density_by_hand():
    base = Uniform(torch.tensor([0.0, 1.0]), torch.tensor([2.0, 4.0]))
    z = torch.tensor([[1.0, 2.0], [3.0, 2.0], [1.0, 0.0]])
    inside, *outside = base.log_prob(z).tolist()
    assert inside == pytest.approx(-math.log(6))
    assert outside == [-math.inf, -math.inf]
    ends = torchd.Uniform(base.low, base.high, validate_args=False)
    for z in (base.low, base.high):  # [low, high), as torch has it
        assert base.log_prob(z) == ends.log_prob(z).sum()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_uniform_has_a_density_at_each_of_its_own_samples(dtype, generator):
    low = torch.tensor([1e6 if dtype == torch.float32 else 512], dtype=dtype)
    step = torch.nextafter(low, low + low) - low
    base = Uniform(low, low + 16 * step)  # the upper end is one of 17 numbers
    drawn = base.sample((10_000,), generator)
    assert base.log_prob(drawn).isfinite().all() and len(drawn.unique()) == 16


def test_angles_are_centered_at_zero(generator):
    drawn = UniformAngles(1, 3.0).sample((1_000,), generator)
    assert -1.5 <= drawn.min() < -1.4 and 1.4 < drawn.max() < 1.5


def test_batch_dimensions_become_event():
    base = FromTorch(Normal(torch.zeros(3, 2), 1.0))
    assert base.event_shape == (3, 2)
    assert base.log_prob(torch.zeros(5, 3, 2)).shape == (5,)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_sample_shape_and_dtype(name, shape, generator):
    base = BASES[name]()
    z = base.sample(shape, generator)
    assert z.shape == (*shape, 2) and z.dtype == F64
    assert base.log_prob(z).shape == shape and base.log_prob(z).dtype == F64


@pytest.mark.parametrize("name", BASES)
def test_zero_draws_give_zero_rows(name):
    assert BASES[name]().sample((3, 0)).shape == (3, 0, 2)


@pytest.mark.parametrize("name", BASES)
def test_seeded_draws_repeat_and_do_not_change_the_global_generator(name):
    base = BASES[name]()
    before = torch.get_rng_state()
    first = base.sample((5,), torch.Generator().manual_seed(3))
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    again = base.sample((5,), torch.Generator().manual_seed(3))
    other = base.sample((5,), torch.Generator().manual_seed(4))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("name", BASES)
def test_one_generator_gives_new_draws_each_time(name, generator):
    base = BASES[name]()
    assert not torch.equal(base.sample((5,), generator), base.sample((5,), generator))


@pytest.mark.parametrize("name", BASES)
def test_global_seed_determines_draws_without_a_generator(name):
    base = BASES[name]()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        first = base.sample((5,))
        torch.manual_seed(1)
        assert torch.equal(first, base.sample((5,)))
        assert not torch.equal(first, base.sample((5,)))


@pytest.mark.parametrize("name", BASES)
def test_samples_follow_the_density(name, generator):
    # importance identity: E_p[q/p] = 1 for a q whose support lies inside p's
    base = BASES[name]()
    z = base.sample((40_000,), generator)
    inner = Independent(torchd.Uniform(*torch.tensor([[0.2, 0.2], [0.9, 0.9]], dtype=F64)), 1)
    inside = ((z >= 0.2) & (z < 0.9)).all(-1)
    ratio = torch.zeros(len(z), dtype=F64)
    ratio[inside] = (inner.log_prob(z[inside]) - base.log_prob(z[inside])).exp()
    error = ratio.std() / math.sqrt(len(z))
    assert abs(ratio.mean() - 1) < 4 * error  # four standard errors, seeded


def test_standard_normal_has_dtype_and_device_of_the_module():
    base = StandardNormal((3,))
    assert base.sample().dtype == torch.float32
    assert base.double().sample().dtype == F64


def test_points_are_drawn_uniformly_and_have_no_density(generator):
    points = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0]], dtype=F64)
    base = as_base(points.numpy(), ())
    assert isinstance(base, Empirical) and not base.has_density and base.event_shape == (2,)
    drawn = base.sample((3000, 2), generator)
    assert drawn.shape == (3000, 2, 2) and drawn.dtype == F64
    rows, counts = drawn.reshape(-1, 2).unique(dim=0, return_counts=True)
    assert torch.equal(rows, points) and (counts - 2000).abs().max() < 150
    with pytest.raises(ValueError, match="source is a set of points, which has no density"):
        base.log_prob(points)
    with pytest.raises(ValueError, match="Empirical: expected points to be finite"):
        Empirical(torch.tensor([[0.0], [math.nan]]))
    with pytest.raises(ValueError, match="Empirical: expected one point or more"):
        Empirical(torch.empty(0, 2))


def test_as_base_accepts_distributions_and_densities():
    base = StandardNormal((2,))
    assert as_base(base, ()) is base
    assert as_base(None, (4,)).event_shape == (4,)
    assert isinstance(as_base(Normal(torch.zeros(2), 1.0), ()), FromTorch)
    assert isinstance(as_base(Stub(), ()), FromDensity)
    with pytest.raises(ValueError, match="got str"):
        as_base("normal", ())


ONES = torch.ones(2, dtype=F64)
BOUNDED = {  # a base, a point inside, one outside
    "uniform": (torchd.Uniform(0 * ONES, ONES), [0.2, 0.7], [0.2, 1.3]),
    "beta": (torchd.Beta(2 * ONES, 3 * ONES), [0.2, 0.7], [-0.2, 0.7]),
    "gamma": (Gamma(2 * ONES, 3 * ONES), [0.2, 1.7], [0.2, -0.7]),
    "exponential": (torchd.Exponential(ONES), [0.2, 1.7], [0.2, -0.7]),
    "log-normal": (torchd.LogNormal(ONES, ONES), [0.2, 1.7], [0.2, -0.7]),
    "dirichlet": (torchd.Dirichlet(2 * ONES), [0.2, 0.8], [0.2, 0.7]),
    "shifted uniform": (
        torchd.TransformedDistribution(
            torchd.Uniform(0 * ONES, ONES), torchd.AffineTransform(2.0, 3.0)
        ),
        [2.5, 4.0],
        [2.5, 1.0],
    ),
    "boxes": (
        torchd.MixtureSameFamily(
            torchd.Categorical(ONES),
            Independent(
                torchd.Uniform(
                    torch.tensor([[0.0, 0], [2, 2]], dtype=F64),
                    torch.tensor([[1.0, 1], [3, 3]], dtype=F64),
                ),
                1,
            ),
        ),
        [2.5, 2.1],
        [1.5, 0.5],
    ),
}


@pytest.mark.parametrize("name", BOUNDED)
def test_point_outside_of_a_bounded_base_has_density_zero_and_affects_no_other(name):
    distribution, inside, outside = BOUNDED[name]
    base = as_base(distribution, ())
    z = torch.tensor([inside, outside, inside], dtype=F64, requires_grad=True)
    found = base.log_prob(z)
    if name == "boxes":
        expected = torch.full((2,), math.log(0.5), dtype=F64)
    else:
        expected = distribution.log_prob(z[[0, 2]])
        expected = expected.sum(-1) if expected.dim() > 1 else expected
    assert found[1] == -math.inf
    torch.testing.assert_close(found[[0, 2]], expected)
    if found.requires_grad:  # a uniform density has no gradient
        (grad,) = torch.autograd.grad(found[[0, 2]].sum(), z)
        (right,) = torch.autograd.grad(expected.sum(), z)
        torch.testing.assert_close(grad, right)


class Counted(torchd.Exponential):
    """How often its density is computed."""

    evaluations = 0

    def log_prob(self, value):
        self.evaluations += 1
        return super().log_prob(value)


def test_density_without_gradients_is_evaluated_once():
    base, z = as_base(Counted(ONES), ()), torch.tensor([[0.3, 0.7], [0.3, -0.7]], dtype=F64)
    inner = base.density.base_dist.inner
    found = base.log_prob(z)
    assert inner.evaluations == 1 and found.tolist() == [pytest.approx(-1.0), -math.inf]
    with torch.no_grad():
        base.log_prob(z.requires_grad_())
    assert inner.evaluations == 2
    (grad,) = torch.autograd.grad(base.log_prob(z)[0], z)
    assert grad.tolist() == [[-1, -1], [0, 0]]
    _, forward = torch.func.jvp(base.log_prob, (z[:1].detach(),), (torch.ones(1, 2, dtype=F64),))
    assert forward.tolist() == [-2]


def test_parameters_of_a_bounded_base_have_gradients():
    rate = torch.tensor([0.5, 2.0], dtype=F64, requires_grad=True)
    base = as_base(torchd.Exponential(rate), ())
    z = torch.tensor([[0.3, 0.7], [0.3, -0.7]], dtype=F64)
    found = base.log_prob(z)
    (grad,) = torch.autograd.grad(found[0], rate)
    torch.testing.assert_close(grad, 1 / rate.detach() - z[0])  # of log λ - λ z
    with torch.no_grad():
        assert torch.equal(base.log_prob(z), found)


@pytest.mark.parametrize("name", ["uniform", "gamma", "boxes"])
def test_flow_with_a_bounded_base_has_log_prob_minus_infinity_outside(name):
    distribution, inside, outside = BOUNDED[name]
    flow = Flow(distribution, Coupling(2)).double()  # the identity at the start
    found = flow.log_prob(torch.tensor([inside, outside, [math.nan, 0.5]], dtype=F64))
    assert found[0].isfinite() and found[1] == -math.inf and found[2].isnan()
    found[0].backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in flow.parameters())


@pytest.mark.parametrize("name", ["checkerboard", "moons"])
def test_toy_as_base_has_log_prob_minus_infinity_far_outside(name):
    flow = Flow(cnf.data.toy(name), Coupling(2))
    x = torch.cat(
        [cnf.data.toy(name).sample(3, torch.Generator().manual_seed(0)), torch.full((1, 2), 1e4)]
    )
    x.requires_grad_()
    found = flow.log_prob(x)
    assert found[:3].isfinite().all() and found[3] < -1e4
    (grad,) = torch.autograd.grad(found[:3].sum(), x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", ["angles", "uniform", "torch"])
def test_nan_has_log_prob_nan_for_angles_and_boxes(name):
    assert BASES[name]().log_prob(torch.tensor([math.nan, 0.5], dtype=F64)).isnan()


WITHOUT_VOLUME = {
    "Bernoulli": torchd.Bernoulli(torch.full((2,), 0.5)),
    "Poisson": torchd.Independent(torchd.Poisson(torch.ones(2)), 1),
    "OneHotCategorical": torchd.OneHotCategorical(torch.ones(2)),
    "scaled Poisson": torchd.TransformedDistribution(
        torchd.Poisson(torch.ones(2)), [torchd.AffineTransform(0.0, 2.0)]
    ),
    "Dirichlet": torchd.Dirichlet(torch.ones(2)),
    "LogisticNormal": torchd.LogisticNormal(torch.zeros(1), torch.ones(1)),
}


@pytest.mark.parametrize("name", WITHOUT_VOLUME)
def test_discrete_or_degenerate_base_is_refused(name):
    transform = cnf.models.build("realnvp", dim=2).transform
    with pytest.raises(ValueError, match="^Flow: expected base to (be continuous|fill the space)"):
        cnf.Flow(WITHOUT_VOLUME[name], transform)


@pytest.mark.parametrize(
    "base",
    [
        torchd.Uniform(torch.zeros(2), torch.ones(2)),
        torchd.Gamma(torch.ones(2), torch.ones(2)),
        torchd.MultivariateNormal(torch.zeros(2), torch.eye(2)),
        torchd.TransformedDistribution(
            torchd.Normal(torch.zeros(2), torch.ones(2)), [torchd.ExpTransform()]
        ),
    ],
)
def test_base_with_a_density_is_accepted(base):
    transform = cnf.models.build("realnvp", dim=2).transform
    assert cnf.Flow(base, transform).sample(3).shape == (3, 2)
