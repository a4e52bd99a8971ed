"""A resumed run gives the weights of an uninterrupted one."""

import shutil
import signal
import warnings

import pytest
import torch
import yaml

import cnf
from cnf.training import checkpoint, origin
from cnf.training.budget import Budget
from cnf.training.origin import hash_of_rows

KINDS = ["toy", "rows", "batches"]


class Killed(Exception):
    pass


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def kill():
    raise Killed


@pytest.fixture
def run(small, config, same):
    """Train, be stopped by `action`, resume, and compare with training in one go."""

    def train(data, whole, stopped, folder, objective=None, **settings):
        objective = objective or cnf.FlowMatching()
        settings = {"steps": 12, "validations": 3, **settings}
        uninterrupted = small()
        history = cnf.fit(uninterrupted, objective, whole, config(**settings))
        stopped(lambda: cnf.fit(small(), objective, data, config(folder=folder, **settings)))
        other = small()
        for parameter in other.parameters():
            torch.nn.init.zeros_(parameter)  # what is resumed comes from the checkpoint alone
        resumed = cnf.fit(other, objective, whole, config(folder=folder, resume=True, **settings))
        assert resumed.steps == history.steps
        assert same(uninterrupted, other)
        assert same(uninterrupted, cnf.load(folder))
        columns = resumed.column("step"), resumed.column("loss"), resumed.column("val_nll")
        assert columns == tuple(history.column(name) for name in ("step", "loss", "val_nll"))

    return train


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_after_ctrl_c_gives_the_weights_of_an_uninterrupted_run(
    kind, run, acting_data, tmp_path
):
    def stopped(fit):
        history = fit()
        assert history.reason == "interrupted"
        assert 0 < history.steps < 12

    run(*acting_data(kind, press_ctrl_c), stopped, tmp_path / "run")


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_after_a_crash_gives_the_weights_of_an_uninterrupted_run(
    kind, run, acting_data, tmp_path
):
    def stopped(fit):
        with pytest.raises(Killed):
            fit()
        assert (tmp_path / "run" / "checkpoints" / "state.pt").is_file()

    run(*acting_data(kind, kill), stopped, tmp_path / "run", checkpoint_seconds=1e-9)


@pytest.mark.parametrize(
    "objective", [cnf.MaximumLikelihood(), cnf.MaximumLikelihood(divergence="hutchinson")]
)
@pytest.mark.parametrize("settings", [{"ema": None}, {"patience": 9}, {"optimizer": "adamw"}])
def test_resuming_is_exact_for_every_setting(objective, settings, run, acting_data, tmp_path):
    data = acting_data("rows", press_ctrl_c)
    run(*data, lambda fit: fit(), tmp_path / "run", objective=objective, **settings)


def test_resumed_run_draws_the_same_rows_of_cells(run, acting_data, tmp_path):
    coupling = {"name": "semidiscrete", "steps": 5, "cells": 10}
    data, objective = acting_data("rows", press_ctrl_c), cnf.FlowMatching(coupling=coupling)
    run(*data, lambda fit: fit(), tmp_path / "run", objective=objective)


def test_resume_with_tensors_continues_with_the_same_rows(config, points, square, tmp_path):
    net = torch.nn.Linear(2, 2)
    cnf.fit(net, square, points, config(steps=12))
    rows, square.batches = square.batches, []
    settings = {"steps": 12, "folder": tmp_path / "run", "checkpoint_seconds": 1e-9}

    class Dies(type(square)):
        def prepare(self, module, batch, generator=None):
            if len(self.batches) == 7:
                kill()
            return batch

    Dies.__name__ = type(square).__name__  # a run is resumed with the objective it had
    dies = Dies()
    with pytest.raises(Killed):
        cnf.fit(torch.nn.Linear(2, 2), dies, points, config(**settings))
    rest = type(square)()
    cnf.fit(torch.nn.Linear(2, 2), rest, points, config(resume=True, **settings))
    assert torch.equal(torch.stack(rows), torch.stack(dies.batches + rest.batches))


