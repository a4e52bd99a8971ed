"""Hutchinson's estimate with several probes and with a sketch (Hutch++)."""

import itertools

import pytest
import torch

from cnf.dynamics import Hutchinson, Solver, record
from cnf.dynamics.divergence import DIVERGENCES
from cnf.fields import Adapter, EndTime, MLPField, VectorField
from cnf.transforms import Continuous

F64 = torch.float64
NOW = torch.tensor(0.3, dtype=F64)


class Matrix(VectorField):
    """v = J x."""

    def __init__(self, matrix):
        super().__init__((len(matrix),))
        self.matrix = torch.nn.Parameter(matrix)

    def forward(self, t, x, context=None):
        return x @ self.matrix.T


@pytest.fixture
def field(randomized):
    return randomized(MLPField(3, (8, 7)))


def low_rank(dim, rank, generator, noise=0.0):
    left, right = (torch.randn(dim, rank, generator=generator, dtype=F64) for _ in range(2))
    rest = torch.randn(dim, dim, generator=generator, dtype=F64)
    return left @ right.T + noise * rest


def rates(estimator, field, x, probe=None, generator=None):
    probe = estimator.draw(x, generator) if probe is None else probe
    return estimator.rates(field, NOW, x, None, probe)


@pytest.mark.parametrize("noise", ["rademacher", "gaussian"])
@pytest.mark.parametrize("sketch", [2, 4, 6, 9])
def test_sketch_that_contains_the_row_space_is_exact(sketch, noise, generator):
    field = Matrix(low_rank(6, 2, generator))
    x = torch.randn(5, 6, generator=generator, dtype=F64)
    estimator = Hutchinson(3, noise, sketch=sketch)
    v, div, _ = rates(estimator, field, x, generator=generator)
    torch.testing.assert_close(v, field(NOW, x))
    expected = field.matrix.trace().expand(5, 3)
    torch.testing.assert_close(div, expected, rtol=0, atol=1e-9)
    plain = rates(Hutchinson(3, noise), field, x, generator=generator).divergence
    assert (plain - expected).abs().min() > 1e-3


