"""Animated pictures of noise becoming data."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cnf.errors import expect_counts, optional
from cnf.flow import Flow
from cnf.plotting.axes import frame, unlike, window_of
from cnf.plotting.style import FAINT, INK, styled
from cnf.plotting.trajectories import particle_path


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
    moving = particle_path(flow, start.to(flow.device), times)[..., :2].cpu()
    if window is None:
        window = window_of(flow, moving)
    images = _frames(moving, times, window, title, names, color)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # matplotlib's PillowWriter rests equally long at each picture and has no palette of ours.
    rests = [600] + [60] * (len(images) - 2) + [2000]
    images[0].save(
        path, save_all=True, append_images=images[1:], duration=rests, loop=0, optimize=True
    )
    return path


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
