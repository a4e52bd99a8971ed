"""Training: `fit`, its settings, and checkpoints."""

from cnf.training.checkpoint import load, save
from cnf.training.config import TrainConfig
from cnf.training.loop import History, fit

__all__ = ["History", "TrainConfig", "fit", "load", "save"]
