"""Flow matching of flows of several ODEs: hand-written targets, a closed form, what is refused."""

import math

import pytest
import torch
from torch import nn

import cnf
from cnf.distributions import StandardNormal
from cnf.fields import VectorField
from cnf.models.scales import at_scales
from cnf.objectives import Batch, FlowMatching, MatchedPairs, MultiscaleMatching, ScalePairs
from cnf.transforms import Compose, Continuous


@pytest.fixture
def flow():
    torch.manual_seed(0)
    return cnf.models.ffjord(
        shape=(1, 8, 8), hidden=(4,), layers=1, scales=2, context=2, preprocess=None
    ).double()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    x, x0 = torch.randn(2, 5, 1, 8, 8, dtype=torch.float64, generator=generator)
    context = torch.randn(5, 2, dtype=torch.float64, generator=generator)
    return Batch(x, context, x0, torch.arange(1.0, 6.0))


def squeezed(x):
    """(N, 1, 2h, 2w) → (N, 4, h, w): pixels of each 2 × 2 square."""
    return torch.stack([x[:, 0, i::2, j::2] for i in (0, 1) for j in (0, 1)], 1)


def unsqueezed(y):
    x = y.new_zeros(len(y), 1, 2 * y.shape[2], 2 * y.shape[3])
    for k, (i, j) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        x[:, 0, i::2, j::2] = y[:, k]
    return x


def test_each_field_is_regressed_on_its_part_of_the_path(flow, batch):
    objective = MultiscaleMatching()
    rows = objective.prepare(flow, batch, torch.Generator().manual_seed(2))
    coarse, after, before = (
        ode.field for ode in cnf.transforms.continuous.odes_in(flow.transform)
    )
    data, noise, c, t = squeezed(batch.x), squeezed(batch.x0), batch.context, rows.t
    way = data - noise
    at = lambda k: t[:, k].reshape(-1, 1, 1, 1)  # noqa: E731
    v = coarse(t[:, 0], noise[:, :2] + at(0) * way[:, :2], c)
    expected = (v - way[:, :2]).square().sum((1, 2, 3))
    way[:, :2] = 0  # the coarse scale has arrived
    v = after(t[:, 1], data - (1 - at(1) / 2) * way, c)
    expected += 0.5 * (2 * v - way).square().sum((1, 2, 3))
    v = before(t[:, 2], unsqueezed(data - (0.5 - at(2) / 2) * way), c)
    expected += 0.5 * (2 * v - unsqueezed(way)).square().sum((1, 2, 3))
    torch.testing.assert_close(objective.per_row(flow, rows), expected)
    loss = objective(flow, batch, torch.Generator().manual_seed(2)).value
    weight = batch.weight.double() / batch.weight.sum()
    torch.testing.assert_close(loss, (weight * expected).sum())


def test_a_flow_of_one_ode_is_trained_as_by_flow_matching():
    torch.manual_seed(0)
    flow, (x0, x1) = cnf.models.cnf(2, preprocess=None).double(), torch.randn(2, 7, 2).double()
    t = torch.rand(7).double()
    found = MultiscaleMatching().per_row(flow, ScalePairs(x0, x1, t[:, None]))
    torch.testing.assert_close(found, FlowMatching().per_row(flow, MatchedPairs(x0, x1, t)))


def test_blocks_of_an_ode_share_its_path():
    torch.manual_seed(0)
    flow, (x0, x1) = cnf.models.ffjord(2, layers=2, preprocess=None).double(), torch.randn(2, 7, 2)
    x0, x1, t = x0.double(), x1.double(), torch.rand(7, 2).double()
    found = MultiscaleMatching().per_row(flow, ScalePairs(x0, x1, t))
    halves = [
        FlowMatching().per_row(flow, MatchedPairs(x0, x1, (t[:, k] + k) / 2)) for k in (0, 1)
    ]
    torch.testing.assert_close(found, 0.5 * (halves[0] + halves[1]))


class NormalField(VectorField):
    """The best field of N(0, I) data for an ODE after `before` others of `count`."""

    def __init__(self, shape, before, count, factored):
        super().__init__(shape)
        self.before, self.count, self.factored = before, count, factored
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, t, x, context=None):
        s = ((self.before + t) / self.count).reshape(-1, 1, 1, 1)
        v = (2 * s - 1) / (s**2 + (1 - s) ** 2) / self.count * x
        y = v if self.factored is None else (squeezed(v) if x.shape[1] == 1 else v).clone()
        if self.factored is not None:
            y[:, : self.factored] = 0
        return self.scale * (unsqueezed(y) if y.shape != x.shape else y)