def test_message_of_interruption_says_where_the_run_is_saved(
    small, config, acting_data, tmp_path, capsys
):
    data, _ = acting_data("toy", press_ctrl_c)
    settings = config(folder=tmp_path / "run", progress=True)
    cnf.fit(small(), cnf.FlowMatching(), data, settings)
    said = "".join(capsys.readouterr().out.split())
    assert "Interruptedatstep4" in said and "saved" in said
    assert "".join(str(tmp_path / "run").split()) in said


def test_message_of_interruption_without_a_folder_says_that_nothing_is_saved(
    small, config, acting_data, capsys
):
    data, _ = acting_data("toy", press_ctrl_c)
    history = cnf.fit(small(), cnf.FlowMatching(), data, config(progress=True))
    assert history.reason == "interrupted"
    assert "not saved" in capsys.readouterr().out


def test_handler_of_ctrl_c_is_restored_after_fit(small, config, points):
    before = signal.getsignal(signal.SIGINT)
    cnf.fit(small(), cnf.FlowMatching(), points, config(steps=2))
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_stops_at_once(small, config, acting_data):
    data, _ = acting_data("toy", lambda: (press_ctrl_c(), press_ctrl_c()))
    with pytest.raises(KeyboardInterrupt):
        cnf.fit(small(), cnf.FlowMatching(), data, config())


def test_config_of_an_interrupted_run_keeps_its_budget_in_seconds(
    small, config, acting_data, tmp_path
):
    data, _ = acting_data("toy", press_ctrl_c)
    settings = config(seconds=30.0, folder=tmp_path / "run")
    cnf.fit(small(), cnf.FlowMatching(), data, settings)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["seconds"] == 30.0  # else resuming from this file would end at once


def test_resuming_a_finished_run_changes_nothing_and_says_so(
    small, config, points, same, tmp_path, capsys
):
    flow = small()
    settings = {"folder": tmp_path / "run", "patience": 1, "validations": 50, "lr": 0.02}
    data = {"data": points, "validation": points[:30]}
    first = cnf.fit(flow, cnf.FlowMatching(), config=config(steps=200, **settings), **data)
    assert first.reason == "patience"
    again, settings = small(), config(steps=200, resume=True, **{**settings, "progress": True})
    second = cnf.fit(again, cnf.FlowMatching(), config=settings, **data)
    assert (second.steps, second.reason) == (first.steps, "patience")
    assert same(flow, again)
    said = " ".join(capsys.readouterr().out.split())
    assert "Nothing is left to train" in said and f"at step {first.steps};" in said


def test_finished_run_with_a_longer_budget_continues_logs_and_scores(
    small, config, points, tmp_path
):
    settings = {"folder": tmp_path / "run", "validations": 5}
    cnf.fit(small(), cnf.FlowMatching(), points, config(steps=10, **settings))
    with pytest.warns(UserWarning, match="other settings than it had: steps was 10, is 20"):
        history = cnf.fit(
            small(), cnf.FlowMatching(), points, config(steps=20, resume=True, **settings)
        )
    assert history.column("step") == list(range(1, 21))
    scored = [record["step"] for record in history.records if "val_nll" in record]
    assert scored == [2, 4, 6, 8, 10, 12, 16, 20]


@pytest.mark.parametrize(("steps", "in_all"), [(20, 20), (40, 40), (2, 4)])
def test_run_with_a_budget_in_seconds_continues_with_the_same_or_another_budget(
    steps, in_all, small, config, acting_data, monkeypatch, tmp_path
):
    tick = 1 / 64  # each step's, whatever the machine: a seconds budget is then one of steps

    class Ticking(Budget):
        def spend(self, seconds):
            super().spend(seconds)
            self.seconds += tick
            self.refresh()

        def charge(self, seconds):
            """Nothing else counts: what comes before the first step takes as long as it may."""

    monkeypatch.setattr("cnf.training.loop.Budget", Ticking)
    data, whole = acting_data("toy", press_ctrl_c)
    settings = {"folder": tmp_path / "run", "seconds": 20 * tick, "validations": 0}
    before = cnf.fit(small(), cnf.FlowMatching(), data, config(**settings))
    assert (before.reason, before.steps) == ("interrupted", 4)
    settings |= {"seconds": steps * tick, "resume": True}
    with warnings.catch_warnings():
        warnings.simplefilter("error" if steps == 20 else "ignore")  # it has other settings
        after = cnf.fit(small(), cnf.FlowMatching(), whole, config(**settings))
    assert (after.reason, after.steps) == ("budget", in_all)
    assert after.column("step") == list(range(1, in_all + 1))
    assert after.column("fraction")[4:] == [k / steps for k in range(5, in_all + 1)]
    assert len(after.ticks) == 200 and after.ticks == sorted(after.ticks)


