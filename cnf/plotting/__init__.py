"""Pictures: plain data in, figures out."""

from cnf.plotting.animation import animate, layer_path
from cnf.plotting.curves import plot_nfe_curves
from cnf.plotting.densities import plot_density

__all__ = ["animate", "layer_path", "plot_density", "plot_nfe_curves"]
