"""Who won a race on what, and at which cost, in words: a difference within its error is a tie.

Names of contestants stand between ** in sentences and notes, as in Markdown, since a title may
hold commas.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cnf.metrics.estimate import number
from cnf.race.results import FEW, Results


@dataclass(frozen=True)
class Aspect:
    """Something to be good at.

    Attributes:
        metric: Key of `Entry.scores`, or "few_steps".
        name: What it is called.
        short: The same in a sentence.
        unit: Of the number, after it.
        lower: Whether less is better.
        margin: Relative difference that the noise of measuring makes: a tie below it.
    """

    metric: str
    name: str
    short: str
    unit: str = ""
    lower: bool = True
    margin: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Who was best at an aspect.

    Attributes:
        aspect: The aspect.
        winners: The best and whoever ties with it, best first; empty where nobody has a number.
        value: The best's number in words.
        note: How far the next is behind, or that it is a tie.
    """

    aspect: Aspect
    winners: list[str]
    value: str
    note: str


def aspects(results: Results) -> list[Aspect]:
    """What the verdict looks at, most important first."""
    gap = results.score == "gap"
    count = f"{results.settings.get('test_points', 10_000):,}"
    # A process's resident set holds the interpreter, torch and what earlier contestants left.
    noise = 0.05 if results.machine.get("gpu") else 0.25
    return [
        Aspect(
            results.score,
            "Gap to the true density" if gap else "Held-out NLL",
            results.score,
            " nats",
        ),
        Aspect("w2", "Samples, W2", "samples (W2)"),
        Aspect("few_steps", f"Samples in {FEW} steps, sliced W2", "few-step samples"),
        Aspect("ms_sample", f"Drawing {count} samples", "sampling speed", " ms", margin=0.1),
        Aspect("ms_log_prob", f"log_prob of {count} points", "log_prob speed", " ms", margin=0.1),
        Aspect(
            "steps_per_second",
            "Training speed",
            "training speed",
            " steps/s",
            lower=False,
            margin=0.1,
        ),
        Aspect("peak_memory_mb", "Peak memory in training", "memory", " MB", margin=noise),
    ]


def outcome(results: Results, aspect: Aspect) -> Outcome:
    """Who was best at an aspect, of those that have a number for it."""
    values = {name: results.mean(name, aspect.metric) for name in results.contestants}
    values = {name: value for name, value in values.items() if math.isfinite(value.value)}
    order = sorted(values, key=lambda name: values[name].value * (1 if aspect.lower else -1))
    if not order:
        return Outcome(aspect, [], "–", "no contestant has a number here")
    best, others = order[0], order[1:]
    winners = [best] + [name for name in others if tie(results, aspect, best, name)]
    return Outcome(
        aspect, winners, f"{values[best]}{aspect.unit}",
        _note(results, aspect, order, winners),
    )  # fmt: skip


def tie(results: Results, aspect: Aspect, one: str, other: str) -> bool:
    """Whether two contestants differ by less than chance explains.

    That is two standard errors of the difference, from test points and seeds together; for a
    sample distance, which has no error over points, at least its floor (between sets of true
    samples it varies by about a third of itself); for times and memory, at least the noise of
    measuring.
    """
    (a, _), (b, _) = (results.mean(name, aspect.metric) for name in (one, other))
    if not (math.isfinite(a) and math.isfinite(b)):
        return False
    allowed = 2 * math.hypot(
        results.standard_error(one, aspect.metric),
        results.standard_error(other, aspect.metric),
    )
    floor = results.floor.get("sliced_w2" if aspect.metric == "few_steps" else aspect.metric, 0.0)
    allowed = max(allowed, floor if math.isfinite(floor) else 0.0)
    allowed = max(allowed, aspect.margin * max(abs(a), abs(b)))
    return abs(a - b) <= allowed


def lead(results: Results) -> list[str]:
    """The verdict in a few plain sentences."""
    names, bad = _names(results), results.failed()
    decided = outcome(results, aspects(results)[0])
    sentences = [_winner(results, decided, names)] if decided.winners else []
    if decided.winners:
        sentences += _cost(results, decided.winners[0], names) + _elsewhere(results, names)
    if bad:
        verb = "has" if len(bad) == 1 else "have"
        sentences.append(
            f"{_joined([names[name] for name in bad])} {verb} no finite "
            f"{_score_name(results)} for at least one seed and cannot win: "
            f"{'it' if len(bad) == 1 else 'they'} failed."
        )
    if len(results.settings.get("seeds", [0])) == 1:
        sentences.append(
            "This is one seed: another may change the order, which no error bar here tells."
        )
    return sentences


