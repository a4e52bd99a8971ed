"""Fields that predict data, noise or score, on Gaussians with closed forms."""

import math

import pytest
import torch

import cnf
from cnf.fields import (
    MLPField,
    NullContext,
    Piecewise,
    Predicts,
    VectorField,
    WithScore,
    converted,
    exact_divergence,
    score,
)
from cnf.transforms import Continuous

F64 = torch.float64
TARGETS = ("velocity", "x1", "noise", "score")
M, S = 1.5, 0.4  # the data are N(M, S²) in every coordinate


def vp(t):
    s = 1 - t
    alpha = torch.exp(-0.5 * (0.1 * s + 0.5 * 19.9 * s**2))
    return alpha, (1 - alpha**2).sqrt(), 0 * t


def cosine(t):
    def f(s):
        return torch.cos(0.5 * math.pi * (s + 0.008) / 1.008)

    alpha = f(1 - t) / f(torch.zeros_like(t))
    return alpha, (1 - alpha**2).sqrt(), 0 * t


# Path, and what x1, x0 and z are multiplied by in its point at t.
PATHS = {
    "linear": ("linear", lambda t: (t, 1 - t, 0 * t)),
    "linear, σ = 0.1": ({"name": "linear", "sigma_min": 0.1}, lambda t: (t, 1 - 0.9 * t, 0 * t)),
    "linear, noise": ({"name": "linear", "noise": 0.3}, lambda t: (t, 1 - t, 0.3 + 0 * t)),
    "polynomial": ("polynomial", lambda t: (t**2, 1 - t**2, 0 * t)),
    "trigonometric": (
        "trigonometric",
        lambda t: (torch.sin(math.pi / 2 * t), torch.cos(math.pi / 2 * t), 0 * t),
    ),
    "vp": ("vp", vp),
    "cosine": ("cosine", cosine),
    "interpolant": ("interpolant", lambda t: (t, 1 - t, torch.sin(math.pi * t) ** 2)),
    "bridge": ("bridge", lambda t: (t, 1 - t, (t * (1 - t)).sqrt())),
}


class Gauss:
    """N(0, 1) to N(M, S²): means given xt, and the law of xt, from the coefficients alone."""

    def __init__(self, name):
        self.path, self.coefficients = cnf.matching.PATHS.build(PATHS[name][0]), PATHS[name][1]

    def law(self, t):
        """Mean and standard deviation of xt."""
        alpha, sigma, gamma = self.coefficients(t)
        return alpha * M, (alpha**2 * S**2 + sigma**2 + gamma**2).sqrt()

    def law_and_slope(self, t):
        return torch.func.jvp(self.law, (t,), (torch.ones_like(t),))

    def mean(self, target, t, x):
        """E[target | xt = x]; the velocity of a Gaussian that moves and widens is affine."""
        t = t.reshape(*t.shape, *[1] * (x.dim() - t.dim()))
        (center, spread), (d_center, d_spread) = self.law_and_slope(t)
        alpha, sigma, gamma = self.coefficients(t)
        if target == "velocity":
            return d_center + d_spread / spread * (x - center)
        if target == "x1":
            return M + alpha * S**2 / spread**2 * (x - center)
        if target == "noise":
            return (sigma**2 + gamma**2).sqrt() / spread**2 * (x - center)
        if target == "z":
            return gamma / spread**2 * (x - center)
        return -(x - center) / spread**2

    def field(self, target, event=(2,)):
        return Mean(self, target, event)


class Mean(VectorField):
    """A network that predicts its target exactly."""

    def __init__(self, gauss, target, event):
        super().__init__(event)
        self.gauss, self.target = gauss, target
        self.gain = torch.nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, t, x, context=None):
        return self.gain * self.gauss.mean(self.target, t, x)


class Known(Mean):
    """The same with a closed-form divergence."""

    def with_divergence(self, t, x, context=None):
        one = self(t, torch.ones_like(x)) - self(t, torch.zeros_like(x))
        return self(t, x), one.flatten(-len(self.event_shape)).sum(-1)


@pytest.fixture(params=["shared time", "own times"])
def points(request, generator):
    def draw(event=(2,)):
        x = 2 * torch.randn(5, *event, generator=generator, dtype=F64) + 1
        own = torch.tensor([0.05, 0.3, 0.5, 0.77, 0.97], dtype=F64)
        return (own if request.param == "own times" else own[1]), x

    return draw


