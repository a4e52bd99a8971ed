"""The interface of a flow, for every model with random weights."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, MultivariateNormal

import cnf
from cnf import Flow, Hutchinson, Solver
from cnf.dequantization import UniformDequantization
from cnf.distributions import Empirical, GaussianMixture
from cnf.dynamics import record
from cnf.fields import Adapter
from cnf.flow import evaluating
from cnf.matching import COUPLINGS
from cnf.metrics import sliced_wasserstein2
from cnf.models import MODELS
from cnf.transforms import Continuous, Standardize

F64 = torch.float64
MODES = [True, False]


@pytest.fixture
def points(generator):
    return torch.randn(5, 2, generator=generator, dtype=F64) * 1.3 + 0.4


@pytest.fixture
def contexts(generator):
    return torch.randn(5, 3, generator=generator, dtype=F64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Linear(nn.Module):
    matrix = torch.tensor([[0.3, -1.2], [0.9, 0.5]], dtype=F64)

    def forward(self, t, x):
        return x @ self.matrix.T


def test_log_prob_of_a_linear_flow_is_that_of_a_gaussian(points):
    # x = e^A z and then ·scale + loc: N(loc, S e^A e^Aᵀ S)
    outer = Standardize((2,))
    outer.loc.copy_(torch.tensor([1.0, -2.0]))
    outer.scale.copy_(torch.tensor([0.5, 3.0]))
    transform = Continuous(Adapter(Linear(), (2,)), Solver(rtol=1e-10, atol=1e-10))
    flow = Flow(None, transform, outer, event_shape=(2,)).double()
    root = outer.scale.diag() @ torch.matrix_exp(Linear.matrix)
    gaussian = MultivariateNormal(outer.loc, root @ root.T)
    torch.testing.assert_close(flow.log_prob(points), gaussian.log_prob(points), rtol=0, atol=1e-7)


class Linear32(nn.Module):
    def forward(self, t, x):
        return x @ Linear.matrix.to(x).T


@pytest.fixture(params=["discrete", "continuous"])
def far(request):
    """A flow in float32, N(loc, RRᵀ) near 1e8, and the float64 points that it was fitted to."""
    x = 1e8 + torch.randn(500, 2, generator=seeded(1), dtype=F64) * torch.tensor([2.0, 0.5])
    outer, inner = Standardize((2,)), Standardize((2,))
    outer.fit(x)
    inner.scale.copy_(torch.tensor([0.8, 1.1]))
    root = inner.scale.diag()
    if request.param == "continuous":
        solver = Solver(rtol=1e-7, atol=1e-7)
        inner, root = (
            Continuous(Adapter(Linear32(), (2,)), solver),
            torch.matrix_exp(Linear.matrix),
        )
    flow = Flow(None, inner, outer, event_shape=(2,)).float()
    root = outer.scale.diag() @ root
    return flow, x, MultivariateNormal(outer.loc, root @ root.T)


def test_float32_flow_resolves_float64_data(far):
    flow, x, gaussian = far
    log_prob = flow.log_prob(x)
    assert log_prob.dtype == F64 and flow.encode(x).dtype == flow.dtype == torch.float32
    # float32 within; rounding x to float32 would be off by thousands of nats
    torch.testing.assert_close(log_prob, gaussian.log_prob(x), rtol=0, atol=2e-5)
    back = flow.decode(flow.encode(x))
    torch.testing.assert_close(back - 1e8, x - 1e8, rtol=0, atol=1e-4)  # two solves at 1e-7
    drawn, claimed = flow.sample_and_log_prob(4000, generator=seeded())
    assert drawn.dtype == claimed.dtype == flow.sample().dtype == F64
    torch.testing.assert_close(claimed, gaussian.log_prob(drawn), rtol=0, atol=1e-4)
    torch.testing.assert_close(drawn.std(0), gaussian.stddev, rtol=0.05, atol=0)  # 4000 draws


@pytest.mark.parametrize("far", ["continuous"], indirect=True)
def test_trajectory_and_integrals_resolve_float64_data(far):
    flow, x, gaussian = far
    path = flow.trajectory(flow.encode(x), [0.0, 0.5, 1.0])
    assert path.dtype == F64
    torch.testing.assert_close(path[-1] - 1e8, x - 1e8, rtol=0, atol=1e-4)
    log_prob, _ = flow.log_prob_and_integral(x)
    torch.testing.assert_close(log_prob, gaussian.log_prob(x), rtol=0, atol=2e-5)


def test_data_that_float32_does_not_resolve_warn(far):
    flow, x, _ = far
    with pytest.warns(UserWarning, match=r"torch.float32 merges values of x in columns \[0, 1\]"):
        flow.log_prob(x.float())
    flow.preprocess = None
    with pytest.warns(UserWarning, match=r"torch.float32 merges values of x in columns \[1\]"):
        flow.log_prob(torch.stack([x[:, 0] - 1e8, x[:, 1]], 1))
    near = x - 1e8  # float64 that float32 holds as well is scored in silence
    assert flow.log_prob(near).dtype == F64
    assert torch.equal(flow.log_prob(near).float(), flow.log_prob(near.float()))


@pytest.mark.parametrize("context", [0, 3])
@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_density_integrates_to_one(name, context, small_flow, contexts):
    # Many layers of large weights make densities that no grid resolves.
    gain = 0.9 if name in ("cnf", "ffjord", "rnode", "otflow") else 0.3
    flow = small_flow(name, context, solver=Solver(rtol=1e-6, atol=1e-6), gain=gain)
    c = contexts[0] if context else None
    with torch.no_grad():
        drawn = flow.sample(2000, c, generator=seeded())
        low, high = drawn.amin(0), drawn.amax(0)
        low, high = low - (high - low) / 2, high + (high - low) / 2
        axes = [torch.linspace(a, b, 160, dtype=F64) for a, b in zip(low, high, strict=True)]
        grid = torch.cartesian_prod(*axes)
        mass = flow.log_prob(grid, c).exp().sum() * ((high - low) / 159).prod()
    assert mass.item() == pytest.approx(1, abs=2e-3)  # grid of 160², solver rtol 1e-6


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_sample_shape_follows_torchs_convention(name, small_flow, contexts):
    flow = small_flow(name)
    for shape, full in (
        ((), ()),
        (4, (4,)),
        ((4,), (4,)),
        ((2, 3), (2, 3)),
        (torch.Size([3]), (3,)),
    ):
        assert flow.sample(shape).shape == (*full, 2)
        assert flow.sample_and_log_prob(shape)[1].shape == full
    flow = small_flow(name, 3)
    for context in (contexts[0], contexts, contexts.expand(4, 5, 3)):
        for shape, full in (((), ()), (4, (4,)), ((2, 3), (2, 3))):
            x, log_prob = flow.sample_and_log_prob(shape, context)
            assert x.shape == (*full, *context.shape[:-1], 2)
            assert log_prob.shape == x.shape[:-1] == flow.sample(shape, context).shape[:-1]
            assert x.dtype == log_prob.dtype == F64


@pytest.mark.parametrize("n", [0, (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_empty_inputs_give_empty_results(name, n, small_flow):
    x, log_prob = small_flow(name).sample_and_log_prob(n)
    assert x.numel() == 0 and log_prob.shape == x.shape[:-1]
    assert small_flow(name).log_prob(x).shape == x.shape[:-1]


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_log_prob_of_sample_and_log_prob_equals_log_prob(name, small_flow, contexts):
    flow = small_flow(name, 3, gain=0.5)  # twice that, and glow's factors are near singular
    with record() as stats:
        x, log_prob = flow.sample_and_log_prob(4, contexts, generator=seeded())
    assert stats.solves <= 1
    torch.testing.assert_close(flow.log_prob(x, contexts), log_prob, rtol=0, atol=1e-6)
    torch.testing.assert_close(flow.sample(4, contexts, generator=seeded()), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_encode_and_decode_are_inverses(name, small_flow, points, contexts):
    flow = small_flow(name, 3)
    z = flow.encode(points, contexts)
    torch.testing.assert_close(flow.decode(z, contexts), points, rtol=0, atol=1e-6)
    assert (z - points).abs().max() > 1e-2
    shared = flow.encode(points, contexts[0])
    torch.testing.assert_close(
        shared, flow.encode(points, contexts[0].expand(5, 3)), atol=1e-7, rtol=0
    )


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_log_prob_equals_change_of_variables(name, small_flow, points):
    flow = small_flow(name)
    jacobian = torch.autograd.functional.jacobian(flow.encode, points[0])
    expected = flow.base.log_prob(flow.encode(points[0])) + jacobian.det().abs().log()
    torch.testing.assert_close(flow.log_prob(points[0]), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("train", MODES)
@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_gradients_reach_every_parameter_and_the_context(
    name, train, small_flow, points, contexts
):
    flow = small_flow(name, 3, gain=0.5).train(train)
    c = contexts.requires_grad_()
    x, log_prob = flow.sample_and_log_prob(2, c, generator=seeded())
    for output in (
        flow.log_prob(points, c).sum(),
        flow.rsample(2, c, generator=seeded()).square().sum(),
        x.square().sum() + log_prob.sum(),  # where volume is kept, the former alone
    ):
        flow.zero_grad()
        (grad,) = torch.autograd.grad(output, c, retain_graph=True)
        assert grad.abs().sum(-1).min() > 0
        output.backward()
        for key, parameter in flow.named_parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_train_and_eval_mode_give_the_same_repeatable_results(name, small_flow, points):
    flow = small_flow(name)
    before = torch.get_rng_state()
    first = flow.train().log_prob(points)
    assert torch.equal(first, flow.log_prob(points))
    assert torch.equal(first, flow.eval().log_prob(points))
    assert torch.equal(torch.get_rng_state(), before)  # exact: nothing is drawn
    assert first.requires_grad and not flow.sample(3, generator=seeded()).requires_grad


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_gradients_in_eval_and_train_mode_are_equal(name, small_flow, points, contexts):
    flow, c = small_flow(name, 3), contexts.requires_grad_()
    inputs = [c, *flow.parameters()]
    train, eval_ = (
        torch.autograd.grad(flow.train(mode).log_prob(points, c).sum(), inputs) for mode in MODES
    )
    for one, other in zip(train, eval_, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_sampling_repeats_and_does_not_change_the_global_generator(name, small_flow):
    flow, before = small_flow(name), torch.get_rng_state()
    one = flow.sample(3, generator=seeded(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, flow.sample(3, generator=seeded(1)))
    assert not torch.equal(one, flow.sample(3, generator=seeded(2)))


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_result_of_a_row_does_not_depend_on_other_rows(name, small_flow, points):
    flow = small_flow(name, solver=Solver(rtol=1e-7, atol=1e-7))
    with torch.no_grad():
        crowd = flow.log_prob(torch.cat([points, 8 * points.repeat(20, 1)]))[:5]
        alone = torch.stack([flow.log_prob(point) for point in points])
    torch.testing.assert_close(crowd, alone, rtol=0, atol=1e-4)  # solver rtol 1e-7


@pytest.mark.parametrize("name", ["cnf", "ffjord", "rnode", "otflow"])
def test_estimated_log_prob_is_optional_and_unbiased(name, small_flow, points):
    flow = small_flow(name, dim=2)
    probe = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]], dtype=F64)[:, None].expand(
        4, 5, 2
    )
    one = flow.log_prob(points, divergence=Hutchinson(probe=probe[:1]))
    assert (one - flow.log_prob(points)).abs().max() > 1e-4
    estimate = flow.log_prob(points, divergence=Hutchinson(probe=probe))
    torch.testing.assert_close(estimate, flow.log_prob(points), rtol=0, atol=1e-6)


CONTINUOUS = ["cnf", "ffjord"]


@pytest.mark.parametrize("name", CONTINUOUS)
def test_trajectory_runs_from_the_base_to_the_sample(name, small_flow, points, contexts):
    flow = small_flow(name, 3)
    path = flow.trajectory(points, [0, 0.25, 1], contexts)
    assert path.shape == (3, 5, 2)
    start = points if flow.preprocess is None else flow.preprocess(points)[0]
    torch.testing.assert_close(path[0], start)
    torch.testing.assert_close(path[-1], flow.decode(points, contexts), rtol=0, atol=1e-6)
    torch.testing.assert_close(flow.trajectory(points, torch.tensor([0.0]), contexts), path[:1])
    for times in ([], [0.5, 1.0], [0.0, 0.0], [0, 1, 0.5], [0, 2.0], [0.0, math.nan], [math.nan]):
        with pytest.raises(ValueError, match="times ascending from 0"):
            flow.trajectory(points, times, contexts)


def test_times_outside_of_the_unit_interval_are_refused(small_flow, points):
    flow = small_flow("cnf")
    whole = flow.trajectory(points, [0.0, 1.0])
    assert torch.equal(flow.trajectory(points, np.array([0, 1])), whole)
    moving = torch.tensor([0.0, 1.0], requires_grad=True)
    for times, text in ((moving, "take no gradient"), (0.5, "sequence"), (["a"], "sequence")):
        with pytest.raises(ValueError, match=f"Flow.trajectory.*{text}"):
            flow.trajectory(points, times)
    for stop in (2.0, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"stop inside \[0, 1\]"):
            flow.log_prob_and_integral(points, stop=stop)
    for times in ([0.0, 2.0], [0.0, math.nan]):
        with pytest.raises(ValueError, match=r"times in \[0, 1\]"):
            flow.transform.trajectory(points, times)


@pytest.mark.parametrize("shape", [-1, True, 2.0, (2, -1), "3", None, (2, True)], ids=str)
def test_invalid_sample_shape_is_refused(shape, small_flow):
    flow = small_flow("realnvp")
    toy = cnf.data.toy("moons")
    expected = "expected sample_shape to be a whole number of at least 0"
    for name in ("sample", "rsample", "sample_and_log_prob"):
        with pytest.raises(ValueError, match=f"^Flow.{name}: {expected}"):
            getattr(flow, name)(shape)
    with pytest.raises(ValueError, match=expected):
        flow.base.sample(shape)
    for call in (toy.sample, cnf.data.load(torch.randn(5, 2)).sample):
        with pytest.raises(ValueError, match="n to be an integer of at least 0"):
            call(shape)
    assert flow.sample(np.int64(3)).shape == (3, 2) == toy.sample(np.int64(3)).shape


@pytest.mark.parametrize("name", CONTINUOUS)
def test_with_solver_shares_weights_and_changes_the_cost(name, small_flow, points):
    flow = small_flow(name)
    fast = flow.with_solver(Solver("rk4", steps=4))
    assert all(a is b for a, b in zip(flow.parameters(), fast.parameters(), strict=True))
    with record() as stats:
        coarse = fast.log_prob(points)
    assert stats.forward == 16 and not torch.equal(coarse, flow.log_prob(points))
    with record() as stats:
        flow.log_prob(points)
    assert stats.forward != 16
    with torch.no_grad():
        for parameter in flow.field.parameters():
            parameter.add_(0.5)
    assert (fast.log_prob(points) - coarse).abs().max() > 1e-2
    assert fast.field is flow.field


@pytest.mark.parametrize(
    "call",
    [
        lambda flow, x, c: flow.log_prob(x, c),
        lambda flow, x, c: flow.encode(x, c),
        lambda flow, x, c: flow.decode(x, c),
        lambda flow, x, c: flow.trajectory(x, [0, 1], c),
    ],
)
def test_error_names_a_device_other_than_the_flows(call):
    flow = cnf.models.build("cnf", dim=2, context=1)
    x, context = torch.zeros(5, 2), torch.zeros(5, 1)
    there = "on cpu, the flow's device, got one on meta; move one"  # every machine has meta
    with pytest.raises(ValueError, match=f"expected [xz] {there}"):
        call(flow, x.to("meta"), context)
    with pytest.raises(ValueError, match=f"expected the context {there}"):
        call(flow, x, context.to("meta"))


@pytest.mark.parametrize(
    "draw",
    [
        lambda flow: flow.sample(2, generator=3),
        lambda flow: flow.base.sample((2,), 3),
        lambda flow: cnf.data.toy("moons").sample(2, 3),
        lambda flow: cnf.data.load(torch.ones(9, 2)).sample(2, 3),
        lambda flow: flow.log_prob(torch.zeros(2, 2), generator=3),
        lambda flow: flow.encode(torch.zeros(2, 2), generator=3),
        lambda flow: flow.with_dequantization(UniformDequantization()).inside(torch.ones(1, 2), 3),
        lambda flow: Empirical(torch.zeros(1, 2)).sample((2,), 3),
        lambda flow: GaussianMixture.fit(torch.randn(9, 2), 1, generator=3),
        lambda flow: Hutchinson().draw(torch.zeros(2, 2), 3),
        lambda flow: sliced_wasserstein2(torch.zeros(2, 2), torch.zeros(2, 2), generator=3),
        lambda flow: COUPLINGS.build("sinkhorn")(torch.eye(2), torch.eye(2), None, 3),
    ],
)
def test_error_names_a_seed_in_place_of_a_generator(draw, small_flow):
    with pytest.raises(TypeError, match=r"got 3; write generator=torch.Generator\(\).manual_seed"):
        draw(small_flow("realnvp"))


def test_with_solver_accepts_the_same_arguments_as_builders(small_flow, points):
    flow = small_flow("cnf")
    coarse = flow.with_solver({"method": "rk4", "steps": 2})
    assert coarse.transform.solver == Solver("rk4", steps=2)
    assert coarse.spec is None or coarse.spec["options"]["solver"]["steps"] == 2
    assert flow.with_solver("dopri8").transform.solver == Solver("dopri8")


def test_discrete_flow_has_no_field_trajectory_and_solver(small_flow, points):
    flow = small_flow("realnvp")
    assert not hasattr(flow, "field") and hasattr(small_flow("cnf"), "field")
    with pytest.raises(
        AttributeError, match="expected a flow whose transform is a Continuous.*Compose"
    ):
        _ = flow.field
    with pytest.raises(AttributeError, match="no attribute 'fields'"):
        _ = flow.fields
    for call in (
        lambda: flow.log_prob_and_integral(points),
        lambda: flow.trajectory(points, [0, 1]),
        lambda: flow.with_solver(Solver()),
    ):
        with pytest.raises(TypeError, match="Compose"):
            call()


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_distribution_behaves_like_a_torch_distribution(name, small_flow, points, contexts):
    flow = small_flow(name, 3)
    p = flow.distribution(contexts)
    assert p.batch_shape == (5,) and p.event_shape == (2,) and p.has_rsample
    assert p.sample((4,)).shape == (4, 5, 2) and not p.sample().requires_grad
    assert p.rsample().requires_grad
    torch.testing.assert_close(p.log_prob(points), flow.log_prob(points, contexts))
    joint = Independent(p, 1)
    torch.testing.assert_close(joint.log_prob(points), flow.log_prob(points, contexts).sum())
    assert flow.distribution(contexts[0]).batch_shape == ()


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_invalid_calls_raise_value_errors_with_a_message(name, small_flow, points, contexts):
    plain, conditional = small_flow(name), small_flow(name, 3)
    for call, text in (
        (
            lambda: plain.log_prob(points[:, :1]),
            r"Flow.log_prob: expected x of shape \(\*, 2\), got \(5, 1\)",
        ),
        (lambda: plain.encode(points.long()), "Flow.encode: expected x of floating dtype"),
        (lambda: plain.decode(points[:, :1]), r"Flow.decode: expected z of shape \(\*, 2\)"),
        (
            lambda: plain.log_prob(points.tolist()),
            "Flow.log_prob: expected x to be a torch.Tensor",
        ),
        (lambda: plain.log_prob(points, contexts), "this flow is unconditional, got a context"),
        (lambda: plain.sample(2, contexts), "this flow is unconditional"),
        (lambda: plain.log_prob(points, torch.tensor(1.0)), "this flow is unconditional"),
        (lambda: conditional.log_prob(points), r"expected a context of shape \(\*, 3\), got None"),
        (lambda: conditional.sample(2), r"expected a context of shape \(\*, 3\), got None"),
        (
            lambda: conditional.log_prob(points, contexts[:, :2]),
            r"expected context of shape \(\*, 3\)",
        ),
        (
            lambda: conditional.log_prob(points, contexts[:4]),
            r"broadcasts to \(5, 3\), got \(4, 3\)",
        ),
        (lambda: plain.log_prob(points.float()), "float64"),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    with pytest.raises(ValueError, match="event_shape"):
        Flow(None, plain.transform)


def test_evaluating_restores_the_mode_of_every_part_after_an_error():
    net = nn.Sequential(nn.Linear(2, 2), nn.Dropout()).train()
    net[1].eval()  # frozen, say
    with pytest.raises(RuntimeError, match="inside"), evaluating(net):
        assert not any(part.training for part in net.modules())
        raise RuntimeError("inside")
    assert [part.training for part in net.modules()] == [True, True, False]
