"""Flows whose solver's steps are the model: training them, checking them, scoring them."""

import pytest
import torch
from torch import nn

import cnf
from cnf.dynamics import Solver
from cnf.fields import Adapter
from cnf.flow import Flow
from cnf.objectives import barrier
from cnf.race.judge import Judge
from cnf.transforms import Continuous

EULER = Solver("euler", steps=1, discrete=True)


class Wave(nn.Module):
    """v(x) = -a sin x, whose Euler step of length 1 folds where a cos x > 1."""

    def __init__(self, size=3.0):
        super().__init__()
        self.size = nn.Parameter(torch.tensor(size, dtype=torch.float64))

    def forward(self, t, x):
        return -self.size * torch.sin(x)


class Bump(nn.Module):
    """v(x) = -a (x - 5) exp(-(x - 5)²), whose Euler step folds at 5, where there are no data."""

    def forward(self, t, x):
        y = x - 5
        return -3 * y * torch.exp(-y.square())


def flow_of(net, solver=EULER, dim=1):
    return Flow(None, Continuous(Adapter(net, dim), solver), event_shape=(dim,)).double()


def data(n=64):
    return torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_loss_is_that_of_rows_with_a_density_and_the_barrier():
    flow = flow_of(Wave(), Solver("euler", steps=1, discrete=True, explicit="density"))
    objective, x = cnf.MaximumLikelihood(), data()
    rows = objective.prepare(flow, cnf.Batch(x), torch.Generator().manual_seed(1))
    loss = objective(flow, rows)
    z = x + 3 * torch.sin(x)  # the explicit step goes from t = 1 to t = 0
    det = 1 + 3 * torch.cos(x[:, 0])
    has = det > 0
    normal = torch.distributions.Normal(0.0, 1.0)
    nll = -(normal.log_prob(z[:, 0]) + det.abs().log())[has].mean()
    torch.testing.assert_close(loss.metrics["nll"], nll)
    torch.testing.assert_close(loss.metrics["folded"], 1 - has.double().mean())
    assert 0 < loss.metrics["folded"] < 0.9
    near, wide = rows.around[:: barrier.EVERY].unbind(1)
    assert barrier.WIDE == (1.0, 12.0)
    reach = 12.0 ** torch.linspace(0, 1, len(wide), dtype=torch.float64)[:, None]
    points = torch.cat([x[:: barrier.EVERY] + barrier.NEAR * near, reach * wide])
    held = (1 - (1 + 3 * torch.cos(points)) / barrier.LEAST).relu().mean()
    torch.testing.assert_close(loss.metrics["barrier"], held)
    torch.testing.assert_close(loss.value, nll + barrier.WEIGHT * held)
    loss.value.backward()
    assert flow.field.net.size.grad.isfinite()


class Stretched(nn.Module):
    """v(x) = (a x, b x), whose backward Euler step of length 1 is diag(1 - a, 1 - b)."""

    def __init__(self, *rates):
        super().__init__()
        self.rates = nn.Parameter(torch.tensor(rates, dtype=torch.float64))

    def forward(self, t, x):
        return self.rates * x


def test_the_barrier_is_of_the_direction_that_is_shortened_most():
    """Factors 0.01 and 5 have a determinant of 0.05, which alone would cost nothing."""
    flow = flow_of(
        Stretched(0.99, -4.0), Solver("euler", steps=1, discrete=True, explicit="density"), dim=2
    )
    x = torch.zeros(16, 2, dtype=torch.float64)
    held = barrier.barrier(flow, x, None, torch.ones(16, 2, 2, dtype=torch.float64))
    torch.testing.assert_close(held, torch.tensor(1 - 0.01 / barrier.LEAST).double())


def test_the_barrier_takes_each_point_with_the_context_of_its_row():
    class Shift(nn.Module):
        """v(x) = -a x with a the context, whose Euler step folds where a > 1."""

        def forward(self, t, x, context):
            return -context * x

    field = Adapter(Shift(), 1, context_dim=1)
    flow = Flow(None, Continuous(field, EULER), event_shape=(1,)).double()
    context = torch.ones(16, 1, dtype=torch.float64) * 3  # a step shortens x by -2
    context[:: barrier.EVERY] = 0.0
    noise = torch.randn(16, 2, 1, dtype=torch.float64)
    assert barrier.barrier(flow, data(16), context, noise) == 0.0
    assert barrier.barrier(flow, data(16), context.roll(1, 0), noise) > 1.0


