"""A row's draws do not depend on the number of processes, and each draws its shards only."""

from types import SimpleNamespace

import pytest
import torch

import cnf
from cnf import Batch, FlowMatching, MaximumLikelihood
from cnf.matching import Pairing
from cnf.objectives import Joint, MultiscaleMatching, Objective
from cnf.objectives.batch import tensors_of
from cnf.random import stream
from cnf.training import shards
from cnf.training.history import Listeners
from cnf.training.loop import _Trainer
from cnf.training.shards import one_shard, shards_of

CPU = torch.device("cpu")
SIZE = 41  # rows of a batch of eight shards
ROWS = torch.randn(150, 2, generator=stream(0, "rows"), dtype=torch.float64)
WEIGHT = torch.linspace(0.1, 5, 150, dtype=torch.float64)
CONTEXT = (ROWS > 0).double()
MEAN = 7.0  # over processes of a sum of weights, pretended


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "LEAST", {"cpu": 50})


class Density:
    """Neither a toy nor a distribution of torch's."""

    dim = 2

    def __init__(self):
        self.drawn = []

    def sample(self, n, generator=None):
        self.drawn.append(n)
        return torch.rand(n, 2, generator=generator, dtype=torch.float64)

    def log_prob(self, x):
        return torch.zeros(len(x))