def all_signs(generator, sketch, rows=5):
    """`sketch` random probes, then all 2³ signs."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)), dtype=F64)
    drawn = torch.randn(sketch, rows, 3, generator=generator, dtype=F64)
    return torch.cat([drawn, signs.unsqueeze(1).expand(8, rows, 3)])


@pytest.mark.parametrize("sketch", [0, 1, 2, 3])
def test_mean_over_all_signs_is_the_trace_and_has_its_gradient(sketch, field, generator):
    x = torch.randn(5, 3, generator=generator, dtype=F64, requires_grad=True)
    probe = all_signs(generator, sketch)
    estimator = Hutchinson(probe=probe, sketch=sketch)
    each = rates(estimator, field, x, probe).divergence
    exact = field.with_divergence(NOW, x)[1]
    torch.testing.assert_close(each.mean(-1), exact, rtol=1e-12, atol=1e-12)
    spread = each.std(-1).min()
    assert spread > 1e-3 if sketch < 2 else spread < 1 if sketch < 3 else spread < 1e-12
    inputs = [x, *list(field.parameters())[:-1]]
    weight = torch.arange(1, 6)
    ours = torch.autograd.grad((each.mean(-1) * weight).sum(), inputs)
    expected = torch.autograd.grad((exact * weight).sum(), inputs)
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


def test_sketch_reduces_the_variance_for_a_nearly_low_rank_jacobian(generator):
    field = Matrix(low_rank(12, 1, generator, noise=0.05))
    x = torch.randn(2000, 12, generator=generator, dtype=F64)
    spread = {}
    for name, estimator in {
        "hutchinson": Hutchinson(6), "hutch++": Hutchinson(2, sketch=2),
    }.items():  # fmt: skip
        mean = rates(estimator, field, x, generator=generator).divergence.mean(-1)
        spread[name] = mean.std()
        assert abs(mean.mean() - field.matrix.trace()) < 4 * mean.std() / 2000**0.5
    assert spread["hutch++"] < spread["hutchinson"] / 4  # both take six products


def test_each_direction_of_a_sketch_costs_two_products(field, generator, monkeypatch):
    calls = []
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
    rates(Hutchinson(3, sketch=2), field, torch.ones(4, 3, dtype=F64))
    assert len(calls) == 2 * 2 + 3


@pytest.mark.parametrize("sketch", [0, 2])
@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_each_probe_has_a_channel_and_their_mean_is_the_result(batch, sketch, field, generator):
    x = torch.randn(*batch, 3, generator=generator, dtype=F64)
    probe = Hutchinson(4, sketch=sketch).draw(x, generator)
    transform = Continuous(field, Solver("rk4", steps=6))
    solved = transform.integrate(
        x, towards="base", divergence=Hutchinson(probe=probe, sketch=sketch)
    )
    assert solved.estimates.shape == (4, *batch) and solved.ladj.shape == batch
    torch.testing.assert_close(solved.estimates.mean(0), solved.ladj, rtol=0, atol=1e-13)
    for k in range(4):
        one = torch.cat([probe[:sketch], probe[sketch + k : sketch + k + 1]])
        alone = transform.integrate(
            x, towards="base", divergence=Hutchinson(probe=one, sketch=sketch)
        )
        torch.testing.assert_close(alone.ladj, solved.estimates[k], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.value, solved.value, rtol=0, atol=1e-13)
    assert transform.integrate(x, towards="base").estimates is None


def test_estimates_of_a_linear_flow_are_its_quadratic_forms(generator):
    field = Matrix(low_rank(3, 3, generator) / 3)
    x = torch.randn(5, 3, generator=generator, dtype=F64)
    probe = Hutchinson(4).draw(x, generator)
    for towards, sign in (("data", 1), ("base", -1)):
        solved = Continuous(field).integrate(
            x, towards=towards, divergence=Hutchinson(probe=probe)
        )
        forms = torch.einsum("kni,ij,knj->kn", probe, field.matrix, probe)
        torch.testing.assert_close(solved.estimates, sign * forms, rtol=0, atol=1e-12)


def test_same_generator_gives_the_same_estimate(field, generator):
    x = torch.randn(5, 3, generator=generator, dtype=F64)
    before = torch.get_rng_state()
    ends = [
        Continuous(field, Solver("rk4", steps=4)).integrate(
            x, towards="base", divergence=Hutchinson(2, generator=torch.Generator().manual_seed(s))
        ).estimates
        for s in (3, 3, 4)
    ]  # fmt: skip
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("sketch", [0, 1])
def test_estimates_work_without_gradients(mode, sketch, randomized, generator):
    field = randomized(EndTime(MLPField(3, (8,), context_dim=2, layer="concatsquash")))
    probe = Hutchinson(2, sketch=sketch).draw(torch.zeros(5, 3, dtype=F64), generator)
    transform = Continuous(field, Solver("rk4", steps=4), Hutchinson(probe=probe, sketch=sketch))

    def run():
        x, context = torch.ones(5, 3, dtype=F64), torch.ones(5, 2, dtype=F64)
        return transform.inverse(x, context)

    expected = run()
    with mode():
        ours = run()
    assert not ours[1].requires_grad
    torch.testing.assert_close(ours, tuple(part.detach() for part in expected))


def test_solver_controls_the_error_of_each_estimate(field, generator):
    x = torch.randn(5, 3, generator=generator, dtype=F64)
    estimator = Hutchinson(probe=Hutchinson(3, "gaussian").draw(x, generator))
    ends = []
    for tolerance in (1e-5, 1e-10):
        transform = Continuous(field, Solver(rtol=tolerance, atol=tolerance))
        with record() as stats:
            ends.append(transform.integrate(x, towards="base", divergence=estimator).estimates)
    assert 1e-10 < (ends[0] - ends[1]).abs().max() < 1e-3 and stats.solves == 1


@pytest.mark.parametrize("options", [{"sketch": -1}, {"probes": 0, "sketch": 2}], ids=str)
def test_invalid_counts_are_refused(options):
    with pytest.raises(ValueError, match=r"expected (sketch >= 0|probes >= 1), got"):
        DIVERGENCES.build({"name": "hutchinson", **options})


def test_estimate_for_images_equals_that_for_vectors(randomized, generator):
    net = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3, padding=1), torch.nn.Tanh(),
                              torch.nn.Conv2d(3, 2, 3, padding=1))  # fmt: skip
    field = Adapter(_Constant(randomized(net)), (2, 3, 3))
    x = torch.randn(4, 2, 3, 3, generator=generator, dtype=F64)
    div = rates(Hutchinson(2, sketch=18), field, x, generator=generator).divergence
    exact = rates(DIVERGENCES.build("exact"), field, x).divergence
    torch.testing.assert_close(div, exact.unsqueeze(-1).expand(4, 2), rtol=0, atol=1e-10)


class _Constant(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, t, x):
        return self.net(x)
