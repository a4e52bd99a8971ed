"""Pictures: data and flows in, figures out.

Every function returns a `matplotlib.figure.Figure` that pyplot does not know: show it in a
notebook by naming it, write it with `figure.savefig(...)`. Where a function takes several flows,
they come by title, and have their colors in that order.
"""

from cnf.plotting.animation import animate
from cnf.plotting.curves import plot_learning, plot_nfe_curves
from cnf.plotting.densities import plot_densities, plot_density
from cnf.plotting.images import arc, plot_images, plot_interpolations, plot_nearest
from cnf.plotting.samples import plot_samples
from cnf.plotting.trajectories import layer_path, plot_trajectories

__all__ = [
    "animate",
    "arc",
    "layer_path",
    "plot_densities",
    "plot_density",
    "plot_images",
    "plot_interpolations",
    "plot_learning",
    "plot_nearest",
    "plot_nfe_curves",
    "plot_samples",
    "plot_trajectories",
]
