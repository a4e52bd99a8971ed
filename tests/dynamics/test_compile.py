"""Solver(compile=True): results, and number of compilations."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters

from cnf.dynamics import REGULARIZERS, Hutchinson, Solver
from cnf.models import build

F64 = torch.float64


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore::DeprecationWarning")
@pytest.mark.parametrize("divergence", ["exact", "hutchinson"])
def test_compiled_dynamics_equal_eager_ones_and_are_compiled_once(divergence):
    flow, x = build("cnf", dim=2, hidden=(4,)).double(), torch.randn(5, 2, dtype=F64)
    estimate = "exact" if divergence == "exact" else Hutchinson(probe=Hutchinson(1).draw(x))

    def run(compile, points):
        timed = flow.with_solver(Solver(rtol=1e-3, atol=1e-3, compile=compile))
        value, solved = timed.log_prob_and_integral(
            points, divergence=estimate, integrands=[REGULARIZERS["kinetic"]]
        )
        loss = value.sum() + solved.integrals[0].sum()
        return value, *torch.autograd.grad(loss, list(flow.field.parameters()))

    torch.testing.assert_close(run(True, x), run(False, x), rtol=1e-10, atol=1e-10)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0 and not counters["graph_break"]
    with torch._dynamo.config.patch(error_on_recompile=True):
        again = run(True, x + 1)
    torch.testing.assert_close(again, run(False, x + 1), rtol=1e-10, atol=1e-10)
    assert counters["stats"]["unique_graphs"] == compiled


def test_every_field_is_compiled_beyond_the_recompilation_limit(monkeypatch):
    # torch stops compiling a function after eight recompilations, whatever field it was for
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    for dim in range(1, 13):
        flow = build("cnf", dim=dim, hidden=(4,), solver={"method": "euler", "steps": 1})
        timed = flow.with_solver(Solver("euler", steps=1, gradient="backprop", compile=True))
        x = torch.ones(3, dim)
        torch.testing.assert_close(timed.log_prob(x), flow.log_prob(x))
        assert counters["stats"]["unique_graphs"] == dim


def assert_compiled_is_eager(flow, fullgraph):
    x = torch.randn(3, *flow.event_shape, dtype=F64)
    parameters = [p for p in flow.parameters() if p.requires_grad]
    compiled = torch.compile(flow.log_prob, fullgraph=fullgraph, backend="aot_eager")
    found = []
    for log_prob in (flow.log_prob, compiled):
        value = log_prob(x)
        slopes = torch.autograd.grad(value.sum(), parameters, materialize_grads=True)
        found.append((value, *slopes))
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:The .grad attribute", "ignore::DeprecationWarning")
@pytest.mark.parametrize("gradient", ["auto", "adjoint"])
def test_adaptive_solve_is_not_compiled(gradient, small_flow):
    flow = small_flow("cnf", solver=Solver(rtol=0.1, atol=0.1, gradient=gradient))
    assert_compiled_is_eager(flow, fullgraph=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["planar", "realnvp"])
def test_discrete_flow_compiles_into_one_graph(name, small_flow):
    assert_compiled_is_eager(small_flow(name, layers=1), fullgraph=True)