def test_run_killed_at_any_time_resumes_from_its_last_checkpoint(
    small, config, points, same, tmp_path
):
    """What lies on the disk is all that SIGKILL leaves: here a copy, made in the middle of it."""
    settings = {"steps": 12, "validations": 3}
    straight, left = small(), tmp_path / "left"
    cnf.fit(straight, cnf.FlowMatching(), points, config(**settings))

    def copy(record):
        if record["step"] == 7:
            shutil.copytree(tmp_path / "run", left)

    often = {**settings, "checkpoint_seconds": 1e-9}
    cnf.fit(small(), cnf.FlowMatching(), points, config(folder=tmp_path / "run", **often),
            callbacks=[copy])  # fmt: skip
    assert checkpoint.load_state(left)["budget"]["step"] == 6
    (left / "metrics.csv").write_text("step,seconds\n1,0.")  # as if the disk had been full
    (left / "checkpoints" / ".state.pt.123.tmp").write_bytes(b"half of it")
    resumed = small()
    again = config(folder=left, resume="auto", **settings)
    history = cnf.fit(resumed, cnf.FlowMatching(), points, again)
    assert history.column("step") == list(range(1, 13)) and same(resumed, straight)
    rows = (left / "metrics.csv").read_text().splitlines()
    assert len(rows) == 13 and rows[0].startswith("step,seconds,fraction")
    assert not list(left.rglob("*.tmp"))


OTHER = {
    "a changed row": lambda x: torch.cat([x[:50], x[50:51] + 1e-3, x[51:]]),
    "another order": lambda x: x.flip(0),
    "fewer rows": lambda x: x[:90],
}


@pytest.mark.parametrize("kind", OTHER)
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: cnf.Batch(x), lambda x: x.numpy()])
def test_resume_refuses_other_rows(kind, wrap, small, config, points, tmp_path):
    settings = {"folder": tmp_path / "run"}
    cnf.fit(small(), cnf.FlowMatching(), wrap(points), config(**settings))
    other = wrap(OTHER[kind](points))
    with pytest.raises(cnf.CheckpointError, match="other data"):
        cnf.fit(small(), cnf.FlowMatching(), other, config(resume=True, **settings))


def test_fingerprint_of_data_covers_every_tensor_its_shape_and_dtype(points):
    """All of these hold the same bytes, some under another name or in another shape."""
    w = points[:, 0].abs().contiguous()
    batches = [
        cnf.Batch(points),
        cnf.Batch(points.reshape(50, 4)),
        cnf.Batch(points.view(torch.int32)),
        cnf.Batch(points, context=points),
        cnf.Batch(points, x0=points),
        cnf.Batch(points, weight=w),
    ]
    assert len({hash_of_rows(batch) for batch in batches}) == len(batches)
    assert hash_of_rows(cnf.Batch(points.clone())) == hash_of_rows(batches[0])


def test_fingerprint_of_large_tensors_covers_their_last_rows(points, monkeypatch):
    monkeypatch.setattr(origin, "WHOLE", 500)
    monkeypatch.setattr(origin, "ENDS", 5)
    batches = [cnf.Batch(points.clone()) for _ in range(3)]
    batches[1].x[0] += 1
    batches[2].x[-1] += 1
    assert len({hash_of_rows(batch) for batch in batches}) == 3


