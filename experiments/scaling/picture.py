"""A picture: how well the model fits here, and how it lets throughput grow with GPUs."""

from pathlib import Path

import gpus
import matplotlib as mpl

mpl.use("agg")
import matplotlib.pyplot as plt  # noqa: E402
from report import Fit, costs_of, measured  # noqa: E402

COUNTS = [2**k for k in range(10)]


def draw(results: dict, file: Path) -> None:
    """Write the picture of these results."""
    figure, (fit, *predictions) = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    _fit(fit, results)
    for axes, kind in zip(predictions, ("weak", "strong"), strict=True):
        _predictions(axes, results, kind)
    figure.savefig(file, dpi=110)
    plt.close(figure)


def _fit(axes: plt.Axes, results: dict) -> None:
    rows = list(measured(results))
    fit = Fit.of(rows)
    for label, marker, seconds, of in (
        ("alone", "o", [row.alone for row in rows], fit.alone.step),
        ("two processes", "^", [row.two for row in rows], fit.two),
    ):
        predicted = [1e3 * of(row.cost) for row in rows]
        axes.loglog(predicted, [1e3 * s for s in seconds], marker, label=label, alpha=0.7)
    axes.axline((1, 1), (10, 10), color="gray", lw=1)
    axes.set(xlabel="ms of a step, fitted", ylabel="ms of a step, measured", title="two CPU cores")
    axes.legend()


def _predictions(axes: plt.Axes, results: dict, kind: str) -> None:
    for color, (name, costs) in enumerate(costs_of(results).items()):
        step = gpus.STEPS[name]
        each = [step.weak if kind == "weak" else step.strong / n for n in COUNTS]
        found = [gpus.predicted(name, costs, n, r) for n, r in zip(COUNTS, each, strict=True)]
        for style, part in (("-", "launched"), ("--", "captured")):
            seconds = [getattr(one, part) for one in found]
            work = [n * r / (each[0] * s) for n, r, s in zip(COUNTS, each, seconds, strict=True)]
            axes.loglog(
                COUNTS, [w * seconds[0] for w in work], style, color=f"C{color}",
                label=f"{name}, {part}", base=2,
            )  # fmt: skip
    axes.loglog(COUNTS, COUNTS, color="gray", lw=1, base=2)
    axes.set(xlabel="H100s", ylabel="times the rows/s of one", title=f"{kind}, predicted")
    if kind == "weak":
        axes.legend(fontsize=7)
