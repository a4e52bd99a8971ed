"""The way of particles from noise to data: as paths, and as animated pictures."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cnf.errors import expect_counts, optional
from cnf.flow import Flow
from cnf.plotting.style import (
    FAINT,
    INK,
    device_of,
    frame,
    styled,
    unlike,
    window_of,
)
from cnf.transforms.base import Compose, Transform
from cnf.transforms.continuous import Continuous, is_continuous, reconfigured

if TYPE_CHECKING:
    pass


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
    """Where particles are at `times`, in data space: along the ODE of a continuous flow, on the
    straight line from layer to layer of any other, whose layers take equal time.

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


def animate(
    flow: Flow,
    path: str | Path,
    *,
    window: Tensor | None = None,
    title: str = "",
    names: Sequence[str] = (),
    color: str = "#0072B2",
    points: int = 1500,
    frames: int = 40,
    seed: int = 0,
) -> Path:
    """Write a GIF of noise becoming data; of more than two dimensions it shows the first two.

    It starts and ends slowly, rests on the end for two seconds, and repeats.

    Args:
        flow: An unconditional flow of vectors, D at least 2.
        path: The file to write.
        window: Low and high corner of what is shown, shape (2, 2); by default, all particles.
        title: Written above.
        names: Of the columns, written at the axes.
        color: Of the particles.
        points: How many particles.
        frames: How many pictures.
        seed: Of the particles' starts.
    Returns:
        The file.
    Raises:
        ValueError: A flow of another than vectors of two or more dimensions.
        SolverError: The ODE could not be solved.
    """
    expect_counts("animate", points=points, frames=frames)
    if len(flow.event_shape) != 1 or flow.event_shape[0] < 2:
        raise ValueError(f"animate: expected vectors of D >= 2, got shape {flow.event_shape}")
    start = flow.base.sample((points,), generator=torch.Generator().manual_seed(seed))
    ease = torch.linspace(0, 1, max(2, frames))
    times = ease * ease * (3 - 2 * ease)
    moving = particle_path(flow, start.to(device_of(flow)), times)[..., :2].cpu()
    if window is None:
        window = window_of(flow, moving)
    images = _frames(moving, times, window, title, names, color)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    rests = [600] + [60] * (len(images) - 2) + [2000]
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=rests, loop=0, optimize=True
    )
    return path


def _layers(transform: Transform) -> list[Transform]:
    """The parts of a composition, and of compositions inside it, from base to data."""
    if not isinstance(transform, Compose):
        return [transform]
    inner: list[Any] = list(transform.transforms)
    return [layer for part in inner for layer in _layers(part)]


def _frames(
    moving: Tensor, times: Tensor, window: Tensor, title: str, names: Sequence[str], color: str
) -> list[Any]:
    """One picture a time, all with the same few shades, which keeps the file small."""
    image = optional("PIL.Image", "evaluation")
    agg = optional("matplotlib.backends.backend_agg", "evaluation")
    figures = optional("matplotlib.figure", "evaluation")
    wide, high = (window[1] - window[0]).tolist()
    pixels = []
    with styled():
        tall = 1.0 if unlike(window) else high / wide
        height = 3.0 * min(1.6, tall)
        beside = 0.75 if names or unlike(window) else 0.03  # inches, for ticks and names
        below = 0.45 if names or unlike(window) else 0.03
        wide, high = 3.0 + beside, height + below + 0.45
        figure = figures.Figure(figsize=(wide, high), dpi=120)
        canvas = agg.FigureCanvasAgg(figure)
        room = 0.45 / high
        ax = figure.add_axes((beside / wide, below / high, 2.97 / wide, (height - 0.03) / high))
        frame(ax, window, "", names=names)
        dots = ax.scatter([], [], s=5, color=color, alpha=0.55, linewidths=0)
        shrunk = min(11.0, 11 * 36 / max(len(title), 1))
        figure.text(0.02, 1 - room / 2, title, va="center", fontsize=shrunk)
        clock = ax.text(
            0.98,
            0.03,
            "",
            ha="right",
            va="bottom",
            fontsize=9,
            color=FAINT,
            transform=ax.transAxes,
        )
        for time, where in zip(times.tolist(), moving, strict=True):
            dots.set_offsets(where.nan_to_num(math.inf).numpy())
            clock.set_text(f"t = {time:.2f}")
            canvas.draw()
            pixels.append(image.fromarray(np.array(canvas.buffer_rgba())[..., :3].copy()))
        figure.clear()
    palette = image.new("P", (1, 1))
    palette.putpalette(_shades(color))
    return [picture.quantize(palette=palette, dither=image.Dither.NONE) for picture in pixels]


def _shades(color: str) -> list[int]:
    """RGB of white to the color and white to ink, 12 and 8 shades, as a GIF's palette."""
    parse = optional("matplotlib.colors", "evaluation").to_rgb
    shades = []
    for end, count in ((parse(color), 12), (parse(INK), 8)):
        mix = np.linspace(0, 1, count)[:, None]
        shades += (255 * ((1 - mix) + mix * np.array(end))).round().astype(int).ravel().tolist()
    return shades


def way_of(flow: Flow, particles: int, points: int) -> Tensor:
    """Paths of the first two coordinates, shape (T, N, 2): at even times, or after each layer."""
    z = flow.base.sample((particles,), generator=torch.Generator().manual_seed(0))
    z = z.to(device_of(flow))
    if isinstance(flow.transform, Continuous):
        return particle_path(flow, z, torch.linspace(0, 1, points))[..., :2].cpu().double()
    return layer_path(flow, z)[..., :2].cpu().double()


def finite(way: Tensor | str) -> bool:
    return isinstance(way, Tensor) and bool(torch.isfinite(way).all())


def way_said(flow: Flow, way: Tensor | str) -> str:
    """Whether lines are paths of an ODE, or have the layers of a discrete flow for corners."""
    if isinstance(flow.transform, Continuous):
        return "along its ODE"
    return "layer by layer" if isinstance(way, str) else f"layer by layer, {len(way) - 1} in all"
