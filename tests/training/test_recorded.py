"""Steps that were recorded, on a CPU or for a GPU: when the module is another one since."""

import copy
import pickle

import pytest
import torch
from torch import nn

import cnf
from cnf.training import checkpoint, compiled, recorded
from cnf.training.capture import CapturedLearner
from cnf.training.compiled import CompiledLearner, CompiledSolveLearner
from cnf.training.diagnosis import outside_of_base
from cnf.training.flat import FlatAdam
from cnf.training.interrupt import Interrupted
from cnf.training.learner import Learner, _LossModule, launch_fabric
from cnf.training.processes import _sendable

ROWS = cnf.Batch(torch.randn(16, 2, generator=torch.Generator().manual_seed(1)).double())


def learner_of(kind, module=None, objective=None, **settings):
    torch.manual_seed(0)
    module = module or cnf.models.realnvp(2, hidden=(8,), layers=2).double()
    config = cnf.TrainConfig(device="cpu", progress=False, **settings)
    fabric = launch_fabric(config, torch.float64)
    return kind(module, objective or cnf.MaximumLikelihood(), config, fabric)


@pytest.fixture
def uncompiled(monkeypatch):
    """Programs are replayed operation by operation, which takes no compiler."""
    monkeypatch.setattr(compiled.Program, "compile", lambda _: None)


def prepared(learner, rows=ROWS):
    return learner.prepare(rows, torch.Generator().manual_seed(0))[0]


@pytest.mark.parametrize("change", ["rows", "freeze", "eval", "gradient"])
def test_conditions_hold_until_they_change(change):
    flow = cnf.models.realnvp(2, hidden=(8,), layers=2).double()
    objective = cnf.MaximumLikelihood()
    loss = _LossModule(flow, objective, None)
    rows = objective.prepare(flow, ROWS)
    conditions = recorded.Conditions(loss, rows)
    assert conditions.hold(rows.map(lambda value: value.flip(0)))
    if change == "rows":
        rows = rows.map(lambda value: value[1:])
    elif change == "freeze":
        next(flow.parameters()).requires_grad_(False)
    elif change == "eval":
        flow.eval()
    else:
        rows.x.requires_grad_()
    assert not conditions.hold(rows)


@pytest.mark.parametrize("ema", [0.9, None])
def test_weights_frozen_in_between_move_and_average_as_without_programs(ema, uncompiled):
    """Frozen when it was recorded, then free, then frozen: plain steps, and programs between."""
    found = []
    for kind in (Learner, CompiledLearner):
        learner = learner_of(kind, ema=ema, compile=kind is CompiledLearner)
        first = next(learner.module.parameters())
        first.requires_grad_(False)
        learner.warm_up(prepared(learner))
        for free in (False, False, True, True, False, False):
            first.requires_grad_(free)
            learner.step(prepared(learner), 1e-2)
        learner.release()
        found.append((learner.module.state_dict(), learner.ema_module.state_dict()))
    for plain, program in zip(*found, strict=True):
        for name, value in plain.items():
            torch.testing.assert_close(program[name], value, rtol=1e-9, atol=1e-12)


def test_weights_frozen_for_some_steps_end_programs_in_words(uncompiled):
    """Adam has then taken fewer steps there, and one operation for all would correct wrongly."""
    found = []
    for kind in (Learner, CompiledLearner):
        learner = learner_of(kind, compile=kind is CompiledLearner)
        first = next(learner.module.parameters())
        learner.warm_up(prepared(learner))
        for step in range(6):
            first.requires_grad_(step not in (1, 2))
            if kind is CompiledLearner and step == 1:
                with pytest.warns(UserWarning, match="some weights were frozen for some steps"):
                    learner.step(prepared(learner), 1e-2)
                assert not learner.compiled
            else:
                learner.step(prepared(learner), 1e-2)
        found.append(copy.deepcopy(learner.module.state_dict()))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-9, atol=1e-12)


def test_parameters_that_are_steps_apart_are_refused():
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    adam = torch.optim.Adam(weights, fused=True)
    weights[0].grad = torch.ones(2)
    adam.step()
    with pytest.raises(RuntimeError, match="more steps with some parameters"):
        FlatAdam(adam, weights, [])


