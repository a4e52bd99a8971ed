"""Flows under torch.func, against loops and against autograd."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap

from cnf.dynamics import Hutchinson, Solver
from cnf.models import MODELS

F64 = torch.float64
STEPS = Solver("rk4", steps=2)
close = torch.testing.assert_close


class LogProb(nn.Module):
    """`log_prob` as a module's forward, which `functional_call` calls."""

    def __init__(self, flow):
        super().__init__()
        self.flow = flow

    def forward(self, *at):
        return self.flow.log_prob(*at)


@pytest.fixture
def flow_and_x(small_flow, randomized, generator):
    def build(name, context=0):
        if name == "glow":
            flow = randomized(MODELS[name](shape=(1, 4, 4), context=context, hidden=(4, 4)))
        else:
            flow = small_flow(name, context=context, solver=STEPS, gain=0.5)
        x = torch.randn(3, *flow.event_shape, generator=generator, dtype=F64)
        return flow.eval(), x

    return build


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_torch_func_derivatives_of_every_density_equal_autograds(name, flow_and_x):
    flow, x = flow_and_x(name)
    leaf = x.clone().requires_grad_()
    value = flow.log_prob(leaf)
    (slope,) = torch.autograd.grad(value.sum(), leaf)
    assert slope.abs().min() > 0
    close(vmap(flow.log_prob)(x), value)
    close(vmap(grad(flow.log_prob))(x), slope)
    close(jacrev(flow.log_prob)(x[0]), slope[0])
    _, tangent = jvp(flow.log_prob, (x,), (torch.ones_like(x),))
    close(tangent, slope.flatten(1).sum(-1))
    if x[0].numel() < 10:
        twice = torch.autograd.functional.hessian(flow.log_prob, x[0])
        close(hessian(flow.log_prob)(x[0]), twice)
        close(vmap(hessian(flow.log_prob))(x[:1]), twice.unsqueeze(0))


@pytest.mark.parametrize("name", MODELS.taking("dim"))
def test_per_sample_gradients_equal_those_of_a_loop(name, flow_and_x):
    flow, x = flow_and_x(name, context=2)
    module, context = LogProb(flow), torch.linspace(-1, 1, 6, dtype=F64).reshape(3, 2)
    parameters = dict(module.named_parameters())

    def log_prob(parameters, x, context):
        return functional_call(module, parameters, (x, context))

    found = vmap(grad(log_prob), (None, 0, 0))(parameters, x, context)
    for row in range(3):
        alone = torch.autograd.grad(
            flow.log_prob(x[row], context[row]), list(parameters.values()),
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        close([part[row] for part in found.values()], list(alone))
    by_context = vmap(lambda c: flow.log_prob(x, c))(context)
    close(by_context, torch.stack([flow.log_prob(x, c) for c in context]))


@pytest.mark.parametrize("name", ["cnf", "ffjord", "otflow", "planar", "sylvester", "nsf"])
def test_ensemble_is_evaluated_in_one_call(name, small_flow, generator):
    members = [LogProb(small_flow(name, solver=STEPS, gain=0.5)) for _ in range(3)]
    x = torch.randn(4, 2, generator=generator, dtype=F64)
    weights, buffers = stack_module_state(members)

    def log_prob(weights, buffers):
        return functional_call(members[0], (weights, buffers), (x,))

    close(vmap(log_prob)(weights, buffers), torch.stack([member(x) for member in members]))


@pytest.mark.parametrize("name", ["cnf", "planar", "iaf"])
def test_both_directions_and_the_trajectory_support_vmap(name, flow_and_x):
    flow, x = flow_and_x(name)
    close(vmap(flow.encode)(x), flow.encode(x))
    close(vmap(flow.decode)(x), flow.decode(x))
    close(jacrev(flow.decode)(x[0]), torch.autograd.functional.jacobian(flow.decode, x[0]))
    if name == "cnf":
        times = [0.0, 0.3, 0.5, 1.0]
        path = vmap(lambda z: flow.trajectory(z, times), out_dims=1)(x)
        close(path, flow.trajectory(x, times), rtol=1e-12, atol=1e-12)


def test_estimated_log_prob_supports_torch_func_with_a_given_probe(flow_and_x):
    flow, x = flow_and_x("ffjord")
    for sketch in (0, 1):
        estimate = Hutchinson(1 + sketch, sketch=sketch)
        estimate = Hutchinson(probe=estimate.draw(x), sketch=sketch)

        def total(x, estimate=estimate):
            return flow.log_prob(x, divergence=estimate).sum()

        leaf = x.clone().requires_grad_()
        close(grad(total)(x), torch.autograd.grad(total(leaf), leaf)[0])


@pytest.mark.parametrize("solver", [Solver(), Solver("explicit_adams", steps=4)])
def test_error_for_an_adaptive_solver_under_torch_func_names_a_fixed_step_one(solver, small_flow):
    flow, x = small_flow("cnf", solver=solver), torch.ones(3, 2, dtype=F64)
    for transformed in (vmap(flow.log_prob), grad(lambda x: flow.log_prob(x).sum())):
        with pytest.raises(TypeError, match=r"(?s)torch.func.*with_solver\(Solver\(.rk4., steps"):
            transformed(x)
