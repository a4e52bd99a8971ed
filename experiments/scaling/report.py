"""Tables of what was measured, how well the cost model fits it, and what it predicts."""

import statistics
from collections.abc import Iterator
from typing import NamedTuple

import gpus
import model
from costs import Cost, at
from tables import markdown, number

BUSY = 0.5  # processes that ran before: their work is in the numbers
GOAL = 1.8  # times the throughput of one process, of the U-Net


class Row(NamedTuple):
    """A case with so many rows for each process, and the median seconds of a step.

    Attributes:
        name: Of the case.
        rows: For each process.
        cost: Of the step.
        alone: On one process.
        beside: On one process, while a copy of it runs on the other core.
        two: On two processes, with twice the rows in all.
        strong: On one process with all the rows of the two; None if that was not measured.
    """

    name: str
    rows: int
    cost: Cost
    alone: float
    beside: float
    two: float
    strong: float | None


def costs_of(results: dict) -> dict[str, dict[int, Cost]]:
    """What was counted, by case and rows."""
    return {
        name: {int(rows): Cost(*cost) for rows, cost in counted.items()}
        for name, counted in results["costs"].items()
    }


def measured(results: dict) -> Iterator[Row]:
    """The rows of the table of measurements."""
    costs = costs_of(results)
    for name, by_rows in results["seconds"].items():
        for rows, ways in by_rows.items():
            ms = {way: found["median"] for way, found in ways.items()}
            whole = by_rows.get(str(2 * int(rows)))
            yield Row(
                name, int(rows), at(int(rows), costs[name]), ms["alone"], ms["beside a copy"],
                ms["two"], whole["alone"]["median"] if whole else None,
            )  # fmt: skip


class Fit(NamedTuple):
    """The constants of this machine, fitted to the measurements."""

    alone: model.Machine
    beside: model.Machine
    link: model.Link

    @classmethod
    def of(cls, rows: list[Row]) -> "Fit":
        """The fit to these measurements."""
        costs = [row.cost for row in rows]
        beside = [row.beside for row in rows]
        return cls(
            model.fitted_machine(costs, [row.alone for row in rows]),
            model.fitted_machine(costs, beside),
            model.fitted_link(costs, [row.two for row in rows], beside),
        )

    def two(self, cost: Cost) -> float:
        """Seconds of a step of two processes."""
        return self.beside.step(cost) + self.link.all_reduce(cost.gradient, 2)


def written(results: dict) -> str:
    """All of it, with what made it."""
    rows, costs = list(measured(results)), costs_of(results)
    parts = {
        "Measured": _measured(rows), "Fitted": _fitted(rows), "Counted": _counted(costs),
        "Predicted": _predicted(costs), "Checked on an H200": _checked(costs),
    }  # fmt: skip
    text = "\n".join(f"## {title}\n\n{part}\n" for title, part in parts.items())
    return f"{text}\n{_about(results)}\n"


def measured_part(results: dict) -> str:
    """What was measured and fitted, with what made it."""
    rows = list(measured(results))
    return "\n\n".join((_measured(rows), _about(results), _fitted(rows)))


def _about(results: dict) -> str:
    host, about = results["about"]["machine"], results["about"]
    load = about["load before"][0]
    text = (
        f"Revision {host['revision']}, {host['processor']}, one thread for each process, torch "
        f"{host['torch']}, seed {about['seed']}, medians of {about['repeats']} jobs of each way "
        f"in turn, {about['minutes']} minutes, load before {load}."
    )
    if load > BUSY:
        text += " **The machine was busy: these times and ratios are to be measured again.**"
    return text


