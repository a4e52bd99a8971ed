"""The Markdown tables of the README, from the rows of results.csv."""

import math
from collections.abc import Iterable
from typing import Any

import torch

from cnf.metrics import Estimate

Row = dict[str, str]
Scores = dict[tuple[str, str], dict[int, float]]  # by set and model, by seed: nats
PAIRS = (  # who is compared with whom, seed by seed
    ("flow matching", "CNF, flow matching", "CNF, likelihood", "likelihood"),
    ("flow matching", "CNF, flow matching", "NSF, autoregressive", "splines"),
    ("likelihood", "CNF, likelihood", "NSF, autoregressive", "splines"),
)
PARTS = {"test": "nll", "training": "train_nll"}  # columns
CLEAR = 3.0  # standard errors of a paired difference


def written(config: dict[str, Any], rows: list[Row]) -> str:
    """All tables, one below the other."""
    found = scores(rows)
    sets = [name for name in config["sets"] if any(name == of for of, _ in found)]
    parts = [nlls(config, found, sets), costs(config, rows, sets)]
    parts.append(wins(config, found, rows, sets))
    varied = {name for told in config["variants"].values() for name in told["sets"]}
    parts += [overfitting(config, rows, name) for name in sets if name in varied]
    return "\n\n".join(parts) + "\n"


def scores(rows: list[Row]) -> Scores:
    found: Scores = {}
    for row in rows:
        by = found.setdefault((row["set"], row["model"]), {})
        by[int(row["seed"])] = float(row["nll"])
    return found


def nlls(config: dict[str, Any], found: Scores, sets: list[str]) -> str:
    """Test NLL of each model on each set; the best in bold, with those not clearly worse."""
    lines = header(["test NLL (nats)", *sets])
    for model in config["models"]:
        cells = []
        for name in sets:
            text = over_seeds(found.get((name, model), {}).values())
            cells.append(f"**{text}**" if text != "–" and leads(found, name, model) else text)
        lines.append(line([model, *cells]))
    return "\n".join(lines)


def leads(found: Scores, name: str, model: str) -> bool:
    """Whether no other model is better on a set, two standard errors of the difference away."""
    mine = found[name, model]
    if not all(map(math.isfinite, mine.values())):
        return False
    rivals = (paired(mine, other) for (of, _), other in found.items() if of == name)
    return all(not r.value > 2 * r.error for r in rivals if math.isfinite(r.error))


def paired(mine: dict[int, float], other: dict[int, float]) -> Estimate:
    """By how many nats `other` is better, over the seeds that both have."""
    both = [mine[seed] - other[seed] for seed in mine if seed in other]
    return Estimate.of(torch.tensor(both)) if both else Estimate(math.nan, math.nan)


def costs(config: dict[str, Any], rows: list[Row], sets: list[str]) -> str:
    """Steps, and the seconds of training that they took."""
    lines = header(["steps in seconds", *sets])
    for model in config["models"]:
        cells = []
        for name in sets:
            mine = [row for row in rows if (row["set"], row["model"]) == (name, model)]
            mine = [row for row in mine if row["steps"]]
            steps, seconds = (
                [float(row[column]) for row in mine] for column in ("steps", "seconds")
            )
            cells.append(f"{mean(steps):,.0f} in {mean(seconds):.0f}" if mine else "–")
        lines.append(line([model, *cells]))
    return "\n".join(lines)


def wins(config: dict[str, Any], found: Scores, rows: list[Row], sets: list[str]) -> str:
    """For each pair and set: who wins by how much, sets by their rows."""
    sizes = {row["set"]: (int(row["rows"]), int(row["dim"])) for row in rows}
    titles = [f"{mine} or {theirs}" for mine, _, _, theirs in PAIRS]
    lines = header(["set", "N", "D", "discrete", *titles, "best"])
    for name in sorted(sets, key=lambda name: sizes[name]):
        n, dim = sizes[name]
        cells = [name, f"{n:,}", str(dim), str(config["sets"][name])]
        for mine, a, b, theirs in PAIRS:
            gain = paired(found.get((name, b), {}), found.get((name, a), {}))
            cells.append(verdict(gain, mine, theirs))
        lines.append(line([*cells, best(found, name)]))
    return "\n".join(lines)


def verdict(gain: Estimate, mine: str, theirs: str) -> str:
    if not math.isfinite(gain.error):
        return "–"
    size = str(Estimate(abs(gain.value), gain.error))
    if abs(gain.value) < CLEAR * gain.error:
        return f"open: {size}"
    return f"{mine if gain.value > 0 else theirs}: {size}"


def best(found: Scores, name: str) -> str:
    """The model with the lowest mean NLL."""
    means = {model: mean(by.values()) for (of, model), by in found.items() if of == name}
    means = {model: value for model, value in means.items() if math.isfinite(value)}
    return min(means, key=lambda model: means[model])


def overfitting(config: dict[str, Any], rows: list[Row], name: str) -> str:
    """NLLs of test and training rows, with and without what keeps from overfitting."""
    variants = config["variants"]
    varied = {model for told in variants.values() for model in told["models"]}
    titles = [f"{part}, {how}" for part in PARTS for how in ("early stopping", *variants)]
    lines = header([f"NLL, {name}", *titles])
    for model in config["models"]:
        names = [model, *(f"{model}, {variant}" for variant in variants)]
        if model in varied or config["models"][model].get("kind"):
            cells = [over(rows, name, one, part) for part in PARTS.values() for one in names]
            lines.append(line([model, *cells]))
    return "\n".join(lines)


def over(rows: list[Row], name: str, model: str, column: str) -> str:
    mine = [row for row in rows if (row["set"], row["model"]) == (name, model) and row[column]]
    return over_seeds(float(row[column]) for row in mine)


def over_seeds(values: Iterable[float]) -> str:
    """Mean and standard error over seeds."""
    found = torch.tensor(list(values), dtype=torch.float64)
    return str(Estimate.of(found)) if len(found) else "–"


def mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def header(cells: list[str]) -> list[str]:
    return [line(cells), "|---|" + "---:|" * (len(cells) - 1)]


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
