"""Autocast around a call: bfloat16 in networks only."""

import pytest
import torch

import cnf
from cnf.dynamics import Solver
from cnf.fields.base import VectorField
from cnf.transforms import Continuous

AUTOCAST = torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("name", ["cnf", "realnvp", "nsf", "nsf-ar", "maf", "iaf", "glow"])
def test_log_prob_under_autocast_computes_maps_in_float32(name, generator):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        flow = cnf.models.build(name, dim=2).eval()
        with torch.no_grad():
            for parameter in flow.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    x = torch.randn(64, 2, generator=generator)
    expected = flow.log_prob(x)
    with AUTOCAST:
        got = flow.log_prob(x)
        assert flow.sample(3).dtype == torch.float32
    assert got.dtype == torch.float32 and not torch.equal(got, expected)
    # With the splines' parameters in bfloat16 the worst row is 0.15 nats off.
    torch.testing.assert_close(got, expected, rtol=0, atol=0.03)


@pytest.mark.parametrize("gradient", ["adjoint", "checkpoint", "backprop"])
@pytest.mark.parametrize("method", [{"method": "dopri5"}, {"method": "rk4", "steps": 3}])
def test_backward_solve_uses_the_autocast_of_the_forward_solve(gradient, method):
    precisions = []

    class PrecisionRecorder(VectorField):
        def __init__(self):
            super().__init__((2,))
            self.net = torch.nn.Linear(2, 2)

        def forward(self, t, x, context=None):
            v = self.net(x)
            precisions.append(v.dtype)
            return v

    transform = Continuous(PrecisionRecorder(), Solver(gradient=gradient, **method))
    with AUTOCAST:
        value, ladj = transform.inverse(torch.ones(4, 2))
    (value.sum() + ladj.sum()).backward()  # outside of autocast, as torch asks
    assert value.dtype == ladj.dtype == torch.float32
    assert set(precisions) == {torch.bfloat16}
    assert all(p.grad.abs().sum() > 0 for p in transform.parameters())
