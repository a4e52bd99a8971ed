"""Training: `fit`, its settings, and checkpoints."""

from cnf.training.checkpoint import load, save
from cnf.training.config import TrainConfig
from cnf.training.loop import History, fit
from cnf.training.preprocessing import fit_preprocessing
from cnf.training.reflow import distill, pairs, reflow

__all__ = [
    "History",
    "TrainConfig",
    "distill",
    "fit",
    "fit_preprocessing",
    "load",
    "pairs",
    "reflow",
    "save",
]
