"""Couplings: properties of every one of them."""

import pytest
import torch

from cnf.matching import COUPLINGS, Pairing

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:.* ignores the context")


def rows(index, n):
    return torch.arange(n) if index is None else index


@pytest.fixture
def data(generator):
    x0 = torch.randn(16, 2, generator=generator, dtype=F64)
    x1 = torch.randn(16, 2, generator=generator, dtype=F64) + 3
    context = torch.randn(16, 1, generator=generator, dtype=F64)
    return x0, x1, context


@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize("name", COUPLINGS)
def test_indices_are_rows_and_pairs_are_of_one_length(name, with_context, data, generator):
    x0, x1, context = data
    i, j, weight = COUPLINGS.build(name)(x0, x1, context if with_context else None, generator)
    i, j = rows(i, 16), rows(j, 16)
    assert len(i) == len(j) > 0
    for index in (i, j):
        assert index.dtype == torch.int64 and index.min() >= 0 and index.max() < 16
    if weight is not None:
        assert weight.shape == i.shape and (weight >= 0).all() and weight.sum() > 0


@pytest.mark.parametrize("name", COUPLINGS)
def test_same_generator_gives_same_pairs_and_global_state_is_left_alone(name, data):
    before = torch.get_rng_state()
    first, again = (
        COUPLINGS.build(name)(*data, torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(torch.get_rng_state(), before)
    for one, other in zip(first, again, strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.parametrize("name", COUPLINGS)
def test_inputs_are_not_modified(name, data, generator):
    before = [value.clone() for value in data]
    COUPLINGS.build(name)(*data, generator)
    assert all(torch.equal(a, b) for a, b in zip(data, before, strict=True))


def test_independent_pairs_rows_in_order(data):
    assert COUPLINGS["independent"](*data) == Pairing(None, None, None)


def test_independent_refuses_unequal_numbers(data):
    with pytest.raises(ValueError, match="as many x0 as x1, got 16 and 15"):
        COUPLINGS["independent"](data[0], data[1][:15])


@pytest.mark.parametrize("name", COUPLINGS)
@pytest.mark.parametrize("sizes", [(0, 0), (0, 4), (4, 0)])
def test_every_coupling_refuses_empty_inputs_with_the_same_message(name, sizes):
    x0, x1 = (torch.zeros(n, 2) for n in sizes)
    with pytest.raises(ValueError, match="expected one row of x0 and of x1 or more, got"):
        COUPLINGS.build(name)(x0, x1)


@pytest.mark.parametrize("name", COUPLINGS)
def test_events_of_different_shapes_are_refused(name):
    with pytest.raises(ValueError, match=r"one event shape, got \(2,\) and \(3,\)"):
        COUPLINGS.build(name)(torch.zeros(4, 2), torch.zeros(4, 3))


DRAWN = {"sinkhorn", "unbalanced", "partial"}  # pairs are drawn from a plan of any shape


@pytest.mark.parametrize("name", COUPLINGS)
@pytest.mark.parametrize("sizes", [(5, 3), (3, 5)])
def test_unequal_sizes_are_paired_or_refused_with_the_same_message(name, sizes, generator):
    x0, x1 = (torch.randn(n, 2, generator=generator) for n in sizes)
    options = (
        {"reg": 0.5} if name == "unbalanced" else {}
    )  # POT's iteration ends with more entropy
    coupling = COUPLINGS.build({"name": name, **options})
    if name not in DRAWN:
        message = f"expected as many x0 as x1, got {sizes[0]} and {sizes[1]}"
        with pytest.raises(ValueError, match=message):
            coupling(x0, x1, generator=generator)
        return
    pairing = coupling(x0, x1, generator=generator)
    assert len(pairing.j) == sizes[0]
    assert 0 <= pairing.j.min() and pairing.j.max() < sizes[1]


def test_conditional_ot_requires_a_context_for_each_row(generator):
    x0, x1 = (torch.randn(4, 2, generator=generator) for _ in range(2))
    with pytest.raises(ValueError, match="a context for each of 4 rows, got 3"):
        COUPLINGS["conditional-ot"](x0, x1, torch.zeros(3, 1))
