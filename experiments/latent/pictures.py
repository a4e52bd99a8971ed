"""Grids of pictures between two, and along an attribute, one row for each space."""

from pathlib import Path

import torch
from attributes import ATTRIBUTES, OPERATIONS
from matplotlib.figure import Figure
from questions import WAYS, Line, along, chosen, directions, measured, pairs_of
from spaces import Options, Pictures, Space
from torch import Tensor

from cnf.data import image_grid
from cnf.random import stream

COLUMNS = 7


def draw(
    spaces: dict[str, Space], data: Pictures, seed: int, config: Options, folder: Path
) -> None:
    """Write interpolation.webp and arithmetic.webp.

    Args:
        spaces: By name.
        data: As of the questions.
        seed: As of the questions.
        config: All of config.yaml.
        folder: Where they are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pairs = pairs_of(data.test, config["pairs"], seed)
    for way in WAYS:
        grids = {}
        for index in (0, 1, len(pairs.first) // 2, len(pairs.first) // 2 + 1):
            title = f"{pairs.digits[index]} to {pairs.ends[index]}, {way}"
            ends = pairs.first[index : index + 1], pairs.last[index : index + 1]
            grids[title] = {name: between(space, *ends, way) for name, space in spaces.items()}
        save(grids, folder / f"interpolation-{way}.webp")
    learned, moved = chosen(data, seed, config)
    assert learned.labels is not None
    known, scale = measured(learned.x), measured(learned.x).std(0)
    strengths = torch.linspace(-2, 2, COLUMNS)
    grids = {f"{name}, {k}": {} for name in ATTRIBUTES for k in ("a", "b")}
    few, rows = slice(config["calibrated"]), (0, 3)
    for name, space in spaces.items():
        noise = stream(seed, "noise of attributes")
        codes, start = space.encode(learned.x, noise), space.encode(moved.x, noise)
        basis = directions(codes, known, learned.labels)
        for index, attribute in enumerate(ATTRIBUTES):
            line = Line(codes[few], start, along(space, basis[index]))
            gain = line.gain(index, scale[index].item())
            for row, k in zip(rows, ("a", "b"), strict=True):
                begin = start[row].expand(COLUMNS, -1)
                made = line.apply(begin, (strengths * scale[index] / gain).float())
                grids[f"{attribute}, {k}"][name] = made
    for index, attribute in enumerate(ATTRIBUTES):
        line = Line(learned.x[few].float(), moved.x.float(), OPERATIONS[attribute])
        gain = line.gain(index, scale[index].item())
        for row, k in zip(rows, ("a", "b"), strict=True):
            begin = moved.x[row].float().expand(COLUMNS, -1, -1, -1)
            made = line.apply(begin, strengths * scale[index] / gain)
            grids[f"{attribute}, {k}"]["scipy's operation"] = made
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