def test_losses_of_rows_have_the_loss_as_their_mean():
    flow = flow_of(Wave(0.97), Solver("euler", steps=1, discrete=True, explicit="density"))
    objective = cnf.MaximumLikelihood()
    x = 3.1 + data()  # where the step all but folds
    rows = objective.prepare(flow, cnf.Batch(x), torch.Generator().manual_seed(1))
    loss = objective(flow, rows)
    assert loss.metrics["folded"] == 0 and loss.metrics["barrier"] > 0
    torch.testing.assert_close(objective.per_row(flow, rows).mean(), loss.value)


def test_steps_have_a_rate_and_a_norm_of_their_own():
    flow = cnf.models.cnf(2, hidden=(8,))
    steps = cnf.MaximumLikelihood(solver=Solver("euler", steps=2, discrete=True))
    plain = cnf.MaximumLikelihood()
    joint = cnf.objectives.Joint(terms=(cnf.FlowMatching(), steps))
    assert [o.learning_rate(flow) for o in (plain, steps, joint)] == [2e-3, 5e-3, 5e-3]
    assert [o.largest_gradient(flow) for o in (plain, steps, joint)] == [10.0, 1.0, 1.0]


def test_a_joint_loss_gives_the_flow_the_solver_of_its_likelihood():
    solver = Solver("euler", steps=2, discrete=True, explicit="density")
    likelihood = cnf.MaximumLikelihood(solver=solver)
    joint = cnf.objectives.Joint(terms=(cnf.FlowMatching(), likelihood))
    flow = cnf.models.cnf(2, hidden=(8,))
    config = cnf.TrainConfig(
        steps=2, batch_size=16, progress=False, validation_rows=20, device="cpu"
    )
    cnf.fit(flow, joint, cnf.data.toy("moons"), config)
    assert flow.transform.solver == solver


@pytest.mark.parametrize("explicit", ["sample", "density"])
def test_training_unfolds_the_steps(explicit):
    flow = flow_of(Wave(1.5))
    solver = Solver("euler", steps=1, discrete=True, explicit=explicit)
    config = cnf.TrainConfig(
        steps=60, batch_size=32, lr=0.05, ema=0.9, progress=False, validations=0, device="cpu"
    )
    with torch.no_grad():
        before = Continuous(flow.field, solver).steps()
    cnf.fit(flow, cnf.MaximumLikelihood(solver=solver), data(256), config)
    assert flow.transform.solver == solver and len(before) == 1
    assert cnf.check(flow, data())["one to one"].passed
    assert flow.log_prob(data()).isfinite().all()


def test_a_flow_trained_so_is_saved_with_its_solver(tmp_path):
    flow = cnf.models.cnf(2, hidden=(8,))
    solver = Solver("midpoint", steps=2, discrete=True, explicit="density")
    settings = {"steps": 3, "batch_size": 16, "progress": False, "device": "cpu"}
    toy = cnf.data.toy("moons")
    config = cnf.TrainConfig(folder=tmp_path / "run", validation_rows=50, **settings)
    history = cnf.fit(flow, cnf.MaximumLikelihood(solver=solver), toy, config)
    assert history.records[-1]["barrier"] >= 0
    loaded = cnf.load(tmp_path / "run")
    assert loaded.transform.solver == solver
    x = toy.sample(20)
    torch.testing.assert_close(loaded.log_prob(x), flow.log_prob(x), rtol=0, atol=0)


@pytest.mark.parametrize("explicit", ["sample", "density"])
def test_a_fold_far_from_the_data_is_found(explicit):
    flow = flow_of(Bump(), Solver("euler", steps=1, discrete=True, explicit=explicit))
    sign = 1 if explicit == "sample" else -1
    if sign < 0:  # the step goes backwards, so that the field's sign is the other
        flow = flow_of(Reversed(Bump()), flow.transform.solver)
    report = cnf.check(flow, data())
    assert report["one to one"].passed is True
    assert report["one to one far out"].passed is False
    assert "points fold" in report["one to one far out"].message
    assert report["consistency"].passed  # as what is asked of data is asked all the same


