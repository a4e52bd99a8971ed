"""The numerical map, and the log-determinant that belongs to it, against autograd."""

import math
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from cnf.data import toy
from cnf.dynamics import Solver, numerical, preimage
from cnf.dynamics.solver import STAGES
from cnf.fields import Adapter, MLPField, Piecewise
from cnf.flow import Flow
from cnf.metrics import c2st
from cnf.models import build
from cnf.transforms import Continuous

F64 = torch.float64
EXPLICIT = ("sample", "density")


def field_of(kind, dim, generator):
    """A field of each way to its tangents, with weights that are not small."""
    fields = {
        "mlp": lambda: MLPField(dim, (16, 16), fourier=3, skip=True),
        "context": lambda: MLPField(dim, (16, 16), context_dim=2, layer="concatsquash"),
        "hyper": lambda: MLPField(dim, (8,), layer="hyper"),
        "forward mode": lambda: Adapter(net(dim), dim, call="concat"),
        "reverse mode": lambda: Adapter(net(dim, Hidden()), dim, call="concat"),
        "blocks": lambda: Piecewise([MLPField(dim, (16,)), MLPField(dim, (16,))]),
    }
    field = fields[kind]().double()
    with torch.no_grad():
        for weight in field.parameters():
            weight.add_(0.15 * torch.randn(weight.shape, generator=generator, dtype=F64))
    return field


def net(dim, activation=None):
    return nn.Sequential(nn.Linear(dim + 1, 16), activation or nn.Tanh(), nn.Linear(16, dim))


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.tanh(x)

    @staticmethod
    def backward(ctx, slope):
        return slope * (1 - ctx.saved_tensors[0].tanh().square())


class Hidden(nn.Module):
    """tanh without a forward mode."""

    def forward(self, x):
        return _Cube.apply(x)


def context_of(field, rows, generator):
    if not field.context_dim:
        return None
    return torch.randn(rows, field.context_dim, generator=generator, dtype=F64)


def jacobians(function, x):
    """Of each row, (N, D, D), by autograd."""
    whole = torch.autograd.functional.jacobian(lambda x: function(x).sum(0), x)
    return whole.movedim(1, 0)


KINDS = ("mlp", "context", "hyper", "forward mode", "reverse mode", "blocks")


@pytest.mark.parametrize("explicit", EXPLICIT)
@pytest.mark.parametrize("method", STAGES)
@pytest.mark.parametrize("dim", [1, 2, 3])
def test_log_determinants_are_those_of_autograd(dim, method, explicit, generator):
    field = field_of("mlp", dim, generator)
    check(Continuous(field, Solver(method, steps=3, discrete=True, explicit=explicit)), generator)


@pytest.mark.parametrize("explicit", EXPLICIT)
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_the_field(kind, explicit, generator):
    field = field_of(kind, 3, generator)
    check(Continuous(field, Solver("rk4", steps=2, discrete=True, explicit=explicit)), generator)


def check(transform, generator):
    """Values, log-determinants and round trips of both directions."""
    points = torch.randn(6, *transform.event_shape, generator=generator, dtype=F64)
    context = context_of(transform.field, 6, generator)
    for direction, other in (
        (transform.forward, transform.inverse),
        (transform.inverse, transform.forward),
    ):
        value, ladj = direction(points, context)
        true = torch.linalg.slogdet(jacobians(lambda x, d=direction: d(x, context)[0], points))
        assert (true.sign > 0).all() and true.logabsdet.abs().max() > 1e-2
        torch.testing.assert_close(ladj, true.logabsdet, rtol=0, atol=1e-10)
        back, undone = other(value, context)
        torch.testing.assert_close(back, points, rtol=0, atol=1e-12)
        torch.testing.assert_close(undone, -ladj, rtol=0, atol=1e-11)


