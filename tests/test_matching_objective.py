"""Flow matching of every target and path: loss by hand, and its minimizer."""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import cnf
from cnf import Batch, Flow, FlowMatching
from cnf.fields import MLPField, NullContext, Predicts, VectorField, WithScore, score
from cnf.matching import Linear
from cnf.matching.paths import Bridge, Path, Schedule, check_path
from cnf.objectives import OBJECTIVES, MatchedPairs
from cnf.transforms import Continuous, Standardize

F64 = torch.float64
M, S = 1.5, 0.4  # the data are N(M, S²) in every coordinate
TIMES = torch.tensor([0.2, 0.55, 0.8], dtype=F64)
TARGETS = ("velocity", "x1", "noise", "score")
HALF = math.pi / 2


def vp(t):
    s = 1 - t
    alpha = torch.exp(-0.5 * (0.1 * s + 0.5 * 19.9 * s**2))
    return alpha, (1 - alpha**2).sqrt(), 0 * t


# What x1, x0 and z are multiplied by at t.
PATHS = {
    "linear": lambda t: (t, 1 - t, 0 * t),
    "trigonometric": lambda t: (torch.sin(HALF * t), torch.cos(HALF * t), 0 * t),
    "vp": vp,
    "interpolant": lambda t: (t, 1 - t, torch.sin(math.pi * t) ** 2),
    "bridge": lambda t: (t, 1 - t, (t * (1 - t)).sqrt()),
}
NOISY = ("interpolant", "bridge")


def coefficients(name, t):
    """(α, σ, γ) and their derivatives."""
    return torch.func.jvp(PATHS[name], (t,), (torch.ones_like(t),))


def closed_form(name, t, x):
    """E[· | xt = x] of everything that a network may predict."""
    t = t.reshape(-1, *[1] * (x.dim() - t.dim())) if t.dim() else t
    (a, b, c), (da, db, dc) = coefficients(name, t)
    centered, square = x - a * M, a**2 * S**2 + b**2 + c**2
    x1 = M + a * S**2 / square * centered
    return {
        "velocity": da * x1 + (db * b + dc * c) / square * centered,
        "x1": x1,
        "noise": (b**2 + c**2).sqrt() / square * centered,
        "score": -centered / square,
        "z": c / square * centered,
    }


class Lines(VectorField):
    """A line in x for each of `TIMES`: linear in its weights, and as rich as Gaussians need."""

    def __init__(self, event=(2,)):
        super().__init__(event)
        self.weight = torch.nn.Parameter(torch.zeros(3, 2, dtype=F64))

    def forward(self, t, x, context=None):
        slope, offset = self.weight[(t[..., None] - TIMES).abs().argmin(-1)].unbind(-1)
        event = [1] * (x.dim() - t.dim())
        return slope.reshape(*t.shape, *event) * x + offset.reshape(*t.shape, *event)


@pytest.fixture
def rows(generator):
    """x0, x1, z and times, whose means and covariances are exact: least squares then gives the
    conditional means themselves, not estimates of them."""
    parts = []
    for _ in TIMES:
        draw = torch.randn(40, 6, generator=generator, dtype=F64)
        draw = draw - draw.mean(0)
        parts.append(torch.linalg.qr(draw).Q * 40**0.5)
    x0, u, z = torch.cat(parts).split(2, 1)
    return x0, M + S * u, z, TIMES.repeat_interleave(40)


def flow_of(field):
    return Flow(None, Continuous(field), event_shape=field.event_shape).double()


def minimize(flow, objective, batch):
    """Newton's one step to the minimum of a quadratic loss."""
    parameters = list(objective.parameters(flow))
    value = objective(flow, batch).value
    slopes = torch.autograd.grad(value, parameters, create_graph=True)
    slope = torch.cat([part.flatten() for part in slopes])
    rows = [torch.autograd.grad(s, parameters, retain_graph=True) for s in slope]
    curvature = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    step = torch.linalg.solve(curvature, slope.detach())
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(parameters) - step, parameters
        )
    return objective(flow, batch).value