def test_steps_are_counted_in_the_dtype_of_torchs_adam_whatever_the_default():
    torch.set_default_dtype(torch.float64)
    try:
        weight = nn.Parameter(torch.ones(2))
        adam = torch.optim.Adam([weight], fused=True)
        FlatAdam(adam, [weight], [])
    finally:
        torch.set_default_dtype(torch.float32)
    assert adam.state[weight]["step"].dtype == torch.float32


class Scaled(nn.Module):
    """A loss with a number of Python's, with draws where wanted."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.shift, self.dropout = 0.0, nn.Dropout(dropout)
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))


class Shifted(cnf.objectives.Objective):
    def __call__(self, module, batch, generator=None):
        values = module.dropout(batch.x * module.weight)
        return cnf.Loss((values.square().mean() + module.shift), {})


class Replayed:
    """What stands for a captured graph: the loss as it was when it was recorded."""

    def __init__(self, learner, rows):
        self.conditions = recorded.Conditions(learner._loss, rows)
        self.shift, self.learner = learner.module.shift, learner

    def replay(self, rows):
        torch.rand(())  # a graph has its own place in the generator's numbers
        now, self.learner.module.shift = self.learner.module.shift, self.shift
        loss = self.learner._update(rows)
        self.learner.module.shift = now
        return loss


def captured(monkeypatch, **settings):
    learner = learner_of(CapturedLearner, Scaled(**settings), Shifted())
    learner.lr = 0.0
    monkeypatch.setattr(CapturedLearner, "_wait_for_device", lambda _: None)
    monkeypatch.setattr(CapturedLearner, "_aside", lambda _, step: step())
    rows = prepared(learner)
    learner._capture, learner.compiled = Replayed(learner, rows), True
    return learner, rows


def test_a_captured_step_is_not_replayed_where_the_module_has_changed(monkeypatch):
    learner, rows = captured(monkeypatch)
    learner.step(rows, 0.0)
    learner.module.shift = 1.0
    assert learner.step(rows, 0.0).value < 2  # replayed: nothing shows that a number has changed
    learner.module.eval()
    assert learner.step(rows, 0.0).value > 1  # a plain step, which sees it


def test_a_captured_steps_loss_is_compared_now_and_then(monkeypatch):
    learner, rows = captured(monkeypatch)
    for _ in range(recorded.COMPARED[0] - 1):
        learner.step(rows, 0.0)
    learner.module.shift = 1.0
    with pytest.warns(UserWarning, match="a number that it computes with has probably changed"):
        learner.step(rows, 0.0)
    assert not learner.compiled
    assert learner.step(rows, 0.0).value > 1


def test_a_loss_that_draws_is_not_compared_and_its_draws_stay(monkeypatch):
    learner, rows = captured(monkeypatch, dropout=0.5)
    learner.module.train()
    learner._capture.conditions = recorded.Conditions(learner._loss, rows)
    monkeypatch.setattr(recorded, "COMPARED", (1,))
    torch.manual_seed(3)
    first = learner.step(rows, 0.0).value
    monkeypatch.setattr(recorded, "COMPARED", ())
    torch.manual_seed(3)
    assert torch.equal(learner.step(rows, 0.0).value, first)
    assert learner.compiled


def test_rows_of_another_number_are_not_compiled_inside_of_the_budget(monkeypatch):
    from cnf.transforms import continuous

    seen = []
    monkeypatch.setattr(
        continuous, "_compiled", lambda function, *args: seen.append(1) or function(*args)
    )
    flow = cnf.models.cnf(2, hidden=(8,), solver=cnf.Solver("rk4", steps=1)).double()
    learner = learner_of(CompiledSolveLearner, flow)
    learner.warm_up(prepared(learner))
    assert seen
    seen.clear()
    learner.step(prepared(learner, cnf.Batch(ROWS.x[:5])), 1e-3)
    assert not seen
    learner.step(prepared(learner), 1e-3)
    assert seen


class Normalized(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(2).double()


class Spread(cnf.objectives.Objective):
    def __call__(self, module, batch, generator=None):
        return cnf.Loss(module.norm(batch.x).square().mean(), {})


@pytest.mark.parametrize("ema", [0.9, None])
@pytest.mark.parametrize("kind", [Learner, CapturedLearner])
def test_a_skipped_step_leaves_running_statistics_alone(kind, ema):
    learner = learner_of(kind, Normalized(), Spread(), ema=ema)
    step = learner._update if kind is CapturedLearner else lambda rows: learner.step(rows, 1e-3)
    step(prepared(learner))
    before = copy.deepcopy(learner.module.state_dict())
    step(prepared(learner, cnf.Batch(ROWS.x * torch.inf)))
    for name, value in before.items():
        assert torch.equal(learner.module.state_dict()[name], value), name
    step(prepared(learner))
    for module in (learner.module, learner.ema_module):
        assert module.norm.running_mean.isfinite().all()
    assert not torch.equal(learner.module.norm.running_mean, before["norm.running_mean"])


def test_a_run_resumed_without_an_average_goes_on_from_its_weights(tmp_path, small, config):
    flow = small("realnvp").double()
    x = torch.randn(64, 2, dtype=torch.float64)
    cnf.fit(flow, cnf.MaximumLikelihood(), x, config(folder=tmp_path / "run", ema=0.99, lr=1e-2))
    state = checkpoint.load_state(tmp_path / "run")
    raw, average = (state["learner"][part] for part in ("module", "kept"))
    name = next(name for name, value in raw.items() if not torch.equal(value, average[name]))
    learner = learner_of(Learner, small("realnvp").double(), ema=None)
    learner.restore(state["learner"])
    assert torch.equal(learner.module.state_dict()[name], raw[name])


def test_what_processes_tell_each_other_can_be_told():
    again = pickle.loads(pickle.dumps(Interrupted(2)))
    assert (again.number, str(again)) == (2, "SIGINT")

    class Local(Exception):
        """One that pickle cannot find."""

    told = pickle.loads(pickle.dumps(_sendable(Local("rows are gone"), 3)))
    assert str(told) == "process 3: Local: rows are gone"
    assert isinstance(_sendable(ValueError("x"), 1), ValueError)


@pytest.mark.parametrize("settings", [{"devices": 3}, {"devices": 3, "batch_size": 64}])
def test_any_number_of_devices_may_share_a_batch(settings):
    assert cnf.TrainConfig(**settings).devices == 3


def test_metrics_of_joint_losses_are_those_of_all_rows():
    """Of parts of a batch whose rows have weights, as of the whole."""
    flow = cnf.models.cnf(2, hidden=(8,), solver=cnf.Solver("rk4", steps=1)).double()
    objective = cnf.objectives.Joint()
    weight = torch.linspace(0.1, 3, 16, dtype=torch.float64)
    batch = objective.prepare(flow, cnf.Batch(ROWS.x, weight=weight), torch.Generator())
    whole = objective(flow, batch)
    parts = [batch.shared(k, 2) for k in range(2)]
    losses = [(share, objective(flow, rows)) for rows, share in parts]
    assert whole.metrics
    for name, value in whole.metrics.items():
        mean = sum(share * loss.metrics[name] for share, loss in losses) / 2
        torch.testing.assert_close(mean, value, rtol=1e-9, atol=0)


def test_weights_that_get_another_memory_go_on_without_programs(uncompiled):
    found = []
    for kind in (Learner, CompiledLearner):
        learner = learner_of(kind, compile=kind is CompiledLearner)
        learner.warm_up(prepared(learner))
        learner.step(prepared(learner), 1e-2)
        with torch.no_grad():
            for weight in learner.module.parameters():
                weight.data = weight.detach().clone()
        if kind is CompiledLearner:
            with pytest.warns(UserWarning, match="given another memory"):
                learner.step(prepared(learner), 1e-2)
        else:
            learner.step(prepared(learner), 1e-2)
        found.append((learner.module.state_dict(), learner.ema_module.state_dict()))
    for plain, program in zip(*found, strict=True):
        for name, value in plain.items():
            torch.testing.assert_close(program[name], value, rtol=1e-9, atol=1e-12)


def test_a_program_that_draws_is_compared_too(uncompiled):
    module = Scaled(dropout=0.5).train()
    learner = learner_of(CompiledLearner, module, Shifted(), compile=True)
    learner.warm_up(prepared(learner))
    for _ in range(recorded.COMPARED[0] - 1):
        learner.step(prepared(learner), 0.0)
    assert learner.compiled  # after a comparison, or none
    module.shift = 1.0
    with pytest.warns(UserWarning, match="has probably changed"):
        learner.step(prepared(learner), 0.0)


class Replacing(nn.Module):
    """A net that replaces a buffer, or a parameter, of its own."""

    def __init__(self, what):
        super().__init__()
        self.what, self.weight = what, nn.Parameter(torch.ones(2))
        self.register_buffer("mean", torch.zeros(2))


class Replaces(cnf.objectives.Objective):
    def __call__(self, module, batch, generator=None):
        if module.what == "buffer":
            module.mean = 0.9 * module.mean + 0.1 * batch.x.mean(0)
        loss = cnf.Loss(((batch.x - module.mean) * module.weight).square().mean(), {})
        if module.what == "weight":
            module.weight = nn.Parameter(module.weight.detach().clone())
        return loss


@pytest.mark.parametrize(("what", "name"), [("buffer", "mean"), ("weight", "weight")])
def test_parts_that_are_replaced_are_refused_in_words(what, name, points, config):
    with pytest.raises(RuntimeError, match=rf"{name} of the module was replaced .* {name}\.copy_"):
        cnf.fit(Replacing(what), Replaces(), points, config(steps=3, validations=0))


def test_a_checkpoint_is_on_the_disk_before_it_replaces_the_last(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: done.append("sync"))
    replace = checkpoint.os.replace
    monkeypatch.setattr(
        checkpoint.os, "replace", lambda *paths: done.append("replace") or replace(*paths)
    )
    checkpoint.write_whole(tmp_path / "file", b"1")
    assert done == ["sync", "replace"]


def test_a_signal_while_the_end_is_saved_is_told(points, config, small, monkeypatch):
    import signal

    from cnf.training import loop

    finish = loop._Trainer._finish

    def interrupted(self, loss):
        signal.raise_signal(signal.SIGTERM)
        finish(self, loss)

    monkeypatch.setattr(loop._Trainer, "_finish", interrupted)
    history = cnf.fit(small("realnvp"), cnf.MaximumLikelihood(), points, config())
    assert (history.reason, history.signal) == ("budget", signal.SIGTERM)


def test_a_run_of_batches_of_several_sizes_resumes_bit_for_bit(
    uncompiled, tmp_path, small, config
):
    """The size that is compiled is that of the first batch, wherever the run goes on."""
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    batches = [x[:16], x[16:32], x[32:]]

    def trained(folder, steps, **settings):
        flow = small("realnvp")
        settings = {"compile": True, "folder": folder, "validations": 0, **settings}
        cnf.fit(flow, cnf.MaximumLikelihood(), batches, config(steps=steps, **settings))
        return flow

    def stop(record):
        if record["step"] == 5:
            raise RuntimeError("stopped")

    whole = trained(tmp_path / "whole", 9)
    with pytest.raises(RuntimeError, match="stopped"):
        cnf.fit(
            small("realnvp"), cnf.MaximumLikelihood(), batches,
            config(steps=9, compile=True, folder=tmp_path / "parts", validations=0),
            callbacks=[stop],
        )  # fmt: skip
    parts = trained(tmp_path / "parts", 9, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], value)


def test_an_infinite_loss_far_out_is_told_to_be_of_scale():
    flow = cnf.models.realnvp(2, hidden=(8,), preprocess=None)
    words = outside_of_base(flow, cnf.Batch(torch.full((4, 2), 1e25)))
    assert "check the data's scale" in words and "take a base" not in words


class Unused(nn.Module):
    """A net with a weight that the loss does not use, before one that it does."""

    def __init__(self):
        super().__init__()
        self.left_out = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.weight = nn.Parameter(torch.ones(2, dtype=torch.float64))


class UsesOne(cnf.objectives.Objective):
    def __call__(self, module, batch, generator=None):
        return cnf.Loss((batch.x * module.weight - 0.3).square().mean(), {})


def test_weights_that_the_loss_does_not_use_stay_under_a_program(uncompiled):
    found = []
    for kind in (Learner, CompiledLearner):
        learner = learner_of(kind, Unused(), UsesOne(), compile=kind is CompiledLearner)
        learner.warm_up(prepared(learner))
        for _ in range(3):
            learner.step(prepared(learner), 1e-2)
        found.append((learner.module.state_dict(), learner.ema_module.state_dict()))
    for plain, program in zip(*found, strict=True):
        for name, value in plain.items():
            torch.testing.assert_close(program[name], value, rtol=1e-9, atol=1e-12)
    assert torch.equal(found[1][0]["left_out"], torch.ones(3, dtype=torch.float64))
