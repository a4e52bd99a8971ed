"""Who won a race on what, and at which cost, in words: a difference within its error is a tie.

Names of contestants stand between ** in sentences and notes, as in Markdown, since a title may
hold commas.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cnf.metrics import Score
from cnf.metrics.estimate import number
from cnf.race.results import DECIDING, Results


@dataclass(frozen=True)
class Contest:
    """Who was best at a score.

    Attributes:
        score: The score.
        winners: The best and whoever ties with it, best first; empty where nobody has a number.
        value: The best's number in words.
        note: How far the next is behind, or that it is a tie.
    """

    score: Score
    winners: list[str]
    value: str
    note: str

    @property
    def title(self) -> str:
        """What it is called, with a capital."""
        return self.score.contest[0].upper() + self.score.contest[1:]


def contested(results: Results) -> list[Score]:
    """What the verdict looks at, the deciding score first."""
    scores = [score for score in results.columns if score.contest]
    deciding = [score for score in scores if score.key == results.score]
    return deciding + [score for score in scores if score.key not in DECIDING]


def contest(results: Results, score: Score) -> Contest:
    """Who was best at a score, of those that have a number for it."""
    values = {name: results.mean(name, score.key) for name in results.contestants}
    values = {name: value for name, value in values.items() if math.isfinite(value.value)}
    order = sorted(values, key=lambda name: values[name].value * (1 if score.lower else -1))
    if not order:
        return Contest(score, [], "–", "no contestant has a number here")
    best, others = order[0], order[1:]
    winners = [best] + [name for name in others if tie(results, score, best, name)]
    return Contest(
        score, winners, _with_unit(str(values[best]), score),
        _note(results, score, order, winners),
    )  # fmt: skip


def tie(results: Results, score: Score, one: str, other: str) -> bool:
    """Whether two contestants differ by less than chance explains.

    That is two standard errors of the difference, from test points and seeds together; gaps and
    NLLs are compared point by point, where the log-densities were kept; for a
    sample distance, which has no error over points, at least its floor (between sets of true
    samples it varies by about a third of itself); for times and memory, at least the noise of
    measuring.
    """
    (a, _), (b, _) = (results.mean(name, score.key) for name in (one, other))
    if not (math.isfinite(a) and math.isfinite(b)):
        return False
    allowed = 2 * math.hypot(
        results.standard_error(one, score.key),
        results.standard_error(other, score.key),
    )
    if score.key in DECIDING and (paired := results.paired_difference(one, other)):
        allowed = 2 * paired.error
    floor = results.floor.get("sliced_w2" if score.key == "few_steps" else score.key, 0.0)
    allowed = max(allowed, floor if math.isfinite(floor) else 0.0)
    allowed = max(allowed, score.margin * max(abs(a), abs(b)))
    return abs(a - b) <= allowed


def lead(results: Results) -> list[str]:
    """The verdict in a few plain sentences."""
    names, bad = _names(results), results.failed()
    decided = contest(results, contested(results)[0])
    sentences = [_winner(results, decided, names)] if decided.winners else []
    if decided.winners:
        sentences += _cost(results, decided.winners[0], names) + _elsewhere(results, names)
    if bad:
        verb = "has" if len(bad) == 1 else "have"
        sentences.append(
            f"{_joined([names[name] for name in bad])} {verb} no finite "
            f"{results.score_name} for at least one seed and cannot win: "
            f"{'it' if len(bad) == 1 else 'they'} failed."
        )
    if len(results.settings.get("seeds", [0])) == 1:
        sentences.append(
            "This is one seed: another may change the order, which no error bar here tells."
        )
    return sentences


def _winner(results: Results, decided: Contest, names: dict[str, str]) -> str:
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
    parts = []
    for score in contested(results):
        if not score.cost:
            continue
        found = contest(results, score)
        if not found.winners or winner in found.winners:
            continue
        own = results.mean(winner, score.key).value
        best = results.mean(found.winners[0], score.key).value
        if not math.isfinite(own) or own <= 0 or best <= 0:
            continue
        ratio = own / best if score.lower else best / own
        parts.append(score.cost.format(_times(ratio), names[found.winners[0]]))
    if parts:
        return [f"Its cost: {names[winner]} {_joined(parts)}."]
    if len(results.contestants) > 1:
        return [f"{names[winner]} is also among the fastest to train, to sample and to evaluate."]
    return []


def _elsewhere(results: Results, names: dict[str, str]) -> list[str]:
    """Who won what else outright, and what is a tie."""
    won: dict[str, list[str]] = {}
    ties = []
    for score in contested(results)[1:]:
        winners = contest(results, score).winners
        if len(winners) == 1:
            won.setdefault(winners[0], []).append(score.contest)
        elif winners:
            ties.append(score.contest)
    if len(names) == 1:
        return []
    parts = [f"{names[name]} won on {_joined(what)}" for name, what in won.items()]
    parts += [f"{_joined(ties)} {'are ties' if len(ties) > 1 else 'is a tie'}"] if ties else []
    return [f"Of the rest, {'; '.join(parts)}."] if parts else []


def _note(results: Results, score: Score, order: list[str], winners: list[str]) -> str:
    names = _names(results)
    if len(order) == 1:
        return "no other contestant has a number here" if len(names) > 1 else "the only contestant"
    if len(winners) > 1:
        return "a tie: the difference is within its error"
    best, second = (results.mean(name, score.key).value for name in order[:2])
    behind = abs(best - second)
    if score.key == results.score:
        paired = results.paired_difference(order[1], order[0])
        told = str(paired) if paired else number(behind)
        return f"{names[order[1]]} is next, {told} nats behind"
    ratio = (second / best if score.lower else best / second) if min(best, second) > 0 else 0
    how = f" ({_times(ratio)}{'' if score.lower else ' slower'})" if ratio else ""
    return f"next is {names[order[1]]}: {_with_unit(number(second), score)}{how}"


def _with_unit(text: str, score: Score) -> str:
    return f"{text} {score.unit}".rstrip()


def _times(ratio: float) -> str:
    return f"{number(ratio) if ratio >= 100 else f'{ratio:.2g}'}×"


def _names(results: Results) -> dict[str, str]:
    return {name: f"**{title}**" for name, title in results.titles.items()}


def _name_value(results: Results, decided: Contest) -> str:
    return f"{'a gap' if results.score == 'gap' else 'an NLL'} of {decided.value}"


def _joined(names: Sequence[str]) -> str:
    """Names as a list in a sentence: "a, b and c"."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
