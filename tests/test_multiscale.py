"""Continuous flows of images at several scales: their density, training by likelihood, cost."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import cnf
from cnf import Batch, Flow, FlowMatching, Hutchinson, MaximumLikelihood, Solver
from cnf.dynamics.ode import record
from cnf.dynamics.regularizers import REGULARIZERS
from cnf.fields import ConvField, EndTime, MLPField
from cnf.metrics.error_bars import log_prob_with_error
from cnf.models.scales import at_scales
from cnf.objectives.likelihood import LikelihoodRows
from cnf.transforms import Compose, Continuous, Coupling, Inverse
from cnf.transforms.continuous import Recipe, odes_in
from cnf.transforms.image import OnChannels, PerPixel

F64 = torch.float64
RK4 = Solver("rk4", steps=2, gradient="backprop")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def x(generator):
    return torch.randn(3, 1, 8, 8, generator=generator, dtype=F64)


@pytest.fixture
def small(randomized):
    """(name) → the model of 8 × 8 pixels, with random weights and two steps for each ODE."""

    def build(name="ffjord", **options):
        options = {"shape": (1, 8, 8), "hidden": (3,), "solver": RK4, **options}
        return randomized(cnf.models.build(name, **options), 0.3)

    return build


@pytest.fixture
def mixed(randomized):
    """A flow of 2 × 2 pixels whose ODEs are of images, of pixels, of a part and inverted."""

    def ode(shape, **recipe):
        made = MLPField(shape[0], (3,)) if len(shape) == 1 else ConvField(shape, (3,))
        return Continuous(EndTime(made), RK4, recipe=Recipe("hutchinson", **recipe))

    steps = [
        OnChannels(ode((1, 2, 2), penalties={"kinetic": 0.3}), 1),
        PerPixel(ode((2,), penalties={"jacobian": 0.2})),
        Inverse(ode((2, 2, 2), penalties={"kinetic": 0.1, "jacobian": 0.5})),
    ]
    return Flow(None, randomized(Compose(steps)), event_shape=(2, 2, 2)).double()


def test_the_scales_are_those_of_the_paper():
    flow = cnf.models.ffjord(shape=(1, 28, 28))
    odes = odes_in(flow.transform)
    shapes = [(1, 28, 28), (4, 14, 14), (2, 14, 14), (8, 7, 7), (4, 7, 7)]
    assert sorted(ode.field.event_shape for ode in odes) == sorted(shapes)
    for ode in odes:
        blocks = [ode.field.block(k).field for k in range(2)]
        assert all(isinstance(block, EndTime) and block.log_end == 0 for block in blocks)
        widths = [layer.in_channels for layer in blocks[0].field.layers]
        assert widths == [1 + n for n in (ode.field.event_shape[0], 64, 64, 64)]
        assert ode.recipe.divergence == "hutchinson" and len(ode.field.knots) == 3


def squeezed(x):
    squares = [x[..., i::2, j::2] for i in (0, 1) for j in (0, 1)]
    return torch.stack(squares, 2).flatten(1, 2)


def solved_by_hand(ode, x):
    """Runge and Kutta's 3/8 rule from data to base, and the integral of the Jacobian's trace."""
    total = torch.zeros(len(x), dtype=F64)
    for index in (1, 0):
        block = ode.field.block(index).field
        net, end = block.field, block.log_end.exp()

        def rates(s, y, net=net, end=end):
            def velocity(row):
                h = row[None]
                for k, layer in enumerate(net.layers):
                    h = F.softplus(h) if k else h
                    time = (end * s).expand(1, 1, *h.shape[-2:])
                    h = F.conv2d(torch.cat([time, h], 1), layer.weight, layer.bias, padding=1)
                return end * h[0]

            size = y[0].numel()
            jacobians = [torch.autograd.functional.jacobian(velocity, row) for row in y]
            traces = torch.stack([jacobian.reshape(size, size).trace() for jacobian in jacobians])
            return torch.stack([velocity(row) for row in y]), traces

        h = -1.0  # the block's own time runs from 1 to 0, in one step
        one, a = rates(1.0, x)
        two, b = rates(2 / 3, x + h * one / 3)
        three, c = rates(1 / 3, x + h * (two - one / 3))
        four, d = rates(0.0, x + h * (one - two + three))
        x = x + h * (one + 3 * (two + three) + four) / 8
        total = total + h * (a + 3 * (b + c) + d) / 8
    return x, total


def test_log_prob_is_that_of_the_flow_written_by_hand(small, x):
    flow = small()
    inner, after, before = odes_in(flow.transform)
    y = (x - flow.preprocess.loc) / flow.preprocess.scale
    first, one = solved_by_hand(before, y)
    second, two = solved_by_hand(after, squeezed(first))
    third, three = solved_by_hand(inner, second[:, :2])
    z = torch.cat([third, second[:, 2:]], 1)
    ladj = one + two + three - 64 * flow.preprocess.scale.log().item()  # one for the channel
    expected = ladj - (z.square() + math.log(2 * math.pi)).flatten(1).sum(1) / 2
    torch.testing.assert_close(flow.log_prob(x), expected, rtol=1e-10, atol=1e-10)
    assert min(each.abs().min() for each in (one, two, three)) > 1e-2


def test_samples_have_their_log_prob_and_decode_inverts_encode(small):
    flow = small(shape=(1, 4, 4), scales=2, layers=1, solver=Solver(rtol=1e-7, atol=1e-7))
    drawn, claimed = flow.sample_and_log_prob(2, generator=seeded())
    torch.testing.assert_close(flow.log_prob(drawn), claimed, rtol=0, atol=1e-5)
    torch.testing.assert_close(flow.decode(flow.encode(drawn)), drawn, rtol=0, atol=1e-5)


@pytest.mark.parametrize("event", [(2, 2, 2)])
def test_estimate_averaged_over_all_signs_is_exact(mixed, event, generator):
    x = torch.randn(2, *event, generator=generator, dtype=F64)
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=8)), dtype=F64)
    each = signs.reshape(1, 256, *event).expand(2, -1, *event)  # a solve of fewer has each equally
    objective = MaximumLikelihood(Hutchinson(probes=256), penalties={"jacobian": 0.4})
    estimated = objective(mixed, LikelihoodRows(x, probe=torch.cat([each] * 3, 1)))
    exact = MaximumLikelihood("exact", penalties={"jacobian": 0.4})(mixed, Batch(x))
    for name in ("nll", "jacobian"):
        torch.testing.assert_close(
            estimated.metrics[name], exact.metrics[name], rtol=1e-10, atol=1e-10
        )
    one = objective(mixed, LikelihoodRows(x, probe=torch.cat([each.flip(0)] * 3, 1)))
    torch.testing.assert_close(one.value, estimated.value)
    few = MaximumLikelihood(Hutchinson(probes=1), {})
    alone = few(mixed, LikelihoodRows(x, probe=torch.cat([each[:, :1]] * 3, 1)))
    assert (alone.value - exact.metrics["nll"]).abs() > 1e-2


def test_each_solve_has_probes_of_its_own(mixed, small, x):
    flow = small()
    rows = MaximumLikelihood().prepare(flow, Batch(x), seeded())
    assert rows.probe.shape == (3, 3, 1, 8, 8) and rows.probe.abs().unique() == 1
    assert not any(torch.equal(rows.probe[:, a], rows.probe[:, b]) for a, b in ((0, 1), (1, 2)))
    loss = MaximumLikelihood()(flow, rows)
    for k in range(3):
        other = rows.probe.clone()
        other[:, k] *= torch.where(torch.arange(64).reshape(1, 8, 8) % 3 == 0, -1.0, 1.0)
        assert MaximumLikelihood()(flow, rows.but(probe=other)).value != loss.value


def test_penalties_are_summed_over_the_solves_with_the_weights_of_each(mixed, generator):
    x = torch.randn(4, 2, 2, 2, generator=generator, dtype=F64)
    part, pixels, inverted = odes_in(mixed.transform)
    regularizers = [REGULARIZERS[name] for name in ("kinetic", "jacobian")]

    def integrals(ode, value, towards):
        done = ode.integrate(value, towards=towards, integrands=regularizers)
        costs = [cost.reshape(len(x), -1).sum(1).mean() for cost in done.integrals]
        return done.value, costs

    first, third = integrals(inverted, x, "data")
    values, second = integrals(pixels, first.movedim(1, -1), "base")
    _, one = integrals(part, values.movedim(-1, 1)[:, :1], "base")
    loss = MaximumLikelihood("exact")(mixed, Batch(x))
    torch.testing.assert_close(loss.metrics["kinetic"], one[0] + third[0])
    torch.testing.assert_close(loss.metrics["jacobian"], second[1] + third[1])
    nll = -mixed.log_prob(x).mean()
    expected = nll + 0.3 * one[0] + 0.2 * second[1] + 0.1 * third[0] + 0.5 * third[1]
    torch.testing.assert_close(loss.value, expected)
    assert min(cost for costs in (one, second, third) for cost in costs) > 1e-3
    rows = MaximumLikelihood("exact").per_row(mixed, Batch(x))
    torch.testing.assert_close(rows.mean(), expected)


def test_steer_draws_an_end_time_for_each_solve(mixed, generator):
    x = torch.randn(4, 2, 2, 2, generator=generator, dtype=F64)
    objective = MaximumLikelihood("exact", {}, steer=0.8)
    rows = objective.prepare(mixed, Batch(x), seeded())
    assert rows.stop.shape == (4, 3) and len(rows.stop.unique()) == 3
    part, pixels, inverted = odes_in(mixed.transform)
    stops = rows.stop[0].tolist()
    value, a, *_ = inverted.integrate(x, towards="data", stop=1 - stops[2])
    value, b, *_ = pixels.integrate(value.movedim(1, -1), towards="base", stop=stops[1])
    value = value.movedim(-1, 1)
    first, c, *_ = part.integrate(value[:, :1], towards="base", stop=stops[0])
    z = torch.cat([first, value[:, 1:]], 1)
    expected = mixed.base.log_prob(z) + a + b.sum((1, 2)) + c
    torch.testing.assert_close(objective(mixed, rows).value, -expected.mean())


@pytest.mark.parametrize("gradient", ["adjoint", "backprop"])
@pytest.mark.parametrize("name", ["ffjord", "rnode"])
def test_gradients_reach_every_scale_and_end_time(name, gradient, small, x):
    flow = small(name, context=2, solver=Solver("rk4", steps=2, gradient=gradient))
    context = torch.randn(3, 2, generator=seeded(), dtype=F64).requires_grad_()
    MaximumLikelihood()(flow, Batch(x, context), seeded()).value.backward()
    grads = {name: parameter.grad.abs().max() for name, parameter in flow.named_parameters()}
    assert min(grads.values()) > 0 and context.grad.abs().min() > 0
    assert sum("log_end" in each for each in grads) == (6 if name == "ffjord" else 0)


def test_each_part_is_trained_by_its_own_recipe(x):
    coarse, fine = Solver("rk4", steps=1), Solver("rk4", steps=3)
    recipes = iter([Recipe("exact", solver=coarse, lr=0.2), Recipe("hutchinson", lr=0.1)])
    transform = at_scales(
        "test", (1, 2, 2), 2, lambda shape: Continuous(ConvField(shape, (2,)), fine)
    )
    inner, after, before = odes_in(transform)
    inner.recipe, after.recipe = next(recipes), next(recipes)
    flow, objective = Flow(None, transform, event_shape=(1, 2, 2)).double(), MaximumLikelihood()
    rows = objective.prepare(flow, Batch(x[..., :2, :2]), seeded())
    assert rows.probe.shape == (3, 1, 1, 2, 2) and objective.learning_rate(flow) == 0.1
    with record() as stats:
        objective(flow, rows)
    assert stats.forward == 4 + 12 + 12 and stats.solves == 3
    assert objective.as_trained(flow).transform is not flow.transform
    before.recipe = Recipe(penalties={"kinetic": 1.0})
    assert set(objective(flow, rows).metrics) == {"nll", "kinetic"}


def test_another_solver_is_that_of_every_scale(small, x):
    flow = small().with_solver(Solver("euler", steps=4))
    with record() as stats:
        flow.log_prob(x, divergence="hutchinson")
    assert stats.forward == 12 and stats.solves == 6  # two blocks in each of three ODEs


def test_error_of_an_estimate_counts_every_scale(small, x):
    flow, many = small(solver=Solver("rk4", steps=4)), Hutchinson(probes=32)
    told = log_prob_with_error(flow, x, divergence=many, generator=seeded())
    exact = flow.log_prob(x)
    error = (told.value - exact).abs()
    assert (error < 2 * told.trace_error).all() and (told.trace_error > 1e-3).all()


def test_flow_matching_needs_one_scale(small, x):
    with pytest.raises(TypeError, match="Compose of 3 of them, each with a field.*MaximumLike"):
        FlowMatching()(small(), Batch(x))
    flow = small(scales=1)
    assert FlowMatching()(flow, Batch(x), seeded()).value.isfinite() and flow.field is not None


def test_penalties_do_not_pass_through_recomputed_steps(mixed, x):
    transform = Compose(list(mixed.transform.transforms), recompute=True)
    flow = Flow(None, transform, event_shape=(2, 2, 2)).double()
    with pytest.raises(ValueError, match="expected recompute=False where penalties"):
        MaximumLikelihood()(flow, Batch(torch.zeros(2, 2, 2, 2, dtype=F64)))


def test_recomputed_steps_have_the_probes_of_the_forward_pass(small):
    ode = odes_in(small(shape=(1, 2, 2)).transform)[0]
    ode.solver = Solver(rtol=1e-10, atol=1e-10)
    x = torch.randn(3, 1, 2, 2, generator=seeded(), dtype=F64)
    grads = []
    for recompute in (False, True):
        flow = Flow(None, Compose([ode], recompute), event_shape=(1, 2, 2)).double()
        loss = MaximumLikelihood()(flow, Batch(x), seeded()).value
        grads.append(torch.autograd.grad(loss, list(flow.parameters())))
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"shape": (1, 30, 30)},
            "divisible by 4 for 3 scales, got 30 × 30; take scales=2, or pad",
        ),
        ({"shape": (1, 9, 9)}, "divisible by 2 for 2 scales, got 9 × 9; take scales=1"),
        ({"shape": (1, 8, 28), "scales": 4}, "divisible by 8 for 4 scales, got 8 × 28"),
        ({"shape": (28, 28)}, r"expected a shape \(C, H, W\), got \(28, 28\)"),
        ({"shape": (1, 8, 8), "scales": 0}, "expected scales > 0, got 0"),
        ({"dim": 2, "scales": 2}, "scales are those of an image: expected shape=…, got dim=2"),
    ],
)
@pytest.mark.parametrize("name", ["ffjord", "rnode"])
def test_sizes_that_do_not_fit_are_refused_in_one_line(name, options, message):
    with pytest.raises(ValueError, match=f"^{name}: .*{message}") as told:
        cnf.models.build(name, **options)
    assert "\n" not in str(told.value)


def test_discrete_layers_and_odes_may_be_mixed(randomized, generator):
    parts = [Coupling(2, hidden=(4,)), Continuous(MLPField(2, (4,)), RK4)]
    flow = Flow(None, randomized(Compose(parts)), event_shape=(2,)).double()
    x = torch.randn(5, 2, generator=generator, dtype=F64)
    loss = MaximumLikelihood("exact", {"kinetic": 0.2})(flow, Batch(x))
    torch.testing.assert_close(loss.metrics["nll"], -flow.log_prob(x).mean())
    speed = parts[1].integrate(x, towards="base", integrands=[REGULARIZERS["kinetic"]])
    torch.testing.assert_close(loss.metrics["kinetic"], speed.integrals[0].mean())
    loss.value.backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in flow.parameters())


class Killed(Exception):
    pass


@pytest.mark.parametrize("name", ["ffjord", "rnode"])
def test_a_resumed_run_gives_the_weights_of_one_in_one_go(name, tmp_path):
    images = torch.randn(60, 1, 8, 8, generator=seeded(3))
    settings = {
        "steps": 4, "batch_size": 8, "validations": 2, "validation_rows": 4, "progress": False,
        "device": "cpu", "validation_divergence": "hutchinson", "checkpoint_seconds": 1e-9,
    }  # fmt: skip

    def train(callbacks=(), **more):
        torch.manual_seed(5)
        flow = cnf.models.build(name, shape=(1, 8, 8), hidden=(3,), solver=RK4)
        config = cnf.TrainConfig(**settings, **more)
        return flow, cnf.fit(flow, MaximumLikelihood(), images, config, callbacks=callbacks)

    def kill(seen):
        if seen["step"] == 2:
            raise Killed

    whole, history = train()
    with pytest.raises(Killed):
        train([kill], folder=tmp_path / "run")
    resumed, again = train(folder=tmp_path / "run", resume=True)
    score = "val_nll (Hutchinson, 1 probe)"
    assert history.column(score) == again.column(score) and len(history.column(score)) == 2
    loaded = cnf.load(tmp_path / "run")
    for flow in (resumed, loaded):
        assert whole.state_dict().keys() == flow.state_dict().keys()
        pairs = zip(whole.state_dict().values(), flow.state_dict().values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    x = images[:2]
    assert torch.equal(whole.log_prob(x), loaded.log_prob(x))
