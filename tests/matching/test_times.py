"""Distributions of training times, against their densities."""

import math

import pytest
import torch

from cnf import Batch, FlowMatching
from cnf.matching import TIMES
from cnf.matching.times import LogitNormalTime, SkewedTime

F64 = torch.float64
U = (torch.arange(200_000, dtype=F64) + 0.5) / 200_000  # the quantiles: no sampling error


def test_uniform_times_equal_u():
    assert torch.equal(TIMES["uniform"]()(U), U)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 1.5, 3.0])
def test_skewed_times_have_the_stated_mean(exponent):
    # 1 - t = (1 - u)^e, so E[1 - t] = 1/(1 + e)
    mean = SkewedTime(exponent)(U).mean().item()
    assert mean == pytest.approx(1 - 1 / (1 + exponent), abs=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.8, 0.5), (-1.0, 2.0)])
def test_logit_normal_times_have_a_normal_logit(mean, std):
    logit = torch.logit(LogitNormalTime(mean, std)(U))
    assert logit.mean().item() == pytest.approx(mean, abs=1e-4)
    assert logit.std().item() == pytest.approx(std, rel=1e-3)
    below = (logit < mean + std).double().mean().item()
    assert below == pytest.approx(0.5 * (1 + math.erf(1 / math.sqrt(2))), abs=1e-4)


@pytest.mark.parametrize("name", TIMES)
def test_times_increase_with_u_within_the_unit_interval(name):
    t = TIMES[name]()(U)
    assert t.min() >= 0 and t.max() <= 1 and (t.diff() >= 0).all() and t.dtype == F64


@pytest.mark.parametrize("times", ["skewed", {"name": "skewed", "exponent": 3.0}, SkewedTime(3.0)])
def test_flow_matching_draws_its_times_from_the_distribution(times, small_flow, generator):
    flow, x = small_flow("cnf"), torch.randn(4000, 2, generator=generator, dtype=F64)
    batch = FlowMatching(times=times).prepare(flow, Batch(x), generator)
    exponent = 1.5 if times == "skewed" else 3.0
    expected = 1 - 1 / (1 + exponent)
    assert batch.t.mean().item() == pytest.approx(expected, abs=0.02)  # 4 standard errors


def test_parameters_out_of_range_are_refused():
    with pytest.raises(ValueError, match="Did you mean 'skewed'"):
        FlowMatching(times="skewd")
    with pytest.raises(ValueError, match="exponent > 0"):
        SkewedTime(0.0)
    with pytest.raises(ValueError, match="std > 0"):
        LogitNormalTime(std=-1.0)