def test_resume_refuses_another_density_dataset_and_iterable(small, config, points, tmp_path):
    moved = points + 1
    pairs = {
        "density": (cnf.data.toy("moons"), cnf.data.toy("circles")),
        "dataset": (list_of(points), list_of(moved)),
        "batches": (list(points.split(20)), list(moved.split(20))),
        "context": (cnf.Batch(points, points), cnf.Batch(points, moved)),
    }
    for name, (data, other) in pairs.items():
        flow = {"context": 2} if name == "context" else {}
        settings = {"folder": tmp_path / name}
        cnf.fit(small(**flow), cnf.FlowMatching(), data, config(**settings))
        resume = config(resume=True, **settings)
        cnf.fit(small(**flow), cnf.FlowMatching(), data, resume)
        with pytest.raises(cnf.CheckpointError, match="other data"):
            cnf.fit(small(**flow), cnf.FlowMatching(), other, resume)


def list_of(x):
    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, row):
            return x[row]

    return Rows()


def test_resume_reports_changed_settings_and_uses_the_new_ones(small, config, points, tmp_path):
    settings = {"folder": tmp_path / "run", "optimizer": "adamw"}
    cnf.fit(small(), cnf.FlowMatching(), points, config(steps=4, weight_decay=0.1, **settings))
    changed = {"steps": 8, "lr": 1e-9, "weight_decay": 0.9, "resume": True}
    words = "steps was 4, is 8, .*lr was None, is 1e-09.*weight_decay was 0.1, is 0.9"
    seen = []
    real = torch.optim.AdamW.step

    def step(self, *rest):
        seen.append(self.param_groups[0]["weight_decay"])
        return real(self, *rest)

    with pytest.MonkeyPatch.context() as patch, pytest.warns(UserWarning, match=words):
        patch.setattr(torch.optim.AdamW, "step", step)
        cnf.fit(small(), cnf.FlowMatching(), points, config(**changed, **settings))
    assert seen and set(seen) == {0.9}


def test_skipped_steps_are_counted_over_the_whole_run(config, points, broken, tmp_path):
    settings = {"folder": tmp_path / "run", "validations": 0}
    cnf.fit(torch.nn.Linear(2, 2), broken({1, 2}), points, config(steps=4, **settings))
    again = config(steps=4, resume=True, **settings)
    assert cnf.fit(torch.nn.Linear(2, 2), broken({}), points, again).skipped == 2


def test_error_for_another_model_names_the_option_that_differs(small, config, points, tmp_path):
    settings = {"folder": tmp_path / "run"}
    cnf.fit(small(), cnf.FlowMatching(), points, config(**settings))
    with pytest.raises(
        cnf.CheckpointError, match=r"another run: options.hidden was \[8\], is \[9"
    ):
        flow = small(hidden=(9,))
        cnf.fit(flow, cnf.FlowMatching(), points, config(resume=True, **settings))


def test_resume_refuses_another_batch_size(small, config, points, tmp_path):
    settings = {"folder": tmp_path / "run"}
    cnf.fit(small(), cnf.FlowMatching(), points, config(**settings))
    with pytest.raises(cnf.CheckpointError, match="another run: batch_size was 16, is 20"):
        again = config(resume=True, batch_size=20, **settings)
        cnf.fit(small(), cnf.FlowMatching(), points, again)


