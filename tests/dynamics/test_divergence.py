"""Exact divergence and Hutchinson's estimate."""

import itertools

import pytest
import torch
from torch import nn

from cnf.dynamics.divergence import (
    DIVERGENCES,
    Exact,
    Hutchinson,
    hutchinson,
)
from cnf.fields import Adapter, MLPField
from cnf.fields.base import EXACT_LIMIT
from cnf.fields.trace import trace_of_jacobian
from cnf.transforms import Continuous

F64 = torch.float64


@pytest.fixture
def net(randomized):
    """A smooth map from R³ to R³, as itself and, without its closed form, as a field."""
    return randomized(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)))


@pytest.fixture
def field(randomized):
    inner = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    return randomized(Adapter(inner, (3,), call="concat"))


def rows_trace(v, x, dims=1):
    """Trace of each row's Jacobian, by plain autograd."""
    size = x.shape[x.dim() - dims :].numel()
    batch = x.shape[: x.dim() - dims]
    flat = x.reshape(-1, *x.shape[x.dim() - dims :])
    jacobians = [
        torch.autograd.functional.jacobian(
            lambda y: v(y.unsqueeze(0)).squeeze(0), row, create_graph=True
        )
        for row in flat
    ]
    return torch.stack([j.reshape(size, size).trace() for j in jacobians]).reshape(batch)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)])
def test_trace_of_a_linear_map_is_its_trace(batch, generator):
    matrix = torch.tensor([[1.0, 2.0, 0.5], [-3.0, 0.25, 1.0], [0.0, 7.0, -4.0]], dtype=F64)
    x = torch.randn(*batch, 3, generator=generator, dtype=F64)
    v, div = trace_of_jacobian(lambda y: y @ matrix.T, x)
    torch.testing.assert_close(v, x @ matrix.T)
    torch.testing.assert_close(div, torch.full(batch, 1 + 0.25 - 4.0, dtype=F64))


def test_trace_equals_autograds_for_vectors(net, generator):
    x = torch.randn(5, 3, generator=generator, dtype=F64)
    v, div = trace_of_jacobian(net, x)
    torch.testing.assert_close(v, net(x))
    torch.testing.assert_close(div, rows_trace(net, x), rtol=1e-12, atol=1e-12)
    assert div.abs().min() > 1e-3 and div.dtype == F64


def test_trace_equals_autograds_for_images(randomized, generator):
    conv = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 3, padding=1))
    conv = randomized(conv)
    x = torch.randn(3, 2, 4, 4, generator=generator, dtype=F64)
    v, div = trace_of_jacobian(conv, x, event_dims=3)
    assert v.shape == x.shape and div.shape == (3,)
    torch.testing.assert_close(div, rows_trace(conv, x, 3), rtol=1e-10, atol=1e-10)
    probe = torch.randn(2, 3, 2, 4, 4, generator=generator, dtype=F64)
    v, estimate = hutchinson(conv, x, probe, event_dims=3)
    assert v.shape == x.shape and estimate.shape == (3,)


@pytest.mark.parametrize("grad", [True, False])
def test_gradient_of_the_exact_trace_equals_autograds(grad, net, generator):
    x = torch.randn(5, 3, generator=generator, dtype=F64, requires_grad=True)
    inputs = [x, *list(net.parameters())[:-1]]
    with torch.set_grad_enabled(grad):
        div = trace_of_jacobian(net, x)[1]
    assert div.requires_grad == grad
    if grad:
        ours = torch.autograd.grad(div.sum(), inputs)
        reference = torch.autograd.grad(rows_trace(net, x).sum(), inputs, allow_unused=True)
        for a, b in zip(ours, reference, strict=True):
            torch.testing.assert_close(a, b if b is not None else torch.zeros_like(a))


def all_signs(dim):
    return torch.tensor(list(itertools.product([-1.0, 1.0], repeat=dim)), dtype=F64)


def test_hutchinson_mean_over_all_signs_is_trace(net, generator):
    x = torch.randn(5, 3, generator=generator, dtype=F64)
    probe = all_signs(3).unsqueeze(1).expand(8, 5, 3)
    v, estimate = hutchinson(net, x, probe)
    torch.testing.assert_close(v, net(x))
    torch.testing.assert_close(estimate, rows_trace(net, x), rtol=1e-12, atol=1e-12)
    one = hutchinson(net, x, probe[:1])[1]
    assert (one - estimate).abs().min() > 1e-4  # a single probe is not the trace


def test_hutchinson_is_exact_for_a_diagonal_jacobian(generator):
    x = torch.randn(5, 3, generator=generator, dtype=F64)
    probe = Hutchinson().draw(x, generator)
    estimate = hutchinson(lambda y: y**3, x, probe)[1]
    torch.testing.assert_close(estimate, (3 * x**2).sum(-1))