def _measured(rows: list[Row]) -> str:
    lines = [
        (
            row.name, f"{row.rows:,}",
            *(number(1e3 * seconds) for seconds in (row.alone, row.beside, row.two)),
            number(2 * row.alone / row.two), number(2 * row.alone / row.beside),
            "–" if row.strong is None else number(row.strong / row.two),
        )
        for row in rows
    ]  # fmt: skip
    header = (
        "", "rows a process", "alone, ms", "beside a copy, ms", "two, ms",
        "weak: throughput of two", "its ceiling", "strong: speed-up by two",
    )  # fmt: skip
    text = markdown(header, lines)
    reached = [
        f"{'met' if 2 * row.alone / row.two >= GOAL else 'MISSED'} at {row.rows}"
        for row in rows if row.name.startswith("U-Net")
    ]  # fmt: skip
    if reached:
        text += f"\n\nGoal for the U-Net, {GOAL} times the throughput: {', '.join(reached)} rows."
    return text


def _fitted(rows: list[Row]) -> str:
    fit = Fit.of(rows)
    lines = [
        (
            name, number(1e6 * machine.launch), *(_rate(1e-9, each) for each in machine[1:]),
            *_errors([machine.step(row.cost) for row in rows], seconds),
        )
        for name, machine, seconds in (
            ("alone", fit.alone, [row.alone for row in rows]),
            ("beside a copy", fit.beside, [row.beside for row in rows]),
        )
    ]  # fmt: skip
    header = ("", "μs a launch", "GFLOP/s", "GB/s", "median error", "largest")
    of_two = _errors([fit.two(row.cost) for row in rows], [row.two for row in rows])
    return (
        f"{markdown(header, lines)}\n\nTwo processes: {number(1e6 * fit.link.latency)} μs for the "
        f"all-reduces of a step and {_rate(1e-9, fit.link.byte)} GB/s; their steps are predicted "
        f"with a median error of {of_two[0]}, at most {of_two[1]}."
    )


def _rate(scale: float, seconds: float) -> str:
    """A rate from its inverse; a dash for a constant that was fitted as zero."""
    return number(scale / seconds) if seconds else "–"


def _errors(predicted: list[float], seconds: list[float]) -> tuple[str, str]:
    """Median and largest relative error, in percent."""
    found = [abs(error) for error in model.errors(predicted, seconds)]
    return f"{100 * statistics.median(found):.0f} %", f"{100 * max(found):.0f} %"


def _counted(costs: dict[str, dict[int, Cost]]) -> str:
    lines = [
        (
            name, f"{rows:,}", number(cost.launches), number(cost.flops / 1e9),
            number(cost.moved / 1e9), number(cost.gradient / 1e6),
        )
        for name, counted in costs.items() for rows, cost in counted.items()
    ]  # fmt: skip
    return markdown(
        ("of a step", "rows", "launches", "GFLOP", "GB moved", "MB of gradient"), lines
    )


def _predicted(costs: dict[str, dict[int, Cost]]) -> str:
    lines = []
    for name in costs:
        step = gpus.STEPS[name]
        for kind, total in (("weak", None), ("strong", step.strong)):
            first = gpus.predicted(name, costs[name], 1, total or step.weak)
            for count in (1, 8, 512):
                each = step.weak if total is None else total // count
                found = gpus.predicted(name, costs[name], count, each)
                ideal = 1 if total is None else count
                lines.append((
                    f"{name}, {kind}", count, f"{each:,}",
                    *(number(1e3 * seconds) for seconds in found),
                    *(
                        f"{100 * a / b / ideal:.0f} %"
                        for a, b in zip(first[2:], found[2:], strict=True)
                    ),
                ))  # fmt: skip
    header = (
        "", "GPUs", "rows a GPU", "kernels, ms", "all-reduce, ms", "launched one by one, ms",
        "as a graph, ms", "efficiency launched", "as a graph",
    )  # fmt: skip
    return markdown(header, lines)


def _checked(costs: dict[str, dict[int, Cost]]) -> str:
    lines = [
        (name, number(1e3 * here), number(1e3 * there), f"{100 * (here / there - 1):+.0f} %")
        for name, (here, there) in gpus.checks(costs).items()
    ]
    return markdown(("kernels of a step", "predicted, ms", "measured, ms", "error"), lines)
