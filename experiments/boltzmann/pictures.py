"""Draws the energies, draws of the flows of the first seed, and profiles beside the exact ones.

`python experiments/boltzmann/pictures.py`, after run.py, which left the flows in runs/boltzmann.
"""

from pathlib import Path

import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from run import FLOWS, HERE
from systems import SYSTEMS, System, metropolis
from torch import Tensor

import cnf
from cnf.plotting.style import INK, TRUTH, color_of, styled
from cnf.random import stream

WINDOWS = {"double-well": ((-4.2, 4.2), (-4, 4)), "mueller-brown": ((-1.7, 1.3), (-0.7, 2.2))}
RANGES = {"double-well": (-3.7, 3.5), "mueller-brown": (-1.85, 0.7)}  # of the coordinate
NAMES = {"double-well": "x", "mueller-brown": "(x - y)/√2"}
DEEPEST = 18  # kT above the deepest point up to which contours are drawn
BINS = 60
SHOWN = [("nsf", "energy"), ("nsf", "both"), ("cnf", "both")]


def draw(name: str, path: Path, config: dict) -> None:
    system = SYSTEMS[name]()
    width = config["systems"][name]["width"]
    examples = metropolis(
        system, width=width, generator=stream(0, "examples"), **config["chains"]
    ).flatten(0, 1)
    edges = torch.linspace(*RANGES[name], BINS + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    flows = {key: cnf.load(FLOWS / f"{name}-{'-'.join(key)}.pt") for key in SHOWN}
    with styled():
        figure = Figure((11, 6.2), layout="constrained")
        grid = figure.add_gridspec(2, 3, height_ratios=(1.25, 1))
        panels = [figure.add_subplot(grid[0, k]) for k in range(3)]
        below = figure.add_subplot(grid[1, :])
        titles = [
            "Examples: chains that do not cross",
            "Draws of nsf, by energy",
            "Draws of nsf, by both",
        ]
        points = [examples, *(flows["nsf", kind].sample(1_500) for kind in ("energy", "both"))]
        for ax, title, x in zip(panels, titles, points, strict=True):
            contours(ax, system, WINDOWS[name])
            right = (system.coordinate(x) >= system.split).float().mean()
            ax.scatter(*x[:1_500].T, s=2, color=color_of(1), alpha=0.5, linewidths=0)
            ax.set_title(f"{title}\n{right:.1%} in the second basin", color=INK)
        profiles(below, system, edges, flows, middle)
        below.set_xlabel(NAMES[name])
        figure.savefig(path, dpi=100)


def contours(
    ax: Axes, system: System, window: tuple[tuple[float, float], tuple[float, float]]
) -> None:
    """The energy up to some kT, and the line between the basins."""
    x, y = (torch.linspace(*side, 200) for side in window)
    energy = system.energy(torch.cartesian_prod(x, y)).reshape(200, 200).T
    energy = (energy - energy.min()).clamp(max=DEEPEST)
    ax.contourf(x, y, energy, levels=18, cmap="Blues_r")
    where = system.coordinate(torch.cartesian_prod(x, y)).reshape(200, 200).T
    ax.contour(x, y, where, levels=[system.split], colors=INK, linewidths=0.8, linestyles="--")
    ax.set_xlim(*window[0])
    ax.set_ylim(*window[1])


def profiles(ax: Axes, system: System, edges: Tensor, flows: dict, middle: Tensor) -> None:
    """The free energy along the coordinate: exact, of weighted draws, and of draws as they are."""
    ax.plot(middle, system.profile(edges), color=TRUTH, linewidth=5, alpha=0.35, label="exact")
    for place, ((model, training), flow) in enumerate(flows.items()):
        x, log_q = flow.sample_and_log_prob(20_000, generator=stream(0, "profile"))
        weight = (system.log_density(x) - log_q).softmax(0)
        for w, style in ((weight, "-"), (torch.full_like(weight, 1 / len(x)), ":")):
            mass, _ = torch.histogram(system.coordinate(x), edges, weight=w)
            told = f"{model} by {training}" + (", reweighted" if style == "-" else ", its draws")
            ax.plot(middle, -mass.log(), style, color=color_of(place), linewidth=1.5, label=told)
    ax.axvline(system.split, color=INK, linewidth=0.8, linestyle="--")
    ax.set_ylabel("free energy of a bin (kT)")
    ax.set_ylim(1, 22)
    ax.legend(fontsize=9, ncols=4, loc="upper center")


if __name__ == "__main__":
    torch.manual_seed(0)
    with torch.no_grad():
        for system in SYSTEMS:
            draw(
                system,
                HERE / "pictures" / f"{system}.webp",
                yaml.safe_load((HERE / "config.yaml").read_text()),
            )