def test_nothing_else_is_asked_where_data_fold():
    flow = flow_of(Wave(), Solver("euler", steps=1, discrete=True, explicit="density"))
    report = cnf.check(flow, data())
    assert report["one to one"].passed is False
    assert "not run, since one to one failed" in report["mass"].message


class Far(nn.Module):
    """Carries the base, where its Euler step folds, to data that are far from there."""

    def forward(self, t, x):
        return 30 - 3 * x * torch.exp(-x.square())


@pytest.mark.parametrize("explicit", ["sample", "density"])
def test_a_fold_is_looked_for_where_the_steps_begin(explicit):
    """Of a solver that is explicit for samples that is at the base, and the data are far away."""
    net = Far() if explicit == "sample" else Reversed(Far())
    flow = flow_of(net, Solver("euler", steps=1, discrete=True, explicit=explicit))
    x = 30 + data() if explicit == "sample" else data()
    assert cnf.check(flow, x)["one to one"].passed is False


class Reversed(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, t, x):
        return -self.net(t, x)


def test_a_flow_that_does_not_fold_says_on_how_many_points_it_was_asked():
    report = cnf.check(flow_of(Wave(0.3)), data())
    assert report["one to one"].passed
    assert "no fold found on 1024 points" in report["one to one"].message
    assert report["solver"].passed is None
    assert all(finding.passed is not False for finding in report.findings), str(report)


def test_many_dimensions_are_asked_on_fewer_points():
    x = torch.randn(70, 32, generator=torch.Generator().manual_seed(0))
    report = cnf.check(flow_of(Wave(0.3), dim=32), x)
    assert report["one to one"].passed
    assert "no fold found on 128 points" in report["one to one"].message


def test_the_judge_scores_the_steps_and_not_the_ode():
    toy = cnf.data.toy("moons")
    test, reference = (toy.sample(300, torch.Generator().manual_seed(k)) for k in (0, 1))
    flow = cnf.models.cnf(2, hidden=(16,)).eval()
    coarse = flow.with_solver(Solver("midpoint", steps=2, discrete=True, explicit="density"))
    judge = Judge(test, reference, toy, w2_points=50)
    gap = judge.scores(coarse)["gap"]
    with torch.no_grad():
        own = (toy.log_prob(test) - coarse.log_prob(test)).mean().item()
        ode = (toy.log_prob(test) - flow.log_prob(test)).mean().item()
    assert gap == pytest.approx(own, abs=1e-5) and abs(own - ode) > 1e-3


class Turned(nn.Module):
    """v = 3 x + 0 a, whose backward Euler step of length 1 is -2 x: it folds everywhere."""

    def __init__(self):
        super().__init__()
        self.still = nn.Parameter(torch.zeros((), dtype=torch.float64))

    def forward(self, t, x):
        return 3 * x + 0 * self.still


def test_held_out_rows_without_a_density_are_told_and_end_no_run():
    flow = flow_of(Turned(), Solver("euler", steps=1, discrete=True, explicit="density"))
    config = cnf.TrainConfig(steps=2, batch_size=16, validations=1, progress=False, device="cpu")
    with pytest.warns(UserWarning) as told:
        history = cnf.fit(flow, cnf.MaximumLikelihood(), data(), config)
    assert any("held-out NLL is NaN, as steps of the solver fold" in str(w.message) for w in told)
    assert torch.tensor(history.records[-1]["val_nll"]).isnan()
    assert history.records[-1]["folded"] == 1


@pytest.mark.parametrize("explicit", ["sample", "density"])
def test_data_may_be_wider_than_the_flow(explicit):
    x = 1_000 * torch.randn(300, 2, dtype=torch.float64).numpy()
    solver = Solver("rk4", steps=1, discrete=True, explicit=explicit)
    history = cnf.fit(
        cnf.models.cnf(2, hidden=(8,)), cnf.MaximumLikelihood(solver=solver), x,
        cnf.TrainConfig(steps=2, batch_size=64, progress=False),
    )  # fmt: skip
    assert history.records[-1]["nll"] > 10  # in the units of the data


def test_a_check_far_out_warns_of_no_rows():
    """Warnings are errors here; a finding is what tells of folds."""
    flow = flow_of(Bump(), Solver("euler", steps=1, discrete=True, explicit="density"))
    assert not cnf.check(flow, data())["one to one far out"].passed