@pytest.mark.parametrize("weighting", ["target", "velocity"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PATHS)
def test_loss_of_every_target_is_minimized_by_the_same_velocity(name, target, weighting, rows):
    x0, x1, z, t = rows
    network = Lines()
    flow = flow_of(Predicts(network, target, name))
    noise = z if name in NOISY else None
    batch = MatchedPairs(x0, x1, t, noise=noise)
    minimize(flow, FlowMatching(weighting=weighting), batch)
    x = torch.linspace(-3, 3, 14, dtype=F64).reshape(7, 2)
    for time in TIMES:
        expected = closed_form(name, time, x)
        torch.testing.assert_close(network(time, x), expected[target], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(flow.field(time, x), expected["velocity"], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", PATHS)
def test_loss_of_a_plain_field_is_minimized_by_the_velocity(name, rows):
    x0, x1, z, t = rows
    flow = flow_of(Lines())
    batch = MatchedPairs(x0, x1, t, noise=z if name in NOISY else None)
    minimize(flow, FlowMatching(path=name), batch)
    x = torch.linspace(-3, 3, 14, dtype=F64).reshape(7, 2)
    for time in TIMES:
        expected = closed_form(name, time, x)["velocity"]
        torch.testing.assert_close(flow.field(time, x), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", NOISY)
def test_losses_of_velocity_and_score_are_minimized_together(name, rows):
    x0, x1, z, t = rows
    flow = flow_of(WithScore(Lines(), Lines(), name))
    batch = MatchedPairs(x0, x1, t, noise=z)
    before = FlowMatching()(flow, batch)
    after = minimize(flow, FlowMatching(), batch)
    x = torch.linspace(-3, 3, 14, dtype=F64).reshape(7, 2)
    for time in TIMES:
        expected = closed_form(name, time, x)
        torch.testing.assert_close(flow.field(time, x), expected["velocity"], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(flow.field.head(time, x), expected["z"], rtol=1e-8, atol=1e-8)
        for found in (flow.field.score(time, x), score(flow.field, time, x)):
            torch.testing.assert_close(found, expected["score"], rtol=1e-8, atol=1e-8)
    assert after < before.value


# The loss by hand


@pytest.mark.parametrize("event", [(2,), (1, 2, 2)], ids=str)
@pytest.mark.parametrize("weighting", ["target", "velocity"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PATHS)
def test_loss_by_hand(name, target, weighting, event, generator):
    network = Lines(event)
    with torch.no_grad():
        network.weight.copy_(torch.randn(3, 2, generator=generator))
    flow = flow_of(Predicts(network, target, name))
    x0, x1, z = (torch.randn(6, *event, generator=generator, dtype=F64) for _ in range(3))
    t, weight = TIMES.repeat(2), torch.arange(1, 7, dtype=F64)
    over = [1] * len(event)
    (a, b, c), (da, db, dc) = (
        [v.reshape(-1, *over) for v in values] for values in coefficients(name, t)
    )
    xt, ut = a * x1 + b * x0 + c * z, da * x1 + db * x0 + dc * z
    joint = (b**2 + c**2).sqrt()
    truth = {"velocity": ut, "x1": x1, "noise": (b * x0 + c * z) / joint}
    predicted = network(t, xt)
    if weighting == "velocity":
        error = flow.field(t, xt) - ut
    elif target == "score":  # σ² times the squared error of the score -noise/σ
        error = joint * (predicted + truth["noise"] / joint)
    else:
        error = predicted - truth[target]
    squares = error.square().flatten(1).sum(1)
    for given, expected in ((None, squares.mean()), (weight, (weight * squares).sum() / 21)):
        batch = MatchedPairs(x0, x1, t, noise=z, weight=given)
        loss = FlowMatching(weighting=weighting)(flow, batch)
        torch.testing.assert_close(loss.value, expected, rtol=1e-9, atol=1e-9)
        assert loss.metrics == {"fm": loss.value.detach()}


@pytest.mark.parametrize("weight", [None, torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0]).double()])
def test_loss_of_a_head_is_added_and_logged(weight, randomized, generator):
    flow = randomized(flow_of(WithScore(MLPField(2, (5,)), MLPField(2, (5,)))))
    x0, x1, z = (torch.randn(6, 2, generator=generator, dtype=F64) for _ in range(3))
    t = torch.linspace(0.1, 0.9, 6, dtype=F64)
    loss = FlowMatching()(flow, MatchedPairs(x0, x1, t, noise=z, weight=weight))
    xt = t[:, None] * x1 + (1 - t[:, None]) * x0 + (t * (1 - t)).sqrt()[:, None] * z
    squares = (flow.field.head(t, xt) - z).square().sum(1)
    expected = squares.mean() if weight is None else (weight * squares).sum() / weight.sum()
    assert list(loss.metrics) == ["fm", "score"]
    torch.testing.assert_close(loss.metrics["score"], expected.detach())
    torch.testing.assert_close(loss.value.detach(), loss.metrics["fm"] + loss.metrics["score"])
    loss.value.backward()
    assert all(p.grad.abs().max() > 0 for p in flow.field.parameters())


def test_training_on_a_bridge_learns_velocity_and_score(generator):
    field = WithScore(MLPField(2, (32,)), MLPField(2, (32,)))
    flow = Flow(None, Continuous(field), event_shape=(2,))
    x = M + S * torch.randn(2000, 2, generator=generator)
    config = cnf.TrainConfig(
        steps=300, batch_size=512, lr=1e-2, ema=0.98, validations=0, progress=False, device="cpu"
    )
    history = cnf.fit(flow, FlowMatching(), x, config)
    scores = history.column("score")
    assert sum(scores[-20:]) < 0.8 * sum(scores[:5]) / 5 * 20
    t, at = torch.tensor(0.5), torch.tensor([[0.0, 1.0], [1.5, 0.5]])
    expected = closed_form("bridge", t, at)
    assert (flow.field(t, at) - expected["velocity"]).abs().max() < 0.35
    assert (score(flow.field, t, at) - expected["score"]).abs().max() < 0.5
    assert expected["score"].abs().max() > 1


# What is drawn beforehand, and which path it is


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_noise_of_a_path_is_drawn_once_in_prepare(randomized, generator):
    flow = randomized(
        Flow(
            None, Continuous(WithScore(MLPField(2, (5,)), MLPField(2, (5,)))),
            Standardize((2,)), event_shape=(2,),
        )
    )  # fmt: skip
    x = torch.randn(8, 2, generator=generator, dtype=F64)
    before, objective = torch.get_rng_state(), FlowMatching()
    first, again, other = (objective.prepare(flow, Batch(x), seeded(seed)) for seed in (1, 1, 2))
    assert first.noise.shape == (8, 2) and first.noise.dtype == F64
    assert torch.equal(first.noise, again.noise) and not torch.equal(first.noise, other.noise)
    assert (first.noise - first.x0).abs().min() > 0
    one = objective(flow, first).value
    assert torch.equal(one, objective(flow, again).value)
    assert torch.equal(one, objective(flow, Batch(x), seeded(1)).value)
    assert torch.equal(torch.get_rng_state(), before)
    halves = [first.map(lambda v, k=k: v[k : k + 4]) for k in (0, 4)]
    torch.testing.assert_close(sum(objective(flow, half).value for half in halves) / 2, one)
    assert torch.equal(first.x1, flow.preprocess.inverse(x)[0])


def test_a_path_without_noise_draws_none(small_flow, generator):
    flow, x = small_flow("rnode"), torch.randn(8, 2, generator=generator, dtype=F64)
    assert FlowMatching().prepare(flow, Batch(x), seeded()).noise is None
    noisy = FlowMatching(path="bridge").prepare(flow, Batch(x), seeded())
    assert noisy.noise is not None
    assert FlowMatching(path=Linear(noise=0.1)).prepare(flow, Batch(x), seeded()).noise is not None


def test_field_with_a_path_is_trained_with_it(rows):
    x0, x1, z, t = rows
    flow = flow_of(Predicts(Lines(), "x1", {"name": "bridge", "sigma": 0.5}))
    batch = MatchedPairs(x0, x1, t, noise=z)
    own = FlowMatching()(flow, batch).value
    for path in (Bridge(0.5), {"name": "bridge", "sigma": 0.5}):
        assert torch.equal(FlowMatching(path=path)(flow, batch).value, own)
    for path in ("linear", Bridge(1.0)):
        with pytest.raises(ValueError, match=r"the field was made for Bridge\(sigma=0.5\), got"):
            FlowMatching(path=path)(flow, batch)
    plain = flow_of(Lines())
    linear = FlowMatching(path="linear")(plain, batch).value
    assert torch.equal(FlowMatching()(plain, batch).value, linear)
    assert not torch.equal(FlowMatching(path="bridge")(plain, batch).value, linear)


def test_path_of_a_wrapped_field_is_used(rows):
    x0, x1, _, t = rows
    predicts = Predicts(MLPField(2, (5,), 2), "x1", "vp").double()
    context = torch.ones(len(t), 2, dtype=F64)
    batch = MatchedPairs(x0, x1, t, context)
    found = FlowMatching(weighting="velocity")(flow_of(NullContext(predicts)), batch).value
    expected = FlowMatching(weighting="velocity")(flow_of(predicts), batch).value
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "straight"}, "unknown path 'straight'"),
        ({"weighting": "noise"}, "FlowMatching: expected weighting to be one of 'target', 'veloc"),
        ({"coupling": "ot"}, "unknown coupling 'ot'"),
        ({"times": "begin"}, "unknown time law 'begin'"),
    ],
)
def test_invalid_settings_are_refused_in_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        FlowMatching(**options)


