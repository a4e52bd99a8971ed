"""Stacked blocks as one field in a `Continuous`, and a trained end time."""

import pytest
import torch

import cnf
from cnf import Batch, FlowMatching, Solver
from cnf.dynamics import Hutchinson, record
from cnf.dynamics.solver import GRADIENTS
from cnf.fields import EndTime, MLPField, Piecewise, VectorField
from cnf.transforms import Compose, Continuous

F64 = torch.float64
TIGHT = Solver(rtol=1e-9, atol=1e-9)
A = torch.tensor([[[0.3, -1.2], [0.9, 0.5]], [[0.0, 1.0], [0.4, -0.6]]], dtype=F64)


class Linear(VectorField):
    """v = Ax."""

    def __init__(self, matrix):
        super().__init__((2,))
        self.matrix = torch.nn.Parameter(matrix.clone())

    def forward(self, t, x, context=None):
        return x @ self.matrix.T


@pytest.fixture
def blocks(randomized):
    return [randomized(MLPField(2, (8,), context_dim=3, frequencies=1)) for _ in range(3)]


@pytest.fixture
def points(generator):
    return tuple(torch.randn(5, n, generator=generator, dtype=F64) for n in (2, 3))


@pytest.mark.parametrize("mode", GRADIENTS)
def test_stacked_linear_blocks_have_closed_form_with_gradients(mode, points):
    solver = Solver(rtol=1e-9, atol=1e-9, gradient=mode)
    transform = Continuous(Piecewise([Linear(a) for a in A]), solver)
    x = points[0].requires_grad_()
    y, ladj = transform(x)
    first, second = (a.clone().requires_grad_() for a in A)
    expected = x @ torch.matrix_exp(first).T @ torch.matrix_exp(second).T
    trace = (first.trace() + second.trace()).expand(5)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(ladj, trace, rtol=0, atol=1e-7)
    matrices = [piece.field.matrix for piece in transform.field.pieces]
    ours = torch.autograd.grad((y.pow(3).sum() + ladj.pow(2).sum()), [x, *matrices])
    closed = torch.autograd.grad(expected.pow(3).sum() + trace.pow(2).sum(), [x, first, second])
    torch.testing.assert_close(ours, closed, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("direction", ["forward", "inverse"])
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
@pytest.mark.parametrize("solver", [TIGHT, Solver("rk4", steps=12)], ids=str)
def test_piecewise_flow_equals_composition_of_its_blocks(
    solver, divergence, direction, blocks, points
):
    x, context = points
    if divergence == "hutchinson":
        divergence = Hutchinson(probe=Hutchinson(2).draw(x))
    share = solver if solver.steps is None else Solver(solver.method, steps=4)
    whole = Continuous(Piecewise(blocks), solver, divergence)
    by_hand = Compose([Continuous(block, share, divergence) for block in blocks])
    ours = getattr(whole, direction)(x, context)
    expected = getattr(by_hand, direction)(x, context)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-7 if solver is TIGHT else 1e-12)
    assert (ours[0] - x).abs().max() > 0.1 and ours[1].abs().max() > 0.1


def test_round_trip_is_the_identity(blocks, points):
    x, context = points
    transform = Continuous(Piecewise(blocks), TIGHT)
    y, ladj = transform(x, context)
    back, inverse = transform.inverse(y, context)
    torch.testing.assert_close((back, inverse), (x, -ladj), rtol=0, atol=1e-7)


@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("solver", [TIGHT, Solver("rk4", steps=90)], ids=str)
def test_trajectory_is_correct_across_knots(solver, backwards, blocks, points):
    x, context = points
    transform = Continuous(Piecewise(blocks), solver)
    times = [0.0, 0.1, 1 / 3, 0.4, 0.5, 2 / 3, 0.9, 1.0]
    if backwards:
        x, times = transform(x, context)[0], times[::-1]
    path = transform.trajectory(x, times, context)
    assert path.shape == (8, 5, 2)
    for t, found in zip(times, path, strict=True):
        k = min(int(3 * t + 1e-9), 2)  # whole blocks, and then the rest of one
        start = points[0]
        for block in blocks[:k]:
            start = Continuous(block, TIGHT)(start, context)[0]
        if 3 * t - k > 1e-9:
            start = Continuous(blocks[k], TIGHT).trajectory(start, [0.0, 3 * t - k], context)[-1]
        torch.testing.assert_close(found, start, rtol=0, atol=1e-6)


