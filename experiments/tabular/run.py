"""Log-likelihoods on tables that papers report, from a Gaussian up: first what is hardly trained.

`python experiments/tabular/run.py` runs what config.yaml says and is not in results.csv yet, on
one core, then writes table.md. `--set` and `--rows` choose some. The log-likelihoods of the test
rows are kept in `log_probs`, for paired differences.
"""

import argparse
import csv
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import cnf
from cnf.data import Points, load
from cnf.distributions import GaussianMixture
from cnf.metrics import Estimate, log_prob_chunked
from cnf.models.autoregressive import autoregressive_flow
from cnf.random import stream
from cnf.training.origin import environment
from cnf.transforms import PREPROCESSING, Compose, MixtureOfGaussians, Transform, logit

HERE = Path(__file__).parent
PATH = HERE / "results.csv"
COLUMNS = [
    "set", "row", "nats", "error", "parameters", "steps", "core_seconds", "revision", "machine",
]  # fmt: skip
PUBLISHED = {  # Papamakarios et al. (2017), table 1 and the appendix: two standard errors
    ("bsds300", "Gaussian"): "96.67 ± 0.25",
    ("mnist", "Gaussian"): "−1366.9 ± 1.4",
}


def bsds300(seed: int) -> Points:
    return load("bsds300")


def mnist(seed: int) -> Points:
    """MAF's protocol: logits of noisy pixels in float64, in which the density is."""
    images = load("mnist")
    squash, noise = logit(784), stream(seed, "noise of pixels")
    for part in (images, images.validation, images.test):
        pixels = part.x.flatten(1).double()
        u = (pixels + torch.rand(pixels.shape, generator=noise, dtype=torch.float64)) / 256
        part.x = squash.inverse(u)[0]
    return images


def gaussianized(rows: Tensor, names: list[str]) -> Transform:
    """The preprocessings of these names, fitted to the rows."""
    parts = [PREPROCESSING.build(name, "run", {"event_shape": rows.shape[1]}) for name in names]
    transform = Compose(parts[::-1])
    transform.fit(rows)
    return transform


def preprocessed(points: Points, seed: int, preprocess: list[str]) -> tuple[cnf.Flow, int]:
    """A normal base under preprocessing: nothing is trained."""
    return cnf.Flow(None, gaussianized(points.x, preprocess), event_shape=(points.dim,)), 0


def mixture(points: Points, seed: int, components: int, steps: int) -> tuple[cnf.Flow, int]:
    """A mixture with full covariances, by EM, inside of whitening and the radial map."""
    transform = gaussianized(points.x, ["whiten", "radial"])
    z = torch.cat([transform.inverse(rows)[0] for rows in points.x.split(100_000)])
    base = GaussianMixture.fit(z, components, steps=steps, generator=stream(seed, "mixture"))
    return cnf.Flow(base, transform), steps


def nsf_ar(points: Points, seed: int, options: dict, train: dict) -> tuple[cnf.Flow, int]:
    """The library's autoregressive splines."""
    flow = cnf.models.nsf_ar(points.dim, preprocess=["whiten", "radial"], **options)
    return flow, trained(flow, points, seed, train)


def made(
    points: Points, seed: int, options: dict[str, Any], train: dict[str, Any]
) -> tuple[cnf.Flow, int]:
    """One autoregressive layer, a mixture of Gaussians for each pixel given those before."""
    given = dict(options)
    flow = autoregressive_flow(
        points.dim, MixtureOfGaussians(given.pop("components")), layers=1, between=None,
        preprocess=["whiten", "radial"], **given,
    )  # fmt: skip
    return flow, trained(flow, points, seed, train)


def trained(flow: cnf.Flow, points: Points, seed: int, train: dict[str, Any]) -> int:
    settings = cnf.TrainConfig(**train, seed=seed, validations=6, progress=False)
    history = cnf.fit(flow, "maximum-likelihood", points, settings)
    if history.reason == "interrupted":
        raise SystemExit(f"interrupted after {history.steps} steps")
    print("validation NLL", [round(score, 2) for score in history.column("val_nll")], flush=True)
    return history.steps