BROKEN = {
    "moments of another shape": ("learner", "optimizer", "state", 0, "exp_avg", torch.ones(99)),
    "moments of another dtype": ("learner", "optimizer", "state", 0, "exp_avg", "double"),
    "step of another shape": ("learner", "optimizer", "state", 0, "step", torch.ones(3)),
    "moments that are words": ("learner", "optimizer", "state", 0, "exp_avg_sq", "x"),
    "moments of another optimizer": ("learner", "optimizer", "state", 0, "momentum", 1),
    "moments of no parameter": ("learner", "optimizer", "state", 99, {}),
    "no optimizer": ("learner", "optimizer", None),
    "weights that are words": ("learner", "module", "x"),
    "average that is NaN": ("learner", "kept", "nan"),
    "no learner": ("learner", None),
    "budget that is words": ("budget", "step", "many"),
    "ticks that are a number": ("budget", "ticks", 3),
    "scores that are a list": ("validation", "best", [1]),
    "records that are a number": ("history", "records", 3),
    "description that is a list": ("origin", "description", [1]),
    "data that are a dict": ("origin", "data", {}),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_state_that_does_not_fit_is_a_checkpoint_error(kind, small, config, points, tmp_path):
    settings = {"folder": tmp_path / "run"}
    cnf.fit(small(), cnf.FlowMatching(), points, config(steps=2, **settings))
    path = tmp_path / "run" / "checkpoints" / "state.pt"
    state = checkpoint.load_state(path)
    *way, name, value = BROKEN[kind]
    place = state
    for step in way:
        place = place[step]
    if isinstance(value, str) and value == "double":
        value = place[name].double()
    if isinstance(value, str) and value == "nan":
        value = {key: torch.full_like(weight, torch.nan) for key, weight in place[name].items()}
    place[name] = value
    checkpoint.save_state(state, path)
    with pytest.raises(cnf.CheckpointError, match=str(tmp_path)):
        cnf.fit(small(), cnf.FlowMatching(), points, config(steps=4, resume=True, **settings))


@pytest.mark.parametrize("before", [1, None, "no origin"])
def test_run_with_other_random_streams_is_not_resumed_but_its_flow_loads(
    before, small, config, points, tmp_path
):
    settings = {"folder": tmp_path / "run"}
    cnf.fit(small(), cnf.FlowMatching(), points, config(steps=2, **settings))
    path = tmp_path / "run" / "checkpoints" / "state.pt"
    state = checkpoint.load_state(path)
    if before == "no origin":
        del state["origin"]
    else:
        state["origin"]["random"] = before
    checkpoint.save_state(state, path)
    with pytest.raises(cnf.CheckpointError, match="drew other random numbers and held out other"):
        cnf.fit(small(), cnf.FlowMatching(), points, config(steps=4, resume=True, **settings))
    assert torch.isfinite(cnf.load(tmp_path / "run").sample(3)).all()


def test_mid_run_checkpoint_holds_the_averaged_weights(small, config, points, tmp_path):
    folder, seen = tmp_path / "run", []

    class Watch(cnf.FlowMatching):
        def prepare(self, module, batch, generator=None):
            if (folder / "checkpoints" / "state.pt").is_file():
                seen.append((checkpoint.load_state(folder)["learner"], cnf.load(folder)))
            return super().prepare(module, batch, generator)

    settings = config(steps=5, folder=folder, checkpoint_seconds=1e-9, validations=0, ema=0.5)
    cnf.fit(small(), Watch(), points, settings)
    saved, flow = seen[-1]
    expected = {name: weight.clone() for name, weight in seen[0][0]["module"].items()}
    for step, (learner, _) in enumerate(seen[1:], 1):
        decay = min(0.5, step / (step + 9))
        for name, weight in learner["module"].items():
            expected[name] = decay * expected[name] + (1 - decay) * weight
    names = [name for name, _ in flow.named_parameters()]
    for name in names:
        assert torch.allclose(flow.state_dict()[name], expected[name], atol=1e-6)
    assert any(not torch.allclose(saved["module"][n], expected[n], atol=1e-4) for n in names)


def test_best_weights_of_patience_are_kept_over_a_resume(
    small, config, points, acting_data, same, tmp_path
):
    settings = {"steps": 12, "validations": 12, "patience": 12, "lr": 0.05}
    data, whole = acting_data("toy", press_ctrl_c)
    straight, resumed = small(), small()
    cnf.fit(straight, cnf.FlowMatching(), whole, config(**settings))
    folder = {"folder": tmp_path / "run"}
    cnf.fit(small(), cnf.FlowMatching(), data, config(**settings, **folder))
    saved = checkpoint.load_state(tmp_path / "run")["validation"]
    assert saved["weights"] is not None and saved["best"] < saved["first"]
    cnf.fit(resumed, cnf.FlowMatching(), whole, config(resume=True, **settings, **folder))
    assert same(straight, resumed)
