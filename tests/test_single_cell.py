"""The gaps between snapshots of experiments/single_cell, on cells whose answer is known."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent.parent / "experiments" / "single_cell"
SHIFT = torch.tensor([30.0, -40.0], dtype=torch.float64)  # of length 50


@pytest.fixture
def module():
    """The module experiments/single_cell/snapshots.py."""
    spec = importlib.util.spec_from_file_location("snapshots", FOLDER / "snapshots.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["snapshots"] = module  # where its dataclass looks for its annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["snapshots"]


@pytest.fixture
def cells(generator):
    """Cells that all move by the same shift at each time."""
    x = torch.randn(60, 2, generator=generator, dtype=torch.float64) * 5 + 100
    return [x, x + SHIFT, (x + 2 * SHIFT).flip(0)]


def test_held_out_snapshot_has_no_influence_on_what_is_seen(module, cells):
    first = module.gap(cells, 1, torch.Generator().manual_seed(0))
    cells[1] = cells[1] * 3 + 1
    second = module.gap(cells, 1, torch.Generator().manual_seed(0))
    assert sorted(first.seen) == [0, 2] and first.scale == second.scale
    assert all(torch.equal(first.seen[k], second.seen[k]) for k in (0, 2))
    assert not torch.equal(first.target, second.target)


def test_halves_are_disjoint_and_all_of_the_snapshot(module, cells):
    own = module.gap(cells, 1, torch.Generator().manual_seed(0))
    both = torch.cat([own.target, own.other])
    assert len(own.target) == len(own.other) == 30 and len(both.unique(dim=0)) == 60


def test_distance_is_in_the_units_of_the_data(module, cells):
    own = module.gap(cells, 1, torch.Generator().manual_seed(0))
    moved = own.target + (SHIFT / own.scale).float()
    assert own.distance(moved) == pytest.approx(50, rel=1e-5)
    with pytest.raises(ValueError, match=r"expected x of shape \(30, 2\)"):
        own.distance(moved[:-1])


def test_middle_of_exact_transport_pairs_is_the_middle_of_a_translation(module, cells, generator):
    """Of a translate the optimal plan is the translation: every middle is a held-out cell."""
    own = module.gap(cells, 1, torch.Generator().manual_seed(0))
    middle = module.transport_pairs(own, generator)
    held_out = torch.cat([own.target, own.other])
    assert torch.cdist(middle.double(), held_out.double()).amin(1).max() < 1e-6
    random = module.random_pairs(own, generator)  # spread by √(1/2) only, and of other cells
    assert torch.cdist(random, held_out).amin(1).max() > 1e-2
    assert random.std(0).max() < 0.9 * held_out.std(0).min()
    after = module.later(own, generator).mean(0) - module.earlier(own, generator).mean(0)
    torch.testing.assert_close(after.double() * own.scale, 2 * SHIFT, rtol=0.1, atol=2.0)


def test_ends_cannot_be_held_out(module, cells, generator):
    for time in (0, 2):
        with pytest.raises(ValueError, match=f"expected a time in 1 … 1, got {time}"):
            module.gap(cells, time, generator)
