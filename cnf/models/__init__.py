"""The named models: presets of the same parts, with the same argument names."""

from cnf.models import continuous, discrete, glow  # noqa: F401  they register themselves
from cnf.models.build import MODELS, build

__all__ = ["MODELS", "build"]
