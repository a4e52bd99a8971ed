"""An interrupted run, resumed, gives the very weights of an uninterrupted one."""

import signal

import pytest
import torch
import yaml

import cnf

KINDS = ["toy", "rows", "batches"]


class Killed(Exception):
    pass


def press():
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
def test_resuming_after_ctrl_c_gives_the_uninterrupted_weights(kind, run, watched, tmp_path):
    def stopped(fit):
        history = fit()
        assert history.reason == "interrupted"
        assert 0 < history.steps < 12

    run(*watched(kind, press), stopped, tmp_path / "run")


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_after_a_crash_gives_the_uninterrupted_weights(kind, run, watched, tmp_path):
    def stopped(fit):
        with pytest.raises(Killed):
            fit()
        assert (tmp_path / "run" / "checkpoints" / "state.pt").is_file()

    run(*watched(kind, kill), stopped, tmp_path / "run", checkpoint_seconds=1e-9)


@pytest.mark.parametrize(
    "objective", [cnf.MaximumLikelihood(), cnf.MaximumLikelihood(divergence="hutchinson")]
)
@pytest.mark.parametrize("settings", [{"ema": None}, {"patience": 9}, {"optimizer": "adamw"}])
def test_resuming_holds_for_every_setting(objective, settings, run, watched, tmp_path):
    data = watched("rows", press)
    run(*data, lambda fit: fit(), tmp_path / "run", objective=objective, **settings)


def test_resume_of_tensors_goes_on_with_the_same_rows(config, points, square, tmp_path):
    net = torch.nn.Linear(2, 2)
    cnf.fit(net, square, points, config(steps=12))
    rows, square.seen = square.seen, []
    settings = {"steps": 12, "folder": tmp_path / "run", "checkpoint_seconds": 1e-9}

    class Dies(type(square)):
        def prepare(self, module, batch, generator=None):
            if len(self.seen) == 7:
                kill()
            return batch

    Dies.__name__ = type(square).__name__  # a run is resumed with the objective it had
    dies = Dies()
    with pytest.raises(Killed):
        cnf.fit(torch.nn.Linear(2, 2), dies, points, config(**settings))
    rest = type(square)()
    cnf.fit(torch.nn.Linear(2, 2), rest, points, config(resume=True, **settings))
    assert torch.equal(torch.stack(rows), torch.stack(dies.seen + rest.seen))


def test_interrupting_says_where_it_was_saved(small, config, watched, tmp_path, capsys):
    data, _ = watched("toy", press)
    settings = config(folder=tmp_path / "run", progress=True)
    cnf.fit(small(), cnf.FlowMatching(), data, settings)
    said = "".join(capsys.readouterr().out.split())
    assert "Interruptedatstep4" in said and "saved" in said
    assert "".join(str(tmp_path / "run").split()) in said


def test_interrupting_without_a_folder_says_that_nothing_was_saved(small, config, watched, capsys):
    data, _ = watched("toy", press)
    history = cnf.fit(small(), cnf.FlowMatching(), data, config(progress=True))
    assert history.reason == "interrupted"
    assert "not saved" in capsys.readouterr().out


def test_ctrl_c_means_what_it_meant_before_once_fit_is_over(small, config, points):
    before = signal.getsignal(signal.SIGINT)
    cnf.fit(small(), cnf.FlowMatching(), points, config(steps=2))
    assert signal.getsignal(signal.SIGINT) is before


def test_second_ctrl_c_stops_at_once(small, config, watched):
    data, _ = watched("toy", lambda: (press(), press()))
    with pytest.raises(KeyboardInterrupt):
        cnf.fit(small(), cnf.FlowMatching(), data, config())


def test_config_of_an_interrupted_seconds_run_still_has_its_budget(
    small, config, watched, tmp_path
):
    data, _ = watched("toy", press)
    settings = config(seconds=30.0, folder=tmp_path / "run")
    cnf.fit(small(), cnf.FlowMatching(), data, settings)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["seconds"] == 30.0  # else resuming from this file would end at once


def test_resuming_a_finished_run_changes_nothing(small, config, points, same, tmp_path):
    flow = small()
    settings = {"folder": tmp_path / "run", "patience": 1, "validations": 6, "lr": 0.5}
    first = cnf.fit(flow, cnf.FlowMatching(), points, config(steps=60, **settings))
    assert first.reason == "patience"
    again = small()
    second = cnf.fit(again, cnf.FlowMatching(), points, config(steps=60, resume=True, **settings))
    assert (second.steps, second.reason) == (first.steps, "patience")
    assert same(flow, again)
