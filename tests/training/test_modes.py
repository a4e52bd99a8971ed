"""Train and eval mode in training, and data-dependent initialization."""

import pytest
import torch

import cnf
from cnf import MaximumLikelihood
from cnf.fields import Adapter
from cnf.objectives import Objective
from cnf.transforms import ActNorm, Continuous


def test_fit_trains_in_train_mode_and_returns_in_eval_mode(small, config, points):
    modes = []

    class ModeRecorder(Objective):
        def prepare(self, module, batch, generator=None):
            return batch

        def __call__(self, module, batch, generator=None):
            modes.extend(part.training for part in module.modules())
            return MaximumLikelihood()(module, batch, generator)

    flow = small("realnvp").eval()
    cnf.fit(flow, ModeRecorder(), points, config(validations=2))
    assert modes and all(modes)
    assert not any(part.training for part in flow.modules())


def test_loaded_flow_is_in_eval_mode(small, tmp_path):
    flow = small("realnvp").train()
    cnf.training.save(flow, tmp_path)
    assert not any(part.training for part in cnf.load(tmp_path).modules())
    assert not cnf.load(tmp_path, into=flow).training


def test_average_starts_from_the_data_dependent_initialization(small, config, points):
    flow = small("glow", layers=2, preprocess=None)
    settings = config(steps=1, lr=1e-9, batch_size=100, validations=0)
    cnf.fit(flow, MaximumLikelihood(), points * 1e3, settings, validation=9e9 + points[:20])
    assert all(part.initialized for part in flow.modules() if isinstance(part, ActNorm))
    z = flow.encode(points * 1e3)
    torch.testing.assert_close(z.mean(0), torch.zeros(2), rtol=0, atol=0.1)
    torch.testing.assert_close(z.std(0), torch.ones(2), rtol=0, atol=0.1)


def test_error_of_a_noisy_solve_names_dropout_and_train_mode():
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))
    solver = cnf.Solver(max_nfe=300)
    transform = Continuous(Adapter(net, (2,), call="concat"), solver)
    flow = cnf.Flow(None, transform, event_shape=(2,))
    with pytest.raises(cnf.SolverError, match=r"dropout.*train mode.*flow.eval\(\)"):
        flow.log_prob(torch.ones(20, 2))
    assert flow.eval().log_prob(torch.ones(20, 2)).isfinite().all()


def test_evaluation_uses_eval_mode_and_restores_train_mode(small, points):
    from cnf import metrics
    from cnf.metrics.error_bars import log_prob_with_error

    class ModeRecorder(torch.nn.Linear):
        def forward(self, x):
            assert not self.training
            return super().forward(x)

    net = ModeRecorder(3, 2)
    field = Adapter(net, (2,), call="concat")
    flow = cnf.Flow(None, Continuous(field, cnf.Solver("rk4", steps=2)), event_shape=(2,)).train()
    metrics.nll(flow, points)
    metrics.straightness(flow, 5, steps=2)
    metrics.nfe(flow, 5)
    metrics.round_trip_error(flow, points)
    log_prob_with_error(flow, points)
    assert all(part.training for part in flow.modules())


@pytest.mark.parametrize(
    ("part", "named"),
    [
        (torch.nn.Dropout(0.5), r"field\.net\.1, a Dropout with p=0.5, which differs"),
        (torch.nn.BatchNorm1d(8), r"field\.net\.1, a BatchNorm1d, which mixes the rows"),
        (torch.nn.Dropout(0.0), None),
        (torch.nn.LayerNorm(8), None),
    ],
)
def test_likelihood_warns_of_a_field_that_couples_rows_or_is_random(part, named, points):
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), part, torch.nn.Linear(8, 2))
    solver = cnf.Solver("rk4", steps=2)
    flow = cnf.Flow(
        None, Continuous(Adapter(net, (2,), call="concat"), solver), event_shape=(2,)
    ).train()
    rows, generator = (lambda n: cnf.Batch(points[:n])), torch.Generator()
    cnf.FlowMatching().begin(flow, rows, generator)  # warnings are errors here
    if named is None:
        MaximumLikelihood().begin(flow, rows, generator)
        return
    with pytest.warns(UserWarning, match=rf"fit: likelihood.*transform\.{named}"):
        MaximumLikelihood().begin(flow, rows, generator)
    with pytest.warns(UserWarning, match="fit: likelihood"):
        cnf.objectives.Joint().begin(flow, rows, generator)


def test_fit_by_likelihood_warns_of_dropout_at_its_start(config, points):
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.1), torch.nn.Linear(8, 2))
    transform = Continuous(Adapter(net, (2,), call="concat"), cnf.Solver("rk4", steps=2))
    flow = cnf.Flow(None, transform, event_shape=(2,))
    cnf.fit(flow, cnf.FlowMatching(), points, config(validations=0))
    with pytest.warns(UserWarning, match="fit: likelihood.*a Dropout with p=0.1"):
        cnf.fit(flow, MaximumLikelihood(), points, config(validations=0))


def test_log_prob_in_train_mode_with_dropout_warns():
    net = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))
    solver = cnf.Solver("rk4", steps=2)
    field = Adapter(net, (2,), call="concat")
    flow = cnf.Flow(None, Continuous(field, solver), event_shape=(2,))
    with torch.no_grad():
        with pytest.warns(UserWarning, match="in train mode and holds a Dropout"):
            flow.log_prob(torch.zeros(3, 2))
        flow.eval().log_prob(torch.zeros(3, 2))
