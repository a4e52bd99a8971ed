"""Log-densities of pictures that a flow was not trained on: the known failure, measured.

`python experiments/anomalies/images.py` trains what images.yaml says and images.csv lacks, then
writes images.md and pictures/. `--config` names another file, whose results lie beside it. Set
`CNF_DATA` to the folder that holds `mnist/`, `freyfaces/` and `cifar10_4k/`.
"""

import argparse
import csv
import itertools
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from run import ALARMS
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.nn.functional import interpolate
from typicality import p_values

import cnf
from cnf.data import Images, load
from cnf.data.downloads import lying
from cnf.metrics.code_length import bits_in_nats, log_prob_of_draws
from cnf.plotting.axes import new_figure
from cnf.plotting.style import TRUTH, color_of, styled
from cnf.random import stream
from cnf.training.origin import environment

HERE = Path(__file__).parent
SIDE = 14  # pixels
COLUMNS = [
    "trained_on", "model", "pictures", "seed", "scored", "bits", "bits_error", "auroc",
    "auroc_typical", "alarms", "alarms_typical", "steps", "histogram", "revision",
]  # fmt: skip
EDGES = np.linspace(0, 16, 161)  # of histograms, in bits per dimension; ends take what is beyond


def grey(x: Tensor) -> Tensor:
    """Bytes of one channel, 14 × 14, each the mean of the area that it covers."""
    small = interpolate(x.float().mean(1, keepdim=True), size=(SIDE, SIDE), mode="area")
    return small.round().to(torch.uint8)


def digits() -> tuple[Tensor, Tensor]:
    """MNIST's first 10,000 training pictures, and its test pictures."""
    whole: Any = load("mnist")
    return grey(whole.x[:10_000]), grey(whole.test.x)


def photos() -> tuple[Tensor, Tensor]:
    """Nine tenths of 4,000 pictures of CIFAR-10, and the others."""
    where = lying("cifar10_4k", ["cifar10_train_first4000_u8.npz"], "https://www.cs.toronto.edu")
    x = grey(load(where).x)
    return x[:3_600], x[3_600:]


def faces() -> Tensor:
    """Frames of Frey's face."""
    return grey(load(lying("freyfaces", ["freyfaces_u8.npz"], "https://cs.nyu.edu/~roweis")).x)


TRAINED_ON = {"digits": digits, "photos": photos}


def others(test: Tensor, trained_on: str, most: int, seed: int) -> dict[str, Tensor]:
    """Pictures by kind, `most` of each at most; the first are the test pictures themselves."""
    generator = stream(seed, "pictures")

    def some(x: Tensor) -> Tensor:
        return x[torch.randperm(len(x), generator=generator)[:most]]

    normal, shape = some(test), (most, 1, SIDE, SIDE)
    level = torch.randint(256, (most, 1, 1, 1), generator=generator)
    return {
        trained_on: normal,
        "half contrast": (normal.float().mean((1, 2, 3), keepdim=True) / 2 + normal / 2).byte(),
        "half as bright": normal // 2,
        "black": torch.zeros(shape, dtype=torch.uint8),
        "constant": level.expand(shape).to(torch.uint8),
        **{name: some(parts()[1]) for name, parts in TRAINED_ON.items() if name != trained_on},
        "faces": some(faces()),
        "noise": torch.randint(256, shape, generator=generator).to(torch.uint8),
    }


