"""log_prob_with_error: the interval covers, and the solver's error is the true one."""

import math

import pytest
import torch

import cnf
from cnf import Flow, Hutchinson, Solver
from cnf.dynamics import record
from cnf.fields import MLPField, VectorField
from cnf.metrics import log_prob_with_error
from cnf.transforms import Compose, Continuous, Coupling
from cnf.transforms.continuous import is_continuous

F64 = torch.float64


class Linear(VectorField):
    matrix = torch.tensor([[0.3, -1.2], [0.9, 0.5]], dtype=F64)

    def __init__(self):
        super().__init__((2,))

    def forward(self, t, x, context=None):
        return x @ self.matrix.to(x).T


def linear_flow(solver):
    return Flow(None, Continuous(Linear(), solver), event_shape=(2,))


def exact(x):
    z = x @ torch.matrix_exp(-Linear.matrix).T
    return -z.square().sum(-1) / 2 - math.log(2 * math.pi) - Linear.matrix.trace()


@pytest.fixture
def x(generator):
    return torch.randn(6, 2, generator=generator, dtype=F64)


SOLVERS = [
    *(Solver("rk4", steps=steps) for steps in (2, 5)),
    Solver("midpoint", steps=8),
    *(Solver(method, rtol=r, atol=r) for method in ("dopri5", "bosh3") for r in (1e-3, 1e-5)),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_solver_error_is_the_true_error_of_a_linear_flow(solver, x):
    told = log_prob_with_error(linear_flow(solver).double(), x)
    true = (told.value - exact(x)).abs()
    # Against twice the steps: 1 - 2^-order of it; against 1/100 of the tolerances: nearly all.
    assert ((told.solver_error - true).abs() < 0.35 * true + 1e-12).all()
    assert true.max() > 1e-8 and torch.equal(told.trace_error, torch.zeros(6, dtype=F64))


def test_solver_error_sees_what_float32_loses(x):
    flow = linear_flow(Solver("rk4", steps=60))
    told = log_prob_with_error(flow, x.float())
    assert told.value.dtype == told.solver_error.dtype == torch.float32
    true = (told.value.double() - exact(x.float().double())).abs()
    torch.testing.assert_close(told.solver_error.double(), true, rtol=0, atol=1e-7)
    assert true.max() > 1e-7


@pytest.mark.parametrize("name", cnf.models.MODELS.taking("dim"))
@pytest.mark.parametrize("context", [0, 3])
def test_every_model_tells_log_prob_and_no_trace_error(name, context, small_flow, x):
    flow = small_flow(name, context, solver=Solver(rtol=1e-5, atol=1e-5))
    c = torch.ones(6, 3, dtype=F64) if context else None
    told = log_prob_with_error(flow, x, c)
    assert not told.value.requires_grad
    expected = flow.log_prob(x, c).detach()  # sums in another order
    torch.testing.assert_close(told.value, expected, rtol=0, atol=1e-12)
    assert torch.equal(told.trace_error, torch.zeros(6, dtype=F64))
    assert told.solver_error.shape == (6,) and told.solver_error.max() < 1e-2
    assert (told.nfe > 0) == is_continuous(flow.transform)


@pytest.mark.parametrize("batch", [(), (2, 3)], ids=str)
def test_one_probe_shows_no_spread_and_two_do(batch, small_flow, generator):
    flow, x = small_flow("cnf"), torch.randn(*batch, 2, generator=generator, dtype=F64)
    one = log_prob_with_error(flow, x, divergence="hutchinson", generator=generator)
    assert one.trace_error is None and one.value.shape == one.solver_error.shape == batch
    two = log_prob_with_error(flow, x, divergence=Hutchinson(2), generator=generator)
    assert two.trace_error.shape == batch and (two.trace_error >= 0).all()


def test_a_learned_divergence_is_compared_with_that_in_twice_the_steps(generator):
    flow = cnf.models.cnf(2, hidden=(8,), flow_map=True, divergence_head=True).double()
    with torch.no_grad():
        for weight in flow.parameters():
            weight.add_(0.3 * torch.randn(weight.shape, generator=generator, dtype=F64))
    x = torch.randn(5, 2, generator=generator, dtype=F64)
    with pytest.warns(UserWarning, match="in twice the steps: do not compare"):
        told = log_prob_with_error(flow, x, divergence="learned")
    eight = flow.with_solver(Solver("flow-map", steps=8)).log_prob(x, divergence="learned")
    assert told.trace_error is None
    torch.testing.assert_close(told.solver_error, (eight - told.value).abs())


def test_trace_error_is_students_interval_of_the_estimates(small_flow, x, generator):
    from scipy.stats import t as student

    flow, probe = small_flow("cnf"), Hutchinson(5).draw(x, generator)
    estimator = Hutchinson(probe=probe)
    told = log_prob_with_error(flow, x, divergence=estimator, confidence=0.8)
    each = torch.stack(
        [flow.log_prob(x, divergence=Hutchinson(probe=p.unsqueeze(0))) for p in probe]
    ).detach()
    torch.testing.assert_close(told.value, each.mean(0), rtol=0, atol=1e-6)  # solver rtol 1e-9
    half = float(student.ppf(0.9, 4)) * each.std(0) / 5**0.5
    torch.testing.assert_close(told.trace_error, half, rtol=1e-5, atol=1e-6)
    assert told.solver_error.max() < 1e-5  # the same probes in both solves


@pytest.mark.filterwarnings("ignore:log_prob_with_error")  # of two steps, as are both values
@pytest.mark.parametrize("sketch", [0, 4])
def test_a_95_percent_interval_covers_the_exact_value_95_percent_of_the_time(
    sketch, randomized, generator
):
    field = randomized(MLPField(16, (24,), layer="concat"), gain=1.5)
    flow = Flow(None, Continuous(field, Solver("rk4", steps=2)), event_shape=(16,)).double()
    x = torch.randn(2000, 16, generator=generator, dtype=F64)
    estimator = Hutchinson(32, sketch=sketch)
    told = log_prob_with_error(flow, x, divergence=estimator, generator=generator)
    covered = ((told.value - flow.log_prob(x)).abs() <= told.trace_error).double().mean()
    assert 0.93 < covered < 0.97  # 2000 rows: 0.005 is one standard deviation
    assert told.trace_error.min() > 1e-3


def test_the_generator_repeats_probes_and_dequantization(small_flow, x):
    flow = small_flow("cnf")
    told = [
        log_prob_with_error(
            flow, x, divergence=Hutchinson(3), generator=torch.Generator().manual_seed(s)
        )
        for s in (1, 1, 2)
    ]
    assert torch.equal(told[0].value, told[1].value)
    assert not torch.equal(told[0].value, told[2].value)


class Noise:
    """Dequantization that hides nothing: y = x + u."""

    def encode(self, x, generator=None):
        u = torch.rand(x.shape, generator=generator, dtype=x.dtype)
        return x + u, torch.zeros(x.shape[:-1], dtype=x.dtype)

    def decode(self, y):
        return y.floor()


def test_both_solves_see_the_same_dequantized_point(small_flow, x):
    for name in ("cnf", "realnvp"):
        flow = small_flow(name)
        flow.dequantization = Noise()
        assert log_prob_with_error(flow, x.floor()).solver_error.max() < 1e-6


@pytest.mark.parametrize("name", ["uniform", "variational"])
def test_noise_of_dequantization_is_no_error_of_a_solver_in_float32(name):
    noise = {"name": name, "levels": 17}
    flow = cnf.models.glow(shape=(1, 8, 8), layers=1, dequantization=noise, preprocess="logit")
    x = torch.randint(0, 17, (3, 1, 8, 8), dtype=torch.uint8, generator=torch.manual_seed(0))
    told = log_prob_with_error(flow, x)
    assert told.solver_error.max() < 1e-3 * told.value.abs().max()  # rounding
    assert type(flow.dequantization).__name__ == f"{name.title()}Dequantization"


def test_nfe_is_that_of_the_value_alone(x):
    flow = linear_flow(Solver("rk4", steps=5)).double()
    with record() as stats:
        told = log_prob_with_error(flow, x)
    assert told.nfe == 20 and stats.forward == 60


def test_the_flow_is_left_as_it_was(small_flow, x):
    flow = small_flow("cnf").float()
    solver, weights = flow.transform.solver, [p.clone() for p in flow.parameters()]
    log_prob_with_error(flow, x.float())
    assert flow.transform.solver == solver
    assert all(torch.equal(a, b) for a, b in zip(flow.parameters(), weights, strict=True))


def test_a_compose_has_the_errors_of_the_odes_in_it(randomized, x):
    parts = [Coupling(2, hidden=(8,)), Continuous(MLPField(2, (8,)), Solver("rk4", steps=3))]
    flow = Flow(None, randomized(Compose(parts)), event_shape=(2,)).double()
    told = log_prob_with_error(flow, x)
    assert torch.equal(told.value, flow.log_prob(x)) and told.nfe == 12
    assert told.trace_error.max() == 0 < told.solver_error.max()
    estimated = log_prob_with_error(flow, x, divergence=Hutchinson(probes=64))
    error = (estimated.value - told.value).abs()
    assert (error < 2 * estimated.trace_error).all() and estimated.trace_error.min() > 1e-3


def test_a_list_is_refused(small_flow):
    with pytest.raises(ValueError, match="log_prob_with_error: expected x to be a torch.Tensor"):
        log_prob_with_error(small_flow("realnvp"), [[0.0, 0.0]])  # pyright: ignore


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.1, math.nan])
def test_a_confidence_outside_its_range_is_refused(confidence, small_flow, x):
    with pytest.raises(ValueError, match="confidence between 0 and 1"):
        log_prob_with_error(small_flow("cnf"), x, confidence=confidence)