def test_steps_are_those_of_the_solver_in_the_explicit_direction(generator):
    field = field_of("mlp", 2, generator)
    x = torch.randn(5, 2, generator=generator, dtype=F64)
    plain = Continuous(field, Solver("heun3", steps=4))
    for explicit, direction in zip(EXPLICIT, ("forward", "inverse"), strict=True):
        solver = replace(plain.solver, discrete=True, explicit=explicit)
        expected = getattr(plain, direction)(x)[0]
        found = getattr(Continuous(field, solver), direction)(x)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dim", [2, 5])
@pytest.mark.parametrize("explicit", EXPLICIT)
def test_gradients_are_those_of_finite_differences(explicit, dim, generator, monkeypatch):
    if dim == 5:
        monkeypatch.setattr(preimage, "NEWTON", 4)  # Anderson's method, and its own gradient
    field = field_of("context", dim, generator)
    transform = Continuous(field, Solver("midpoint", steps=2, discrete=True, explicit=explicit))
    x = torch.randn(3, dim, generator=generator, dtype=F64).requires_grad_()
    context = context_of(field, 3, generator).requires_grad_()
    bias = field.layers[0].linear.bias
    for direction in (transform.forward, transform.inverse):

        def scored(x, context, bias_value, direction=direction):
            with torch.no_grad():
                kept = bias.clone()
                bias.copy_(bias_value)
            value, ladj = direction(x, context)
            with torch.no_grad():
                bias.copy_(kept)
            return value.sin().sum() + ladj.sum()

        value, ladj = direction(x, context)
        slopes = torch.autograd.grad(value.sin().sum() + ladj.sum(), (x, context, bias))
        given = (x.detach(), context.detach(), bias.detach().clone())
        for k, slope in enumerate(slopes):
            way = torch.randn(slope.shape, generator=generator, dtype=F64)
            ends = []
            for sign in (1, -1):
                moved = list(given)
                moved[k] = moved[k] + sign * 1e-5 * way
                with torch.no_grad():
                    ends.append(scored(*moved))
            difference = (ends[0] - ends[1]) / 2e-5
            assert difference.abs() > 1e-3
            torch.testing.assert_close((slope * way).sum(), difference, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("explicit", EXPLICIT)
def test_density_integrates_to_one_and_is_that_of_the_samples(explicit, generator):
    flow = build("cnf", dim=2, hidden=(32, 32), solver=Solver("rk4", steps=2)).double().eval()
    with torch.no_grad():
        for weight in flow.field.parameters():
            weight.add_(0.06 * torch.randn(weight.shape, generator=generator, dtype=F64))
    coarse = flow.with_solver(Solver("midpoint", steps=2, discrete=True, explicit=explicit))
    side = torch.linspace(-9, 9, 181, dtype=F64)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        mass = coarse.log_prob(grid).exp().sum() * (18 / 180) ** 2
        assert mass.item() == pytest.approx(1, abs=1e-4)
        # whose trace's integral is another number, so that the test means something
        plain = flow.with_solver(Solver("midpoint", steps=2)).log_prob(grid)
        assert (plain.exp().sum() * (18 / 180) ** 2 - 1).abs() > 1e-3
        x, claimed = coarse.sample_and_log_prob(20_000, generator=generator)
        torch.testing.assert_close(coarse.log_prob(x), claimed, rtol=0, atol=1e-9)
        # χ² of the counts in cells of the plane, in units of its standard deviation
        cells = 12
        edges = torch.linspace(-4, 4, cells + 1, dtype=F64)
        counts, _ = torch.histogramdd(x, bins=[edges, edges])
        fine = torch.linspace(-4, 4, cells * 8 + 1, dtype=F64)
        middle = (fine[1:] + fine[:-1]) / 2
        density = coarse.log_prob(torch.cartesian_prod(middle, middle)).exp()
        share = density.reshape(cells, 8, cells, 8).sum((1, 3)) * (8 / (cells * 8)) ** 2
        expected = 20_000 * share
        busy = expected > 5
        chi = ((counts - expected)[busy] ** 2 / expected[busy]).sum()
        spread = (2 * busy.sum()) ** 0.5
        assert (chi - busy.sum()).abs() < 4 * spread


@pytest.mark.parametrize("explicit", EXPLICIT)
def test_samples_weighted_by_their_density_follow_another_law(explicit, generator):
    """A classifier tells them from draws of N(0, I) by chance alone, and unweighted ones well."""
    pytest.importorskip("sklearn")
    flow = Flow(None, Continuous(field_of("mlp", 2, generator)), event_shape=(2,)).double()
    coarse = flow.with_solver(Solver("midpoint", steps=2, discrete=True, explicit=explicit))
    with torch.no_grad():
        x, log_q = coarse.sample_and_log_prob(20_000, generator=generator)
    target = torch.randn(2_000, 2, generator=generator, dtype=F64)
    log_p = -0.5 * x.square().sum(1) - math.log(2 * math.pi)
    weight = (log_p - log_q).exp()
    assert weight.mean().item() == pytest.approx(1, abs=0.05)
    drawn = x[weight.multinomial(2_000, replacement=True, generator=generator)]
    assert c2st(drawn, target) < 0.54
    assert c2st(x[:2_000], target) > 0.56


def test_error_to_the_ode_falls_at_the_order_of_the_method(generator):
    field = field_of("mlp", 2, generator)
    x = torch.randn(20, 2, generator=generator, dtype=F64)
    true = Continuous(field, Solver("dopri5", rtol=1e-12, atol=1e-12)).inverse(x)[1]
    for method, order in {"euler": 1, "midpoint": 2, "heun2": 2, "heun3": 3, "rk4": 4}.items():
        for explicit in EXPLICIT:
            errors = []
            for steps in (16, 32):
                solver = Solver(method, steps=steps, discrete=True, explicit=explicit)
                errors.append((Continuous(field, solver).inverse(x)[1] - true).abs().mean())
            rate = torch.log2(errors[0] / errors[1]).item()
            assert rate == pytest.approx(order, abs=0.4), (method, explicit)


def folding():
    """v(x) = -3 sin x: a step of Euler's method folds where 1 - 3 cos x < 0."""

    class Wave(nn.Module):
        def forward(self, t, x):
            return -3 * torch.sin(x)

    field = Adapter(Wave(), 1)
    return field


def test_a_fold_is_nan_in_its_rows_only_and_told_once():
    solver = Solver("euler", steps=1, discrete=True)
    flow = Flow(None, Continuous(folding(), solver), event_shape=(1,)).double()
    z = torch.tensor([[0.0], [2.0], [3.0]], dtype=F64)
    with pytest.warns(UserWarning, match=r"1 of 3 rows \(0\).*step 1 \(from t = 0\) of 1"):
        x, ladj = flow.transform(z)
    assert x.isfinite().all() and ladj.isnan().tolist() == [True, False, False]
    torch.testing.assert_close(
        ladj[1:], torch.log(1 - 3 * torch.cos(z[1:, 0])), rtol=0, atol=1e-12
    )
    # the point that no step reaches: none but NaN, and the others as they are without it
    density = replace(solver, explicit="density")
    other = Flow(None, Continuous(folding(), density), event_shape=(1,)).double()
    with pytest.warns(UserWarning, match="3 of 3 rows|2 of 3 rows|1 of 3 rows"):
        log_prob = other.log_prob(z)
    assert log_prob.isnan().any()


def test_two_folds_do_not_cancel():
    solver = Solver("euler", steps=2, discrete=True)
    transform = Continuous(folding(), solver).double()
    z = torch.zeros(1, 1, dtype=F64)
    with pytest.warns(UserWarning, match=r"step 1 .*, 2 \(from t = 0\.5\) of 2"):
        ladj = transform(z)[1]
    assert ladj.isnan().all()  # though (1 - 1.5)² is positive


def test_rows_without_a_density_leave_the_others_gradients_alone(generator):
    field = folding()
    scale = nn.Parameter(torch.ones((), dtype=F64))
    z = torch.tensor([[0.0], [2.0]], dtype=F64)
    step = numerical.NumericalStep(field, None, "euler", 0.0, 1.0)
    ladj = numerical.log_det(step.with_jacobian(scale * z)[1])
    slope = torch.autograd.grad(ladj[1], scale)[0]
    assert slope.isfinite()


def test_a_row_that_is_nan_stays_alone(generator):
    for explicit in EXPLICIT:
        solver = Solver("rk4", steps=2, discrete=True, explicit=explicit)
        transform = Continuous(field_of("mlp", 2, generator), solver)
        x = torch.randn(4, 2, generator=generator, dtype=F64)
        whole = transform.inverse(x)[1]
        x[1] = torch.nan
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # NaN came in, so that nothing is told
            ladj = transform.inverse(x)[1]
        assert ladj.isnan().tolist() == [False, True, False, False]
        torch.testing.assert_close(ladj[[0, 2, 3]], whole[[0, 2, 3]], rtol=0, atol=1e-13)


@pytest.mark.parametrize("explicit", EXPLICIT)
def test_trajectories_pass_through_the_steps(explicit, generator):
    solver = Solver("midpoint", steps=4, discrete=True, explicit=explicit)
    transform = Continuous(field_of("blocks", 2, generator), solver)
    z = torch.randn(5, 2, generator=generator, dtype=F64)
    times = [0.0, 0.1, 0.25, 0.4, 0.5, 0.9, 1.0]
    path = transform.trajectory(z, times)
    torch.testing.assert_close(path[-1], transform(z)[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(path[0], z, rtol=0, atol=0)
    back = transform.trajectory(path[-1], times[::-1])
    torch.testing.assert_close(back.flip(0), path, rtol=0, atol=1e-11)
    moves = [(b - a).norm() for a, b in pairwise(path)]
    assert max(moves) < 3 * path[-1].sub(z).norm()  # no jumps between the steps


def test_penalties_are_integrated_over_increasing_time(generator):
    from cnf.dynamics.regularizers import kinetic_energy

    field = field_of("mlp", 2, generator)
    x = torch.randn(5, 2, generator=generator, dtype=F64)
    found = [
        Continuous(
            field, Solver("rk4", steps=20, discrete=discrete, **explicit)
        ).integrate(x, towards="base", integrands=[kinetic_energy]).integrals[0]
        for discrete, explicit in (
            (False, {}), (True, {"explicit": "sample"}), (True, {"explicit": "density"}),
        )
    ]  # fmt: skip
    assert found[0].min() > 1e-2
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(found[2], found[0], rtol=1e-4, atol=0)


def test_events_of_pictures_and_no_rows(generator):
    flow = build("ffjord", shape=(1, 4, 4), solver=Solver("rk4", steps=1)).double()
    solver = Solver("euler", steps=2, discrete=True)
    transform = Continuous(flow.field, solver)
    x = torch.randn(3, 1, 4, 4, generator=generator, dtype=F64)
    value, ladj = transform.inverse(x)
    flat = torch.autograd.functional.jacobian(
        lambda y: transform.inverse(y.reshape(1, 1, 4, 4))[0].flatten(), x[0].flatten()
    )
    torch.testing.assert_close(ladj[0], torch.linalg.slogdet(flat).logabsdet, rtol=0, atol=1e-10)
    torch.testing.assert_close(transform(value)[0], x, rtol=0, atol=1e-12)
    assert transform.inverse(x[:0])[1].shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"method": "dopri5", "discrete": True}, "discrete=True"),
        ({"method": "explicit_adams", "steps": 4, "discrete": True}, "whose steps"),
        ({"method": "rk4", "steps": 4, "explicit": "density"}, "discrete=True"),
        ({"method": "rk4", "steps": 4, "discrete": True, "gradient": "adjoint"}, "backprop"),
        ({"method": "rk4", "steps": 4, "discrete": True, "explicit": "both"}, "density"),
    ],
)
def test_solvers_that_make_no_map_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        Solver(**arguments)


