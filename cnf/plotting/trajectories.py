"""The paths of particles from noise to data."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cnf.errors import optional
from cnf.flow import Flow
from cnf.plotting.axes import attempt, axis_names, frame, panels, say_failed, scatter, window_of
from cnf.plotting.style import FAINT, RULE, color_of, styled
from cnf.transforms.base import Compose, Transform
from cnf.transforms.continuous import Continuous, is_continuous, reconfigured

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def layer_path(flow: Flow, z: Tensor) -> Tensor:
    """Where z is before the first and after each layer of a flow, in data space.

    A flow whose transform is a `Compose` has its parts for layers, any other transform is one
    layer. Every value is pushed through the flow's preprocessing; the last is `flow.decode(z)`.

    Args:
        flow: An unconditional flow of vectors.
        z: Base samples, shape (*batch, D).

    Returns:
        Positions, shape (layers + 1, *batch, D).
    """
    values, transform = [z], flow.transform
    if is_continuous(transform):  # as in decode: no log-determinant is paid for
        transform = reconfigured(transform, divergence=None)
    for layer in _layers(transform):
        values.append(layer(values[-1])[0])
    return flow.outside(torch.stack(values))[0]


@torch.no_grad()
def particle_path(flow: Flow, z: Tensor, times: Tensor) -> Tensor:
    """Where particles are at `times`, in data space.

    They move along the ODE of a continuous flow, and on straight lines from layer to layer of any
    other, whose layers take equal time.

    Args:
        flow: An unconditional flow of vectors.
        z: Base samples, shape (N, D).
        times: Ascending from 0 to 1, shape (T,).

    Returns:
        Positions, shape (T, N, D).
    """
    if isinstance(flow.transform, Continuous):
        return flow.trajectory(z, times)
    path = layer_path(flow, z)
    where = times.to(path).clamp(0, 1) * (len(path) - 1)
    index = where.floor().long().clamp(max=len(path) - 2)
    share = (where - index)[:, None, None]
    return path[index] * (1 - share) + path[index + 1] * share


def plot_trajectories(
    data: Any, flows: Mapping[str, Flow], particles: int = 120, points: int = 60
) -> "Figure":
    """The paths of particles from noise to data, of which the first two coordinates are shown.

    They run along the ODE of a continuous flow, and from layer to layer of a discrete one, whose
    title says so. Every flow gets the same noise.

    Args:
        data: A known density or `Points` of two dimensions or more.
        flows: Title → unconditional flow.
        particles: How many paths.
        points: Times along each.

    Returns:
        The figure.

    Raises:
        ValueError: The data have one dimension.
    """
    if data.dim < 2:
        raise ValueError("plot_trajectories: expected data of dim 2 or more, got 1")
    paths: dict[str, Tensor | str] = {
        title: attempt(_path, flow, particles, points) for title, flow in flows.items()
    }
    edges = torch.tensor([0.02, 0.98], dtype=torch.float64)
    finite = [p for p in paths.values() if isinstance(p, Tensor) and p.isfinite().all()]
    window = window_of(data, *(path.quantile(edges, 1) for path in finite))
    collection = optional("matplotlib.collections", "evaluation").LineCollection
    with styled():
        figure, axes = panels(len(paths), window, 2.05 if len(paths) > 2 else 2.9, below=0.3)
        for place, (title, path) in enumerate(paths.items()):
            ax, color = axes[place], color_of(place)
            frame(ax, window, title, _kind_of_path(flows[title], path), axis_names(data))
            if isinstance(path, str):
                say_failed(ax, path)
                continue
            lines = collection(
                path.transpose(0, 1).numpy(), colors=color, linewidths=0.8, alpha=0.35
            )
            ax.add_collection(lines, autolim=False)
            scatter(ax, path[0], RULE, size=9, alpha=0.9)
            scatter(ax, path[-1], color, size=9, alpha=0.95)
        figure.supxlabel("gray dots: noise    colored dots: data", color=FAINT, fontsize=11)
    return figure


def _layers(transform: Transform) -> list[Transform]:
    """The parts of a composition, and of compositions inside it, from base to data."""
    if not isinstance(transform, Compose):
        return [transform]
    inner: list[Any] = list(transform.transforms)
    return [layer for part in inner for layer in _layers(part)]


@torch.no_grad()
def _path(flow: Flow, particles: int, points: int) -> Tensor:
    """Paths of the first two coordinates, shape (T, N, 2): at even times, or after each layer."""
    z = flow.base.sample((particles,), generator=torch.Generator().manual_seed(0))
    z = z.to(flow.device)
    if isinstance(flow.transform, Continuous):
        return flow.trajectory(z, torch.linspace(0, 1, points))[..., :2].cpu().double()
    return layer_path(flow, z)[..., :2].cpu().double()


def _kind_of_path(flow: Flow, path: Tensor | str) -> str:
    """Whether lines are paths of an ODE, or have the layers of a discrete flow for corners."""
    if isinstance(flow.transform, Continuous):
        return "along its ODE"
    return "layer by layer" if isinstance(path, str) else f"layer by layer, {len(path) - 1} in all"
