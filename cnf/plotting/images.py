"""Pictures that flows have learned to draw, beside true ones."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cnf.data import Images, image_grid
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
    grids = {"Your pictures": true.x, **drawn}
    across = min(len(grids), 3)
    down = -(-len(grids) // across)
    with styled():
        figure = new_figure(SIDE * across, (SIDE + 0.4) * down)
        for ax, (title, pictures) in zip(
            figure.subplots(down, across, squeeze=False).flat, grids.items(), strict=False
        ):
            ax.set_title(title)
            if isinstance(pictures, Tensor):
                ax.imshow(image_grid(pictures, data.levels), cmap="gray", vmin=0, vmax=255)
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
