"""Who runs in the race: a model and the way it is trained."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from cnf.dynamics.solver import Solver
from cnf.flow import Flow
from cnf.objectives import OBJECTIVES, FlowMatching, MaximumLikelihood, Objective
from cnf.registry import Registry, spec
from cnf.training.origin import hash_of_weights, objective_name

CONTESTANTS = Registry("contestant")
# Who runs where nobody is named.
RACE_OF_PICTURES = ("cnf-flow-matching", "ffjord", "glow")
RACE = ("cnf-likelihood", "cnf-flow-matching", "cnf-both", "ffjord", "realnvp", "nsf")


@dataclass(frozen=True)
class Stage:
    """A part of a contestant's training.

    Args:
        objective: What is minimized.
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
        model: A name in `MODELS`; a function that takes `dim=…` (`context=…`, where the data have
            one) and the options, and returns a flow; or a flow, of which copies are trained.
        stages: What is done one after the other; the shares sum to one.
        options: The model's options.
        toy_options: More of them, on a density that is known: settings published for its scale.
    """

    title: str
    model: str | Callable[..., Flow] | Flow
    stages: tuple[Stage, ...]
    options: dict[str, Any] = field(default_factory=dict)
    toy_options: dict[str, Any] = field(default_factory=dict)

    @property
    def about(self) -> str:
        """Who it is, in a sentence."""
        names = [objective_name(stage.objective).replace("-", " ") for stage in self.stages]
        ways = ", then by ".join(names)
        model = f"the model {self.model}" if isinstance(self.model, str) else "one's own model"
        return f"{self.title}: {model}, trained by {ways}."

    @property
    def made_of(self) -> dict[str, Any]:
        """What tells it from others of its name, as JSON holds it; a flow by its weights, too."""
        told = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.model, Flow):
            told["model"] = [repr(self.model), hash_of_weights(self.model)]
        elif not isinstance(self.model, str):
            told["model"] = getattr(self.model, "__qualname__", type(self.model).__name__)
        return spec(told)


def entrants(contestants: Any) -> dict[str, Contestant]:
    """Who is to run, by name.

    Args:
        contestants: None for those of `RACE`; or a sequence of names in `CONTESTANTS`,
            `Contestant`s and (title, model, objective or stages); or a mapping of one's own names
            to these.

    Raises:
        ValueError: An unknown name, one that comes twice, or none at all.
        TypeError: None of these, or a name or title that is no text.
    """
    given = RACE if contestants is None else contestants
    if isinstance(given, Mapping):
        pairs = [(name, _entrant(one)[1]) for name, one in given.items()]
    else:
        alone = isinstance(given, str) or not isinstance(given, Iterable)
        alone |= isinstance(given, Sequence) and len(given) == 3 and isinstance(given[1], Flow)
        pairs = [_entrant(one) for one in ([given] if alone else given)]
    found = dict(pairs)
    if not found or len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"compare: expected contestants, of names that differ, got {names}")
    for text in (*found, *(contestant.title for contestant in found.values())):
        if not isinstance(text, str):
            raise TypeError(f"compare: expected names and titles to be text, got {text!r}")
    return found


def _entrant(given: Any) -> tuple[str, Contestant]:
    if isinstance(given, str):
        return given, CONTESTANTS[given]
    if isinstance(given, Contestant):
        return given.title, given
    if isinstance(given, Sequence) and len(given) == 3:
        title, model, stages = given
        staged = isinstance(stages, Sequence) and len(stages) > 0
        if not (staged and all(isinstance(one, Stage) for one in stages)):
            stages = (Stage(OBJECTIVES.build(stages, "compare")),)
        return title, Contestant(title, model, tuple(stages))
    raise TypeError(
        "compare: expected a contestant to be a name, a Contestant, or (title, model, objective), "
        f"got {given!r}"
    )


AS_THEY_ARE = {"preprocess": None}  # the papers' toys need no standardizing; one's own points do
# Cheap, exact-for-what-it-computes gradients; the evaluation's solver is another and tight. With
# fewer steps likelihood learns to exploit the solver's error instead of the data.
LIKELIHOOD = MaximumLikelihood(solver=Solver("rk4", steps=12, gradient="backprop"))
LIKELIHOOD_SETTINGS = {"batch_size": 256, "lr": 3e-3, "ema": 0.99, "clip": 1.0}
ONE_STEP = MaximumLikelihood(
    solver=Solver("rk4", steps=1, discrete=True, explicit="density")
)  # four evaluations for an exact density
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
    "cnf-one-step": Contestant(
        "CNF, likelihood of one RK4 step", "cnf", (Stage(ONE_STEP, settings={"batch_size": 256}),)
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
    "made": ("MADE", 2e-2, {}),
    "iaf": ("IAF", 2e-3, {}),
    "planar": ("Planar", 5e-2, {}),
    "radial": ("Radial", 5e-2, {}),
    "sylvester": ("Sylvester", 5e-2, {}),
}.items():
    _stages = (Stage(MaximumLikelihood(), settings={"batch_size": 512, "lr": _lr}),)
    CONTESTANTS.register(_name)(Contestant(_title, _name, _stages, _options))
