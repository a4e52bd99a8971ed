"""Quality of samples against evaluations."""

import math

import pytest
import torch

from cnf import Flow, Solver, models
from cnf.fields import VectorField
from cnf.metrics import nfe_curve, nfe_table
from cnf.race.judge import Judge
from cnf.random import stream
from cnf.transforms import Continuous

F64 = torch.float64


class Growth(VectorField):
    """v = x, which Euler's method with n steps carries to (1 + 1/n)ⁿ x."""

    def __init__(self, context_dim=0):
        super().__init__((2,), context_dim)
        self.unused = torch.nn.Parameter(torch.zeros((), dtype=F64))

    def forward(self, t, x, context=None):
        return x if context is None else x * context


@pytest.fixture
def flow():
    solver = Solver(rtol=1e-9, atol=1e-9)
    return Flow(None, Continuous(Growth(), solver), event_shape=(2,)).double()


def spread(drawn):
    return drawn.square().mean().sqrt().item()


def test_the_curve_is_eulers_error(flow):
    target = torch.zeros(200, 2, dtype=F64)
    curve = nfe_curve(flow, target, steps=(1, 2, 5), distance=spread)
    z = flow.base.sample((200,), stream(0, "samples in few steps"))
    growths = [value / spread(z) for _, value in curve]
    assert [nfe for nfe, _ in curve[:-1]] == [1, 2, 5]
    assert growths == pytest.approx([2.0, 2.25, 1.2**5, math.e])
    assert curve[-1][0] > 10


def test_other_methods_count_their_stages(flow):
    curve = nfe_curve(flow, torch.zeros(9, 2), steps=(1, 3), method="heun2", distance=spread)
    assert [nfe for nfe, _ in curve[:-1]] == [2, 6]


def test_a_context_goes_with_its_sample():
    flow = Flow(None, Continuous(Growth(1)), event_shape=(2,)).double()
    context = torch.zeros(50, 1, dtype=F64)
    still = nfe_curve(flow, torch.zeros(50, 2), steps=(1,), context=context, distance=spread)
    moved = nfe_curve(flow, torch.zeros(50, 2), steps=(1,), context=context + 1, distance=spread)
    assert moved[0][1] == pytest.approx(2 * still[0][1])


def test_a_discrete_flow_has_one_point(small_flow):
    curve = nfe_curve(small_flow("realnvp"), torch.randn(100, 2, dtype=F64))
    assert len(curve) == 1 and curve[0][0] == 0 and curve[0][1] > 0


def test_the_distance_is_sliced_w2_unless_told(flow):
    """Of N(0, I) from itself made e times as large: e - 1, the same in every direction."""
    target = flow.base.sample((20_000,), torch.Generator().manual_seed(1))
    ((_, value),) = nfe_curve(flow, target, steps=())
    assert value == pytest.approx(math.e - 1, rel=0.03)


def test_the_distance_is_that_of_the_judge(flow):
    """Both over the same directions, so that curves of either can be compared."""
    target = flow.base.sample((300,), torch.Generator().manual_seed(1))
    judge = Judge(target, target, flow.base, w2_points=10)
    assert judge.few_steps(flow) == nfe_curve(flow, target)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_target_may_be_on_the_gpu(flow):
    target = flow.base.sample((100,), torch.Generator().manual_seed(1))
    want = nfe_curve(flow, target, steps=(4,))
    assert nfe_curve(flow.cuda(), target.cuda(), steps=(4,))[0] == pytest.approx(want[0])


def test_the_table_has_a_column_for_each_number_of_evaluations():
    curves = {
        "before": [(1, 2.0), (4, 0.5), (80, 0.125)],
        "after": [(1, 0.2), (4, 0.1), (60, 0.1)],
    }
    assert nfe_table(curves).splitlines() == [
        "|  | 1 | 4 | own solver |",
        "| --- | ---: | ---: | ---: |",
        "| before | 2.000 | 0.500 | 0.125 (80) |",
        "| after | 0.200 | 0.100 | 0.100 (60) |",
    ]


def test_a_flow_map_takes_steps_of_its_own():
    flow = models.cnf(2, hidden=(8,), flow_map=True).double()
    target, seen = torch.zeros(9, 2, dtype=F64), []

    def spread(drawn):
        seen.append(drawn)
        return 0.0

    curve = nfe_curve(flow, target, steps=(2,), distance=spread)
    assert [nfe for nfe, _ in curve] == [2, 4]
    two = flow.with_solver(Solver("flow-map", steps=2))
    z = flow.base.sample((9,), stream(0, "samples in few steps"))
    torch.testing.assert_close(seen[0], two.decode(z), rtol=0, atol=0)
