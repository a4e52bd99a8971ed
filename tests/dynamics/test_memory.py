"""Memory that a solve saves for its backward pass, and the choice of gradient="auto"."""

import gc
import weakref
from contextlib import contextmanager

import pytest
import torch

import cnf
from cnf.dynamics import Solver, record
from cnf.dynamics.ode import GIB
from cnf.errors import SolverError
from cnf.fields import MLPField
from cnf.metrics.error_bars import log_prob_with_error
from cnf.transforms import Compose, Continuous, Planar, Sylvester

F64 = torch.float64


class SavedMemory:
    """Bytes that autograd holds: now, and at peak."""

    def __init__(self):
        self.now = self.peak = self.count = 0

    def pack(self, tensor):
        # Detached: a node's own result, held by the node, would be a cycle that outlives it.
        saved, size = _Saved(tensor if tensor.is_leaf else tensor.detach()), tensor.nbytes
        self.now, self.count = self.now + size, self.count + 1
        self.peak = max(self.peak, self.now)
        weakref.finalize(saved, self._drop, size)
        return saved

    def _drop(self, size):
        self.now -= size


class _Saved:
    def __init__(self, held):
        self.held = held


@contextmanager
def saved_memory():
    memory = SavedMemory()
    with torch.autograd.graph.saved_tensors_hooks(memory.pack, lambda saved: saved.held):
        yield memory


@pytest.fixture
def run(randomized, generator):
    """Solver → gradients of a small flow."""
    field = randomized(MLPField(2, (16, 16)))
    x = torch.randn(64, 2, generator=generator, dtype=F64)

    def run(solver, create_graph=False):
        value, ladj = Continuous(field, solver).inverse(x)
        loss = value.square().sum() + ladj.sum()
        return torch.autograd.grad(loss, list(field.parameters()), create_graph=create_graph)

    return run


@pytest.fixture
def backprop_memory(run):
    """Steps → bytes of backprop's graph."""

    def backprop_memory(steps):
        with saved_memory() as memory:
            run(Solver("rk4", steps=steps, gradient="backprop"))
        return memory.peak

    return backprop_memory


def test_memory_grows_with_steps_for_backprop_and_with_a_segment_for_checkpoint(
    run, backprop_memory
):
    peaks = {}
    for segments in (1, 4, 8):
        solver = Solver("rk4", steps=64, gradient="checkpoint", segments=segments)
        with saved_memory() as memory:
            run(solver)
        peaks[segments] = memory.peak
    assert backprop_memory(64) == pytest.approx(8 * backprop_memory(8), rel=0.05)
    assert peaks[4] < 1.2 * peaks[1] / 4 and peaks[8] < 1.3 * peaks[1] / 8  # and the ends
    assert peaks[1] == pytest.approx(backprop_memory(64), rel=0.05)


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_memory_of_the_adjoint_does_not_depend_on_tolerance(method, run):
    found = []
    for tolerance in (1e-2, 1e-6):
        solver = Solver(method, rtol=tolerance, atol=tolerance, gradient="adjoint")
        with record() as stats, saved_memory() as memory:
            run(solver)
        found.append((memory.peak, stats.forward))
    assert found[0][0] == found[1][0] and found[1][1] > 3 * found[0][1]


def test_number_of_tensors_saved_by_the_adjoint_does_not_depend_on_tolerance(
    randomized, generator
):
    field = randomized(MLPField(2, (16, 16)))
    counts = []
    for tolerance in (1e-3, 1e-9):
        transform = Continuous(field, Solver(rtol=tolerance, atol=tolerance, gradient="adjoint"))
        with saved_memory() as memory:
            transform.inverse(torch.ones(4, 2, dtype=F64))
        counts.append(memory.count)
    assert counts[0] == counts[1]


def solver_with_limit(share, steps, backprop_memory, **options):
    """A solver with that share of backprop's bytes to spend."""
    return Solver("rk4", steps=steps, memory=share * backprop_memory(steps) / GIB, **options)


def test_auto_is_backprop_if_the_graph_fits(run, backprop_memory):
    solver = solver_with_limit(1.2, 8, backprop_memory)
    with record() as stats:
        ours = run(solver)
    assert (stats.forward, stats.backward) == (32, 0)
    assert_same(ours, run(Solver("rk4", steps=8, gradient="backprop")))


