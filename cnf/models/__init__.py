"""The named models: functions that build flows, with the same argument names throughout."""

from cnf.models.autoregressive import autoregressive_flow, iaf, made, maf, nsf_ar
from cnf.models.build import MODELS, build
from cnf.models.continuous import cnf, ffjord, otflow, rnode
from cnf.models.coupling import coupling_flow, nice, nsf, realnvp
from cnf.models.images import unet
from cnf.models.manifolds import sphere, torus
from cnf.models.multiscale import glow
from cnf.models.planar_radial import planar, radial, sylvester

__all__ = [
    "MODELS",
    "autoregressive_flow",
    "build",
    "cnf",
    "coupling_flow",
    "ffjord",
    "glow",
    "iaf",
    "made",
    "maf",
    "nice",
    "nsf",
    "nsf_ar",
    "otflow",
    "planar",
    "radial",
    "realnvp",
    "rnode",
    "sphere",
    "sylvester",
    "torus",
    "unet",
]