class Items(torch.utils.data.Dataset):
    """Rows that are decoded one by one, and remember it."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, row):
        self.read.append(row)
        return {"x": ROWS[row], "weight": WEIGHT[row]}


class Training:
    """The rows of a step as one of some processes has them, none of which is started."""

    def __init__(self, objective, data, model, weight=None, context=None):
        config = cnf.TrainConfig(
            steps=6, batch_size=SIZE, validations=0, device="cpu", progress=False
        )
        given = context, weight, None, Listeners((), ())
        self.trainer = _Trainer(model(), objective, data, config, *given)
        self.trainer.resumes = False
        self.trainer._begin()

    def rows(self, step, rank=0, processes=1):
        self.trainer.fabric = self.trainer.learner.fabric = SimpleNamespace(
            global_rank=rank, world_size=processes, device=CPU, all_reduce=self.all_reduce
        )
        return self.trainer._rows(step)

    def all_reduce(self, part):
        self.asked = part.item()
        return part.fill_(MEAN)  # in place, as torch.distributed does


def equal(one, other):
    """Whether prepared rows are the same to the bit; contexts left out are NaN."""
    pairs = zip(tensors_of(one), tensors_of(other), strict=True)
    return all(torch.equal(a.nan_to_num(9e9), b.nan_to_num(9e9)) for a, b in pairs)


def flow(**options):
    torch.manual_seed(7)
    solver = cnf.Solver("rk4", steps=2, gradient="backprop")
    return cnf.models.cnf(2, hidden=(8,), solver=solver, **options).double()


def pictures():
    torch.manual_seed(7)
    return cnf.models.ffjord(shape=(1, 4, 4), hidden=(4,), dequantization="uniform")


PICTURES = torch.randint(0, 256, (150, 1, 4, 4), generator=stream(0, "pictures"))
BATCHES = [Batch(ROWS[k : k + SIZE], weight=WEIGHT[k : k + SIZE]) for k in (0, 20, 40, 60)]
SEMIDISCRETE = {"name": "semidiscrete", "steps": 5}
CASES = {
    "likelihood": (MaximumLikelihood, ROWS, flow, {}),
    "probes": (lambda: MaximumLikelihood("hutchinson"), ROWS, flow, {"weight": WEIGHT}),
    "matching": (FlowMatching, ROWS, flow, {}),
    "a toy": (FlowMatching, cnf.data.toy("moons"), flow, {}),
    "a distribution": (
        FlowMatching, torch.distributions.Normal(torch.zeros(2), torch.ones(2)), flow, {},
    ),
    "a density": (FlowMatching, Density(), flow, {}),
    "batches": (FlowMatching, BATCHES, flow, {}),
    "a dataset": (FlowMatching, Items(), flow, {}),
    "weights": (FlowMatching, ROWS, flow, {"weight": WEIGHT}),
    "a noisy path": (lambda: FlowMatching(path="bridge"), ROWS, flow, {}),
    "a context left out": (
        lambda: FlowMatching(context_dropout=0.5), ROWS,
        lambda: flow(context=2, null_context=True), {"context": CONTEXT},
    ),
    "a fitted coupling": (lambda: FlowMatching(coupling=SEMIDISCRETE), ROWS, flow, {}),
    "a coupling of cells": (
        lambda: FlowMatching(coupling=SEMIDISCRETE | {"cells": 10}), ROWS,
        lambda: flow(context=2), {"context": CONTEXT},
    ),
    "both": (Joint, ROWS, flow, {"weight": WEIGHT}),
    "scales": (MultiscaleMatching, PICTURES, pictures, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_what_a_row_gets_is_the_same_on_any_number_of_processes(name):
    build, data, model, given = CASES[name]
    run = Training(build(), data, model, **given)
    assert run.trainer.objective.rowwise
    for step in (0, 3):
        expected, share = run.rows(step)
        assert len(run.trainer.learner._batches) >= 8 and share == 1
        for processes in (2, 3, 5):
            parts = [run.rows(step, rank, processes)[0] for rank in range(processes)]
            assert max(len(tensors_of(p)[0]) for p in parts) <= -(-SIZE // processes)
            together = (torch.cat(found) for found in zip(*map(tensors_of, parts), strict=True))
            assert equal(expected.map(lambda _, t=together: next(t)), expected)


def test_rows_of_all_shards_have_draws_of_their_own():
    rows, _ = Training(FlowMatching(), ROWS, flow).rows(2)
    assert len(rows.x0.unique()) == 2 * SIZE and len(rows.t.unique()) == SIZE


@pytest.mark.parametrize("name", ["probes", "both", "batches", "a dataset"])
def test_shares_of_weighted_rows_average_to_the_mean_of_the_batch(name):
    build, data, model, given = CASES[name]
    run = Training(build(), data, model, **given)
    run.rows(3)
    total = sum(batch.weight.sum().item() for batch in run.trainer.learner._batches)
    for processes in (2, 3):
        sums = []
        for rank in range(processes):
            share = run.rows(3, rank, processes)[1]
            assert share == pytest.approx(run.asked / MEAN, rel=1e-14)
            sums.append(run.asked)
        assert sum(sums) == pytest.approx(total, rel=1e-14)


class Noisy(Objective):
    """One of a user's, which says nothing of rows."""

    def prepare(self, module, batch, generator=None):
        return batch.but(x=batch.x + torch.randn(len(batch.x), 2, generator=generator))

    def __call__(self, module, batch, generator=None):
        return cnf.Loss(-module.log_prob(batch.x).mean(), {})


def twice(x0, x1, context=None, generator=None):
    """Each row of x1 with two of x0."""
    rows = torch.arange(len(x1))
    return Pairing(torch.cat([rows, rows.flip(0)]), torch.cat([rows, rows]))