def test_auto_is_checkpoint_if_a_segment_fits(run, backprop_memory):
    solver = solver_with_limit(0.5, 8, backprop_memory)
    with record() as stats:
        ours = run(solver)
    assert stats.backward == 32 and 32 < stats.forward <= 36  # and what showed that it does not
    assert_same(ours, run(Solver("rk4", steps=8, gradient="checkpoint")))
    assert run(solver, create_graph=True)[0].requires_grad


def test_auto_is_adjoint_if_no_segment_fits(run, backprop_memory):
    solver = solver_with_limit(0.02, 8, backprop_memory)
    with record() as stats:
        ours = run(solver)
    assert stats.backward == 32
    assert_same(ours, run(Solver("rk4", steps=8, gradient="adjoint")))
    with pytest.raises(RuntimeError, match="first derivatives only"):
        run(solver, create_graph=True)


def test_auto_is_adjoint_for_adaptive_methods_above_the_limit(run, backprop_memory):
    tight = {"rtol": 1e-7, "atol": 1e-7}
    ours = run(
        Solver(memory=backprop_memory(1) / GIB, **tight)
    )  # four evaluations of some hundred
    assert_same(ours, run(Solver(gradient="adjoint", **tight)))
    assert_same(run(Solver(**tight)), run(Solver(gradient="backprop", **tight)))
    apart = max((a - b).abs().max() for a, b in zip(ours, run(Solver(**tight)), strict=True))
    assert 0 < apart < 1e-3  # both right, and not the same


def assert_same(one, other):
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_auto_respects_the_memory_limit(run, backprop_memory):
    for share in (0.9, 0.3, 0.02):
        solver = solver_with_limit(share, 64, backprop_memory)
        with saved_memory() as memory:
            run(solver)
        assert memory.peak < 1.3 * share * backprop_memory(
            64
        )  # the first evaluation, and the ends


def live_tensors():
    """Tensors that are alive, and the storages that they hold; without the fake ones that tests
    before have compiled with, which hold nothing."""
    gc.collect()
    found = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    return len(found), len({tensor.untyped_storage().data_ptr() for tensor in found})


def assert_graph_is_freed(call):
    call()  # what is made once
    before = live_tensors()
    for _ in range(3):
        call()
    assert live_tensors() == before


METHODS = {"fixed": {"method": "rk4", "steps": 2}, "adaptive": {"rtol": 0.1, "atol": 0.1}}
MODES = {
    "backprop": {"gradient": "backprop"},
    "checkpoint": {"gradient": "checkpoint", "segments": 2},
    "adjoint": {"gradient": "adjoint"},
    "auto": {},
    "auto, outgrown": {"memory": 1e-9},
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_graph_is_freed_with_and_without_backward(method, mode, small_flow):
    solver = Solver(**METHODS[method], **MODES[mode])
    flow = small_flow("cnf", hidden=(4,), context=1, solver=solver)
    x, context = (torch.ones(3, size, dtype=F64, requires_grad=True) for size in (2, 1))

    def use():
        flow.log_prob(x, 2 * context)
        flow.log_prob(x, context, divergence="hutchinson")
        flow.log_prob(x, context).sum().backward(inputs=[x])
        flow.sample_and_log_prob(3, context)
        flow.trajectory(2 * x, [0.0, 0.5, 1.0], context)
        if mode in ("backprop", "checkpoint", "auto"):
            torch.autograd.grad(flow.log_prob(x, context).sum(), x, create_graph=True)
        failing = flow.with_solver(Solver(max_nfe=5, **MODES[mode]))
        with pytest.raises(SolverError, match="too many evaluations"):
            failing.log_prob(x, context)

    assert_graph_is_freed(use)


@pytest.mark.filterwarnings("ignore:.*by twice the steps")  # two Euler steps, for speed
@pytest.mark.parametrize("name", ["ffjord", "rnode", "otflow"])
def test_graph_is_freed_for_every_field(name, small_flow):
    flow = small_flow(name, solver=Solver("euler", steps=2))
    x = torch.ones(3, 2, dtype=F64, requires_grad=True)
    objective, batch = cnf.MaximumLikelihood(), cnf.Batch(x.detach())

    def use():
        log_prob_with_error(flow, x)
        objective(flow, batch)
        objective(flow, batch).value.backward()

    assert_graph_is_freed(use)


def test_graph_of_recomputed_layers_is_freed(randomized):
    layers = [Planar(2), Sylvester(2, 1)]
    stack = randomized(Compose(layers, recompute=True))
    x = torch.ones(3, 2, dtype=F64, requires_grad=True)

    def use():
        stack.inverse(x)
        stack(x)[1].sum().backward(inputs=[x])

    assert_graph_is_freed(use)