def rows_of(trained_on: str, model: str, seed: int, config: dict[str, Any]) -> list[dict]:
    """One row for each kind of pictures."""
    told = config["models"][model]
    train, test = TRAINED_ON[trained_on]()
    order = torch.randperm(len(train), generator=stream(seed, "split"))
    n = len(train) // 10
    images, held_out = Images(train[order[2 * n :]], trained_on), train[order[:n]]
    images.validation = Images(train[order[n : 2 * n]], trained_on)
    torch.manual_seed(seed)
    preprocess = [{"name": "logit", "alpha": 0.05}, "standardize"]
    sizes = {**images.sizes, "preprocess": preprocess}
    flow = cnf.models.build(told["model"], **sizes, **told.get("options", {}))
    history = cnf.fit(flow, "maximum-likelihood", images, {**told["train"], "seed": seed})
    if history.signal:  # an interrupted fit is no result
        raise SystemExit(128 + history.signal)
    flow.eval()
    noise = stream(seed, "noise of a score")

    def bits(x: Tensor) -> np.ndarray:
        nats = torch.cat([log_prob_of_draws(flow, part, generator=noise) for part in x.split(250)])
        return (nats / bits_in_nats(flow)).double().numpy()  # per dimension, negative log-density

    expected, found = bits(held_out[: config["scored"]]), []
    for kind, x in others(test, trained_on, config["scored"], seed).items():
        told_bits = bits(x)
        normal = found[0]["each"] if found else told_bits
        low, typical = p_values(-expected, -told_bits)
        truth = np.r_[np.zeros(len(normal)), np.ones(len(told_bits))]
        apart = np.abs(np.r_[normal, told_bits] - expected.mean())
        found.append({
            "trained_on": trained_on, "model": model, "pictures": kind, "seed": seed,
            "scored": len(x), "bits": f"{told_bits.mean():.4f}",
            "bits_error": f"{told_bits.std() / len(x) ** 0.5:.4f}",
            "auroc": f"{roc_auc_score(truth, np.r_[normal, told_bits]):.4f}",
            "auroc_typical": f"{roc_auc_score(truth, apart):.4f}",
            "alarms": f"{np.mean(low <= ALARMS):.4f}",
            "alarms_typical": f"{np.mean(typical <= ALARMS):.4f}", "steps": history.steps,
            "histogram": " ".join(map(str, np.histogram(told_bits.clip(0, 16), EDGES)[0])),
            "each": told_bits,
        })  # fmt: skip
    return found


def table(rows: list[dict[str, str]]) -> str:
    """Means over seeds."""
    heads = ["trained on", "pictures", "bits/dim", "AUROC, density", "AUROC, typicality"]
    heads += ["alarms at 5 %", "alarms, two-sided"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for trained_on, kind in dict.fromkeys((row["trained_on"], row["pictures"]) for row in rows):
        own = [r for r in rows if (r["trained_on"], r["pictures"]) == (trained_on, kind)]
        cells = [trained_on, kind]
        for key, digits in (
            ("bits", 2), ("auroc", 3), ("auroc_typical", 3), ("alarms", 2), ("alarms_typical", 2),
        ):  # fmt: skip
            cells.append(f"{statistics.fmean(float(row[key]) for row in own):.{digits}f}")
        if kind == trained_on:
            cells[3:5] = ["–", "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, str]], path: Path) -> None:
    """Histograms of bits per dimension over all seeds, a panel for what was trained on."""
    sets = list(dict.fromkeys(row["trained_on"] for row in rows))
    with styled():
        figure = new_figure(10, 1.0 + 2.4 * len(sets))
        for ax, trained_on in zip(np.atleast_1d(figure.subplots(len(sets), 1)), sets, strict=True):
            own = [row for row in rows if row["trained_on"] == trained_on]
            for place, kind in enumerate(dict.fromkeys(row["pictures"] for row in own)):
                counts = sum(
                    np.array(row["histogram"].split(), float)
                    for row in own if row["pictures"] == kind
                )  # fmt: skip
                color = TRUTH if place == 7 else color_of(place)  # of eight kinds, seven colors
                name = f"{kind}, test" if kind == trained_on else kind
                ax.stairs(counts / counts.sum(), EDGES, color=color, fill=True, alpha=0.25)
                ax.stairs(counts / counts.sum(), EDGES, color=color, label=name)
            ax.set_title(f"trained on {trained_on}")
            ax.set_ylabel("share")
            ax.legend(ncols=2)
        ax.set_xlabel("bits per dimension: to the left the density is higher")
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, dpi=90, pil_kwargs={"quality": 85})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=HERE / "images.yaml")
    path = parser.parse_args().config
    config, results = yaml.safe_load(path.read_text()), path.with_suffix(".csv")
    torch.set_num_threads(1)
    rows = list(csv.DictReader(results.open())) if results.exists() else []
    done = {(row["trained_on"], row["model"], row["seed"]) for row in rows}
    revision = environment()["revision"]
    for seed, trained_on, model in itertools.product(
        config["seeds"], config["trained_on"], config["models"]
    ):
        if (trained_on, model, str(seed)) in done:
            continue
        for row in rows_of(trained_on, model, seed, config):
            row["revision"] = revision
            rows.append({key: str(row[key]) for key in COLUMNS})
            print({key: row[key] for key in COLUMNS if key != "histogram"}, flush=True)
        with results.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    path.with_suffix(".md").write_text(table(rows) + "\n")
    draw(rows, path.parent / "pictures" / "images.webp")
    print(table(rows))


if __name__ == "__main__":
    main()