def test_all_times_may_be_zero(small_flow, generator):
    flow, x = small_flow("cnf"), torch.randn(8, 2, generator=generator, dtype=F64)
    batch = FlowMatching(times="start").prepare(flow, Batch(x), generator)
    assert batch.t.tolist() == [0.0] * 8 and batch.t.dtype == F64
    loss = FlowMatching(times="start")(flow, batch)
    start = flow.field(torch.zeros(8, dtype=F64), batch.x0) - (batch.x1 - batch.x0)
    torch.testing.assert_close(loss.value, start.square().sum(1).mean())


# Where it goes wrong


@pytest.mark.parametrize("target", ["noise", "score"])
def test_loss_is_finite_at_the_end_of_a_path(target, generator):
    """float32 comes to t = 1 itself: of the time law "skewed" once in 100,000 draws."""
    flow = flow_of(Predicts(MLPField(2, (5,)), target))
    x0, x1 = (torch.randn(4, 2, generator=generator, dtype=F64) for _ in range(2))
    batch = MatchedPairs(x0, x1, torch.tensor([0.3, 0.7, 1.0, 0.1], dtype=F64))
    assert FlowMatching()(flow, batch).value.isfinite()


def test_regression_target_of_the_noise_close_to_the_data_is_x0(generator):
    x0, x1 = (torch.randn(4, 2, generator=generator) for _ in range(2))
    x1 = x1 + 5
    flow = Flow(None, Continuous(Predicts(Lines().float(), "noise")), event_shape=(2,))
    batch = MatchedPairs(x0, x1, torch.full((4,), 1 - 2e-6))
    value = FlowMatching()(flow, batch).value  # Lines predicts zero
    torch.testing.assert_close(value, x0.square().sum(1).mean(), rtol=1e-3, atol=0)


