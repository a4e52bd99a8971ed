"""Fixtures for training: tiny budgets, small repeatable flows, modules that fail."""

import functools
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import cnf
from cnf.objectives import Objective
from cnf.registry import options_of
from tests.training.process_runs import launch

FIXED = cnf.Solver("rk4", steps=2, gradient="backprop")


@pytest.fixture(autouse=True)
def one_thread():
    """Bit-for-bit repetition is promised for a fixed number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small():
    """(name) → a small model with the same first weights every time."""

    def build(name="cnf", **options):
        state = torch.random.get_rng_state()
        torch.manual_seed(7)
        options = {"dim": 2, **options}
        if "hidden" in options_of(cnf.models.MODELS[name]):
            options.setdefault("hidden", (8,))
        if name == "cnf":
            options.setdefault("solver", FIXED)
        flow = cnf.models.build(name, **options)
        torch.random.set_rng_state(state)
        return flow

    return build


@pytest.fixture
def points():
    """100 rows of distinct numbers."""
    return torch.randn(100, 2, generator=torch.Generator().manual_seed(3)) * 2 + 1


@pytest.fixture
def same():
    """Whether two modules, or a module and a state dict, have bitwise the same weights."""

    def compare(a, b):
        a, b = (m.state_dict() if isinstance(m, nn.Module) else m for m in (a, b))
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    return compare


class Square(Objective):
    """Mean of |net(x)|², whatever the net; remembers the rows it was given."""

    def __init__(self):
        self.batches, self.contexts = [], []

    def prepare(self, module, batch, generator=None):
        return batch

    def __call__(self, module, batch, generator=None):
        if torch.is_grad_enabled():
            self.batches.append(batch.x)
            self.contexts.append(batch.context)
        value = module(batch.x).square().mean()
        return cnf.Loss(value, {"square": value.detach()})


@pytest.fixture
def square():
    return Square()


class Broken(Objective):
    """The gradient is NaN in the steps given."""

    def __init__(self, bad_steps):
        self.bad_steps, self.step = set(bad_steps), 0

    def prepare(self, module, batch, generator=None):
        return batch

    def __call__(self, module, batch, generator=None):
        value = module(batch.x).square().mean()
        if torch.is_grad_enabled():
            value = value * float("nan") if self.step in self.bad_steps else value
            self.step += 1
        return cnf.Loss(value, {})


@pytest.fixture
def broken():
    return Broken


class ActingData:
    """Density or batches that do something at one step: raise, or press Ctrl-C."""

    def __init__(self, inner, at, action):
        self.inner, self.at, self.action, self.calls = inner, at, action, 0

    def act(self):
        if self.calls == self.at:
            self.action()
        self.calls += 1


class ActingDensity(ActingData):
    dim = 2

    def log_prob(self, x):
        return self.inner.log_prob(x)

    def sample(self, n, generator=None):
        if n == 16:  # a training batch, neither the held-out draw nor preprocessing's
            self.act()
        return self.inner.sample(n, generator)


class ActingRows(ActingData, torch.utils.data.Dataset):
    def __len__(self):
        return len(self.inner)

    def __getitem__(self, row):
        self.act()
        return self.inner[row]


class ActingBatches(ActingData):
    def __iter__(self):
        for batch in self.inner:
            self.act()
            yield batch


@pytest.fixture
def acting_data():
    """(kind, action) → (data, the same data without the action), the action near step 4."""
    toy = cnf.data.toy("moons")
    rows = torch.randn(100, 2, generator=torch.Generator().manual_seed(3))

    def make(kind, action):
        if kind == "toy":
            return ActingDensity(toy, 3, action), ActingDensity(toy, -1, None)
        if kind == "rows":
            head = 100  # the held-out rows and those preprocessing is fitted to
            return ActingRows(rows, head + 3 * 16, action), ActingRows(rows, -1, None)
        batches = list(rows[:96].split(16))
        return ActingBatches(batches, 1 + 3, action), ActingBatches(batches, -1, None)

    return make


@pytest.fixture
def in_processes(monkeypatch):
    """(count, work) → what work(fabric) gave, or raised, in each thread in place of a process."""

    def run(count, work):
        parts, mine = [None] * count, threading.local()
        barrier = threading.Barrier(count, timeout=5)  # who waits for one that has gone, fails

        def gather(found, own):
            parts[mine.rank] = own
            barrier.wait()
            found[:] = parts
            barrier.wait()

        def process(rank):
            mine.rank = rank
            try:
                return work(SimpleNamespace(global_rank=rank, world_size=count))
            except Exception as error:
                return error

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        with ThreadPoolExecutor(count) as pool:
            return list(pool.map(process, range(count)))

    return run


@pytest.fixture(scope="session")
def launched(tmp_path_factory):
    """(kind, launcher) → the folder of the runs of `process_runs.py`, and the lines that their
    processes printed; each is started once."""

    @functools.cache
    def start(kind, launcher):
        folder = tmp_path_factory.mktemp(f"{kind}-{launcher}")
        return folder, launch(kind, folder, launcher)

    return start
