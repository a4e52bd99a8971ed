"""Averaged weights, validation, patience, and gradients that are NaN."""

import contextlib
import copy
import math

import pytest
import torch

import cnf
from cnf.objectives import Objective
from cnf.training import checkpoint
from cnf.training.validation import Validation


def exponential_average(weights, decay):
    average = weights[0].clone()
    for step, weight in enumerate(weights[1:], 1):
        rate = min(decay, step / (step + 9))  # the first weights are soon forgotten
        average = rate * average + (1 - rate) * weight
    return average


@pytest.fixture
def linear(points, config, square):
    """Train a linear map → (net, its raw weights from first to last, the folder's state)."""

    def train(folder, **settings):
        net = torch.nn.Linear(2, 2, bias=False).double()
        torch.nn.init.eye_(net.weight)
        history = []
        before = type(square).__call__

        class Watching(type(square)):
            def __call__(self, module, batch, generator=None):
                if torch.is_grad_enabled():
                    history.append(module.weight.detach().clone())
                return before(self, module, batch, generator)

        cnf.fit(net, Watching(), points, config(steps=8, folder=folder, **settings))
        state = checkpoint.load_state(folder)
        raw = state["learner"]["module"]["weight"]
        return net, [*history, raw], state

    return train


@pytest.mark.parametrize("decay", [0.5, 0.15, 0.999])
def test_module_holds_the_moving_average_after_training(linear, decay, tmp_path):
    net, raw, _ = linear(tmp_path / "run", ema=decay, lr=0.1)
    assert len(raw) == 9
    torch.testing.assert_close(
        net.weight.detach(), exponential_average(raw, decay), rtol=0, atol=1e-14
    )
    assert not torch.equal(net.weight, raw[-1])


def test_checkpoint_holds_raw_and_averaged_weights(linear, tmp_path):
    net, raw, state = linear(tmp_path / "run", ema=0.9, lr=0.1)
    assert torch.equal(state["learner"]["module"]["weight"], raw[-1])
    assert torch.equal(state["learner"]["kept"]["weight"], net.weight)


def test_module_holds_the_last_weights_without_ema(linear, tmp_path):
    net, raw, state = linear(tmp_path / "run", ema=None, lr=0.1)
    assert torch.equal(net.weight, raw[-1])
    assert not torch.equal(raw[-1], raw[-2])


def test_buffers_are_updated_by_training_and_not_by_validation(points, config, square):
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    cnf.fit(net, square, points, config(steps=6, ema=0.9))
    assert net[1].num_batches_tracked == 6


@pytest.mark.parametrize("objective", [cnf.FlowMatching(), cnf.MaximumLikelihood()])
def test_validation_is_the_nll_of_the_averaged_weights_on_held_out_rows(
    objective, small, config, points
):
    flow, held_out = small(), points[:30] + 0.5
    history = cnf.fit(flow, objective, points, config(steps=20), validation=held_out)
    scores = history.column("val_nll")
    assert len(scores) == 10
    with torch.no_grad():
        expected = -flow.log_prob(held_out).mean().item()
    assert scores[-1] == pytest.approx(expected, rel=1e-6)  # float32 sum


def test_toy_is_validated_on_fixed_samples(small, config):
    settings = config(steps=4, lr=1e-30, ema=None)  # too small a step to change a weight
    history = cnf.fit(small(), cnf.FlowMatching(), cnf.data.toy("moons"), settings)
    assert len(history.column("val_nll")) == 4
    assert len(set(history.column("val_nll"))) == 1


def test_validations_are_evenly_spaced_in_the_budget(small, config, points):
    history = cnf.fit(small(), cnf.FlowMatching(), points, config(steps=12, validations=4))
    scored = [record["step"] for record in history.records if "val_nll" in record]
    assert scored == [3, 6, 9, 12]


def test_no_validation_means_no_score_and_training_on_every_row(config, points, square):
    history = cnf.fit(torch.nn.Linear(2, 2), square, points, config(steps=6, validations=0))
    assert history.column("val_loss") == []
    assert len(torch.cat(square.batches).unique(dim=0)) == 96  # six whole batches of sixteen


@pytest.mark.parametrize("validation_rows, held_out", [(50, 10), (4, 4)])
def test_one_tenth_of_the_rows_is_held_out_and_never_trained_on(
    validation_rows, held_out, config, points, square, monkeypatch
):
    scored = []
    original = cnf.training.validation.Validation.__init__

    def spy(self, objective, config, rows, fabric):
        scored.append(rows.x)
        original(self, objective, config, rows, fabric)

    monkeypatch.setattr(cnf.training.validation.Validation, "__init__", spy)
    settings = config(steps=60, validation_rows=validation_rows)
    cnf.fit(torch.nn.Linear(2, 2), square, points, settings)
    trained = {tuple(row) for row in torch.cat(square.batches).tolist()}
    kept_out = {tuple(row) for row in scored[0].tolist()}
    assert len(kept_out) == held_out
    assert not trained & kept_out
    assert len(trained) == 100 - held_out


