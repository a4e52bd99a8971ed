"""Draws paths of cells over a snapshot that is held out.

`CNF_DATA=… python experiments/single_cell/pictures.py` trains the flows that it draws.
"""

import torch
import yaml
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from run import HERE, trained
from snapshots import Gap, gap, snapshots
from torch import Tensor

import cnf
from cnf.plotting.style import FAINT, INK, color_of, styled
from cnf.random import stream

TIMES = {"lineage": 1, "emt": 2}  # that are held out
SHOWN = {
    "cnf between, independent pairs": "A flow between the snapshots:\nindependent pairs",
    "cnf between, minibatch OT": "A flow between the snapshots:\nminibatch OT",
    "nsf given the time": "nsf given the time:\ndecode(encode(x, before), t)",
}
CELLS, POINTS = 60, 1_000  # with paths, and drawn of each snapshot


@torch.no_grad()
def paths(flow: cnf.Flow, own: Gap, between: bool) -> Tensor:
    """Where some cells of the snapshot before go, shape (times, cells, D)."""
    order = torch.randperm(len(own.before), generator=stream(0, "cells"))
    x, times = own.before[order[:CELLS]], torch.linspace(0, 1, 21)
    if between:
        return flow.trajectory(x, times)
    z = flow.encode(x, torch.tensor([own.time - 1.0]))
    return torch.stack([flow.decode(z, (own.time - 1 + 2 * t)[None]) for t in times])


def scene(ax: Axes, own: Gap) -> None:
    """The three snapshots; the one in the middle is held out."""
    shown = (
        (own.before, FAINT),
        (torch.cat([own.target, own.other]), color_of(2)),
        (own.after, color_of(4)),
    )
    names = (f"t = {own.time + k}" for k in (-1, 0, 1))
    for (x, color), name in zip(shown, names, strict=True):
        order = torch.randperm(len(x), generator=stream(0, "shown"))[:POINTS]
        label = f"{name}, held out" if x is shown[1][0] else name
        ax.scatter(*x[order, :2].T, s=4, color=color, alpha=0.35, linewidths=0, label=label)


def draw(name: str, config: dict) -> None:
    own = gap(snapshots(name), TIMES[name], stream(0, "halves"))
    with styled():
        figure = Figure((11, 4.1), layout="constrained")
        for ax, (contestant, title) in zip(
            figure.subplots(1, 3, sharex=True, sharey=True), SHOWN.items(), strict=True
        ):
            settings = config["contestants"][contestant]
            path = paths(trained(own, settings, config, 0), own, settings["between"])[..., :2]
            scene(ax, own)
            lines = path.transpose(0, 1).numpy()
            ax.add_collection(LineCollection(lines, colors=color_of(0), linewidths=0.8, alpha=0.7))
            ax.scatter(
                *path[len(path) // 2].T, s=14, color=color_of(1), zorder=3, label="cells half way"
            )
            ax.set_title(title, color=INK)
        figure.legend(
            *ax.get_legend_handles_labels(), loc="outside lower center", ncols=4, markerscale=2
        )
        figure.savefig(HERE / "pictures" / f"{name}.webp", dpi=100)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in TIMES:
        draw(name, yaml.safe_load((HERE / "config.yaml").read_text()))
