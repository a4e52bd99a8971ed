"""Fields with an optional context, classifier-free guidance, and flows of both."""

import gc
import json
import weakref

import pytest
import torch
from torch import nn

import cnf
from cnf import Batch, Flow, FlowMatching, MaximumLikelihood, Solver
from cnf.fields import (
    ConvField,
    Guided,
    MLPField,
    NullContext,
    Piecewise,
    Preconditioned,
    VectorField,
    exact_divergence,
)
from cnf.sampling import guided
from cnf.training import checkpoint
from cnf.transforms import Continuous, Standardize

F64 = torch.float64
NAN = float("nan")
MODELS = ["cnf", "ffjord", "rnode", "otflow"]  # those with null_context
TIGHT = {"rtol": 1e-9, "atol": 1e-9}


class Affine(VectorField):
    """v = rate·x + c, without a closed-form divergence and without an optional context."""

    def __init__(self, rate=0.7):
        super().__init__((2,), 2)
        self.rate = nn.Parameter(torch.tensor(rate, dtype=F64))

    def forward(self, t, x, context=None):
        assert context is not None and t.dim() in (0, x.dim() - 1)
        return self.rate * x + context


@pytest.fixture
def field(randomized):
    return randomized(NullContext(MLPField(2, (6, 5), 3)))


@pytest.fixture
def data(generator):
    """x and its context."""
    draws = [torch.randn(6, n, generator=generator, dtype=F64) for n in (2, 3)]
    return draws[0] * 1.5 + 0.5, draws[1]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# A context that is missing


def test_null_vector_is_a_parameter_that_starts_at_zero():
    field = NullContext(MLPField(2, (4,), 3))
    assert dict(field.named_parameters())["null"] is field.null
    assert field.null.tolist() == [0, 0, 0] and field.context_dim == 3
    assert field.optional_context and not field.field.optional_context


@pytest.mark.parametrize("own_time", [False, True])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_missing_context_is_replaced_by_the_null_vector(field, batch, own_time, points):
    t, x, context = points(field, batch, own_time)
    expected = exact_divergence(field.field, t, x, field.null.expand(*batch, 3))
    for missing in (None, torch.full_like(context, NAN)):
        torch.testing.assert_close(field.with_divergence(t, x, missing), expected)
        torch.testing.assert_close(field(t, x, missing), expected[0])
    given = exact_divergence(field.field, t, x, context)
    assert torch.equal(field.with_divergence(t, x, context)[1], given[1])
    assert (given[0] - expected[0]).abs().max() > 0.02