def test_each_epoch_has_every_row_once_in_a_new_order(config, points, square):
    cnf.fit(torch.nn.Linear(2, 2), square, points[:96], config(steps=12, validations=0))
    first, second = torch.cat(square.batches[:6]), torch.cat(square.batches[6:])
    assert len(first.unique(dim=0)) == len(second.unique(dim=0)) == 96
    assert not torch.equal(first, second)


def test_patience_without_held_out_rows_is_told(small, config, points):
    with pytest.warns(UserWarning, match="expected held-out rows, by which patience=2"):
        cnf.fit(small(), cnf.FlowMatching(), points[:9], config(steps=2, batch_size=4, patience=2))


def test_patience_stops_and_returns_the_best_weights(small, config, points):
    flow = small()
    held_out = points[:30]
    settings = config(steps=400, lr=0.02, patience=2, validations=100, schedule="constant")
    history = cnf.fit(flow, cnf.FlowMatching(), points, settings, validation=held_out)
    scores = history.column("val_nll")
    assert history.reason == "patience" and history.steps < 400
    assert min(scores) == scores[-3] < scores[-2]
    with torch.no_grad():
        kept = -flow.log_prob(held_out).mean().item()
    assert kept == pytest.approx(min(scores), rel=1e-6)  # float32 sum


@pytest.mark.parametrize("objective", [cnf.FlowMatching(), cnf.MaximumLikelihood()])
def test_early_stopping_keeps_and_tells_of_the_weights_from_before_training_that_worsens_them(
    small, config, points, same, objective
):
    flow = small()
    cnf.fit(flow, cnf.FlowMatching(), points, config(steps=200, lr=1e-2))
    before = copy.deepcopy(flow)
    settings = config(steps=10, lr=0.3, patience=2, validations=5, ema=None, warmup=0.0)
    with pytest.warns(UserWarning, match="no validation was better than their val_nll"):
        history = cnf.fit(flow, objective, points, settings, validation=points)
    with torch.no_grad():
        start = -before.log_prob(points).mean().item()
    assert min(history.column("val_nll")) > start
    assert same(flow, before)


def test_patience_saves_the_best_weights(small, config, points, same, tmp_path):
    flow = small()
    settings = {"steps": 400, "lr": 0.02, "patience": 2, "validations": 100}
    settings = config(folder=tmp_path / "run", schedule="constant", **settings)
    history = cnf.fit(flow, cnf.FlowMatching(), points, settings, validation=points[:30])
    assert history.reason == "patience"
    assert same(flow, cnf.load(tmp_path / "run"))


def test_steps_with_nan_gradients_are_skipped_and_counted(config, points, broken):
    net, twin = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    twin.load_state_dict(net.state_dict())
    settings = {"validations": 0, "schedule": "constant", "ema": None, "warmup": 0.0}
    history = cnf.fit(net, broken({0, 2, 3}), points, config(steps=6, **settings))
    assert (history.skipped, history.steps) == (3, 6)
    assert all(torch.isfinite(p).all() for p in net.parameters())
    cnf.fit(twin, broken({0, 1, 2}), points, config(steps=6, **settings))
    assert not torch.equal(net.weight, twin.weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_steps_whose_loss_alone_is_nan_are_skipped_and_counted(bad, config, points):
    class Spoiled(Objective):  # as of a NaN row, which has a gradient of 0
        step = 0

        def prepare(self, module, batch, generator=None):
            return batch

        def __call__(self, module, batch, generator=None):
            self.step += 1
            value = module(batch.x).square().mean()
            return cnf.Loss(value + bad if self.step in (2, 3) else value, {})

    history = cnf.fit(torch.nn.Linear(2, 2), Spoiled(), points, config(steps=6, validations=0))
    assert (history.skipped, history.steps) == (2, 6)


def test_nan_samples_of_a_density_stop_training(small, config):
    class Holed:
        dim = 2

        def log_prob(self, x):
            return x.sum(-1)

        def sample(self, n, generator=None):
            x = torch.randn(n, 2, generator=generator)
            x[0] = float("nan") if n == 16 else x[0]  # a training batch
            return x

    with pytest.raises(cnf.errors.DivergedError, match="loss or its gradient was NaN"):
        cnf.fit(small(), cnf.MaximumLikelihood(), Holed(), config(steps=30, validations=0))


def test_skipped_step_does_not_change_weights_and_average(config, points, broken):
    net = torch.nn.Linear(2, 2)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(cnf.DivergedError, match="NaN or infinite in 6 steps in a row"):
        cnf.fit(net, broken(range(6)), points, config(steps=6, validations=0))
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_twenty_nan_gradients_in_a_row_raise_an_error_with_a_remedy(config, points, broken):
    net = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"20 steps in a row.*lower lr=.*data's scale") as raised:
        cnf.fit(net, broken(range(5, 99)), points, config(steps=99, validations=0))
    assert "\n" not in str(raised.value)
    assert all(torch.isfinite(p).all() for p in net.parameters())


