"""Probability paths."""

import pytest
import torch

from cnf.matching import PATHS, Linear

F64 = torch.float64
CASES = {name: PATHS[name] for name in PATHS} | {"linear, σ = 0.1": lambda: Linear(0.1)}


@pytest.fixture(params=[(5, 2), (4, 1, 3, 3)], ids=str)
def pair(request, generator):
    shape = request.param
    return [torch.randn(shape, generator=generator, dtype=F64) for _ in range(2)]


@pytest.mark.parametrize("name", CASES)
def test_velocity_is_time_derivative_of_path(name, pair, generator):
    path, (x0, x1) = CASES[name](), pair
    t = 0.05 + 0.9 * torch.rand(len(x0), generator=generator, dtype=F64)
    sample = path.sample(x0, x1, t)
    _, derivative = torch.func.jvp(
        lambda s: path.sample(x0, x1, s).xt, (t,), (torch.ones_like(t),)
    )
    torch.testing.assert_close(sample.ut, derivative, rtol=1e-10, atol=1e-10)
    assert torch.equal(sample.t, t) and sample.xt.shape == sample.ut.shape == x0.shape
    assert derivative.abs().max() > 0.1 and sample.xt.dtype == F64


@pytest.mark.parametrize("name", PATHS)
def test_path_runs_from_x0_to_x1(name, pair):
    path, (x0, x1) = PATHS[name](), pair
    ends = [path.sample(x0, x1, torch.full((len(x0),), t, dtype=F64)).xt for t in (0.0, 1.0)]
    torch.testing.assert_close(ends[0], x0, rtol=0, atol=1e-6)
    torch.testing.assert_close(ends[1], x1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", PATHS)
def test_each_row_has_its_own_time(name, pair):
    path, (x0, x1) = PATHS[name](), pair
    t = torch.linspace(0.1, 0.9, len(x0), dtype=F64)
    whole = path.sample(x0, x1, t)
    for k in range(len(x0)):
        one = path.sample(x0[k : k + 1], x1[k : k + 1], t[k : k + 1])
        torch.testing.assert_close(whole.xt[k], one.xt[0])
        torch.testing.assert_close(whole.ut[k], one.ut[0])


def test_linear_by_hand():
    x0, x1 = torch.tensor([[1.0, -2.0]], dtype=F64), torch.tensor([[5.0, 2.0]], dtype=F64)
    t = torch.tensor([0.25], dtype=F64)
    _, xt, ut = Linear().sample(x0, x1, t)
    assert xt.tolist() == [[2.0, -1.0]] and ut.tolist() == [[4.0, 4.0]]
    _, xt, ut = Linear(0.5).sample(x0, x1, t)
    assert xt.tolist() == [[2.125, -1.25]] and ut.tolist() == [[4.5, 3.0]]


def test_linear_leaves_sigma_of_x0_at_the_end(pair):
    x0, x1 = pair
    xt = Linear(0.1).sample(x0, x1, torch.ones(len(x0), dtype=F64)).xt
    torch.testing.assert_close(xt, x1 + 0.1 * x0)