def test_closed_forms_of_this_file_follow_from_the_joint_gaussian(generator):
    """The helper itself: the velocity is what x1, x0 and z give, and Tweedie's formula holds."""
    x, t = torch.randn(6, 1, generator=generator, dtype=F64), torch.tensor(0.3, dtype=F64)
    for name in PATHS:
        gauss = Gauss(name)
        coefficients, slopes = torch.func.jvp(gauss.coefficients, (t,), (torch.ones_like(t),))
        center, spread = gauss.law(t)
        prior = (S**2, 1.0, 1.0)
        means = [
            mu + c * v / spread**2 * (x - center)
            for mu, c, v in zip((M, 0, 0), coefficients, prior, strict=True)
        ]
        velocity = sum(d * mean for d, mean in zip(slopes, means, strict=True))
        torch.testing.assert_close(gauss.mean("velocity", t, x), velocity)
        y = x.clone().requires_grad_()
        log_density = torch.distributions.Normal(center, spread).log_prob(y).sum()
        (slope,) = torch.autograd.grad(log_density, y)
        torch.testing.assert_close(gauss.mean("score", t, x), slope)


@pytest.mark.parametrize("event", [(2,), (1, 3, 2)], ids=str)
@pytest.mark.parametrize("name", PATHS)
def test_each_target_converts_to_each_other(name, event, points):
    gauss, (t, x) = Gauss(name), points(event)
    means = {target: gauss.mean(target, t, x) for target in TARGETS}
    for given, value in means.items():
        for wanted, expected in means.items():
            found = converted(value, given, wanted, x, t, gauss.path)
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert all((value.abs() > 1e-2).any() for value in means.values())
    assert found.shape == x.shape


KINDS = [((2,), "network"), ((1, 3, 2), "network"), ((2,), "network with a divergence")]


