"""Error norms over all rows and of the worst row, in forward and backward solves."""

import pytest
import torch

from cnf.dynamics import REGULARIZERS, Solver, record, solve
from cnf.fields import MLPField
from cnf.transforms import Continuous

F64 = torch.float64


def wave_dynamics(omega):
    """dx/dt = ω cos(ω t) for each row's ω: x(1) = x(0) + sin ω."""
    return lambda t, state: ((omega * torch.cos(omega * t)).unsqueeze(-1).expand_as(state[0]),)


def error_of_the_hard_row(norm, method, rows=4000, tolerance=1e-5):
    omega = torch.zeros(rows, dtype=F64)
    omega[7] = 30.0
    solver = Solver(method, rtol=tolerance, atol=tolerance, norm=norm)
    start = torch.zeros(rows, 2, dtype=F64)
    (x,), _ = solve(wave_dynamics(omega), (start,), 0.0, 1.0, solver, ())
    assert x[:7].abs().max() < 1e-12
    return (x[7] - omega[7].sin()).abs().max().item()


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_rows_norm_solves_a_hard_row_among_easy_ones_and_rms_does_not(method):
    assert error_of_the_hard_row("rows", method) < 1e-5 < error_of_the_hard_row("rms", method)


@pytest.fixture
def transform(randomized):
    field = randomized(MLPField(2, (16, 16)), gain=1.5)

    def build(solver):
        return Continuous(field, solver)

    return build


def alone_and_in_batch(transform, x):
    kinetic = [REGULARIZERS["kinetic"]]
    whole = transform.integrate(x, towards="base", integrands=kinetic)
    row = transform.integrate(x[:1], towards="base", integrands=kinetic)
    return torch.cat([
        (whole.value[:1] - row.value).flatten(), whole.ladj[:1] - row.ladj,
        whole.integrals[0][:1] - row.integrals[0],
    ]).abs().max().item()  # fmt: skip


@pytest.mark.parametrize("method", ["rk4", "euler", "heun3", "explicit_adams"])
def test_fixed_step_result_of_a_row_does_not_depend_on_other_rows(method, transform, generator):
    x = torch.randn(50, 2, generator=generator, dtype=F64)
    assert alone_and_in_batch(transform(Solver(method, steps=10)), x) < 1e-12


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_rows_norm_result_of_a_row_does_not_depend_on_easier_rows(method):
    omega = torch.cat([torch.tensor([30.0]), torch.linspace(0, 3, 500)]).double()
    apart = {}
    for norm in ("rows", "rms"):
        ends = []
        for count in (1, 501):
            start, solver = torch.zeros(count, 2, dtype=F64), Solver(method, norm=norm)
            ends.append(
                solve(wave_dynamics(omega[:count]), (start,), 0.0, 1.0, solver, ()).state[0][0]
            )
        apart[norm] = (ends[0] - ends[1]).abs().max()
    assert apart["rows"] < 1e-12 and apart["rms"] > 1e-6


def test_rows_norm_equals_rms_for_a_single_row():
    solvers = [Solver(norm=norm) for norm in ("rows", "rms")]
    omega, start = torch.full((1,), 9.0, dtype=F64), torch.ones(1, 3, dtype=F64)
    ends = [solve(wave_dynamics(omega), (start,), 0.0, 1.0, s, ()) for s in solvers]
    assert ends[0].nfe == ends[1].nfe
    torch.testing.assert_close(ends[0].state, ends[1].state, rtol=0, atol=1e-14)


def test_rows_norm_accepts_scalars_and_images():
    def field(t, state):
        return tuple(torch.cos(5 * t).expand_as(part) for part in state)

    start = (torch.zeros((), dtype=F64), torch.zeros(3, 2, 4, 4, dtype=F64))
    ends, _ = solve(field, start, 0.0, 1.0, Solver(norm="rows", rtol=1e-9, atol=1e-9), ())
    for part, first in zip(ends, start, strict=True):
        expected = torch.sin(torch.tensor(5.0, dtype=F64)).div(5).expand_as(first)
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("norm", ["rms", "rows"])
@pytest.mark.parametrize("end", [1.0, -1.0])
def test_seminorm_takes_fewer_evaluations_and_its_gradient_is_correct(end, norm, generator):
    # Four parameters for two hundred rows: their gradient is what the full norm bounds.
    x = torch.randn(200, 2, generator=generator, dtype=F64)
    start = torch.tensor([[0.3, -1.2], [0.9, 0.5]], dtype=F64)
    backward = {}
    for kind in ("seminorm", "full"):
        matrix = start.clone().requires_grad_()
        tight = {"rtol": 1e-9, "atol": 1e-9, "gradient": "adjoint"}
        with record() as stats:
            solver = Solver(adjoint_norm=kind, norm=norm, **tight)
            y = solve(lambda t, s, a=matrix: (s[0] @ a.T,), (x,), 0.0, end, solver, (matrix,))
            (slope,) = torch.autograd.grad(y.state[0].square().sum(), matrix)
        closed = (x @ torch.matrix_exp(end * matrix).T).square().sum()
        (expected,) = torch.autograd.grad(closed, matrix)
        torch.testing.assert_close(slope, expected, rtol=1e-7, atol=0)
        backward[kind] = stats.backward
    assert 0 < backward["seminorm"] < 0.9 * backward["full"]