WHOLE = {
    "more pairs than rows": (lambda: FlowMatching(coupling=twice), {}),
    "a pairing": (lambda: FlowMatching(coupling="minibatch-ot"), {}),
    "a weighted pairing": (lambda: FlowMatching(coupling="minibatch-ot"), {"weight": WEIGHT}),
    "a fitted coupling of weighted rows": (
        lambda: FlowMatching(coupling=SEMIDISCRETE), {"weight": WEIGHT},
    ),
    "one end time": (lambda: MaximumLikelihood(steer=0.5), {}),
    "a term that pairs": (lambda: Joint((FlowMatching(coupling="minibatch-ot"),), (1.0,)), {}),
    "a stranger's": (Noisy, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_not_made_row_by_row_is_made_of_the_whole_batch(name):
    build, given = WHOLE[name]
    run = Training(build(), ROWS, flow, **given)
    objective = run.trainer.objective
    assert not objective.rowwise
    run.rows(3)
    (batch,) = run.trainer.learner._batches
    prepared = objective.prepare(run.trainer.module, batch, stream(0, "step", 3))
    for rank in range(3):
        rows, share = run.rows(3, rank, 3)
        expected, weight = prepared.shared(rank, 3)
        assert equal(rows, expected) and share == weight


def test_a_batch_of_one_shard_is_drawn_from_the_stream_of_its_step(monkeypatch):
    monkeypatch.setattr(shards, "LEAST", {"cpu": 10 * SIZE})
    toy = cnf.data.toy("moons")
    run = Training(FlowMatching(), toy, flow)
    generator = stream(0, "step", 3)
    batch = Batch(toy.sample(SIZE, generator).double())
    expected = FlowMatching().prepare(run.trainer.module, batch, generator)
    assert equal(run.rows(3)[0], expected)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_a_process_reads_its_own_rows_only(processes):
    data, read = Items(), []
    run = Training(FlowMatching(), data, flow)
    for rank in range(processes):
        data.read.clear()
        run.rows(1, rank, processes)
        assert len(data.read) in (SIZE // processes, -(-SIZE // processes))
        read += data.read
    assert len(set(read)) == len(read) == SIZE


def test_a_process_draws_only_the_shards_that_hold_its_rows():
    data = Density()
    run = Training(FlowMatching(), data, flow)
    data.drawn.clear()
    run.rows(1, 1, 4)
    assert data.drawn == [5, 5]  # rows 10 to 19 of 41, in shards that begin with 10 and 15


def test_first_rows_are_whole_on_every_process(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "cnf.training.learner.Learner.initialize",
        lambda self, batch, generator: seen.append(batch.x),
    )
    run = Training(FlowMatching(), ROWS, flow)
    for rank, processes in ((0, 1), (0, 2), (1, 2)):
        run.rows(0, rank, processes)
    assert seen[0].shape == (SIZE, 2)
    assert all(torch.equal(x, seen[0]) for x in seen)


@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_shards_partition_a_batch_into_a_power_of_two(size):
    ranges = list(shards_of(size, 2, CPU).ranges.values())
    assert [row for rows in ranges for row in rows] == list(range(size))
    assert len(ranges).bit_count() == 1 and len(ranges) <= min(64, size)
    sizes = {len(rows) for rows in ranges}
    assert max(sizes) - min(sizes) <= 1


def test_only_a_large_batch_has_several_shards(monkeypatch):
    monkeypatch.undo()
    counts = {
        (size, numbers, device): len(shards_of(size, numbers, torch.device(device)).ranges)
        for size, numbers, device in (
            (1024, 2, "cpu"), (256, 63, "cpu"), (65_536, 2, "cpu"), (1024, 784, "cpu"),
            (10**6, 10, "cpu"), (65_536, 2, "cuda"), (8_192, 3_072, "cuda"),
        )
    }  # fmt: skip
    assert list(counts.values()) == [1, 1, 8, 8, 64, 1, 4]


def test_processes_without_a_row_are_refused():
    with pytest.raises(ValueError, match="at least 3 rows, one for each process"):
        one_shard(2).of_process(0, 3)


def test_a_run_of_several_shards_resumes_bit_for_bit(tmp_path, config, same):
    def train(callback=None, **settings):
        module, settings = flow(), config(batch_size=SIZE, checkpoint_seconds=1e-9, **settings)
        callbacks = [] if callback is None else [callback]
        cnf.fit(module, FlowMatching(), ROWS, settings, weight=WEIGHT, callbacks=callbacks)
        return module

    def fail(record):
        if record["step"] == 4:
            raise KeyError("disk")

    with pytest.raises(KeyError):
        train(fail, folder=tmp_path / "run")
    assert same(train(), train(folder=tmp_path / "run", resume=True))
