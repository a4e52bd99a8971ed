"""Sigmoid, tanh and softplus: densities against torch's, supports, tails and precision."""

import math

import pytest
import torch
from torch.distributions import Independent, Normal, TransformedDistribution
from torch.distributions.transforms import SigmoidTransform, SoftplusTransform, TanhTransform

from cnf import Flow
from cnf.transforms import Inverse, Sigmoid, Softplus, Tanh

F64 = torch.float64
CASES = {
    "sigmoid": (Sigmoid(), SigmoidTransform(), [-0.1, 1.2]),
    "tanh": (Tanh(), TanhTransform(), [-1.1, 1.5]),
    "softplus": (Softplus(), SoftplusTransform(), [-0.2, -30.0]),
}


@pytest.mark.parametrize("name", CASES)
def test_density_equals_torchs_inside_and_is_zero_outside_of_support(name, generator):
    transform, theirs, outside = CASES[name]
    flow = Flow(None, transform, event_shape=(2,)).double()
    x = flow.sample(50, generator=generator)
    expected = Independent(TransformedDistribution(Normal(x.new_zeros(2), 1.0), theirs), 1)
    torch.testing.assert_close(flow.log_prob(x), expected.log_prob(x), rtol=1e-9, atol=1e-9)
    for value in outside:
        x[0, 1] = value
        x.requires_grad_()
        log_prob = flow.log_prob(x)
        assert log_prob[0] == -math.inf and torch.isfinite(log_prob[1:]).all()
        assert torch.isfinite(torch.autograd.grad(log_prob[1:].sum(), x)[0]).all()
        x = x.detach()


@pytest.mark.parametrize(("name", "depth"), [("sigmoid", -70.0), ("softplus", -70.0)])
def test_small_numbers_are_recovered_in_float32(name, depth):
    transform = CASES[name][0]
    z = torch.linspace(depth, 10, 81).unsqueeze(-1)
    x, forward = transform(z)
    again, inverse = transform.inverse(x)
    torch.testing.assert_close(again, z, rtol=1e-5, atol=0.01)  # at 10 an eps of x is 0.003 of z
    torch.testing.assert_close(inverse, -forward, rtol=1e-5, atol=0.01)


@pytest.mark.parametrize(
    ("name", "ends"), [("sigmoid", (0, 1)), ("tanh", (-1, 1)), ("softplus", (0,))]
)
def test_the_ends_of_the_support_are_finite_with_finite_gradients(name, ends):
    x = torch.tensor(ends, dtype=torch.float32).unsqueeze(-1).requires_grad_()
    z, log_slope = CASES[name][0].inverse(x)
    log_prob = log_slope - z.square().sum(-1) / 2
    assert torch.isfinite(log_prob).all()
    assert torch.isfinite(torch.autograd.grad(log_prob.sum(), x)[0]).all()


def test_sigmoid_onto_a_given_box_and_its_logit(generator):
    transform = Sigmoid(-2.0, 3.0)
    z = torch.randn(20, 3, generator=generator, dtype=F64)
    x, ladj = transform(z)
    torch.testing.assert_close(x, -2 + 5 / (1 + (-z).exp()))
    torch.testing.assert_close(Inverse(transform)(x), (z, -ladj))
    assert transform.inverse(x + 6)[1].max() == -math.inf
    with pytest.raises(ValueError, match="expected low < high, got 1.0 and 1.0"):
        Sigmoid(1.0, 1.0)


@pytest.mark.parametrize("box", [(0.1, 0.9), (-0.05, 1.05), (-3.0, 2.0), (0.0, 0.3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_saturated_values_stay_in_the_box_and_have_a_density(box, dtype):
    transform, z = Sigmoid(*box), torch.linspace(-200, 200, 401, dtype=dtype).unsqueeze(-1)
    x, _ = transform(z)
    assert x.min() >= x.new_tensor(box[0]) and x.max() <= x.new_tensor(box[1])
    assert torch.isfinite(transform.inverse(x)[1]).all()
    assert torch.isfinite(transform.inverse(x.float().double())[1]).all()  # as files keep it
    beyond = x.new_tensor([[box[0] - 1e-3], [box[1] + 1e-3]])
    assert (transform.inverse(beyond)[1] == -math.inf).all()


@pytest.mark.parametrize("name", CASES)
def test_round_trip_in_float16(name):
    transform, z = CASES[name][0], torch.linspace(-5, 3, 17, dtype=torch.float16).unsqueeze(-1)
    again, _ = transform.inverse(transform(z)[0])
    torch.testing.assert_close(again[6:], z[6:], rtol=0.05, atol=0.05)
    assert name == "tanh" or (again - z).abs().max() < 0.2