def test_mean_over_gaussian_probes_is_the_trace(net, generator):
    x = torch.randn(1, 3, generator=generator, dtype=F64)
    probe = Hutchinson(20_000, noise="gaussian").draw(x, generator)
    each = hutchinson(net, x.expand(20_000, 3), probe.movedim(1, 0))[1]
    error = each.std() / len(each) ** 0.5
    assert abs(each.mean() - rows_trace(net, x)[0]) < 4 * error  # seeded


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
def test_probes_have_identity_covariance_and_repeat_with_the_seed(noise, generator):
    x = torch.zeros(20_000, 2, dtype=F64)
    probe = Hutchinson(2, noise).draw(x, generator)
    assert probe.shape == (2, 20_000, 2) and probe.dtype == F64
    flat = probe.reshape(-1, 2)
    covariance = flat.T @ flat / len(flat)
    torch.testing.assert_close(covariance, torch.eye(2, dtype=F64), atol=0.03, rtol=0)  # 4σ
    assert ((probe.abs() == 1).all()) == (noise == "rademacher")
    before = torch.get_rng_state()
    again = Hutchinson(2, noise).draw(x, torch.Generator().manual_seed(20240229))
    assert torch.equal(again, probe) and torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("create_graph", [True, False])
def test_gradients_of_the_estimate_equal_autograds(create_graph, net, generator):
    x = torch.randn(5, 3, generator=generator, dtype=F64, requires_grad=True)
    probe = all_signs(3).unsqueeze(1).expand(8, 5, 3)
    inputs = [x, *list(net.parameters())[:-1]]
    with torch.set_grad_enabled(create_graph):
        v, estimate = hutchinson(net, x, probe)
    assert v.requires_grad == estimate.requires_grad == create_graph
    if create_graph:
        ours = torch.autograd.grad(estimate.sum(), inputs, allow_unused=True)
        reference = torch.autograd.grad(rows_trace(net, x).sum(), inputs, allow_unused=True)
        for a, b in zip(ours, reference, strict=True):
            zero = torch.zeros_like(a if a is not None else b)
            torch.testing.assert_close(zero if a is None else a, zero if b is None else b)


def test_probe_of_another_shape_is_refused(net):
    with pytest.raises(
        ValueError, match=r"expected probe of shape \(probes, 5, 3\), got \(5, 3\)"
    ):
        hutchinson(net, torch.zeros(5, 3), torch.zeros(5, 3))


class CountedHutchinson(Hutchinson):
    def draw(self, x, generator=None):
        DRAWS.append(tuple(x.shape))
        return super().draw(x, generator)


DRAWS = []


def test_probes_are_drawn_once_per_solve(field, generator):
    DRAWS.clear()
    divergence = CountedHutchinson(3, generator=generator)
    x = torch.randn(4, 3, generator=generator, dtype=F64, requires_grad=True)
    transform = Continuous(field, divergence=divergence)
    solved = transform.integrate(x, towards="base", divergence=divergence)
    assert DRAWS == [(4, 3)] and solved.nfe > 7
    solved.ladj.sum().backward()
    assert DRAWS == [(4, 3)]  # the adjoint sees the forward's probes
    transform.inverse(x)
    assert len(DRAWS) == 2


def test_given_probes_are_used(field, generator):
    x = torch.randn(4, 3, generator=generator, dtype=F64)
    probe = all_signs(3).unsqueeze(1).expand(8, 4, 3)
    transform = Continuous(field)
    exact = transform.integrate(x, towards="base", divergence="exact").ladj
    estimate = transform.integrate(x, towards="base", divergence=Hutchinson(probe=probe)).ladj
    torch.testing.assert_close(estimate, exact, rtol=0, atol=1e-4)  # solver rtol 1e-5
    assert exact.abs().min() > 1e-3


def test_exact_uses_the_closed_form_and_agrees_with_autograd(randomized, generator):
    closed = randomized(MLPField(3, (6, 5)))
    generic = Adapter(closed, (3,))
    x = torch.randn(4, 3, generator=generator, dtype=F64)
    t = torch.tensor(0.3, dtype=F64)
    a = Exact().rates(closed, t, x, None, None)
    b = Exact().rates(generic, t, x, None, None)
    for ours, reference in zip(a[:2], b[:2], strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-12, atol=1e-12)


class Constant(nn.Module):
    def forward(self, t, x):
        return x


def test_error_for_infeasible_exact_divergence_names_the_estimator():
    field = Adapter(Constant(), (1, 40, 40))
    with pytest.raises(ValueError) as caught:
        Exact().rates(field, torch.tensor(0.1), torch.zeros(2, 1, 40, 40), None, None)
    for part in ("Adapter", "1600", str(EXACT_LIMIT), "divergence=Hutchinson(probes=8)"):
        assert part in str(caught.value)
    x, estimator = torch.ones(2, 1, 40, 40), Hutchinson()
    rates = estimator.rates(field, torch.tensor(0.1), x, None, estimator.draw(x))
    assert (rates.divergence == 1600).all()  # v = x


def test_invalid_settings_are_refused():
    with pytest.raises(ValueError, match="noise to be one of 'rademacher', 'gaussian', got 'x'"):
        Hutchinson(noise="x")
    with pytest.raises(ValueError, match="probes >= 1, got 0"):
        Hutchinson(probes=0)
    with pytest.raises(ValueError, match="Did you mean 'hutchinson'"):
        DIVERGENCES.build("hutchinsn")


@pytest.mark.parametrize("name", DIVERGENCES)
def test_names_give_estimators_with_default_settings(name):
    assert DIVERGENCES.build(name) == DIVERGENCES[name]()
    assert DIVERGENCES.build(DIVERGENCES.build(name)) == DIVERGENCES[name]()