@pytest.mark.parametrize("times", [[0.0, 1.0], [0.2, 0.5], [1.0, 0.4], [0.0, 1 / 3]], ids=str)
def test_trajectory_has_the_given_times(times, blocks, points):
    path = Continuous(Piecewise(blocks), Solver("rk4", steps=6)).trajectory(
        points[0], times, points[1]
    )
    assert path.shape == (2, 5, 2) and torch.equal(path[0], points[0])


@pytest.mark.parametrize(("steps", "expected"), [(12, 12), (3, 3), (7, 9), (1, 3)])
def test_fixed_steps_are_divided_among_blocks(steps, expected, blocks, points):
    transform = Continuous(Piecewise(blocks), Solver("euler", steps=steps))
    with record() as stats:
        solved = transform.integrate(points[0], points[1], towards="base")
    assert solved.nfe == stats.forward == expected and stats.solves == 3


def test_solve_towards_base_may_stop_inside_a_block(points):
    transform = Continuous(Piecewise([Linear(a) for a in A]), TIGHT)
    solved = transform.integrate(points[0], towards="base", stop=0.25)  # half of the first block
    matrix = torch.matrix_exp(-A[0] / 2) @ torch.matrix_exp(-A[1])
    torch.testing.assert_close(solved.value, points[0] @ matrix.T, rtol=0, atol=1e-7)
    trace = -(A[1].trace() + A[0].trace() / 2)
    torch.testing.assert_close(solved.ladj, trace.expand(5), rtol=0, atol=1e-7)


def test_solve_towards_data_may_stop_inside_a_block(points):
    transform = Continuous(Piecewise([Linear(a) for a in A]), Solver("rk4", steps=8))
    solved = transform.integrate(points[0], towards="data", stop=0.75)
    matrix = torch.matrix_exp(A[1] / 2) @ torch.matrix_exp(A[0])
    torch.testing.assert_close(solved.value, points[0] @ matrix.T, rtol=0, atol=1e-3)  # h = 1/4
    assert solved.nfe == 24


@pytest.mark.parametrize("count", [4, 7, 31])
@pytest.mark.parametrize("solver", [Solver(), Solver("rk4", steps=6)], ids=str)
def test_trajectory_accepts_float32_times_next_to_knots(solver, count):
    flow = cnf.models.build("cnf", dim=2, hidden=(8,), layers=3, solver=solver)
    z = torch.ones(5, 2)
    path = flow.trajectory(z, torch.linspace(0, 1, count))
    assert path.shape == (count, 5, 2)
    torch.testing.assert_close(path[-1], flow.decode(z), rtol=0, atol=1e-2)


@pytest.mark.parametrize("name", ["cnf", "ffjord", "rnode"])
def test_flow_matching_and_likelihood_train_every_block(name, small_flow, points):
    flow = small_flow(name, layers=3)
    x = points[0].repeat(20, 1)
    for objective in (FlowMatching(), cnf.MaximumLikelihood()):
        flow.zero_grad()
        objective(flow, Batch(x), torch.Generator().manual_seed(0)).value.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in flow.field.parameters())


def test_steps_of_with_solver_are_divided_among_blocks(small_flow, points):
    flow = small_flow("cnf", layers=3).with_solver(Solver("rk4", steps=6))
    with record() as stats:
        flow.log_prob(points[0])
    assert stats.forward == 24


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("mode", GRADIENTS)
def test_the_end_time_is_trained(mode, layers, randomized, points):
    blocks = [randomized(EndTime(MLPField(2, (8,), layer="concatsquash"), 0.7)) for _ in range(2)]
    solver = Solver("rk4", steps=96, gradient=mode)
    field = blocks[0] if layers == 1 else Piecewise(blocks)
    flow = cnf.Flow(None, Continuous(field, solver), event_shape=(2,)).double()
    for block in blocks[:layers]:
        (slope,) = torch.autograd.grad(flow.log_prob(points[0]).sum(), block.log_end)
        found = []
        with torch.no_grad():
            for step in (1e-4, -2e-4):
                block.log_end += step
                found.append(flow.log_prob(points[0]).sum())
            block.log_end += 1e-4
        assert slope.item() == pytest.approx((found[0] - found[1]).item() / 2e-4, rel=1e-5)
        assert slope.abs() > 1e-2


def test_the_end_time_of_a_linear_flow_has_closed_form(points):
    transform = Continuous(EndTime(Linear(A[0]), 0.7).double(), TIGHT)
    y, ladj = transform(points[0])
    torch.testing.assert_close(y, points[0] @ torch.matrix_exp(0.7 * A[0]).T, rtol=0, atol=1e-6)
    torch.testing.assert_close(ladj, (0.7 * A[0].trace()).expand(5), rtol=0, atol=1e-6)
