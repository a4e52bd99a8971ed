"""The Markdown tables of flow_matching_2d, from the rows of results.csv."""

import statistics

# W2 and normalized path energy as printed in table 2 of Tong et al. (2024), [SF]²M,
# https://arxiv.org/abs/2307.03672: mean over 5 seeds, in the order of config.yaml's tasks.
PUBLISHED = {
    "I-CFM": ((0.373, 1.557, 0.178, 0.242), (0.202, 2.680, 0.891, 0.856)),
    "OT-CFM": ((0.303, 0.601, 0.130, 0.144), (0.031, 0.015, 0.083, 0.027)),
    "[SF]²M-Exact": ((0.275, 0.726, 0.124, 0.128), (0.016, 0.045, 0.053, 0.034)),
    "SB-CFM": ((2.314, None, 0.434, 0.341), (1.000, None, 0.995, 0.745)),
    "rectified flow": ((0.421, 1.525, 0.283, 0.345), (0.044, 0.203, 0.130, 0.099)),
}


def tables(config: dict, rows: list[dict[str, str]]) -> str:
    methods = list(dict.fromkeys(row["method"] for row in rows))
    parts = []
    for column, title, place in (("w2", "W2", 0), ("npe", "normalized path energy", 1)):
        lines = [header([title, *config["tasks"]])]
        for method in methods:
            cells = [over_seeds(chosen(rows, method, task), column) for task in config["tasks"]]
            if any(cell != "–" for cell in cells):
                lines.append(line([method, *cells]))
            if method in PUBLISHED:
                known = PUBLISHED[method][place]
                cells = ["–" if value is None else f"{value:.3f}" for value in known]
                lines.append(line([f"· published {method}", *cells]))
        parts.append("\n".join(lines))
    steps = [f"euler_{n}" for n in config["few_steps"]]
    lines = [header(["W2 by Euler steps", "", *(str(n) for n in config["few_steps"])])]
    for task in config["tasks"]:
        for method in methods:
            mine = [row for row in chosen(rows, method, task) if row["euler_1"]]
            if mine:
                lines.append(line([task, method, *(over_seeds(mine, step) for step in steps)]))
    parts.append("\n".join(lines))
    lines = [header(["seconds of training (of these pairing)", *config["tasks"]])]
    for method in methods:
        cells = []
        for task in config["tasks"]:
            mine = [row for row in chosen(rows, method, task) if row["train_seconds"]]
            whole, pairing = (
                [float(row[name]) for row in mine]
                for name in ("train_seconds", "coupling_seconds")
            )
            median = statistics.median
            cells.append(f"{median(whole):.0f} ({median(pairing):.0f})" if mine else "–")
        if any(cell != "–" for cell in cells):
            lines.append(line([method, *cells]))
    parts.append("\n".join(lines))
    return "\n\n".join(parts)


def chosen(rows: list[dict[str, str]], method: str, task: str) -> list[dict[str, str]]:
    return [row for row in rows if (row["method"], row["task"]) == (method, task)]


def over_seeds(rows: list[dict[str, str]], column: str) -> str:
    values = [float(row[column]) for row in rows if row[column]]
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def header(cells: list[str]) -> str:
    return line(cells) + "\n|---|" + "---:|" * (len(cells) - 1)


def line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