def test_a_saved_flow_keeps_its_map(tmp_path):
    import cnf

    solver = Solver("rk4", steps=2, discrete=True, explicit="density")
    flow = build("cnf", dim=2, hidden=(8,)).with_solver(solver).eval()
    cnf.save(flow, tmp_path / "flow.safetensors")
    loaded = cnf.load(tmp_path / "flow.safetensors")
    assert loaded.transform.solver == solver
    x = toy("moons").sample(10)
    torch.testing.assert_close(loaded.log_prob(x), flow.log_prob(x), rtol=0, atol=0)


@pytest.mark.parametrize("dim", [1, 2, 3, 7])
def test_least_stretch_is_the_smallest_singular_value_with_the_sign_of_the_determinant(
    dim, generator
):
    jacobian = torch.randn(9, dim, dim, generator=generator, dtype=torch.float64)
    jacobian.requires_grad_()
    expected = torch.linalg.svdvals(jacobian)[:, -1] * torch.linalg.det(jacobian).sign()
    found = numerical.least_stretch(jacobian)
    assert (expected < 0).any() and (expected > 0).any()
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(each.sum(), jacobian)[0] for each in (found, expected)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_least_stretch_of_a_matrix_that_is_not_finite_leaves_the_others(dim, value):
    jacobian = torch.eye(dim).repeat(3, 1, 1)
    jacobian[1, 0, 0] = value
    found = numerical.least_stretch(jacobian)
    assert not found[1].isfinite() and found[0] == found[2] == 1


