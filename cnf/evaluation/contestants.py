"""Who runs in the race: a model and the way it is trained."""

from dataclasses import dataclass, field
from typing import Any

from cnf.dynamics.solver import Solver
from cnf.objectives import OBJECTIVES, FlowMatching, MaximumLikelihood, Objective
from cnf.registry import Registry

CONTESTANTS = Registry("contestant")
# Unless told.
RACE = ("cnf-likelihood", "cnf-flow-matching", "cnf-both", "ffjord", "realnvp", "nsf")


@dataclass(frozen=True)
class Stage:
    """A part of a contestant's training.

    Args:
        objective: What is minimised.
        share: Part of the budget.
        settings: `TrainConfig` fields that this stage sets, such as lr or batch_size.
    """

    objective: Objective
    share: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contestant:
    """A model and the way it is trained.

    Args:
        title: Its name in tables and pictures.
        model: A name in `MODELS`.
        stages: What is done one after the other; the shares sum to one.
        options: The model's options.
        toy_options: More of them, on a density that is known: settings published for its scale.
    """

    title: str
    model: str
    stages: tuple[Stage, ...]
    options: dict[str, Any] = field(default_factory=dict)
    toy_options: dict[str, Any] = field(default_factory=dict)

    @property
    def about(self) -> str:
        """Who it is, in a sentence."""
        names = {kind: name for name, kind in OBJECTIVES.items()}
        ways = [names[type(stage.objective)].replace("-", " ") for stage in self.stages]
        return f"{self.title}: the model {self.model}, trained by {', then by '.join(ways)}."


AS_THEY_ARE = {"preprocess": None}  # the papers' toys need no standardising; one's own points do
# Cheap, exact-for-what-it-computes gradients; the evaluation's solver is another and tight. With
# fewer steps likelihood learns to exploit the solver's error instead of the data.
LIKELIHOOD = MaximumLikelihood(solver=Solver("rk4", steps=12, gradient="backprop"))
LIKELIHOOD_SETTINGS = {"batch_size": 256, "lr": 3e-3, "ema": 0.99, "clip": 1.0}
MATCHING = FlowMatching(times="skewed")

for _name, _contestant in {
    "cnf-likelihood": Contestant(
        "CNF, likelihood", "cnf", (Stage(LIKELIHOOD, settings=LIKELIHOOD_SETTINGS),)
    ),
    "cnf-flow-matching": Contestant(
        "CNF, flow matching", "cnf", (Stage(MATCHING),)
    ),
    "cnf-both": Contestant(
        "CNF, flow matching then likelihood",
        "cnf",
        (
            Stage(MATCHING, 0.75),
            Stage(LIKELIHOOD, 0.25, {**LIKELIHOOD_SETTINGS, "lr": 1e-3}),
        ),
    ),
    "ffjord": Contestant(
        "FFJORD, as published",
        "ffjord",
        (
            Stage(
                MaximumLikelihood(divergence="hutchinson"),
                settings={
                    "batch_size": 100, "lr": 1e-3, "weight_decay": 1e-5, "optimizer": "adamw",
                    "schedule": "constant", "clip": None, "warmup": 0.0,
                },
            ),
        ),
        toy_options=AS_THEY_ARE,
    ),
    "rnode": Contestant(
        "RNODE",
        "rnode",
        (Stage(MaximumLikelihood(), settings={"batch_size": 256, "lr": 2e-3}),),
        toy_options=AS_THEY_ARE,
    ),
    "otflow": Contestant(
        "OT-Flow", "otflow", (Stage(MaximumLikelihood()),)
    ),
}.items():  # fmt: skip
    CONTESTANTS.register(_name)(_contestant)

# A linear map between the layers brings little in the plane, and a minute is short for six layers.
SPLINES = {"layers": 4, "bins": 16, "bound": 3.0}
for _name, (_title, _lr, _options) in {
    "realnvp": ("RealNVP", 5e-3, {}),
    "nice": ("NICE", 2e-3, {}),
    "glow": ("Glow", 2e-3, {}),
    "nsf": ("NSF", 1e-2, {**SPLINES, "between": None}),
    "nsf-ar": ("NSF, autoregressive", 1e-2, {**SPLINES, "between": "reverse"}),
    "maf": ("MAF", 5e-3, {}),
    "iaf": ("IAF", 2e-3, {}),
    "planar": ("Planar", 5e-2, {}),
    "radial": ("Radial", 5e-2, {}),
    "sylvester": ("Sylvester", 5e-2, {}),
}.items():
    _stages = (Stage(MaximumLikelihood(), settings={"batch_size": 512, "lr": _lr}),)
    CONTESTANTS.register(_name)(Contestant(_title, _name, _stages, _options))
