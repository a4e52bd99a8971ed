"""Grids of pictures between two, and along an attribute, one row for each space."""

from pathlib import Path

import torch
from attributes import ATTRIBUTES, OPERATIONS
from matplotlib.figure import Figure
from questions import WAYS, along, chosen, directions, measured, pairs_of
from spaces import Options, Pictures, Space
from torch import Tensor

from cnf.data import image_grid
from cnf.random import stream

COLUMNS = 7
SHOWN = [0, 3]  # of the moved pictures
LEARNED = 700  # training pictures whose codes give the directions: enough for a picture


def draw(
    spaces: dict[str, Space],
    gains: dict[tuple[str, str], float],
    data: Pictures,
    seed: int,
    config: Options,
    folder: Path,
) -> None:
    """Write interpolation-linear.webp, interpolation-arc.webp and arithmetic.webp.

    Args:
        spaces: By name.
        gains: By name of a space, or "operations", and of an attribute: as `arithmetic` found.
        data: As of the questions.
        seed: As of the questions.
        config: All of config.yaml.
        folder: Where they are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pairs = pairs_of(data.test, config["pairs"], seed)
    half = len(pairs.first) // 2
    for way in WAYS:
        grids = {}
        for index in (0, 1, half, half + 1):
            title = f"{pairs.digits[index]} to {pairs.ends[index]}, {way}"
            ends = pairs.first[index : index + 1], pairs.last[index : index + 1]
            grids[title] = {name: between(space, *ends, way) for name, space in spaces.items()}
        save(grids, folder / f"interpolation-{way}.webp")
    learned, moved = chosen(data, seed, {**config, "directions": LEARNED})
    assert learned.labels is not None
    known, scale = measured(learned.x), measured(learned.x).std(0)
    shown = moved.x[SHOWN]
    grids = {f"{attribute}, {row}": {} for attribute in ATTRIBUTES for row in "ab"}
    for name in [*spaces, "operations"]:
        start, applied = shown.float(), list(OPERATIONS.values())
        if name in spaces:
            noise, space = stream(seed, "noise of attributes"), spaces[name]
            codes, start = space.encode(learned.x, noise), space.encode(shown, noise)
            basis = directions(codes, known, learned.labels)
            applied = [along(space, direction) for direction in basis]
        for index, attribute in enumerate(ATTRIBUTES):
            amounts = torch.linspace(-2, 2, COLUMNS) * scale[index] / gains[name, attribute]
            for row, begin in zip("ab", start, strict=True):
                repeated = begin.expand(COLUMNS, *begin.shape)
                grids[f"{attribute}, {row}"][name] = applied[index](repeated, amounts)
    save(grids, folder / "arithmetic.webp")


def between(space: Space, first: Tensor, last: Tensor, way: str) -> Tensor:
    noise = stream(0, "noise of a grid")
    a, b = space.encode(first, noise), space.encode(last, noise)
    shares = torch.linspace(0, 1, COLUMNS).tolist()
    return space.decode(torch.cat([WAYS[way](a, b, share) for share in shares]))


def save(grids: dict[str, dict[str, Tensor]], path: Path) -> None:
    """A row of grids, each with a row for every space."""
    names = list(next(iter(grids.values())))
    figure = Figure((2.1 * len(grids) + 1.2, 0.3 * len(names) + 0.3), layout="constrained")
    axes = figure.subplots(1, len(grids), squeeze=False)[0]
    for ax, (title, rows) in zip(axes, grids.items(), strict=True):
        grid = image_grid(torch.cat([rows[name] for name in names]), 256, COLUMNS)
        ax.imshow(grid, cmap="gray", vmin=0, vmax=255)
        ax.set_title(title, fontsize=8)
        side = grid.shape[0] / len(names)
        labels = names if ax is axes[0] else [""] * len(names)
        ax.set_yticks([side * (k + 0.5) for k in range(len(names))], labels, fontsize=8)
        ax.set_xticks([])
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    figure.savefig(path, dpi=150, pil_kwargs={"quality": 80, "method": 6})
