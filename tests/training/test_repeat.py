"""The same config gives the same weights, bit for bit."""

import math

import pytest
import torch
import yaml

import cnf
from cnf.training.learner import Learner
from cnf.training.shards import one_shard
from cnf.training.stream import as_stream
from cnf.training.validation import Validation

RUNS = {
    "cnf by flow matching": ("cnf", cnf.FlowMatching()),
    "cnf by likelihood": ("cnf", cnf.MaximumLikelihood()),
    "cnf by estimated likelihood": ("cnf", cnf.MaximumLikelihood(divergence="hutchinson")),
    "realnvp by likelihood": ("realnvp", cnf.MaximumLikelihood()),
}


@pytest.fixture
def trained(small, config):
    def train(kind, data, **settings):
        name, objective = RUNS[kind]
        flow = small(name)
        cnf.fit(flow, objective, data, config(**settings))
        return flow

    return train


@pytest.mark.parametrize("kind", RUNS)
def test_same_seed_gives_bitwise_equal_weights(kind, trained, small, same):
    toy = cnf.data.toy("moons")
    first = trained(kind, toy, seed=1)
    torch.manual_seed(12345)  # what the user drew before must not matter
    torch.rand(7)
    assert same(first, trained(kind, toy, seed=1))
    assert not same(first, small(RUNS[kind][0]))


@pytest.mark.parametrize("objective", [cnf.FlowMatching(), cnf.MaximumLikelihood()])
@pytest.mark.parametrize("data", ["toy", "points"])
def test_other_seed_gives_other_weights(data, objective, small, config, points, same):
    data = cnf.data.toy("moons") if data == "toy" else points
    flows = [small(preprocess=None) for _ in range(2)]  # its buffers would differ in any case
    for seed, flow in enumerate(flows):
        cnf.fit(flow, objective, data, config(seed=seed))
    assert not same(*flows)


def test_every_step_draws_new_samples_of_a_toy(config, square):
    cnf.fit(torch.nn.Linear(2, 2), square, cnf.data.toy("moons"), config(steps=6))
    assert len(torch.cat(square.batches).unique(dim=0)) == 6 * 16


def test_folder_progress_bar_and_checkpoints_do_not_change_weights(
    trained, points, same, tmp_path, capsys
):
    plain = trained("cnf by flow matching", points)
    settings = {"folder": tmp_path / "run", "progress": True, "checkpoint_seconds": 1e-9}
    assert same(plain, trained("cnf by flow matching", points, **settings))


@pytest.mark.parametrize("kind", RUNS)
def test_global_random_state_is_not_changed(kind, trained, points):
    with torch.random.fork_rng():
        torch.manual_seed(987654321)  # a state that no earlier training can have left
        before = torch.random.get_rng_state()
        trained(kind, points)
        trained(kind, cnf.data.toy("moons"))
        assert torch.equal(before, torch.random.get_rng_state())


def test_no_torch_default_is_changed(small, config, points):
    before = torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()
    cnf.fit(small().double(), cnf.MaximumLikelihood(), points, config())
    assert before == (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())


def test_dropout_repeats_and_differs_between_steps(config, points, square, same):
    def train():
        net = torch.nn.Sequential(torch.nn.Linear(2, 32), torch.nn.Dropout(0.5))
        torch.nn.init.ones_(net[0].weight), torch.nn.init.ones_(net[0].bias)
        cnf.fit(net, square, points, config(validations=0, schedule="constant", lr=1e-9))
        return net

    assert same(train(), train())


def test_budget_in_seconds_records_steps_and_ticks(small, config, points, tmp_path):
    settings = config(seconds=0.2, folder=tmp_path / "run")
    history = cnf.fit(small(), cnf.FlowMatching(), points, settings)
    assert history.reason == "budget" and history.seconds >= 0.2
    assert history.ticks == sorted(history.ticks) and len(history.ticks) == 200
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert written["seconds"] is None
    assert (written["steps"], written["ticks"]) == (history.steps, history.ticks)