def test_least_stretch_of_the_identity_has_a_gradient():
    jacobian = torch.eye(2).unsqueeze(0).requires_grad_()
    (slope,) = torch.autograd.grad(numerical.least_stretch(jacobian).sum(), jacobian)
    assert slope.isfinite().all()


class Cubic:
    """x + x³ in each direction, which counts its Jacobians."""

    def __init__(self):
        self.jacobians = 0

    def __call__(self, x):
        return x + x**3

    def with_jacobian(self, x):
        self.jacobians += 1
        return self(x), torch.diag_embed(1 + 3 * x**2)

    def of_rows(self, rows):
        return self


@pytest.mark.parametrize("dim", [2, 5])
@pytest.mark.parametrize(("start", "most"), [(1.01, 2), (30.0, 30)])
def test_newton_keeps_a_jacobian_near_the_solution_and_renews_it_far_away(dim, start, most):
    """From 30 the first Jacobian, 2,701, would take thousands of steps to reach 1."""
    cubic, x = Cubic(), torch.ones(3, dim, dtype=F64)
    found, missed, _ = preimage.preimage(cubic, cubic(x), start * x)
    torch.testing.assert_close(found, x)
    assert not missed.any()
    assert dim <= preimage.FEW or cubic.jacobians <= most


class Twisted:
    """x - 0.5 sin x in each direction, turned by an angle that grows with the distance."""

    def __call__(self, x):
        wave = x - 0.5 * torch.sin(x)
        angle = 0.03 * wave.square().sum(1)
        cos, sin = angle.cos().unsqueeze(1), angle.sin().unsqueeze(1)
        return cos * wave + sin * torch.stack([-wave[:, 1], wave[:, 0]], 1)

    def with_jacobian(self, x):
        return self(x), jacobians(self, x).mT

    def of_rows(self, rows):
        return self


