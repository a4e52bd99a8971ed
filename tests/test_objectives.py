"""Maximum likelihood and flow matching, against hand computations."""

import pytest
import torch
from torch import nn

import cnf
from cnf import Batch, Flow, FlowMatching, Hutchinson, MaximumLikelihood, Solver
from cnf.fields import Adapter
from cnf.matching import Pairing
from cnf.objectives import OBJECTIVES
from cnf.objectives.batch import resampled
from cnf.transforms import Continuous

F64 = torch.float64


@pytest.fixture
def x(generator):
    return torch.randn(6, 2, generator=generator, dtype=F64) * 1.5 + 0.5


@pytest.fixture
def context(generator):
    return torch.randn(6, 3, generator=generator, dtype=F64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_likelihood_is_the_mean_negative_log_prob(small_flow, x):
    for name in cnf.models.MODELS.taking("dim"):
        flow = small_flow(name)
        solver = getattr(flow.transform, "solver", None)
        loss = MaximumLikelihood("exact", {}, solver)(flow, Batch(x))
        torch.testing.assert_close(loss.value, -flow.log_prob(x).mean())
        assert loss.metrics["nll"] == loss.value and not loss.metrics["nll"].requires_grad


def test_weighted_loss_is_a_weighted_mean(small_flow, x):
    flow, weight = small_flow("realnvp"), torch.arange(6).double()
    value = MaximumLikelihood()(flow, Batch(x, weight=weight)).value
    torch.testing.assert_close(value, -(weight * flow.log_prob(x)).sum() / 15)


def test_estimated_likelihood_is_log_prob_with_the_prepared_probes(small_flow, x):
    flow, objective = small_flow("ffjord"), MaximumLikelihood(divergence=Hutchinson(probes=2))
    batch = objective.prepare(flow, Batch(x), seeded())
    assert batch.probe.shape == (6, 2, 2)
    value = objective(flow, batch).value
    expected = -flow.log_prob(x, divergence=Hutchinson(probe=batch.probe.movedim(1, 0))).mean()
    torch.testing.assert_close(value, expected)
    assert (value + flow.log_prob(x).mean()).abs() > 1e-4  # an estimate, not the exact one


@pytest.mark.parametrize("name", ["cnf", "ffjord"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_penalties_are_added_with_their_weight(name, divergence, small_flow, x):
    flow = small_flow(name)
    batch = MaximumLikelihood(divergence).prepare(flow, Batch(x), seeded())
    plain = MaximumLikelihood(divergence)(flow, batch)
    loss = MaximumLikelihood(divergence, {"kinetic": 0.3})(flow, batch)
    torch.testing.assert_close(loss.metrics["nll"], plain.value.detach(), rtol=0, atol=1e-7)
    expected = plain.value + 0.3 * loss.metrics["kinetic"]
    torch.testing.assert_close(loss.value, expected, rtol=0, atol=1e-7)
    assert loss.metrics["kinetic"] > 1e-2
    y = x if flow.preprocess is None else flow.preprocess.inverse(x)[0]
    times = torch.linspace(0, 1, 201, dtype=F64)
    path = flow.transform.trajectory(flow.encode(x), times.tolist())
    speed = torch.stack(
        [flow.field(t, p).square().sum(-1) for t, p in zip(times, path, strict=True)]
    )
    torch.testing.assert_close(path[-1], y, rtol=0, atol=1e-6)
    energy = torch.trapezoid(speed, times, dim=0).mean()
    torch.testing.assert_close(loss.metrics["kinetic"], energy, rtol=1e-3, atol=0)  # trapezoid


def test_penalties_are_weighted_means_like_the_likelihood(small_flow, x):
    flow, objective = small_flow("cnf"), MaximumLikelihood(penalties={"kinetic": 0.3})
    counts = torch.arange(len(x)) % 3
    weighted = objective(flow, Batch(x, weight=counts.double()))
    repeated = objective(flow, Batch(x.repeat_interleave(counts, 0)))
    plain = objective(flow, Batch(x))
    kinetic = [loss.metrics["kinetic"] for loss in (weighted, repeated, plain)]
    torch.testing.assert_close(kinetic[0], kinetic[1], rtol=0, atol=1e-7)  # solver rtol 1e-9
    torch.testing.assert_close(weighted.value, repeated.value, rtol=0, atol=1e-7)
    assert (kinetic[0] - kinetic[2]).abs() > 1e-3


@pytest.mark.parametrize("name", ["cnf", "ffjord"])
def test_penalized_loss_reaches_every_parameter_and_the_context(name, small_flow, x, context):
    flow, leaf = small_flow(name, context=3), context.requires_grad_()
    loss = MaximumLikelihood(penalties={"kinetic": 0.3})(flow, Batch(x, leaf))
    loss.value.backward()
    assert all(p.grad.abs().max() > 0 for p in flow.parameters()) and leaf.grad.abs().min() > 0


def test_flow_matching_by_hand(small_flow, x, context):
    flow = small_flow("cnf", context=3)
    objective = FlowMatching()
    batch = objective.prepare(flow, Batch(x, context), seeded())
    x1 = (x - flow.preprocess.loc) / flow.preprocess.scale  # it works inside preprocess
    t = batch.t[:, None]
    xt = (1 - t) * batch.x0 + t * x1
    columns = flow.context_preprocess.columns
    inner = (context - columns.loc) / columns.scale
    error = flow.field(batch.t, xt, inner) - (x1 - batch.x0)
    loss = objective(flow, batch)
    torch.testing.assert_close(loss.value, (error**2).sum(-1).mean())
    assert (inner - context).abs().min() > 1e-3
    assert (flow.preprocess.loc != 0).all() and loss.metrics["fm"] == loss.value
    assert ((0 <= batch.t) & (batch.t < 1)).all() and batch.t.unique().numel() == 6


@pytest.mark.parametrize(
    "objective",
    [
        FlowMatching(),
        MaximumLikelihood("hutchinson"),
        MaximumLikelihood("hutchinson", {"kinetic": 1}),
    ],
    ids=str,
)
def test_prepare_makes_all_random_draws(objective, small_flow, x):
    flow = small_flow("cnf")
    before = torch.get_rng_state()
    first, again, other = (objective.prepare(flow, Batch(x), seeded(seed)) for seed in (1, 1, 2))
    one = objective(flow, first, seeded(5)).value
    assert torch.equal(one, objective(flow, again, seeded(6)).value)
    assert torch.equal(one, objective(flow, Batch(x), seeded(1)).value)
    assert not torch.equal(one, objective(flow, other).value)
    assert torch.equal(torch.get_rng_state(), before)
    halves = [first.map(lambda v, k=k: v[k : k + 3]) for k in (0, 3)]
    values = [objective(flow, half).value for half in halves]
    torch.testing.assert_close(sum(values) / 2, one, rtol=0, atol=1e-6)  # solver rtol 1e-9
    assert abs(values[0] - one) > 1e-3
    assert not any(v.requires_grad for v in vars(first).values() if v is not None)


def test_coupling_carries_context_with_x1_and_weighs_pairs(small_flow, x, context):
    swap = torch.tensor([3, 0, 5, 1, 2, 4])
    move = torch.tensor([1, 2, 3, 4, 5, 0])
    extra = torch.arange(1, 7).double()

    def couple(x0, x1, context, generator):
        return Pairing(swap, move, extra)

    flow = small_flow("cnf", context=3)
    plain = FlowMatching().prepare(flow, Batch(x, context), seeded())
    paired = FlowMatching(coupling=couple).prepare(flow, Batch(x, context), seeded())
    assert torch.equal(paired.x0, plain.x0[swap])
    assert torch.equal(paired.x1, plain.x1[move])
    assert torch.equal(paired.context, plain.context[move])
    assert torch.equal(paired.weight, extra)


def test_coupling_may_change_the_number_of_pairs(small_flow, x):
    def couple(x0, x1, context, generator):
        return Pairing(torch.tensor([0, 1, 2, 3]), torch.tensor([5, 5, 0, 1]))

    flow, objective = small_flow("cnf"), FlowMatching(coupling=couple)
    batch = objective.prepare(flow, Batch(x), seeded())
    assert len(batch.t) == len(batch.x0) == len(batch.x1) == 4
    assert objective(flow, batch).value.isfinite()


class Conditional(nn.Module):
    """E[x1 - x0 | xt] for x0 ~ N(0, 1), x1 ~ N(m, s²), times a gain that should be one."""

    def __init__(self, m, s):
        super().__init__()
        self.m, self.s = m, s
        self.gain = nn.Parameter(torch.ones(2, dtype=F64))

    def forward(self, t, x):
        t = t.unsqueeze(-1)
        variance = (1 - t) ** 2 + (t * self.s) ** 2
        slope = (t * self.s**2 - (1 - t)) / variance
        return self.gain[0] * self.m + self.gain[1] * slope * (x - t * self.m)


def test_exact_field_of_gaussian_to_gaussian_minimizes_flow_matching():
    net = Conditional(2.0, 0.5)
    flow = Flow(
        None, Continuous(Adapter(net, (1,)), Solver(rtol=1e-8, atol=1e-8)), event_shape=(1,)
    )
    flow.double()
    x = 2 + 0.5 * torch.randn(100_000, 1, generator=seeded(1), dtype=F64)
    objective = FlowMatching()
    batch = objective.prepare(flow, Batch(x), seeded(2))

    def slope():
        (grad,) = torch.autograd.grad(objective(flow, batch).value, net.gain)
        return grad

    at_best = slope()
    net.gain.data.fill_(1.2)
    assert at_best.abs().max() < 0.02 < 0.15 < slope().abs().min()  # 10⁵ draws: 0.004 each
    net.gain.data.fill_(1.0)
    normal = torch.distributions.Normal(torch.tensor(2.0, dtype=F64), 0.5)
    torch.testing.assert_close(flow.log_prob(x[:9]), normal.log_prob(x[:9, 0]), rtol=0, atol=1e-6)


def test_flow_matching_trains_the_field_only(small_flow):
    flow = small_flow("cnf")
    assert set(FlowMatching().parameters(flow)) == set(flow.field.parameters())
    assert set(MaximumLikelihood().parameters(flow)) == set(flow.parameters())


def test_given_x0_is_used(small_flow, x):
    flow = small_flow("cnf")
    batch = FlowMatching().prepare(flow, Batch(x, x0=x + 1), seeded())
    assert torch.equal(batch.x0, x + 1)


@pytest.mark.parametrize(
    "objective", [FlowMatching(), MaximumLikelihood(penalties={"kinetic": 1})]
)
def test_objectives_that_need_a_field_refuse_a_discrete_flow(objective, small_flow, x):
    with pytest.raises(
        TypeError, match="whose transform (is|holds) a Continuous, .* got a Compose"
    ):
        objective(small_flow("realnvp"), Batch(x))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_module_that_is_not_a_flow_is_refused(name, x):
    needed = [lambda x: x.sum(-1)] if name in ("reverse-kl", "importance-weighted") else []
    with pytest.raises(TypeError, match="expected a cnf.Flow, got Linear"):
        OBJECTIVES[name](*needed)(nn.Linear(2, 2), Batch(x))


@pytest.mark.parametrize(
    "objective",
    [FlowMatching(), MaximumLikelihood(), MaximumLikelihood(penalties={"kinetic": 1})],
    ids=str,
)
def test_missing_or_unexpected_context_raises_value_error(objective, small_flow, x, context):
    with pytest.raises(ValueError, match="context"):
        objective(small_flow("cnf", context=3), Batch(x))
    with pytest.raises(ValueError, match="unconditional"):
        objective(small_flow("cnf"), Batch(x, context))


def test_misspelt_settings_are_refused():
    for make in (
        lambda: FlowMatching(path="liner"),
        lambda: FlowMatching(coupling="indep"),
        lambda: MaximumLikelihood(divergence="exat"),
        lambda: MaximumLikelihood(penalties={"kinetics": 1.0}),
        lambda: MaximumLikelihood(penalties={"kinetic": -1.0}),
    ):
        with pytest.raises(ValueError):
            make()


MISFITS = {
    "weight of shape (N, 1)": (
        dict(weight=torch.ones(6, 1)),
        r"weight of shape \(6,\), got .*6, 1",
    ),
    "one weight": (dict(weight=torch.tensor(1.0)), r"weight of shape \(6,\)"),
    "too few weights": (dict(weight=torch.ones(5)), r"weight of shape \(6,\), got .*\(5,\)"),
    "an array as weight": (
        dict(weight=torch.ones(6).numpy()),
        "weight to be a torch.Tensor, got nda",
    ),
    "one context for all": (dict(context=torch.ones(1, 3)), "6 rows, .* got .*1, 3"),
    "x0 of another batch": (dict(x0=torch.ones(5, 2)), "x0 of 6 rows, as many as x has"),
    "negative weight": (dict(weight=-torch.arange(6.0)), r"at least 0, got -1 in row 1 \(5 of 6"),
    "NaN weight": (dict(weight=torch.full((6,), torch.nan)), "finite .* got nan in row 0"),
    "infinite weight": (dict(weight=torch.full((6,), torch.inf)), "finite .* got inf"),
    "weights of 0": (dict(weight=torch.zeros(6)), "above 0, got zero in all 6"),
}


@pytest.mark.parametrize("kind", MISFITS)
def test_batch_whose_parts_would_broadcast_is_refused_when_it_is_created(kind, x):
    tensors, message = MISFITS[kind]
    with pytest.raises(ValueError, match=f"^Batch: expected .*{message}"):
        Batch(x, **tensors)


@pytest.mark.parametrize(
    "objective", [FlowMatching(), MaximumLikelihood(), cnf.objectives.Joint()]
)
def test_rows_of_more_than_one_event_are_refused(objective, small_flow, x):
    message = r"expected one row for each x, shape \('N', 2\), got \(6, 1, 2\)"
    with pytest.raises(ValueError, match=message):
        objective(small_flow("cnf"), Batch(x[:, None], weight=torch.ones(6)), seeded())


def test_x0_of_another_event_is_refused(small_flow, x):
    with pytest.raises(ValueError, match=r"x0 of x1's shape \(6, 2\), got \(6, 1, 2\)"):
        FlowMatching()(small_flow("cnf"), Batch(x, x0=x[:, None]), seeded())


@pytest.mark.parametrize(
    "objective", [FlowMatching(), MaximumLikelihood(), cnf.objectives.Joint()]
)
def test_batch_with_all_weights_0_has_zero_gradient(objective, small_flow, x):
    flow = small_flow("cnf")
    batch = Batch(x, weight=torch.ones(6)).but(weight=torch.zeros(6))  # as chance may draw it
    value = objective(flow, batch, seeded()).value
    assert value == 0
    slopes = torch.autograd.grad(value, list(objective.parameters(flow)), allow_unused=True)
    assert not any(slope.any() for slope in slopes if slope is not None)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_weights_may_be_integers(dtype, small_flow, x):
    flow, weight = small_flow("realnvp"), torch.tensor([1, 0, 1, 1, 0, 1], dtype=dtype)
    value = MaximumLikelihood()(flow, Batch(x, weight=weight)).value
    torch.testing.assert_close(value, -flow.log_prob(x)[weight > 0].mean())


def test_rows_are_resampled_in_proportion_to_their_weights():
    weight = torch.tensor([0.0, 3.0, 1.5, 0.25, 0.0, 1.25], dtype=F64)
    x = torch.arange(6.0)[:, None]
    counts = torch.stack(
        [
            torch.bincount(
                resampled(Batch(x, weight=weight), seeded(k)).x[:, 0].long(), minlength=6
            )
            for k in range(2_000)
        ]
    )
    share = 6 * weight / weight.sum()
    assert ((counts - share).abs() < 2).all()  # of N strata a row fills all but two, or misses
    torch.testing.assert_close(counts.double().mean(0), share, rtol=0, atol=0.05)  # 4 deviations
    assert torch.equal(resampled(Batch(x, weight=torch.full((6,), 0.1)), seeded()).x, x)


@pytest.mark.parametrize(
    "coupling", ["independent", "minibatch-ot", "conditional-ot", "sinkhorn", "semidiscrete"]
)
def test_weights_change_the_distribution_of_the_data_and_not_of_the_base(coupling):
    """x is ±2, of weights 9 and 1. Weights of pairs would move the base to -0.64."""
    x = torch.tensor([-2.0, 2.0], dtype=F64).repeat(256)[:, None]
    data = Batch(
        x + 0.002 * torch.randn(512, 1, generator=seeded(3), dtype=F64), weight=(5 - 2 * x[:, 0])
    )
    flow = cnf.models.build("cnf", dim=1, hidden=(4,), preprocess=None).double()
    objective = FlowMatching(coupling=coupling)
    objective = objective.begin(flow, lambda n: data, seeded(1))
    batch = objective.prepare(flow, data, seeded(2))
    weight = torch.ones(512) if batch.weight is None else batch.weight
    share, mean = ((weight * v).sum() / weight.sum() for v in (batch.x1[:, 0] < 0, batch.x0[:, 0]))
    assert abs(share - 0.9) < 0.06 and abs(mean) < 0.2


def test_resampled_rows_keep_their_context_and_noise(generator):
    x = torch.arange(40, dtype=torch.float64)[:, None]
    weight = torch.rand(40, generator=generator, dtype=torch.float64)
    drawn = resampled(cnf.Batch(x, context=2 * x + 1, x0=-x, weight=weight), generator)
    assert not torch.equal(drawn.x, x)
    torch.testing.assert_close(drawn.context, 2 * drawn.x + 1, rtol=0, atol=0)
    torch.testing.assert_close(drawn.x0, -drawn.x, rtol=0, atol=0)
    expected = (weight @ x[:, 0]) / weight.sum()  # stratified: off by one row's share
    assert abs(drawn.x.mean() - expected) < 1


@pytest.mark.parametrize("batch", [torch.zeros(3, 2), (torch.zeros(3, 2), None)])
@pytest.mark.parametrize("objective", [cnf.FlowMatching(), cnf.MaximumLikelihood()])
def test_rows_that_are_no_batch_are_refused_in_words(objective, batch):
    flow = cnf.models.cnf(2, hidden=(8,))
    with pytest.raises(
        TypeError, match=r"expected a cnf\.Batch, .* write cnf\.Batch\(x, context\)"
    ):
        objective(flow, batch)


def test_a_loss_that_is_a_tensor_is_refused_in_words():
    class Mine(cnf.objectives.Objective):
        def __call__(self, module, batch, generator=None):
            return -module.log_prob(batch.x).mean()

    flow, config = cnf.models.realnvp(2, hidden=(8,)), cnf.TrainConfig(steps=1, progress=False)
    with pytest.raises(TypeError, match=r"Mine: expected a cnf\.Loss, got a Tensor; return cnf"):
        cnf.fit(flow, Mine(), torch.randn(64, 2), config)