@pytest.fixture
def best():
    """The flow of the best fields of standard normal pixels, 1 × 8 × 8."""
    solver = cnf.Solver("rk4", steps=8)

    def part(before, factored):
        def ode(shape):
            count = 1 if factored is None else 2
            return Continuous(NormalField(shape, before, count, factored), solver)

        return ode

    transform = at_scales("best", (1, 8, 8), 2, part(1, 2), part(0, 2), part(0, None))
    return cnf.Flow(StandardNormal((1, 8, 8)), transform).double()


def test_the_best_fields_leave_the_variance_of_straight_paths(best):
    """∫ 1/(s² + (1-s)²) ds = π/2 for each variable; without velocity it is E(x1 - x0)² = 2."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8000, 1, 8, 8, dtype=torch.float64, generator=generator)
    rows = MultiscaleMatching().prepare(best, Batch(x), generator)
    with torch.no_grad():
        loss = MultiscaleMatching()(best, rows).value
        assert loss.item() == pytest.approx(64 * math.pi / 2, rel=1e-2)
        for field in best.modules():
            if isinstance(field, NormalField):
                field.scale.zero_()
        assert MultiscaleMatching()(best, rows).value.item() == pytest.approx(128, rel=1e-2)


def test_the_best_fields_give_the_density_of_the_data(best):
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64)
    expected = torch.distributions.Normal(0.0, 1.0).log_prob(x).sum((1, 2, 3))
    torch.testing.assert_close(best.log_prob(x), expected, rtol=1e-3, atol=1e-2)


def test_gradients_reach_every_field(flow, batch):
    MultiscaleMatching()(flow, batch).value.backward()
    assert all(p.grad is not None and p.grad.any() for p in flow.transform.parameters())


@pytest.mark.parametrize("name", ["realnvp", "glow"])
def test_a_flow_without_an_ode_is_refused(name):
    flow = cnf.models.build(name, dim=2)
    with pytest.raises(TypeError, match="only these solve an ODE"):
        MultiscaleMatching().prepare(flow, Batch(torch.randn(3, 2)))


def test_parameters_that_would_not_be_trained_are_refused():
    ode = cnf.models.cnf(2, preprocess=None).transform
    flow = cnf.Flow(StandardNormal((2,)), Compose([ode, cnf.transforms.ActNorm((2,))]))
    with pytest.raises(TypeError, match="no parameters outside of the ODEs, got a ActNorm"):
        MultiscaleMatching().prepare(flow, Batch(torch.randn(3, 2)))


def test_an_ode_that_comes_before_a_coarser_scale_is_refused():
    def ode(channels):
        return cnf.models.cnf(shape=(channels, 4, 4), hidden=(4,), preprocess=None).transform

    inner = cnf.transforms.OnChannels(ode(1), 1)
    flow = cnf.Flow(StandardNormal((2, 4, 4)), Compose([ode(2), inner]))
    rows = MultiscaleMatching().prepare(flow, Batch(torch.randn(3, 2, 4, 4)))
    with pytest.raises(TypeError, match="an OnChannels before the others"):
        MultiscaleMatching()(flow, rows)


def test_flow_matching_of_several_odes_names_what_trains_them(flow, batch):
    with pytest.raises(TypeError, match="MultiscaleMatching"):
        FlowMatching().prepare(flow, batch)


def test_data_are_taken_through_the_maps_between_the_odes():
    ode = cnf.models.cnf(3, preprocess=None).transform
    rolled = cnf.transforms.Permutation(3, [1, 2, 0])
    flow = cnf.Flow(StandardNormal((3,)), Compose([ode, rolled])).double()
    x = torch.arange(6.0).reshape(2, 3).double()
    rows = MultiscaleMatching().prepare(flow, Batch(x))
    torch.testing.assert_close(rolled(rows.x1)[0], x)
    v = ode.field(rows.t[:, 0], rows.x0 + rows.t * (rows.x1 - rows.x0))
    expected = (v - (rows.x1 - rows.x0)).square().sum(1)
    torch.testing.assert_close(MultiscaleMatching().per_row(flow, rows), expected)