def test_rows_with_nan_context_equal_those_without_context(field, data):
    (x, context), t = data, torch.tensor(0.4, dtype=F64)
    rows = torch.tensor([True, False, True, True, False, False])
    mixed = context.masked_fill(rows[:, None], NAN)
    for call in (field.with_divergence, lambda *at: (field(*at),)):
        for found, none, given in zip(
            call(t, x, mixed), call(t, x, None), call(t, x, context), strict=True
        ):
            # but for the rounding of products with a vector and with its copies
            torch.testing.assert_close(found[rows], none[rows], rtol=1e-14, atol=1e-14)
            torch.testing.assert_close(found[~rows], given[~rows], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("name", MODELS)
def test_model_treats_none_and_nan_contexts_alike(name, small_flow, data):
    flow, (x, context) = small_flow(name, context=3, null_context=True), data
    none, nan = flow.log_prob(x), flow.log_prob(x, torch.full((3,), NAN, dtype=F64))
    torch.testing.assert_close(none, nan, rtol=0, atol=1e-12)
    torch.testing.assert_close(flow.encode(x), flow.encode(x, torch.full_like(context, NAN)))
    samples = flow.sample((5,), generator=seeded())
    same = flow.sample((5,), torch.full((3,), NAN, dtype=F64), generator=seeded())
    torch.testing.assert_close(samples, same, rtol=0, atol=1e-12)
    assert (flow.log_prob(x, context) - none).abs().max() > 0.05
    mixed = torch.cat([context[:3], torch.full_like(context[3:], NAN)])
    found = flow.log_prob(x, mixed)
    expected = torch.cat([flow.log_prob(x, context)[:3], none[3:]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)  # solver rtol 1e-9


@pytest.mark.parametrize("name", MODELS)
def test_model_without_null_vector_requires_a_context(name, small_flow, data):
    flow = small_flow(name, context=3)
    for call in (flow.log_prob, flow.encode, flow.decode):
        with pytest.raises(ValueError, match=r"expected a context of shape \(\*, 3\), got None"):
            call(data[0])
    with pytest.raises(ValueError, match="got None"):
        flow.sample(3)


@pytest.mark.parametrize("name", MODELS)
def test_unconditional_model_refuses_null_context(name):
    with pytest.raises(ValueError, match=r"expected a conditional field, got .*; build it with"):
        cnf.models.build(name, dim=2, null_context=True)


@pytest.mark.parametrize("name", MODELS)
def test_null_vector_is_saved_and_loaded(name, small_flow, data, tmp_path):
    flow, (x, context) = small_flow(name, context=3, null_context=True), data
    back = cnf.load(checkpoint.save(flow, tmp_path / "flow.safetensors"))
    assert back.spec == json.loads(json.dumps(flow.spec))
    for condition in (None, context):
        torch.testing.assert_close(
            back.log_prob(x, condition), flow.log_prob(x, condition), rtol=0, atol=0
        )


def test_check_accepts_a_guided_flow(small_flow):
    flow = small_flow("otflow", dim=4, context=3, null_context=True, hidden=(6, 6))
    assert cnf.check(guided(flow, 1.7), n=8).ok


@pytest.mark.parametrize(
    "name",
    [
        "cnf",
        "ffjord",
        "rnode",
        "otflow",
    ],
)
def test_likelihood_trains_a_model_with_its_own_recipe(name, small_flow, data):
    flow, (x, context) = small_flow(name, context=3, null_context=True), data
    loss = MaximumLikelihood()(flow, Batch(x, context), seeded())
    assert loss.value.isfinite()


def test_blocks_use_weights_that_were_loaded(small_flow, data):
    flow, (x, _) = small_flow("cnf", context=3, null_context=True, layers=2), data
    flow.log_prob(x)
    state = {name: value + 0.1 for name, value in flow.state_dict().items() if "fit" not in name}
    other = small_flow("cnf", context=3, null_context=True, layers=2)
    other.load_state_dict(state, strict=False)
    flow.load_state_dict(state, strict=False)
    torch.testing.assert_close(flow.log_prob(x), other.log_prob(x), rtol=0, atol=0)


def test_blocks_use_parameters_that_were_replaced(small_flow, data):
    flow, (x, _) = small_flow("cnf", context=3, null_context=True, layers=2), data
    flow.log_prob(x)
    state = {name: value + 0 for name, value in flow.state_dict().items()}
    state["transform.field.null"] += 1
    flow.load_state_dict(state, assign=True)
    other = small_flow("cnf", context=3, null_context=True, layers=2)
    other.load_state_dict(state)
    torch.testing.assert_close(flow.log_prob(x), other.log_prob(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["cnf", "ffjord", "rnode", "otflow"])
def test_deleted_flow_is_freed_without_garbage_collection(name, small_flow):
    flow = small_flow(name)
    flow.decode(torch.zeros(2, 2, dtype=F64))
    gc.collect()
    gc.disable()  # on a GPU the weights' memory would wait for it
    try:
        field = weakref.ref(flow.field)
        del flow
        assert field() is None
    finally:
        gc.enable()


# Guidance


@pytest.mark.parametrize("own_time", [False, True])
@pytest.mark.parametrize("batch", [(), (6,), (2, 3)], ids=str)
def test_weight_one_gives_the_conditional_and_zero_the_unconditional_field(
    field, batch, own_time, points
):
    t, x, context = points(field, batch, own_time)
    for weight, condition in ((1.0, context), (0.0, None)):
        found = Guided(field, weight)
        expected = field.with_divergence(t, x, condition)
        torch.testing.assert_close(found.with_divergence(t, x, context), expected, rtol=0, atol=0)
        assert torch.equal(found(t, x, context), field(t, x, condition))


@pytest.mark.parametrize("weight", [-0.5, 0.25, 2.0, 7.5])
@pytest.mark.parametrize("own_time", [False, True])
@pytest.mark.parametrize("batch", [(), (6,), (2, 3)], ids=str)
def test_velocity_and_divergence_are_linear_in_the_weight(
    field, weight, batch, own_time, points, autograd_divergence
):
    t, x, context = points(field, batch, own_time)
    one, zero = field.with_divergence(t, x, context), field.with_divergence(t, x, None)
    found = Guided(field, weight).with_divergence(t, x, context)
    for value, a, b in zip(found, one, zero, strict=True):
        torch.testing.assert_close(value, b + weight * (a - b), rtol=1e-13, atol=1e-13)
        assert value.shape == a.shape and (value - a).abs().max() > 1e-2
    guide = Guided(field, weight)
    torch.testing.assert_close(guide(t, x, context), found[0], rtol=1e-13, atol=1e-13)
    expected = autograd_divergence(guide, t, x, context)
    torch.testing.assert_close(found[1], expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("own_time", [False, True])
def test_images_are_guided_like_vectors(own_time, randomized, points, autograd_divergence):
    field = randomized(Guided(NullContext(ConvField((1, 2, 3), (4,), 3)), 2.5, (0.0, 0.6)))
    t, x, context = points(field, (5,), own_time)
    v, div = field.with_divergence(t, x, context)
    torch.testing.assert_close(field(t, x, context), v)
    expected = autograd_divergence(field, t, x, context)
    torch.testing.assert_close(div, expected, rtol=1e-10, atol=1e-12)
    one, zero = field.field(t, x, context), field.field(t, x, None)
    weight = torch.where(t <= 0.6, 2.5, 1.0).double().expand(5).reshape(5, 1, 1, 1)
    torch.testing.assert_close(v, zero + weight * (one - zero), rtol=1e-12, atol=1e-12)
    assert div.abs().max() > 1e-3 and (one - zero).abs().max() > 1e-3


def test_weight_has_the_precision_of_the_field():
    field, x = Guided(NullContext(Affine()), 1.1), torch.zeros(2, dtype=F64)
    v = field(torch.tensor(0.5, dtype=F64), x, torch.ones(2, dtype=F64))
    torch.testing.assert_close(v, torch.full((2,), 1.1, dtype=F64), rtol=1e-14, atol=0)


def test_guidance_without_context_is_the_unconditional_field(field, data):
    (x, context), t = data, torch.tensor(0.3, dtype=F64)
    expected = field.with_divergence(t, x, None)
    found = Guided(field, 5.0)
    torch.testing.assert_close(found.with_divergence(t, x, None), expected, rtol=0, atol=0)
    nan = found.with_divergence(t, x, torch.full_like(context, NAN))
    torch.testing.assert_close(nan, expected, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found(t, x), expected[0], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("event", [(2,), (1, 2, 3)], ids=str)
def test_guidance_applies_inside_its_interval_only(event, generator):
    class Shift(VectorField):
        def forward(self, t, x, context=None):
            return 0.5 * x + context.reshape(*context.shape[:-1], *[1] * len(event))

    field = Guided(NullContext(Shift(event, 1)), 3.0, (0.25, 0.5))
    times = torch.tensor([0.0, 0.2499, 0.25, 0.4, 0.5, 0.5001, 1.0], dtype=F64)
    weights = torch.tensor([1.0, 1.0, 3.0, 3.0, 3.0, 1.0, 1.0], dtype=F64)
    x = torch.randn(7, *event, generator=generator, dtype=F64)
    context = torch.ones(7, 1, dtype=F64)
    spread = weights.reshape(7, *[1] * len(event))
    v, div = field.with_divergence(times, x, context)
    torch.testing.assert_close(v, 0.5 * x + spread)  # what stands in is zero
    torch.testing.assert_close(div, torch.full((7,), 0.5 * x[0].numel(), dtype=F64))
    torch.testing.assert_close(field(times, x, context), v)
    for k, t in enumerate(times):
        torch.testing.assert_close(field(t, x[k], context[k]), v[k])
        alone = field.with_divergence(t, x, context)
        torch.testing.assert_close(alone[0][k], v[k])
        torch.testing.assert_close(alone[1], div)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_guided_affine_flow_has_closed_form(weight, layers, generator):
    """dx/dt = a·x + n + w(c - n): x = eᵃz + (eᵃ - 1)/a·(n + w(c - n)), log|det| = 2a."""
    blocks = [Affine(0.7 / layers) for _ in range(layers)]
    field = NullContext(blocks[0] if layers == 1 else Piecewise(blocks))
    with torch.no_grad():
        field.null.copy_(torch.tensor([0.3, -0.2]))
    field = field.double()
    transform = Continuous(field, Solver(**TIGHT))
    flow = guided(Flow(None, transform, event_shape=(2,)).double(), weight)
    z, c = (torch.randn(5, 2, generator=generator, dtype=F64) for _ in range(2))
    rate = torch.tensor(0.7, dtype=F64)
    push = layers * (field.null + weight * (c - field.null))  # each block adds the whole of it
    x = rate.exp() * z + (rate.exp() - 1) / rate * push
    torch.testing.assert_close(flow.decode(z, c), x, rtol=0, atol=1e-7)
    expected = flow.base.log_prob(z) - 2 * rate
    torch.testing.assert_close(flow.log_prob(x, c), expected, rtol=0, atol=1e-7)


CASES = {
    "plain": lambda: NullContext(MLPField(2, (6, 5), 3)),
    "stacked": lambda: NullContext(Piecewise([MLPField(2, (5,), 3) for _ in range(2)])),
    "preconditioned": lambda: NullContext(Preconditioned(MLPField(2, (6, 5), 3))),
    "preconditioned, stacked": lambda: Preconditioned(
        NullContext(Piecewise([MLPField(2, (5,), 3) for _ in range(2)]))
    ),
    "blocks of their own": lambda: Piecewise([NullContext(MLPField(2, (5,), 3)) for _ in "ab"]),
}


@pytest.mark.parametrize("case", CASES)
def test_density_of_a_guided_flow_equals_change_of_variables(case, randomized, data):
    transform = Continuous(CASES[case](), Solver("rk4", steps=24, gradient="backprop"))
    flow = randomized(Flow(None, transform, Standardize((2,)), event_shape=(2,)))
    guide, (x, context) = guided(flow, 2.2), data
    x, context = x[:2], context[:2]
    found = guide.log_prob(x, context)
    for k in range(2):
        z = guide.encode(x[k], context[k])
        jacobian = torch.autograd.functional.jacobian(
            lambda y, k=k: guide.encode(y, context[k]), x[k]
        )
        expected = guide.base.log_prob(z) + jacobian.det().abs().log()
        torch.testing.assert_close(found[k], expected, rtol=0, atol=1e-5)  # 24 steps of rk4
    y, log_prob = guide.sample_and_log_prob((2,), context, generator=seeded())
    torch.testing.assert_close(log_prob, guide.log_prob(y, context), rtol=0, atol=1e-4)
    drawn = guide.sample((2,), context, generator=seeded())
    torch.testing.assert_close(drawn, y.detach(), rtol=0, atol=1e-12)
    assert (found - flow.log_prob(x, context)).abs().max() > 1e-2
    torch.testing.assert_close(guided(flow, 1.0).log_prob(x, context), flow.log_prob(x, context))
    torch.testing.assert_close(
        guided(flow, 0.0).log_prob(x, context), flow.log_prob(x), rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("mode", ["adjoint", "checkpoint", "auto"])
@pytest.mark.parametrize("weight", [None, 2.0])
@pytest.mark.parametrize("case", CASES)
def test_every_gradient_mode_has_gradients_of_null_vector_and_weights(
    case, weight, mode, randomized, data
):
    field, (x, context) = CASES[case](), data
    mixed = torch.cat([context[:3], torch.full_like(context[3:], NAN)])
    gradients = []
    for gradient in ("backprop", mode):
        solver = Solver("rk4", steps=16, gradient=gradient, segments=3)
        flow = Flow(None, Continuous(field, solver), event_shape=(2,)).double()
        if not gradients:
            randomized(flow)
        flow = flow if weight is None else guided(flow, weight)
        leaf = mixed.clone().requires_grad_()
        leaves = [*flow.field.parameters(), leaf]
        gradients.append(torch.autograd.grad(flow.log_prob(x, leaf).sum(), leaves))
        names = [name for name, _ in flow.field.named_parameters()]
        found = dict(zip([*names, "context"], gradients[-1], strict=True))
        for name, slope in found.items():
            assert slope.isfinite().all(), name
            # a constant velocity changes nothing in log p but where the points come from
            assert slope.abs().max() > 1e-4, name
        assert (found["context"][3:] == 0).all() and (found["context"][:3] != 0).all()
    # the adjoint's own error at 16 steps of rk4
    tolerance = 1e-2 if mode == "adjoint" else 1e-10
    torch.testing.assert_close(*gradients, rtol=tolerance, atol=tolerance)


def test_guided_flow_shares_weights_and_does_not_change_the_flow(small_flow, data):
    flow, (x, context) = small_flow("cnf", context=3, null_context=True), data
    before, names = flow.log_prob(x, context), list(flow.state_dict())
    guide = guided(flow, 3.0)
    torch.testing.assert_close(flow.log_prob(x, context), before, rtol=0, atol=0)
    assert list(flow.state_dict()) == names and flow.spec is not None and guide.spec is None
    assert {id(p) for p in guide.parameters()} == {id(p) for p in flow.parameters()}
    assert guide.preprocess is flow.preprocess and guide.transform.solver is flow.transform.solver
    with torch.no_grad():
        flow.field.null.add_(0.5)
    assert (guide.log_prob(x) - flow.log_prob(x)).abs().max() == 0


def test_guidance_requires_a_continuous_flow_with_optional_context():
    with pytest.raises(ValueError, match=r"null_context=True and train it with FlowMatching\("):
        guided(cnf.models.build("cnf", dim=2, context=1), 2.0)
    with pytest.raises(TypeError, match="guided: expected a flow whose transform is a Continuous"):
        guided(cnf.models.build("realnvp", dim=2, context=1), 2.0)


@pytest.mark.parametrize("arguments", [(NAN,), (2.0, (0.8, 0.2)), (float("inf"),)], ids=str)
def test_invalid_weights_and_intervals_are_refused(field, arguments):
    with pytest.raises(ValueError, match="Guided"):
        Guided(field, *arguments)


# Training without the context now and then


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_context_dropout_drops_the_given_share_of_contexts(share, small_flow, generator):
    flow = small_flow("cnf", context=3, null_context=True)
    x = torch.randn(4000, 2, generator=generator, dtype=F64)
    context = torch.randn(4000, 3, generator=generator, dtype=F64)
    objective, kept = FlowMatching(context_dropout=share), context.clone()
    first, again, other = (
        objective.prepare(flow, Batch(x, context), seeded(seed)) for seed in (1, 1, 2)
    )
    missing = first.context.isnan()
    assert torch.equal(missing.all(1), missing.any(1))  # whole rows
    rows = missing.all(1)
    deviation = (share * (1 - share) / 4000) ** 0.5
    assert rows.double().mean().item() == pytest.approx(share, abs=4 * deviation)
    inner = flow.inner_context("test", context, None)
    assert torch.equal(first.context[~rows], inner[~rows]) and torch.equal(context, kept)
    assert torch.equal(again.context.isnan(), missing)
    assert not torch.equal(other.context.isnan(), missing)
    plain = FlowMatching().prepare(flow, Batch(x, context), seeded(1))
    assert torch.equal(plain.context, inner) and torch.equal(plain.x0, first.x0)
    assert torch.equal(plain.t, first.t)


def test_loss_of_rows_without_context_is_that_of_the_unconditional_field(small_flow, data):
    flow, (x, context) = small_flow("cnf", context=3, null_context=True), data
    objective = FlowMatching(context_dropout=0.5)
    batch = objective.prepare(flow, Batch(x, context), seeded(3))
    rows = batch.context.isnan().all(1)
    assert 0 < rows.sum() < 6
    t = batch.t[:, None]
    xt, ut = (1 - t) * batch.x0 + t * batch.x1, batch.x1 - batch.x0
    without = flow.field(batch.t, xt, None) - ut
    given = flow.field(batch.t, xt, flow.inner_context("test", context, (6,))) - ut
    expected = torch.where(rows[:, None], without, given).square().sum(1).mean()
    loss = objective(flow, batch)
    torch.testing.assert_close(loss.value, expected, rtol=1e-12, atol=0)
    loss.value.backward()
    assert flow.field.null.grad.abs().min() > 0


def test_context_dropout_requires_a_model_and_data_with_optional_context(small_flow, data):
    x, context = data
    objective = FlowMatching(context_dropout=0.1)
    with pytest.raises(ValueError, match="context_dropout needs a model built with null_context"):
        objective.prepare(small_flow("cnf", context=3), Batch(x, context))
    with pytest.raises(ValueError, match="and data with a context"):
        objective.prepare(small_flow("cnf", context=3, null_context=True), Batch(x))
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match=f"expected 0 <= context_dropout < 1, got {share}"):
            FlowMatching(context_dropout=share)


def test_training_with_context_dropout_learns_both_distributions_and_guidance_sharpens(generator):
    """Given its sign, the data are N(±2, ¼) in the first coordinate; without it, both lumps."""
    sign = torch.where(torch.rand(4096, 1, generator=generator) < 0.5, 1.0, -1.0)
    x = torch.cat([2 * sign, 0 * sign], 1) + 0.5 * torch.randn(4096, 2, generator=generator)
    flow = cnf.models.build(
        "cnf", dim=2, context=1, hidden=(32, 32), null_context=True,
        solver=Solver("midpoint", steps=12),
    )  # fmt: skip
    config = cnf.TrainConfig(
        steps=400, batch_size=256, lr=1e-2, ema=0.98, validations=0, progress=False, device="cpu"
    )
    cnf.fit(flow, FlowMatching(context_dropout=0.2), x, config, context=sign)
    one = torch.ones(1)
    given = flow.sample((1000,), one, generator=generator)[:, 0]
    free = flow.sample((1000,), generator=generator)[:, 0]
    more = guided(flow, 3.0).sample((1000,), one, generator=generator)[:, 0]
    assert given.mean().item() == pytest.approx(2.0, abs=0.25) and (given > 0).float().mean() > 0.9
    assert (free > 0).float().mean().item() == pytest.approx(0.5, abs=0.15)
    assert more.mean() > given.mean() + 0.05


def test_data_may_have_missing_contexts(generator):
    flow = cnf.models.build("cnf", dim=2, context=1, hidden=(4,), null_context=True)
    context = torch.ones(64, 1)
    context[::3] = NAN
    config = cnf.TrainConfig(steps=2, batch_size=16, validations=0, progress=False, device="cpu")
    cnf.fit(flow, FlowMatching(), torch.randn(64, 2, generator=generator), config, context=context)
