"""Pictures of results.csv and of the densities that run.py kept: calibration, and the known noise.

`python experiments/regression/pictures.py` draws them into pictures/.
"""

import csv
from pathlib import Path

import numpy as np
import yaml
from predictive import BINS
from problems import exact
from run import GRID, GRIDS, HERE
from torch import from_numpy

from cnf.plotting.axes import new_figure
from cnf.plotting.style import TRUTH, color_of, dash_of, styled

FOLDER = HERE / "pictures"


def calibration(config: dict, rows: list[dict[str, str]]) -> None:
    """How far the distribution of PIT values is from uniform, over all seeds' test rows."""
    figure = new_figure(10, 3.2)
    panels = figure.subplots(1, len(config["problems"]), sharex=True, sharey=True)
    levels = np.arange(BINS + 1) / BINS
    for ax, name in zip(panels, config["problems"], strict=True):
        total = 0
        for place, model in enumerate(config["models"]):
            own = [r["pit"].split() for r in rows if (r["problem"], r["model"]) == (name, model)]
            if not own:
                continue
            counts = np.array(own, dtype=float).sum(0)
            total, apart = counts.sum(), np.r_[0, np.cumsum(counts)] / counts.sum() - levels
            ax.plot(levels, apart, color=color_of(place), ls=dash_of(place), label=model)
        band = 2 * np.sqrt(levels * (1 - levels) / total)
        ax.fill_between(levels, -band, band, color=TRUTH, alpha=0.15, lw=0)
        ax.set_title(name)
        ax.set_xlabel("level u")
    panels[0].set_ylabel("share of PIT ≤ u, less u")
    named = {}
    for ax in panels:
        named |= dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    named = {model: named[model] for model in config["models"]}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4)
    save(figure, "calibration")


def densities(names: list[str]) -> None:
    """The known conditional density, and what models made of it under the first seed."""
    truth = exact(from_numpy(np.repeat(GRID[0], len(GRID[1])))[:, None])
    known = np.exp(truth.log_prob(np.tile(GRID[1], len(GRID[0]))))
    found = {"exact": known.reshape(*map(len, GRID))}
    found |= {name: np.load(GRIDS / f"{name}.npy") for name in names}
    figure = new_figure(11, 3)
    panels = figure.subplots(1, len(found), sharex=True, sharey=True)
    for ax, (name, density) in zip(panels, found.items(), strict=True):
        ends = (*GRID[0][[0, -1]], *GRID[1][[0, -1]])
        top = found["exact"].max()
        ax.imshow(density.T, origin="lower", extent=ends, aspect="auto", vmax=top, cmap="magma")
        ax.set_title(name)
    panels[0].set_ylabel("target")
    figure.supxlabel("feature")
    save(figure, "bimodal")


def save(figure, name: str) -> None:
    FOLDER.mkdir(exist_ok=True)
    path: Path = FOLDER / f"{name}.webp"
    figure.savefig(path, dpi=100, pil_kwargs={"quality": 85})
    print(path, path.stat().st_size)


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    with styled():
        calibration(config, list(csv.DictReader((HERE / "results.csv").open())))
        densities(["NSF", "CNF, flow matching", "quantile forest", "boosting, σ(x)"])


if __name__ == "__main__":
    main()