@pytest.mark.parametrize(("event", "kind"), KINDS, ids=str)
@pytest.mark.parametrize("name", PATHS)
def test_prediction_is_converted_to_velocity_and_divergence(
    name, event, kind, points, autograd_divergence
):
    gauss, (t, x) = Gauss(name), points(event)
    expected = gauss.mean("velocity", t, x)
    (_, spread), (_, d_spread) = gauss.law_and_slope(t)
    closed = math.prod(event) * (d_spread / spread).expand(5)
    for target in TARGETS:
        network = (Mean if kind == "network" else Known)(gauss, target, event)
        field = Predicts(network, target, gauss.path)
        v, div = field.with_divergence(t, x)
        torch.testing.assert_close(v, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(field(t, x), v)
        torch.testing.assert_close(div, closed, rtol=1e-9, atol=1e-9)
        assert div.shape == (5,) and div.abs().max() > 0.01
    torch.testing.assert_close(div, autograd_divergence(field, t, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("target", ["x1", "noise", "score"])
@pytest.mark.parametrize("name", PATHS)
def test_velocity_is_constant_within_the_margin(name, target, generator):
    gauss, x = Gauss(name), torch.randn(4, 2, generator=generator, dtype=F64)
    field = Predicts(gauss.field(target), target, gauss.path)
    for t, edge in ((0.0, 0.01), (0.004, 0.01), (0.995, 0.99), (1.0, 0.99)):
        found = field.with_divergence(torch.tensor(t, dtype=F64), x)
        at_edge = field.with_divergence(torch.tensor(edge, dtype=F64), x)
        torch.testing.assert_close(found, at_edge, rtol=0, atol=0)
        torch.testing.assert_close(
            found[0], gauss.mean("velocity", torch.tensor(edge, dtype=F64), x), rtol=1e-8, atol=0
        )
        assert found[0].isfinite().all()


def with_frozen_ends(gauss):
    """Shift and scale of the map from z to x(1) where the velocity stands still within 0.01 of the
    ends; in between it is the Gaussian's own."""
    low, high = (torch.tensor(t, dtype=F64) for t in (0.01, 0.99))
    shift, scale = torch.zeros((), dtype=F64), torch.ones((), dtype=F64)
    for stage in ("start", "middle", "end"):
        if stage == "middle":
            (a, b), (c, d) = gauss.law(low), gauss.law(high)
            factor, push = d / b, c - d / b * a
        else:  # dx/dt = rate·x + offset for 0.01
            (center, spread), slope = gauss.law_and_slope(low if stage == "start" else high)
            rate = slope[1] / spread
            offset = slope[0] - rate * center
            factor = torch.exp(0.01 * rate)
            push = offset * torch.expm1(0.01 * rate) / rate
        shift, scale = factor * shift + push, factor * scale
    return shift, scale


# What the margin of 0.01 costs log p, in nats, on the data: where a path bends near its ends, or
# begins beside N(0, 1) as vp does. Linear paths that end with noise are not data's there at all.
COST = {
    "linear": 1e-3, "polynomial": 6e-3, "trigonometric": 2e-3, "vp": 0.05, "cosine": 3e-3,
    "interpolant": 1e-3, "bridge": 3e-3,
}  # fmt: skip


@pytest.mark.parametrize("target", ["x1", "noise", "score"])
@pytest.mark.parametrize("name", PATHS)
def test_flow_of_a_perfect_network_has_the_density_of_the_data(name, target, generator):
    gauss = Gauss(name)
    field = Predicts(Known(gauss, target, (2,)), target, gauss.path)
    # the velocity has kinks where it begins and ceases to stand still; the grid steps on them
    inner = [0.01 + 0.98 * math.sin(math.pi / 2 * k / 18) ** 2 for k in range(19)]
    solver = cnf.Solver("rk4", grid=(0.0, *inner, 1.0))
    flow = cnf.Flow(None, Continuous(field, solver), event_shape=(2,)).double()
    x = M + S * torch.randn(6, 2, generator=generator, dtype=F64)
    shift, scale = with_frozen_ends(gauss)
    exact = torch.distributions.Normal(shift, scale).log_prob(x).sum(-1)
    with torch.no_grad():
        found = flow.log_prob(x)
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-3)  # 20 steps of rk4
    if name in COST:
        true = torch.distributions.Normal(M, S).log_prob(x).sum(-1)
        assert (exact - true).abs().max() < COST[name]


def test_score_of_the_wrong_sign_gives_another_velocity(generator):
    gauss = Gauss("linear")
    t, x = torch.tensor(0.6, dtype=F64), torch.randn(4, 2, generator=generator, dtype=F64)
    flipped = converted(-gauss.mean("score", t, x), "score", "velocity", x, t, gauss.path)
    assert (flipped - gauss.mean("velocity", t, x)).abs().max() > 0.3


def test_conversion_holds_for_dependent_pairs():
    """x1 = 2·x0 + 1: velocity, x1 and noise are conversions of each other for any coupling."""
    path, t = cnf.matching.PATHS.build("linear"), torch.tensor([0.3], dtype=F64)
    x0 = torch.tensor([[0.7, -1.1]], dtype=F64)
    x1 = 2 * x0 + 1
    x = 0.3 * x1 + 0.7 * x0
    values = {"velocity": x1 - x0, "x1": x1, "noise": x0}
    for given, value in values.items():
        for wanted, expected in values.items():
            torch.testing.assert_close(converted(value, given, wanted, x, t, path), expected)


@pytest.mark.parametrize("name", ["given", "wanted"])
def test_unknown_targets_are_refused(name):
    x = torch.zeros(1, 2, dtype=F64)
    names = {"given": "x1", "wanted": "noise", name: "data"}
    with pytest.raises(ValueError, match=f"converted: expected {name} to be one of 'velocity'"):
        converted(
            x,
            names["given"],
            names["wanted"],
            x,
            torch.tensor(0.5),
            cnf.matching.PATHS.build("linear"),
        )
    with pytest.raises(ValueError, match="Predicts: expected target to be one of .* got 'data'"):
        Predicts(MLPField(2), "data")
    with pytest.raises(ValueError, match="unknown path 'straight'"):
        Predicts(MLPField(2), "x1", "straight")


def test_predicts_keeps_the_blocks_of_a_piecewise_field(randomized):
    blocks = randomized(Piecewise([MLPField(2, (5,)), MLPField(2, (5,))]))
    field = Predicts(blocks, "x1", "trigonometric")
    assert field.knots == (0.0, 0.5, 1.0)
    x = torch.ones(3, 2, dtype=F64)
    for k, t in enumerate((0.2, 0.8)):
        piece, time = field.block(k), torch.tensor(t, dtype=F64)
        expected = exact_divergence(field, time, x)
        torch.testing.assert_close(exact_divergence(piece, time, x), expected)


def test_with_score_keeps_the_blocks_of_a_piecewise_field(randomized):
    blocks = randomized(Piecewise([MLPField(2, (5,)), MLPField(2, (5,))]))
    field = WithScore(blocks, MLPField(2, (5,)).double())
    assert field.knots == (0.0, 0.5, 1.0)


@pytest.mark.parametrize("event", [(2,), (1, 3, 2)])
@pytest.mark.parametrize("name", ["linear, noise", "interpolant", "bridge"])
def test_score_of_a_head_has_closed_form(name, event, points):
    gauss, (t, x) = Gauss(name), points(event)
    field = WithScore(gauss.field("velocity", event), gauss.field("z", event), gauss.path)
    expected = gauss.mean("score", t, x)
    torch.testing.assert_close(field.score(t, x), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(score(field, t, x), expected, rtol=1e-9, atol=1e-9)
    assert expected.abs().max() > 0.5


def test_head_does_not_change_velocity_and_density(generator):
    gauss, x = Gauss("bridge"), torch.randn(4, 2, generator=generator, dtype=F64)
    plain = gauss.field("velocity")
    field, t = WithScore(plain, gauss.field("z")), torch.tensor(0.3, dtype=F64)
    assert torch.equal(field(t, x), plain(t, x))
    torch.testing.assert_close(field.with_divergence(t, x), exact_divergence(plain, t, x))


@pytest.mark.parametrize("name", PATHS)
def test_score_is_correct_for_every_predicted_target(name, points):
    gauss, (t, x) = Gauss(name), points()
    expected = gauss.mean("score", t, x)
    found = score(gauss.field("velocity"), t, x, path=gauss.path)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    for target in ("x1", "noise", "score"):
        found = score(Predicts(gauss.field(target), target, gauss.path), t, x)  # it knows its path
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)


def test_score_accepts_a_number_as_time():
    gauss, x = Gauss("linear"), torch.ones(3, 2, dtype=F64)
    found = score(gauss.field("velocity"), 0.25, x)
    torch.testing.assert_close(found, gauss.mean("score", torch.tensor(0.25, dtype=F64), x))


def test_score_of_a_head_accepts_a_number_as_time():
    gauss, x = Gauss("bridge"), torch.ones(3, 2, dtype=F64)
    field = WithScore(gauss.field("velocity"), gauss.field("z"))
    found = score(field, 0.25, x)
    torch.testing.assert_close(found, gauss.mean("score", torch.tensor(0.25, dtype=F64), x))


@pytest.mark.parametrize("t", [0.001, 0.998])
@pytest.mark.parametrize(
    "kind",
    [
        "x1",
        "velocity",
        "head",
    ],
)
def test_score_is_constant_within_the_margin(kind, t, generator):
    gauss = Gauss("bridge" if kind == "head" else "linear")
    field = gauss.field("velocity" if kind == "head" else kind)
    if kind == "head":
        field = WithScore(field, gauss.field("z"))
    elif kind == "x1":
        field = Predicts(field, "x1")
    x = M * t + torch.randn(4, 2, generator=generator, dtype=F64)
    edge = torch.tensor(0.01 if t < 0.5 else 0.99, dtype=F64)
    found = score(field, torch.tensor(t, dtype=F64), x)
    torch.testing.assert_close(found, gauss.mean("score", edge, x), rtol=1e-6, atol=1e-6)


def test_head_requires_a_noisy_path():
    with pytest.raises(ValueError, match=r"expected a noisy path, got Linear"):
        WithScore(MLPField(2), MLPField(2), "linear")


@pytest.mark.parametrize(
    "head",
    [lambda: MLPField(3), lambda: MLPField(2, context_dim=1), lambda: MLPField(2, context_dim=2)],
)
def test_head_of_another_shape_or_context_size_is_refused(head):
    # the last one cannot go without its context, as the velocity can
    with pytest.raises(ValueError):
        WithScore(NullContext(MLPField(2, context_dim=2)), head())


def test_score_uses_the_path_of_a_wrapped_field(randomized, generator):
    x, t = torch.randn(4, 2, generator=generator, dtype=F64), torch.tensor(0.4, dtype=F64)
    c = torch.randn(4, 2, generator=generator, dtype=F64)
    inner = randomized(MLPField(2, (5,), 2))
    field = Predicts(NullContext(inner), "x1", "vp")
    torch.testing.assert_close(
        score(NullContext(Predicts(inner, "x1", "vp")), t, x, c), score(field, t, x, c)
    )