@pytest.mark.parametrize("x", [(2.4, -9.3), (-4.1, 6.2), (5.9, 3.3), (-0.2, 9.3), (-9.1, -1.8)])
def test_newton_finds_what_takes_more_than_fifty_short_steps(x):
    twisted, x = Twisted(), torch.tensor([x], dtype=F64)
    found, missed, _ = preimage.preimage(twisted, twisted(x), twisted(x))
    assert not missed.any()
    torch.testing.assert_close(found, x)


def test_a_gradient_that_is_not_found_is_nan_in_its_row_only():
    """That of a map whose eigenvalues are 1 to 1,000 is no fixed point that iteration reaches."""
    factors = torch.stack([torch.ones(100), torch.linspace(1, 1000, 100)]).double()

    def stretched(x):
        return factors * x

    y = torch.ones(2, 100, dtype=F64, requires_grad=True)
    x = (y / factors).detach()
    preimage._ImplicitGradient.apply(x, y - stretched(x), stretched).sum().backward()
    assert torch.equal(y.grad[0], torch.ones(100, dtype=F64)) and y.grad[1].isnan().all()


@pytest.mark.parametrize("dim", [2, 70])
def test_a_second_derivative_of_what_is_inverted_is_refused(dim, generator):
    solver = Solver("rk4", steps=1, discrete=True)
    flow = Flow(None, Continuous(MLPField(dim, (8,)), solver), event_shape=(dim,)).double()
    x = torch.randn(2, dim, generator=generator, dtype=F64, requires_grad=True)
    value = flow.transform.inverse(x)[0].sum()
    with pytest.raises(RuntimeError, match=r"differentiable once.*torch\.func\.hessian"):
        torch.autograd.grad(value, x, create_graph=True)


