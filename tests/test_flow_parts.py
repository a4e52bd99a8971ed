"""Flows with other parts: a density as base, dequantized data, images."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

import cnf
from cnf import Flow
from cnf.distributions import StandardNormal, UniformAngles
from cnf.fields import Adapter, MLPField
from cnf.transforms import (
    ActNorm,
    Compose,
    Continuous,
    Coupling,
    RationalQuadratic,
    Standardize,
)

F64 = torch.float64


@pytest.fixture
def points(generator):
    return torch.randn(5, 2, generator=generator, dtype=F64) * 1.3 + 0.4


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Shifted:
    """A density of 2-D data, as `cnf.data.toy` gives one."""

    dim = 2
    normal = Independent(Normal(torch.tensor([3.0, -1.0], dtype=F64), 0.5), 1)

    def sample(self, n, generator=None):
        return torch.randn(n, 2, generator=generator, dtype=F64) * 0.5 + self.normal.mean

    def log_prob(self, x):
        return self.normal.log_prob(x)


def test_flow_between_data_sets_has_an_exact_density(randomized, points):
    flow = randomized(Flow(Shifted(), Compose([Coupling(2), Coupling(2, [1])])))
    z = flow.encode(points)
    jacobian = torch.autograd.functional.jacobian(flow.encode, points[0])
    expected = Shifted().log_prob(z[0]) + jacobian.det().abs().log()
    torch.testing.assert_close(flow.log_prob(points)[0], expected)
    x, log_prob = flow.sample_and_log_prob((2, 3), generator=seeded())
    torch.testing.assert_close(flow.log_prob(x), log_prob)


def test_flow_may_combine_splines_and_a_field(randomized, points):
    spline, tight = RationalQuadratic(4), cnf.Solver(rtol=1e-8, atol=1e-8)
    parts = [
        Coupling(2, transformer=spline, hidden=(8,)),
        Continuous(MLPField(2, (8,), frequencies=1), tight),
        Coupling(2, [1], transformer=spline, hidden=(8,)),
    ]
    flow = randomized(Flow(None, Compose(parts), event_shape=(2,)), gain=0.6)
    z = flow.encode(points)
    jacobian = torch.autograd.functional.jacobian(flow.encode, points[0])
    expected = flow.base.log_prob(z[0]) + jacobian.det().abs().log()
    torch.testing.assert_close(flow.log_prob(points)[0], expected, rtol=0, atol=1e-6)
    report = cnf.check(flow)
    assert report.ok, str(report)
    before = flow.log_prob(points).mean().item()
    cnf.fit(flow, cnf.MaximumLikelihood(), points, cnf.TrainConfig(steps=5, progress=False))
    assert flow.log_prob(points).mean().item() > before


class UniformNoise:
    """y = (x + u)/4 for x in {0, 1, 2, 3}: -log q(y|x) = -D·log 4 for the change of scale."""

    def encode(self, x, generator=None):
        u = torch.rand(x.shape, generator=generator, dtype=x.dtype)
        return (x + u) / 4, torch.full(x.shape[:-1], -x.shape[-1] * math.log(4), dtype=x.dtype)

    def decode(self, y):
        return (y * 4).floor().clamp(0, 3)


def test_dequantized_log_prob_is_a_lower_bound_that_includes_the_noise():
    # the uniform on [0, 1)² gives each of the 16 cells exactly 1/16, whatever is drawn
    base = cnf.distributions.Uniform(torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64))
    flow = Flow(base, Standardize((2,)), dequantization=UniformNoise()).double()
    assert not flow.distribution().has_rsample  # discrete draws have no gradient
    assert Flow(base, Standardize((2,))).distribution().has_rsample
    x = torch.tensor([[0.0, 3.0], [2.0, 1.0]], dtype=F64)
    torch.testing.assert_close(flow.log_prob(x), torch.full((2,), -math.log(16), dtype=F64))
    torch.testing.assert_close(flow.decode(flow.encode(x)), x)
    assert set(flow.sample(200, generator=seeded()).flatten().tolist()) == {0.0, 1.0, 2.0, 3.0}
    with pytest.raises(TypeError, match="call sample, then log_prob for the bound"):
        flow.sample_and_log_prob(2)


def test_parts_with_different_event_shapes_are_refused():
    for parts in ((Coupling(3), None), (Coupling(2), Standardize((3,)))):
        with pytest.raises(ValueError, match=r"expected a transform of \(2,\), got .* of \(3,\)"):
            Flow(None, *parts, event_shape=(2,))


@pytest.mark.parametrize(
    "base", [StandardNormal(3), StandardNormal(1), UniformAngles(3), Normal(torch.zeros(1), 1.0)]
)
def test_base_of_another_event_shape_is_refused(base):
    """Its log_prob would broadcast, or sum over other variables, to a density that is wrong."""
    with pytest.raises(ValueError, match=r"expected a base of \(2,\), got .* of \([13],\)"):
        cnf.models.coupling_flow(2, base=base)


def test_image_flow_has_a_three_dimensional_event(generator):
    net = nn.Conv2d(1, 1, 3, padding=1)
    field = Adapter(_Image(net), (1, 3, 3))
    flow = Flow(None, Continuous(field), Standardize((1, 3, 3)), event_shape=(1, 3, 3)).double()
    x, log_prob = flow.sample_and_log_prob((2, 2), generator=generator)
    assert x.shape == (2, 2, 1, 3, 3) and log_prob.shape == (2, 2)
    torch.testing.assert_close(flow.log_prob(x), log_prob, rtol=0, atol=1e-3)  # solver rtol 1e-5


class _Image(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, t, x):
        return self.net(x.flatten(0, -4)).tanh().reshape(x.shape)


def test_field_of_a_flow_is_that_of_its_transform():
    field = MLPField(2, (4,))
    assert Flow(None, Continuous(field), event_shape=(2,)).field is field


@pytest.mark.parametrize(
    "base",
    [
        np.random.default_rng(0).normal(size=(50, 2)),
        Normal(torch.zeros(2).double(), torch.ones(2).double()),
        cnf.distributions.GaussianMixture(torch.eye(2).double(), torch.ones(2, 2).double()),
    ],
    ids=["points", "torch", "mixture"],
)
def test_float64_base_is_cast_to_the_dtype_of_the_weights(base):
    flow = cnf.Flow(base, cnf.models.build("realnvp", dim=2).transform).eval()
    assert flow.dtype == flow.sample(3).dtype == torch.float32
    if flow.base.has_density:
        z = flow.base.sample((4,)).float()
        log_prob = flow.log_prob(flow.decode(z))
        assert log_prob.dtype == torch.float32
        torch.testing.assert_close(log_prob, flow.base.double().log_prob(z.double()).float())


def test_data_dependent_initialization_does_not_depend_on_dropout(generator):
    def net(inputs, outputs):
        return nn.Sequential(nn.Linear(inputs, 64), nn.Dropout(0.5), nn.Linear(64, outputs))

    x = torch.randn(50, 2, generator=generator)
    actnorms = [ActNorm((2,)), ActNorm((2,))]
    coupling = Coupling(2, conditioner=net)
    for actnorm in actnorms:
        flow = Flow(None, Compose([actnorm, coupling]), event_shape=(2,)).train()
        flow.initialize(x)
        assert flow.training and actnorm.initialized
    assert torch.equal(actnorms[0].log_scale, actnorms[1].log_scale)