def test_weighted_loss_is_the_mean_over_processes(randomized, generator):
    flow, objective = randomized(flow_of(MLPField(2, (5,)))), FlowMatching()
    x = torch.randn(8, 2, generator=generator, dtype=F64)
    weight = torch.tensor([1.0, 0, 0, 0, 2, 2, 2, 1], dtype=F64)
    batch = objective.prepare(flow, Batch(x, weight=weight), seeded())
    halves = [batch.shared(rank, 2) for rank in (0, 1)]
    value = sum(part * objective(flow, half).value for half, part in halves) / 2
    assert halves[0][1] != 1 and [len(half.x1) for half, _ in halves] == [4, 4]
    torch.testing.assert_close(value, objective(flow, batch).value)


@pytest.mark.parametrize("path", [cnf.matching.PATHS.build(name) for name in PATHS], ids=str)
def test_objective_is_rebuilt_from_its_description(path, tmp_path):
    objective = FlowMatching(path=path, context_dropout=0.1)
    flow = cnf.models.build("cnf", dim=2, context=1, hidden=(4,), null_context=True)
    config = cnf.TrainConfig(
        steps=1, batch_size=8, validations=0, progress=False, device="cpu", folder=tmp_path / "run"
    )
    cnf.fit(flow, objective, torch.randn(16, 2), config, context=torch.ones(16, 1))
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (
        OBJECTIVES.build({"name": written["objective"], **written["objective_options"]})
        == objective
    )


