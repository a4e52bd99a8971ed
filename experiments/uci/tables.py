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
    """Test NLL of each model on each set; the lowest in bold."""
    lines = header(["test NLL (nats)", *sets])
    for model in config["models"]:
        cells = []
        for name in sets:
            text = over_seeds(found.get((name, model), {}).values())
            cells.append(f"**{text}**" if model == best(config, found, name) else text)
        lines.append(line([model, *cells]))
    return "\n".join(lines)


def costs(config: dict[str, Any], rows: list[Row], sets: list[str]) -> str:
    """Steps, and the seconds of training that they took, on the machine of the first rows."""
    rows = [row for row in rows if row["machine"] == rows[0]["machine"]]
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
            cells.append(verdict(found.get((name, a), {}), found.get((name, b), {}), mine, theirs))
        lines.append(line([*cells, best(config, found, name)]))
    return "\n".join(lines)


def verdict(mine: dict[int, float], other: dict[int, float], my: str, their: str) -> str:
    """Who is better by how many nats, and in how many of the seeds that both have."""
    gains = [other[seed] - mine[seed] for seed in mine if seed in other]
    if len(gains) < 2:
        return "–"
    gain = Estimate.of(torch.tensor(gains, dtype=torch.float64))
    won = sum(each * gain.value > 0 for each in gains)
    size = f"{Estimate(abs(gain.value), gain.error)} ({won} of {len(gains)})"
    clear = abs(gain.value) >= CLEAR * gain.error
    return f"{'' if clear else 'open, '}{my if gain.value > 0 else their}: {size}"


def best(config: dict[str, Any], found: Scores, name: str) -> str:
    """The model that no other beats, on average over the seeds that both have."""
    by = {model: found.get((name, model), {}) for model in config["models"]}
    by = {model: own for model, own in by.items() if own and all(map(math.isfinite, own.values()))}

    def beaten(model: str) -> bool:
        mine = by[model]
        gaps = (
            [mine[seed] - other[seed] for seed in mine if seed in other] for other in by.values()
        )
        return any(not mean(gap) <= 0 for gap in gaps if gap)

    return next((model for model in by if not beaten(model)), "–")


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
