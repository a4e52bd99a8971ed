"""The fixed-step loop for torch.compile and CUDA graphs, against torchdiffeq's."""

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from cnf.dynamics import Solver, fixed, solve
from cnf.dynamics.solver import STAGES
from cnf.models import build

F64 = torch.float64
A = torch.tensor([[0.3, -1.2], [0.9, 0.5]], dtype=F64)


def field(weight):
    def dynamics(t, state):
        x, y = state
        return torch.tanh(x @ weight.T + t), (x * torch.cos(2 * t)).sum(-1) - 0.3 * y

    return dynamics


@pytest.mark.parametrize("ends", [(0.0, 1.0), (1.0, 0.0), (0.25, 0.9)], ids=str)
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize("method", fixed.TABLEAUX)
def test_loop_takes_the_steps_of_torchdiffeq(method, steps, ends, generator):
    state = torch.randn(5, 2, generator=generator, dtype=F64), torch.ones(5, dtype=F64)
    found = []
    for loop in (False, True):
        weight = A.clone().requires_grad_()
        x = state[0].clone().requires_grad_()
        if loop:
            stops = torch.linspace(*ends, steps + 1, dtype=F64).tolist()
            end = fixed.integrate(field(weight), (x, state[1]), stops, method)
        else:
            solver = Solver(method, steps=steps, gradient="backprop")
            end = solve(field(weight), (x, state[1]), *ends, solver, ()).state
        slopes = torch.autograd.grad(sum(part.pow(2).sum() for part in end), (weight, x))
        found.append((*end, *slopes))
    torch.testing.assert_close(*found, rtol=0, atol=1e-13)


def test_every_one_step_method_has_a_tableau():
    assert list(fixed.TABLEAUX) == list(STAGES)
    for name, (nodes, rows, weights) in fixed.TABLEAUX.items():
        assert len(nodes) == len(rows) == len(weights) == STAGES[name]
        assert sum(weights) == pytest.approx(1, abs=1e-15)
        assert [sum(row) for row in rows] == pytest.approx(list(nodes), abs=1e-15)


@pytest.fixture
def captured(monkeypatch):
    """As if a graph were being captured."""
    monkeypatch.setattr(fixed, "captured", lambda: True)


def traced(flow):
    def log_prob(x):
        return flow.log_prob(x)

    return make_fx(log_prob, tracing_mode="fake", _allow_non_fake_inputs=True)


@pytest.mark.parametrize("name", ["cnf", "otflow"])
def test_captured_solve_does_not_synchronize_with_the_device(name, captured, small_flow):
    flow, x = small_flow(name, solver=Solver("rk4", steps=3)), torch.ones(5, 2, dtype=F64)
    # Fake tensors hold no data: .item(), bool() and a shape that hangs on data would all raise.
    graph = traced(flow)(x)
    assert not any("_local_scalar_dense" in str(node.target) for node in graph.graph.nodes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fixed, "captured", lambda: False)
        torch.testing.assert_close(graph(x), flow.log_prob(x), rtol=0, atol=1e-12)


def test_torchdiffeqs_loop_synchronizes_with_the_device(small_flow):
    flow = small_flow("cnf", solver=Solver("rk4", steps=3))
    with pytest.raises(Exception, match="data|DataDependent|_local_scalar|item"):
        traced(flow)(torch.ones(5, 2, dtype=F64))


@pytest.mark.slow
def test_log_prob_compiles_into_one_graph_with_its_gradient():
    flow = build("cnf", dim=2, hidden=(4,), solver=Solver("rk4", steps=2)).double()
    x = torch.randn(5, 2, dtype=F64)
    compiled = torch.compile(flow.log_prob, fullgraph=True, backend="aot_eager")
    for points in (x, x + 1):
        found = []
        for log_prob in (flow.log_prob, compiled):
            value = log_prob(points)
            slopes = torch.autograd.grad(value.sum(), list(flow.field.parameters()))
            found.append((value, *slopes))
        torch.testing.assert_close(*found, rtol=0, atol=1e-12)