SETS: dict[str, Callable[[int], Points]] = {"bsds300": bsds300, "mnist": mnist}
KINDS: dict[str, Callable[..., tuple[cnf.Flow, int]]] = {
    "preprocessed": preprocessed, "mixture": mixture, "nsf-ar": nsf_ar, "made": made,
}  # fmt: skip


def scored(name: str, row: str, points: Points, told: dict[str, Any], seed: int) -> dict[str, Any]:
    options = {key: value for key, value in told.items() if key not in ("kind", "over")}
    torch.manual_seed(seed)
    about = environment()  # as it is loaded
    began = time.process_time()
    flow, steps = KINDS[told["kind"]](points, seed, **options)
    seconds = time.process_time() - began
    flow.eval()
    assert points.test is not None
    log_prob = log_prob_chunked(flow, points.test.x, chunk=5_000).double()
    (HERE / "log_probs").mkdir(exist_ok=True)
    torch.save(log_prob, HERE / "log_probs" / f"{name}-{row}.pt")
    found = Estimate.of(log_prob)
    return {
        "set": name, "row": row, "nats": f"{found.value:.3f}", "error": f"{found.error:.3f}",
        "parameters": numbers(flow), "steps": steps, "core_seconds": f"{seconds:.0f}",
        "revision": about["revision"], "machine": f"{about['processor']}, one core",
    }  # fmt: skip


def numbers(flow: cnf.Flow) -> int:
    """Of what gradients or EM have fitted; preprocessing is not counted."""
    free = sum(p.numel() for p in flow.parameters())
    base = flow.base
    if isinstance(base, GaussianMixture):
        components, dim = base.means.shape
        free += components * (1 + dim + dim * (dim + 1) // 2) - 1
    return free


def rows() -> list[dict[str, str]]:
    return list(csv.DictReader(PATH.open())) if PATH.exists() else []


def keep(result: dict[str, Any]) -> None:
    begun = PATH.exists()
    with PATH.open("a", newline="") as file:  # one short write: processes do not mix
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not begun:
            writer.writeheader()
        writer.writerow(result)


def paired(name: str, row: str, over: str) -> str:
    """The mean difference of two rows' log-likelihoods of the same points, in words."""
    files = [HERE / "log_probs" / f"{name}-{one}.pt" for one in (row, over)]
    if not all(file.exists() for file in files):
        return "–"
    mine, other = (torch.load(file) for file in files)
    return f"{Estimate.of(mine - other)} over {over}"


def table(config: dict[str, Any]) -> str:
    found = {(row["set"], row["row"]): row for row in rows()}
    lines = [
        "| set | model | nats | published | paired difference | parameters | steps | core s |",
        "|---|---|---:|---:|---|---:|---:|---:|",
    ]
    for name, told in config["sets"].items():
        for row, options in told.items():
            if one := found.get((name, row)):
                nats = f"{float(one['nats']):.2f} ± {float(one['error']):.2f}".replace("-", "−")
                cells = [
                    name, row, nats,
                    PUBLISHED.get((name, row), "–"),
                    paired(name, row, options["over"]) if "over" in options else "–",
                    f"{int(one['parameters']):,}", f"{int(one['steps']):,}", one["core_seconds"],
                ]  # fmt: skip
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", choices=SETS, nargs="+", default=list(SETS))
    parser.add_argument("--rows", nargs="+", help="names of rows in config.yaml")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    done = {(row["set"], row["row"]) for row in rows()}
    for name in chosen.set:
        todo = [
            row for row in config["sets"][name]
            if (name, row) not in done and row in (chosen.rows or config["sets"][name])
        ]  # fmt: skip
        points = SETS[name](config["seed"]) if todo else None
        for row in todo:
            assert points is not None
            result = scored(name, row, points, config["sets"][name][row], config["seed"])
            keep(result)
            print(result, flush=True)
    (HERE / "table.md").write_text(table(config))


if __name__ == "__main__":
    main()
