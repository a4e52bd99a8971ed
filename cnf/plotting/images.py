"""Pictures that flows have learned to draw, beside true ones."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cnf.data import Images, image_grid
from cnf.data.arrays import as_numbers
from cnf.errors import expect_counts, is_whole
from cnf.flow import Flow
from cnf.plotting.axes import attempt, new_figure, say_failed
from cnf.plotting.style import styled

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 2.6  # of a grid, in inches


def plot_images(data: Images, flows: Mapping[str, Flow], count: int = 64) -> "Figure":
    """Grids of true pictures and of each flow's samples.

    Args:
        data: The pictures; a conditional flow draws under the contexts of those that are shown.
        flows: Title → flow.
        count: Pictures in each grid.

    Returns:
        The figure.
    """
    generator = torch.Generator().manual_seed(0)
    true = data.take(data.draw(count, generator))
    drawn = {title: attempt(_samples, flow, true, generator) for title, flow in flows.items()}
    return _grids({"Your pictures": true.x, **drawn}, data.levels)


def plot_nearest(
    data: Images, flows: Mapping[str, Flow], count: int = 6, neighbors: int = 5
) -> "Figure":
    """Each flow's samples, and beside each of them the training pictures nearest to it.

    A sample that equals a picture was memorized. Distances are Euclidean, of pixels.

    Args:
        data: The pictures that the flows were trained on; a conditional flow draws under the
            contexts of some of them.
        flows: Title → flow.
        count: Samples of each flow, one in a row.
        neighbors: Training pictures beside each.

    Returns:
        The figure.
    """
    generator = torch.Generator().manual_seed(0)
    like = data.take(data.draw(count, generator))

    def rows(flow: Flow) -> Tensor:
        drawn = _samples(flow, like, generator)
        beside = data.x[nearest(drawn, data.x, neighbors)]
        return torch.cat([drawn[:, None], beside.to(drawn)], 1).flatten(0, 1)

    made = {f"{title}, then nearest": attempt(rows, flow) for title, flow in flows.items()}
    return _grids(made, data.levels, 1 + neighbors)


def plot_interpolations(
    data: Images, flows: Mapping[str, Flow], pairs: Any = 6, steps: int = 7
) -> "Figure":
    """Pictures between pairs of true ones: decoded from an arc between their codes z.

    On the arc from one code to the other the length of z changes evenly, so that it stays that of
    noise, which it would not on the straight line.

    Args:
        data: The pictures; with a conditional flow all of a row are under the first one's context.
        flows: Title → flow.
        pairs: How many pairs are drawn, one in a row; or pairs of one's own, as numbers of rows of
            the data, such as [(3, 17), (4, 2)].
        steps: Pictures in a row, with both ends; 2 or more.

    Returns:
        The figure.

    Raises:
        ValueError: There are fewer than two steps, or pairs are none of rows of the data.
    """
    expect_counts("plot_interpolations", 2, steps=steps)
    ends = _pairs(data, pairs)
    true = data.take(ends.flatten())

    @torch.no_grad()
    def rows(flow: Flow) -> Tensor:
        context = None if true.context is None else true.context[: len(ends[0])].to(flow.device)
        noise = torch.Generator().manual_seed(0)
        first, last = (
            flow.encode(x.to(flow.device, flow.dtype), context, generator=noise)
            for x in true.x.split(len(ends[0]))
        )
        z = torch.stack([arc(first, last, k / (steps - 1)) for k in range(steps)], 1)
        each = None if context is None else context.repeat_interleave(steps, 0)
        return flow.decode(z.flatten(0, 1), each).cpu()

    return _grids(
        {title: attempt(rows, flow) for title, flow in flows.items()}, data.levels, steps
    )


def _pairs(data: Images, pairs: Any) -> Tensor:
    """Numbers of the first pictures and of the last ones, shape (2, pairs)."""
    if is_whole(pairs):
        expect_counts("plot_interpolations", pairs=pairs)
        return data.draw(2 * pairs, torch.Generator().manual_seed(0)).view(2, pairs)
    rows = as_numbers("plot_interpolations", "pairs", pairs)
    whole = not rows.is_floating_point() and rows.numel() and rows.dim() == 2
    if not whole or rows.shape[1] != 2 or rows.min() < 0 or rows.max() >= len(data.x):
        raise ValueError(
            "plot_interpolations: expected pairs to be their number, or pairs of numbers of rows "
            f"below {len(data.x)}, such as [(3, 17), (4, 2)], got {pairs!r}"
        )
    return rows.long().T


def nearest(x: Tensor, among: Tensor, count: int = 1, chunk: int = 10_000) -> Tensor:
    """Indices of the nearest of some pictures, the nearest first, shape (N, count).

    Args:
        x: Pictures, shape (N, C, H, W).
        among: Those that are searched, shape (M, C, H, W), in memory or mapped.
        count: How many are wanted for each; at most M.
        chunk: Pictures compared at once.
    """
    rows, found, at = x.flatten(1).double().cpu(), [], []
    for start in range(0, len(among), chunk):
        others = among[start : start + chunk].flatten(1).double()
        distance, index = torch.cdist(rows, others).topk(min(count, len(others)), largest=False)
        found.append(distance)
        at.append(index + start)
    best = torch.cat(found, 1).topk(count, largest=False).indices
    return torch.cat(at, 1).gather(1, best)


def arc(z0: Tensor, z1: Tensor, share: float) -> Tensor:
    """The point at a share of the way from z0 to z1, in direction and in length.

    >>> arc(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 4.0]]), 0.5)
    tensor([[2.1213, 2.1213]])

    Args:
        z0: Codes, shape (N, *event), none of them 0.
        z1: Others, of the same shape.
        share: From 0, z0, to 1, z1.
    """
    first, last = z0.flatten(1), z1.flatten(1)
    lengths = first.norm(dim=1, keepdim=True), last.norm(dim=1, keepdim=True)
    first, last = first / lengths[0], last / lengths[1]
    angle = (first * last).sum(1, keepdim=True).clamp(-1, 1).acos()
    scale = angle.sin()
    bent = (((1 - share) * angle).sin() * first + (share * angle).sin() * last) / scale
    direction = torch.where(scale > 1e-4, bent, torch.lerp(first, last, share))
    return (torch.lerp(*lengths, share) * direction).view_as(z0)


def _grids(grids: Mapping[str, Any], levels: int, columns: int | None = None) -> "Figure":
    """A figure of grids of pictures.

    Args:
        grids: Title → pictures, or what `attempt` returns of a flow that failed.
        levels: Number of values of a pixel.
        columns: Pictures in a row of a grid; None for a square.
    """
    across = min(len(grids), 3)
    down = -(-len(grids) // across)
    with styled():
        figure = new_figure(SIDE * across, (SIDE + 0.4) * down)
        for ax, (title, pictures) in zip(
            figure.subplots(down, across, squeeze=False).flat, grids.items(), strict=False
        ):
            ax.set_title(title)
            if isinstance(pictures, Tensor):
                ax.imshow(image_grid(pictures, levels, columns), cmap="gray", vmin=0, vmax=255)
            else:
                say_failed(ax, pictures)
        for ax in figure.axes:
            ax.axis("off")
    return figure


@torch.no_grad()
def _samples(flow: Flow, true: Images, generator: torch.Generator) -> Tensor:
    if true.context is None:
        return flow.sample((len(true.x),), generator=generator).cpu()
    return flow.sample((), true.context.to(flow.device), generator=generator).cpu()
