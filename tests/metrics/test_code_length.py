"""Bits per dimension against exact masses of cells, and against published conventions."""

import itertools
import math

import pytest
import torch

import cnf
from cnf import Flow
from cnf.dequantization import UniformDequantization
from cnf.distributions import StandardNormal
from cnf.metrics import bits_per_dim, log_prob_of_draws
from cnf.transforms import Compose, Standardize, logit

F64 = torch.float64


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def normal_flow(levels=4):
    place = Standardize((2,))
    place.settle({"loc": torch.full((2,), 2.0), "scale": torch.full((2,), 1.5)}, F64)
    noise = UniformDequantization(levels)
    return Flow(StandardNormal((2,)), place, dequantization=noise).double()


def test_many_draws_give_the_code_length_of_the_cells():
    x = torch.tensor(list(itertools.product(range(4), repeat=2)), dtype=torch.uint8)
    cells = torch.special.ndtr((torch.arange(5, dtype=F64) - 2) / 1.5).diff()
    exact = -(cells.log2()[x.long()].sum(1) / 2).mean().item()
    bound = bits_per_dim(normal_flow(), x.repeat(500, 1), generator=draws())
    tight = bits_per_dim(normal_flow(), x, draws=4_000, generator=draws())
    assert tight.value == pytest.approx(exact, abs=1e-3)
    assert bound.value > exact + 5 * bound.error / 500**0.5 and bound.value < exact + 0.1


def test_many_draws_give_the_log_probability_of_each_picture():
    x = torch.tensor([[0, 3], [1, 2], [2, 2]], dtype=torch.uint8)
    cells = torch.special.ndtr((torch.arange(5, dtype=F64) - 2) / 1.5).diff()
    exact = cells.log()[x.long()].sum(1)
    found = log_prob_of_draws(normal_flow(), x, draws=4_000, generator=draws())
    assert found == pytest.approx(exact, abs=0.02)  # noise of 4,000 draws


def test_uniform_pixels_cost_all_their_bits_whatever_the_preprocessing():
    """The density 1/256 on [0, 256) has 8 bits per dimension, through the logit as well."""
    shape, alpha = (1, 4, 4), 0.05
    pixels = torch.randint(0, 256, (7, *shape), generator=draws(), dtype=torch.uint8)
    squash = logit(shape, alpha=alpha, levels=256)

    class UniformThroughLogit(cnf.distributions.Base):
        """What uniform pixels are after the logit."""

        def log_prob(self, z):
            _, ladj = squash(z)
            return ladj - 16 * math.log(256)

        def sample(self, sample_shape=(), generator=None):
            raise NotImplementedError

    noise = UniformDequantization()
    identity = Compose([cnf.transforms.PerPixel(cnf.transforms.Permutation(1))])
    flow = Flow(UniformThroughLogit(shape), identity, squash, noise).double()
    found = bits_per_dim(flow, pixels, draws=3, chunk=2, generator=draws())
    assert found.value == pytest.approx(8, abs=1e-9) and found.error < 1e-9


def test_chunks_and_modes_change_nothing_and_contexts_do(randomized):
    body = cnf.models.realnvp(2, layers=2, hidden=(8,), context=1)
    flow = Flow(None, body.transform, dequantization=UniformDequantization(4), event_shape=(2,))
    flow = randomized(flow).train()
    x = torch.randint(0, 4, (9, 2), generator=draws())
    context = torch.randn(9, 1, generator=draws(), dtype=F64)
    one = bits_per_dim(flow, x, context, chunk=9, generator=draws(1))
    many = bits_per_dim(flow, x, context, chunk=4, generator=draws(1))
    assert one.value == pytest.approx(many.value, rel=1e-12) and flow.training
    assert one.value != bits_per_dim(flow, x, -context, generator=draws(1)).value


@pytest.mark.parametrize(
    ("x", "context", "words"),
    [
        (torch.zeros(4, 2).numpy(), None, r"a torch.Tensor, got ndarray; write torch.as_tensor"),
        (torch.zeros(2), None, r"x of shape \(N, 2\), got \(2,\)"),
        (torch.zeros(0, 2), None, r"x of shape \(N, 2\), got \(0, 2\)"),
        (torch.zeros(4, 2), torch.zeros(8, 1), r"context of shape \(4, C\), .*got \(8, 1\)"),
        (torch.zeros(4, 2), [[1.0]] * 4, r"context to be a torch.Tensor, got list"),
        (torch.zeros(4, 2), torch.zeros(1), r"context of shape \(4, C\), .*got \(1,\)"),
    ],
)
@pytest.mark.parametrize("function", [bits_per_dim, log_prob_of_draws])
def test_other_things_than_rows_of_pictures_are_refused(function, x, context, words):
    size = 0 if context is None else 1
    body = cnf.models.realnvp(2, layers=1, hidden=(4,), context=size)
    flow = Flow(None, body.transform, dequantization=UniformDequantization(4), event_shape=(2,))
    with pytest.raises(ValueError, match=f"^{function.__name__}: expected .*{words}"):
        function(flow, x, context, chunk=4)


def test_density_without_dequantization_has_no_bits():
    with pytest.raises(TypeError, match="without dequantization.*dequantization='uniform'"):
        bits_per_dim(cnf.models.realnvp(2), torch.zeros(3, 2))
    for function in (bits_per_dim, log_prob_of_draws):
        with pytest.raises(ValueError, match=f"^{function.__name__}: expected draws > 0, got 0"):
            function(normal_flow(), torch.zeros(3, 2), draws=0)


def test_estimated_traces_give_the_bits_of_exact_ones_on_average(randomized):
    flow = cnf.models.ffjord(
        shape=(1, 4, 4), hidden=(3,), solver=cnf.Solver("rk4", steps=2), dequantization="uniform"
    )
    flow = randomized(flow, 0.3)
    x = torch.randint(0, 256, (1, 1, 4, 4), generator=draws())
    exact = bits_per_dim(flow, x, generator=draws(1)).value
    one, many = (
        bits_per_dim(
            flow, x, divergence=cnf.Hutchinson(probes, generator=draws(2)), generator=draws(1)
        ).value
        for probes in (1, 4_000)
    )
    assert 0 < abs(many - exact) < abs(one - exact) / 10
