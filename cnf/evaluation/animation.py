"""The way of particles from noise to data: as paths, and as animated pictures."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.errors import expect_positive, optional
from cnf.evaluation.style import FAINT, device_of, styled, window_of
from cnf.flow import Flow
from cnf.transforms.base import Compose, Transform
from cnf.transforms.continuous import Continuous


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
    values = [z]
    for layer in _layers(flow.transform):
        values.append(layer(values[-1])[0])
    path = torch.stack(values)
    return path if flow.preprocess is None else flow.preprocess(path)[0]


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
    colour: str = "#0072B2",
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
        colour: Of the particles.
        points: How many particles.
        frames: How many pictures.
        seed: Of the particles' starts.
    Returns:
        The file.
    Raises:
        ValueError: A flow of another than vectors of two or more dimensions.
        SolverError: The ODE could not be solved.
    """
    expect_positive("animate", points=points, frames=frames)
    if len(flow.event_shape) != 1 or flow.event_shape[0] < 2:
        raise ValueError(f"animate: expected vectors of D >= 2, got shape {flow.event_shape}")
    start = flow.base.sample((points,), generator=torch.Generator().manual_seed(seed))
    ease = torch.linspace(0, 1, max(2, frames))
    times = ease * ease * (3 - 2 * ease)
    moving = particle_path(flow, start.to(device_of(flow)), times)[..., :2].cpu()
    if window is None:
        window = window_of(flow, moving)
    images = _frames(moving, times, window, title, colour)
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
    moving: Tensor, times: Tensor, window: Tensor, title: str, colour: str
) -> list[Any]:
    """One picture a time, all with the palette of the last, which keeps the file small."""
    image = optional("PIL.Image", "evaluation")
    agg = optional("matplotlib.backends.backend_agg", "evaluation")
    figures = optional("matplotlib.figure", "evaluation")
    (left, bottom), (right, top) = window.tolist()
    pixels = []
    with styled():
        height = 3.0 * min(1.6, (top - bottom) / (right - left))
        figure = figures.Figure(figsize=(3.0, height + 0.45), dpi=120)
        canvas = agg.FigureCanvasAgg(figure)
        room = 0.45 / (height + 0.45)
        ax = figure.add_axes((0.01, 0.01, 0.98, 0.98 - room))
        ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal", xticks=[], yticks=[])
        ax.spines[:].set(visible=True, color="#d5d9e0")
        dots = ax.scatter([], [], s=5, color=colour, alpha=0.55, linewidths=0)
        shrunk = min(11.0, 11 * 36 / max(len(title), 1))
        figure.text(0.02, 1 - room / 2, title, va="center", fontsize=shrunk)
        clock = figure.text(0.98, 0.03, "", ha="right", va="bottom", fontsize=9, color=FAINT)
        for time, where in zip(times.tolist(), moving, strict=True):
            dots.set_offsets(where.nan_to_num(math.inf).numpy())
            clock.set_text(f"t = {time:.2f}")
            canvas.draw()
            pixels.append(image.fromarray(np.array(canvas.buffer_rgba())[..., :3].copy()))
        figure.clear()
    palette = pixels[-1].quantize(24, dither=image.Dither.NONE)
    return [picture.quantize(palette=palette, dither=image.Dither.NONE) for picture in pixels]