@pytest.mark.parametrize("dim", [2, 5])
@pytest.mark.parametrize("outer", [torch.func.jacfwd, torch.func.jacrev])
def test_torch_func_differentiates_the_inverse_twice(outer, dim, generator):
    """The Hessian of log q of inverted steps, by differences of its gradient."""
    solver = Solver("midpoint", steps=2, discrete=True)
    flow = Flow(None, Continuous(field_of("mlp", dim, generator), solver), event_shape=(dim,))
    x = torch.randn(dim, generator=generator, dtype=F64)
    found = outer(torch.func.jacrev(flow.double().log_prob))(x)

    def slope(x):
        x = x.requires_grad_()
        return torch.autograd.grad(flow.log_prob(x), x)[0]

    shifts = 1e-5 * torch.eye(dim, dtype=F64)
    expected = torch.stack([(slope(x + s) - slope(x - s)) / 2e-5 for s in shifts])
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


class Square(Cubic):
    """x², which has no preimage of -1."""

    def __call__(self, x):
        return x**2

    def with_jacobian(self, x):
        return self(x), torch.diag_embed(2 * x)


def test_a_row_that_is_not_found_leaves_the_others_gradients_alone():
    y, start = torch.tensor([[[-1.0], [4.0]], [[0.0], [1.0]]], dtype=F64)  # a Jacobian of 0 first
    scale = torch.ones((), dtype=F64, requires_grad=True)
    found, missed, _ = preimage.preimage(Square(), scale * y, start)
    assert missed.tolist() == [True, False]
    assert found.isfinite().all()  # as what is computed of it has gradients, too
    (slope,) = torch.autograd.grad(found[~missed].sum(), scale)
    torch.testing.assert_close(slope, torch.ones((), dtype=F64))  # d√(4s)/ds at 1


@pytest.mark.parametrize("dim", [2, 5])
def test_a_row_in_a_large_batch_keeps_its_context(dim, generator):
    """Where few rows are left, Newton's method goes on with these alone, and their contexts."""
    field = MLPField(dim, (16,), context_dim=2).double()
    x, context = (torch.randn(3000, n, generator=generator, dtype=F64) for n in (dim, 2))
    step = numerical.NumericalStep(field, context, "rk4", 0.0, 1.0)
    with torch.no_grad():
        for weight in field.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator, dtype=F64))
        y, start = step(x), x.clone()
        start[2900:] += 0.1
        found, missed, _ = preimage.preimage(step, y, start)
    assert not missed.any()
    torch.testing.assert_close(found, x)


def test_the_gradient_takes_the_jacobian_at_the_solution(generator):
    """In five dimensions Newton's method ends with one of an earlier iterate."""
    cubic, y = Cubic(), torch.rand(3, 5, generator=generator, dtype=F64) + 0.5
    y.requires_grad_()
    found, _, _ = preimage.preimage(cubic, y, y.detach())
    (slope,) = torch.autograd.grad(found.sum(), y)
    torch.testing.assert_close(slope, 1 / (1 + 3 * found.detach() ** 2), rtol=1e-9, atol=0)