def test_budget_in_seconds_repeats_bitwise_from_its_saved_config(
    small, config, points, same, tmp_path
):
    first = small()
    settings = config(seconds=0.2, folder=tmp_path / "run", patience=3, seed=5)
    cnf.fit(first, cnf.FlowMatching(), points, settings)
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    names = cnf.TrainConfig.__dataclass_fields__
    repeated = cnf.TrainConfig(**{k: v for k, v in written.items() if k in names})
    second = small()
    cnf.fit(second, cnf.FlowMatching(), points, repeated)
    assert same(first, second)


def test_validation_time_is_not_charged_to_the_budget(small, config, points, monkeypatch):
    score, spent = Validation.score, []

    def slow(self, module, fraction):
        start = clock[0]
        clock[0] += 1000.0
        spent.append(clock[0] - start)
        return score(self, module, fraction)

    clock = [0.0]

    def tick():
        clock[0] += 5e-4  # twice from the start of a step to its end
        return clock[0]

    monkeypatch.setattr(Validation, "score", slow)
    monkeypatch.setattr("cnf.training.loop.SLOW", math.inf)  # none waits
    monkeypatch.setattr("cnf.training.loop.time.perf_counter", tick)
    history = cnf.fit(small(), cnf.FlowMatching(), points, config(seconds=0.05, validations=4))
    assert len(spent) >= 4
    assert 0.05 <= history.seconds < 0.06
    assert history.steps >= 40


@pytest.mark.parametrize("kind", ["toy", "rows", "batches"])
def test_step_that_only_compiles_does_not_change_training(
    kind, config, points, square, same, monkeypatch
):
    def train():
        with torch.random.fork_rng():
            torch.manual_seed(7)
            net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        toy, batches = cnf.data.toy("moons"), list(points[:96].split(16))
        data = {"toy": toy, "rows": points, "batches": batches}[kind]
        cnf.fit(net, square, data, config())
        return net

    plain = train()
    monkeypatch.setattr(Learner, "compiles", True)
    assert same(plain, train())
    assert len(square.batches) == 6 + 7 and square.batches[6].shape == (16, 2)


def test_second_gpu_has_no_effect_on_a_run_on_the_cpu(small, config, points, monkeypatch):
    # Without devices, torch.random.fork_rng would ask both for their state, and warn.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.random, "_fork_rng_warned_already", False)
    cnf.fit(small(), cnf.FlowMatching(), points, config())
    uniform = torch.distributions.Uniform(torch.zeros(2), torch.ones(2))
    cnf.distributions.as_base(uniform, ()).sample((3,), torch.Generator().manual_seed(1))


def test_each_epoch_has_an_order_of_its_own(config):
    rows = torch.arange(12.0)[:, None]
    stream = as_stream(rows, config(batch_size=12, validations=0))
    whole = one_shard(12)
    orders = [stream.batches(step, whole, [])[0].x.flatten().tolist() for step in range(3)]
    assert all(sorted(order) == rows.flatten().tolist() for order in orders)
    assert len(set(map(tuple, orders))) == 3


def test_what_a_module_draws_depends_on_step_and_process(small, config, points, monkeypatch):
    """Dropout must not be the same on every process, nor in every step."""
    asked, seed = [], cnf.training.loop.stream_seed

    def noted(*place):
        asked.append(place)
        return seed(*place)

    monkeypatch.setattr("cnf.training.loop.stream_seed", noted)
    monkeypatch.setattr("lightning_fabric.Fabric.global_rank", 5)
    monkeypatch.setattr("lightning_fabric.Fabric.is_global_zero", True)
    cnf.fit(small(), cnf.FlowMatching(), points, config(steps=2, seed=3))
    assert asked == [(3, "module", 0, 5), (3, "module", 1, 5)]
