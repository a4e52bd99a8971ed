"""All registries of names that a user may choose from, as `cnf list` shows them."""

from typing import Any

from cnf.data import IMAGE_SETS, TABLE_SETS, TOYS
from cnf.dynamics import DIVERGENCES, REGULARIZERS
from cnf.dynamics.solver import ADAPTIVE, FIXED
from cnf.fields import FIELDS
from cnf.matching import COUPLINGS, PATHS, TIMES
from cnf.metrics import METRICS
from cnf.models import MODELS
from cnf.objectives import OBJECTIVES
from cnf.race import CONTESTANTS
from cnf.transforms import TRANSFORMS

KINDS: dict[str, Any] = {
    "models": MODELS,
    "densities": TOYS,
    "pictures": IMAGE_SETS,
    "tables": TABLE_SETS,
    "objectives": OBJECTIVES,
    "paths": PATHS,
    "couplings": COUPLINGS,
    "times": TIMES,
    "divergences": DIVERGENCES,
    "regularizers": REGULARIZERS,
    "fields": FIELDS,
    "transforms": TRANSFORMS,
    "contestants": CONTESTANTS,
    "metrics": METRICS,
    "solvers": {name: None for name in sorted(ADAPTIVE + FIXED)},
}