@pytest.mark.parametrize("options", [{}, {"coupling": "minibatch-ot"}, {"context_dropout": 0.5}])
def test_loss_has_gradients_of_a_network_that_computes_the_context(options, small_flow, generator):
    null = {"null_context": True} if "context_dropout" in options else {}
    flow = small_flow("cnf", context=2, **null)
    x, seen = (torch.randn(12, 2, generator=generator, dtype=F64) for _ in range(2))
    weight = torch.randn(2, 2, generator=generator, dtype=F64, requires_grad=True)

    def loss(weight):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # minibatch-ot does not look at contexts
            draws = torch.Generator().manual_seed(0)
            return FlowMatching(**options)(flow, Batch(x, seen @ weight), draws).value

    (found,) = torch.autograd.grad(loss(weight), weight)
    step = torch.zeros_like(found)
    step[0, 1] = 1e-6
    with torch.no_grad():
        numeric = (loss(weight + step) - loss(weight - step)) / 2e-6
    torch.testing.assert_close(found[0, 1], numeric, rtol=1e-6, atol=1e-8)
    assert numeric.abs() > 1e-4


@dataclass(frozen=True)
class OwnPath(Path):
    """A path of one's own from coefficients that tests choose."""

    make: Any = None

    def schedule(self, t):
        return self.make(t)


def fit_with(**options):
    torch.manual_seed(0)
    flow = cnf.models.cnf(2, hidden=(8,), context=options.pop("context", 0))
    config = cnf.TrainConfig(steps=3, batch_size=8, validations=0, progress=False)
    data = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    context = data[:, :1] if flow.context_dim else None
    return cnf.fit(flow, FlowMatching(**options), data, config, context=context)


def test_path_of_wrong_derivatives_is_refused():
    wrong = OwnPath(lambda t: Schedule(t**2, 1 - t**2, t, -2 * t))
    with pytest.raises(ValueError, match=r"d_alpha to be the derivative of alpha, 0\.2 at t=0\.1"):
        fit_with(path=wrong)


@pytest.mark.parametrize(
    "make",
    [
        lambda t: Schedule(0.5 * t, 1 - 0.5 * t, 0.5, -0.5),
        lambda t: Schedule(t, 2 - 2 * t, 1.0, -2.0),
        lambda t: Schedule(1 - t, t, -1.0, 1.0),
    ],
)
def test_path_that_does_not_lead_from_base_to_data_warns(make):
    with pytest.warns(UserWarning, match="what is trained does not carry the base to the data"):
        fit_with(path=OwnPath(make))


@pytest.mark.parametrize("name", cnf.matching.PATHS)
def test_every_named_path_passes_its_own_check(name):
    check_path(cnf.matching.PATHS.build(name))


def test_coupling_that_ignores_the_context_warns_once():
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        fit_with(coupling="minibatch-ot", context=1)
    assert ["minibatch-ot ignores the context" in str(w.message) for w in heard] == [True]


def test_coupling_that_returns_or_takes_something_else_is_named():
    def pair(x0, x1, context=None, generator=None):
        return torch.arange(len(x0)), torch.arange(len(x1))

    with pytest.raises(TypeError, match=r"coupling pair to return a cnf\.matching\.Pairing"):
        fit_with(coupling=pair)
    with pytest.raises(TypeError, match=r"takes \(x0, x1, context, generator\), got <lambda>"):
        fit_with(coupling=lambda x0, x1: None)


def test_path_may_compute_with_numpy():
    def schedule(t):
        a = torch.from_numpy(np.sin(np.pi / 2 * t.detach().cpu().numpy()) ** 2).to(t)
        slope = np.pi / 2 * torch.sin(np.pi * t)
        return Schedule(a, 1 - a, slope, -slope)

    history = fit_with(path=OwnPath(schedule))
    assert history.steps == 3