def _winner(results: Results, decided: Outcome, names: dict[str, str]) -> str:
    what = "came closest to the true density"
    if results.score == "nll":
        what = "gave held-out points the highest likelihood"
    if len(results.contestants) == 1:
        return f"{names[decided.winners[0]]} reached {_name_value(results, decided)}."
    if len(decided.winners) == 1:
        return (
            f"{names[decided.winners[0]]} {what}: {_name_value(results, decided)}; {decided.note}."
        )
    tied = [names[name] for name in decided.winners]
    if len(tied) == len(results.contestants):
        return (
            f"It is a tie: {_joined(tied)} are within two standard errors of each other's best, "
            f"{_name_value(results, decided)}."
        )
    return (
        f"{_joined(tied)} {what}; between them it is a tie, within two standard errors of "
        f"{_name_value(results, decided)}."
    )


def _cost(results: Results, winner: str, names: dict[str, str]) -> list[str]:
    """What being best at the density cost: times more than the cheapest."""
    words = {
        "ms_sample": "draws samples {} slower than {}",
        "ms_log_prob": "evaluates densities {} slower than {}",
        "steps_per_second": "trains at a {} slower pace in steps per second than {}",
    }
    parts = []
    for aspect in aspects(results):
        if aspect.metric not in words:
            continue
        found = outcome(results, aspect)
        if not found.winners or winner in found.winners:
            continue
        own = results.mean(winner, aspect.metric).value
        best = results.mean(found.winners[0], aspect.metric).value
        if not math.isfinite(own) or own <= 0 or best <= 0:
            continue
        ratio = own / best if aspect.lower else best / own
        parts.append(words[aspect.metric].format(_times(ratio), names[found.winners[0]]))
    if parts:
        return [f"Its cost: {names[winner]} {_joined(parts)}."]
    if len(results.contestants) > 1:
        return [f"{names[winner]} is also among the fastest to train, to sample and to evaluate."]
    return []


def _elsewhere(results: Results, names: dict[str, str]) -> list[str]:
    """Who won what else outright, and what is a tie."""
    won: dict[str, list[str]] = {}
    ties = []
    for aspect in aspects(results)[1:]:
        winners = outcome(results, aspect).winners
        if len(winners) == 1:
            won.setdefault(winners[0], []).append(aspect.short)
        elif winners:
            ties.append(aspect.short)
    if len(names) == 1:
        return []
    parts = [f"{names[name]} won on {_joined(what)}" for name, what in won.items()]
    parts += [f"{_joined(ties)} {'are ties' if len(ties) > 1 else 'is a tie'}"] if ties else []
    return [f"Of the rest, {'; '.join(parts)}."] if parts else []


def _note(results: Results, aspect: Aspect, order: list[str], winners: list[str]) -> str:
    names = _names(results)
    if len(order) == 1:
        return "no other contestant has a number here" if len(names) > 1 else "the only contestant"
    if len(winners) > 1:
        return "a tie: the difference is within its error"
    best, second = (results.mean(name, aspect.metric).value for name in order[:2])
    behind = abs(best - second)
    if aspect.metric in ("gap", "nll"):
        return f"{names[order[1]]} is next, {number(behind)} nats behind"
    ratio = (second / best if aspect.lower else best / second) if min(best, second) > 0 else 0
    how = f" ({_times(ratio)}{'' if aspect.lower else ' slower'})" if ratio else ""
    return f"next is {names[order[1]]}: {number(second)}{aspect.unit}{how}"


def _times(ratio: float) -> str:
    return f"{number(ratio) if ratio >= 100 else f'{ratio:.2g}'}×"


def _names(results: Results) -> dict[str, str]:
    return {name: f"**{title}**" for name, title in results.titles.items()}


def _name_value(results: Results, decided: Outcome) -> str:
    return f"{'a gap' if results.score == 'gap' else 'an NLL'} of {decided.value}"


def _score_name(results: Results) -> str:
    return "gap" if results.score == "gap" else "NLL"


def _joined(names: Sequence[str]) -> str:
    """Names as a list in a sentence: "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
