"""Named streams: what determines their draws, and that no two uses share one."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

import cnf
from cnf.random import device_of, draw, stream, stream_seed


def test_stream_is_determined_by_seed_purpose_and_place():
    streams = {
        (seed, purpose, place): tuple(
            torch.rand(4, generator=stream(seed, purpose, *place)).tolist()
        )
        for seed in (0, 1, -1, 2**62)
        for purpose in ("step", "epoch", "split")
        for place in ((), (0,), (1,), (1, 0), (0, 1), (2**40,))
    }
    assert len(set(streams.values())) == len(streams)
    again = torch.rand(4, generator=stream(-1, "epoch", 0, 1)).tolist()
    assert again == list(streams[-1, "epoch", (0, 1)])


def test_seeds_equal_those_of_numpys_seed_sequence():
    # From np.random.SeedSequence(3, spawn_key=(binascii.crc32(b"step"), 7)), NumPy 2.
    assert stream_seed(3, "step", 7) == 4235343752


def test_streams_of_consecutive_steps_are_uncorrelated():
    drawn = torch.stack([torch.randn(20_000, generator=stream(0, "step", k)) for k in range(8)])
    correlation = torch.corrcoef(drawn) - torch.eye(8)
    assert correlation.abs().max() < 4 / 20_000**0.5


def test_no_purpose_of_a_stream_is_used_twice():
    """Each use has a name of its own, so that nothing repeats another module's draws."""
    source = [path.read_text() for path in Path(cnf.__file__).parent.rglob("*.py")]
    called = re.compile(r"""\b(?:stream|stream_seed)\([^()]*?,\s*["']([^"']+)["']""")
    purposes = Counter(name for text in source for name in called.findall(text))
    assert len(purposes) > 10
    assert [name for name, count in purposes.items() if count > 1] == []


def test_draws_without_a_generator_are_made_where_they_go():
    like = torch.empty(0, device="meta")
    assert device_of(None, like) == like.device
    assert device_of(torch.Generator(), like) == torch.device("cpu")
    assert device_of(None) is None


@pytest.mark.parametrize("sampler", [torch.rand, torch.randn])
def test_draw_has_the_dtype_and_the_numbers_of_its_generator(sampler):
    like = torch.empty(0, dtype=torch.float64)
    drawn = draw(sampler, (5, 2), stream(0, "test"), like=like)
    expected = sampler(5, 2, generator=stream(0, "test"), dtype=torch.float64)
    assert torch.equal(drawn, expected)
    torch.manual_seed(3)
    without = draw(sampler, (5,), None, like=like)
    torch.manual_seed(3)
    assert torch.equal(without, sampler(5, dtype=torch.float64))