@pytest.mark.parametrize(("bad", "raises"), [({5}, False), ({4, 5}, False), ({3, 4, 5}, True)])
def test_half_of_the_last_steps_nan_is_a_divergence_error(bad, raises, config, points, broken):
    settings = config(steps=6, validations=0)
    expected = pytest.raises(cnf.DivergedError) if raises else contextlib.nullcontext()
    with expected:
        assert cnf.fit(torch.nn.Linear(2, 2), broken(bad), points, settings).skipped == len(bad)


def test_nineteen_nan_gradients_in_a_row_raise_no_error(config, points, broken):
    bad = {*range(19), *range(20, 39)}
    settings = config(steps=50, validations=0)
    assert cnf.fit(torch.nn.Linear(2, 2), broken(bad), points, settings).skipped == 38


def test_gradient_is_clipped_to_the_norm_given(config, points, square, monkeypatch):
    def first_step(clip):
        net = torch.nn.Linear(2, 2, bias=False).double()
        torch.nn.init.eye_(net.weight)
        settings = config(steps=1, clip=clip, ema=None, validations=0, warmup=0.0)
        cnf.fit(net, square, points * 1e-8, settings)  # so small that Adam's epsilon shows
        return (net.weight - torch.eye(2)).norm()

    assert first_step(1e-18) < first_step(None) / 10
    monkeypatch.setattr(type(square), "clip", 1e-18)
    assert first_step("auto") == first_step(1e-18) < first_step(10.0)


class Flat(Objective):
    """A loss whose gradient is zero."""

    def prepare(self, module, batch, generator=None):
        return batch

    def __call__(self, module, batch, generator=None):
        return cnf.Loss(0.0 * module(batch.x).sum(), {})


def test_weight_decay_is_decoupled_in_adamw_and_an_l2_gradient_in_adam(config, points):
    """Without a gradient: (1 - lr·λ)^k for adamw (Loshchilov & Hutter 2019), and for adam, whose
    gradient is then λw, one step of about lr."""
    found = {}
    for optimizer, decay in (("adamw", 0.0), ("adamw", 0.5), ("adam", 0.0), ("adam", 0.5)):
        net = torch.nn.Linear(2, 2, bias=False).double()
        torch.nn.init.constant_(net.weight, 0.8)
        settings = config(
            steps=1 if optimizer == "adam" else 3, lr=0.1, warmup=0.0, schedule="constant",
            ema=None, validations=0, optimizer=optimizer, weight_decay=decay,
        )  # fmt: skip
        cnf.fit(net, Flat(), points, settings)
        found[optimizer, decay] = net.weight[0, 0].item()
    assert found["adamw", 0.0] == found["adam", 0.0] == 0.8
    assert found["adamw", 0.5] == pytest.approx(0.8 * (1 - 0.1 * 0.5) ** 3)
    assert found["adam", 0.5] == pytest.approx(0.8 - 0.1, abs=1e-6)


class Steep(Flat):
    """Gradient one in each weight, NaN in the steps given."""

    def __init__(self, bad):
        self.bad, self.step = bad, 0

    def __call__(self, module, batch, generator=None):
        factor = float("nan") if self.step in self.bad else 1.0
        self.step += 1
        return cnf.Loss(factor * module.weight.sum(), {})


def test_skipped_steps_do_not_count_as_steps_of_the_average(config, points):
    """Adam's steps along a constant gradient are of length lr: 0, -1, -2, … times lr, whose
    average is as if the bad steps had not been."""
    net = torch.nn.Linear(2, 2, bias=False).double()
    torch.nn.init.zeros_(net.weight)
    settings = config(
        steps=8, lr=0.1, warmup=0.0, schedule="constant", ema=0.5, validations=0, clip=None
    )
    history = cnf.fit(net, Steep({2, 3, 6}), points, settings)
    assert history.skipped == 3
    raw = [torch.tensor(-0.1 * k, dtype=torch.float64) for k in range(6)]
    assert net.weight[0, 0].item() == pytest.approx(exponential_average(raw, 0.5).item(), abs=1e-7)


def test_a_first_score_of_nan_is_no_better_than_what_follows(config):
    validation = Validation(cnf.FlowMatching(), config(patience=2), None)
    validation.first, validation.best, validation.best_weights = math.nan, 1.0, {}
    validation.done = 1
    validation.warn_of_untrained()  # warnings are errors


def test_equal_score_is_not_an_improvement(config, points):
    """Patience counts validations without a better score; ties must not go on for ever."""
    net = torch.nn.Linear(2, 2)
    settings = config(steps=400, validations=100, patience=3)
    with pytest.warns(UserWarning, match="no validation was better than their val_loss"):
        history = cnf.fit(net, Flat(), points, settings)
    assert (history.reason, len(history.column("val_loss"))) == ("patience", 3)
