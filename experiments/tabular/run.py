"""Log-likelihoods on tables that papers report, from a Gaussian up: first what is hardly trained.

`python experiments/tabular/run.py` runs what config.yaml says and is not in results.csv yet, on
one core or, with `--device cuda`, on a GPU, then writes table.md. `--set` and `--rows` choose
some. Training that was stopped, as by `--limit` after so many seconds, goes on at the next call.
The log-likelihoods of the test rows are kept in `runs`, for paired differences.
"""

import argparse
import csv
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
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

BEGAN = time.monotonic()
HERE = Path(__file__).parent
COLUMNS = [
    "set", "row", "nats", "error", "over", "difference", "difference_error", "parameters", "steps",
    "seconds", "revision", "machine",
]  # fmt: skip
PUBLISHED = {  # Papamakarios et al. (2017), table 1 and the appendix: two standard errors
    ("bsds300", "Gaussian"): "96.67 ± 0.25",
    ("mnist", "Gaussian"): "−1366.9 ± 1.4",
}
LEAST = 40.0  # seconds, for which it is worth to begin
ORDERS = 8  # raster orders of a square's pixels


@dataclass(frozen=True)
class Place:
    """Where a row runs and what it may take.

    Attributes:
        seed: Of everything.
        device: "cpu" or "cuda".
        limit: Seconds from the start of the process after which training stops; None for none.
        runs: Folder of checkpoints and of log-likelihoods.
        results: Folder of tables.
    """

    seed: int
    device: str
    limit: float | None
    runs: Path
    results: Path


class Made(NamedTuple):
    """What a row scores: a density, its size and what it took.

    Attributes:
        density: Has `log_prob`.
        parameters: Numbers that gradients or EM have fitted; preprocessing is not counted.
        steps: Of training.
        seconds: Of training, of a GPU or of a core; None for the processor time of the row.
        stopped: Whether the limit ended it.
    """

    density: Any
    parameters: int = 0
    steps: int = 0
    seconds: float | None = None
    stopped: bool = False


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


def preprocessed(points: Points, row: str, place: Place, preprocess: list[str]) -> Made:
    """A normal base under preprocessing: nothing is trained."""
    transform = gaussianized(points.x, preprocess)
    return Made(cnf.Flow(None, transform, event_shape=(points.dim,)))


def mixture(points: Points, row: str, place: Place, components: int, steps: int) -> Made:
    """A mixture with full covariances, by EM, inside of whitening and the radial map."""
    transform = gaussianized(points.x, ["whiten", "radial"])
    z = torch.cat([transform.inverse(rows)[0] for rows in points.x.split(100_000)])
    generator = stream(place.seed, "mixture")
    base = GaussianMixture.fit(z, components, steps=steps, generator=generator)
    components, dim = base.means.shape
    numbers = components * (1 + dim + dim * (dim + 1) // 2) - 1
    return Made(cnf.Flow(base, transform), numbers, steps)


def nsf_ar(points: Points, row: str, place: Place, options: dict, train: dict) -> Made:
    """The library's autoregressive splines."""
    flow = cnf.models.nsf_ar(points.dim, preprocess=["whiten", "radial"], **options)
    return trained(flow, points, row, place, train)


def mixtures(
    points: Points, row: str, place: Place, components: int, options: dict, train: dict
) -> Made:
    """One autoregressive layer, a mixture of Gaussians for each pixel given those before."""
    flow = autoregressive_flow(
        points.dim, MixtureOfGaussians(components), layers=1, between=None,
        preprocess=["whiten", "radial"], **options,
    )  # fmt: skip
    return trained(flow, points, row, place, train)


def made(points: Points, row: str, place: Place, options: dict, train: dict) -> Made:
    """Mixtures of logistics for each pixel, relative to the size of those before."""
    flow = cnf.models.made(points.dim, preprocess="whiten", **options)
    return trained(flow, points, row, place, train)


def orders(points: Points, row: str, place: Place, options: dict, train: dict) -> Made:
    """One net for the eight raster orders of the pixels, which it is told; their mean density."""
    flow = cnf.models.made(points.dim, context=ORDERS, preprocess="whiten", **options)
    assert flow.preprocess is not None and points.validation is not None
    flow.preprocess.fit(points.x)
    validation = in_all_orders(points.validation.x[:10_000])
    rows, order = in_all_orders(points.x)
    found = trained(flow, Points(rows, context=order), row, place, train, validation)
    return found._replace(density=MeanOverOrders(flow))


def first_order(points: Points, row: str, place: Place, of: str) -> Made:
    """What one net for eight orders makes of the first of them alone."""
    flow = cnf.load(place.runs / "bsds300" / of)
    return Made(FirstOrder(flow.to(place.device)), sum(p.numel() for p in flow.parameters()))


def trained(
    flow: cnf.Flow, points: Points, row: str, place: Place, train: dict, validation: Any = None
) -> Made:
    """The flow after training, or after as much of it as there was time for."""
    settings = cnf.TrainConfig(
        **train, seed=place.seed, validations=12, progress=False, device=place.device,
        folder=place.runs / "bsds300" / row, resume="auto",
    )  # fmt: skip
    end = None
    if place.limit is not None:
        left = BEGAN + place.limit - time.monotonic()
        if left < LEAST:
            raise SystemExit(f"{row}: {left:.0f} s are left, not enough to begin; call again")
        end = threading.Timer(left, os.kill, (os.getpid(), signal.SIGTERM))
        end.start()
    began = time.process_time()
    history = cnf.fit(flow, "maximum-likelihood", points, settings, validation=validation)
    if end is not None:
        end.cancel()
    print(row, "validation NLL", [round(s, 2) for s in history.column("val_nll")], flush=True)
    assert settings.folder is not None
    shutil.copy(settings.folder / "metrics.csv", place.results / f"{row}.metrics.csv")
    seconds = added(settings.folder / "core_seconds.txt", time.process_time() - began)
    if place.device == "cuda":
        seconds = history.seconds
    numbers, stopped = sum(p.numel() for p in flow.parameters()), history.reason == "interrupted"
    return Made(flow, numbers, history.steps, seconds, stopped)


def added(path: Path, seconds: float) -> float:
    """The seconds of this call and of those before, which the file keeps."""
    total = seconds + (float(path.read_text()) if path.exists() else 0.0)
    path.write_text(f"{total}")
    return total


class MeanOverOrders:
    """The mean of the densities that a flow, told the order, gives a patch in all raster orders.

    To turn or to mirror a patch changes no volume, so that it is a density of patches.
    """

    def __init__(self, flow: cnf.Flow) -> None:
        self.flow = flow

    def log_prob(self, x: Tensor) -> Tensor:
        each = self.flow.log_prob(*in_all_orders(x)).unflatten(0, (ORDERS, len(x)))
        return each.logsumexp(0) - math.log(ORDERS)


class FirstOrder:
    """The density that a flow, told the order, gives a patch as it is."""

    def __init__(self, flow: cnf.Flow) -> None:
        self.flow = flow

    def log_prob(self, x: Tensor) -> Tensor:
        return self.flow.log_prob(x, told(0, x))


def told(k: int, x: Tensor) -> Tensor:
    """Order k as the context of rows x, shape (N, 8)."""
    return F.one_hot(torch.full_like(x[:, 0], k, dtype=torch.long), ORDERS).to(x)


def in_order(x: Tensor, k: int) -> Tensor:
    """Patches of 63 numbers, the last pixel left out, mirrored or turned such that order k is."""
    pixels = torch.cat([x, -x.sum(1, keepdim=True)], 1).unflatten(1, (8, 8))
    if k & 4:
        pixels = pixels.transpose(1, 2)
    pixels = pixels.flip([axis for axis in (1, 2) if k & axis])
    return pixels.flatten(1)[:, :-1]


def in_all_orders(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows in each order, one after the other, and the orders as their context."""
    rows = torch.cat([in_order(x, k) for k in range(ORDERS)])
    return rows, torch.cat([told(k, x) for k in range(ORDERS)])


SETS: dict[str, Callable[[int], Points]] = {"bsds300": bsds300, "mnist": mnist}
KINDS: dict[str, Callable[..., Made]] = {
    "preprocessed": preprocessed, "mixture": mixture, "nsf-ar": nsf_ar, "mixtures": mixtures,
    "made": made, "orders": orders, "first-order": first_order,
}  # fmt: skip


def score(name: str, row: str, points: Points, config: dict[str, Any], place: Place) -> None:
    """Train what a row says, score it on the test part, and write both down."""
    options = {key: value for key, value in config.items() if key not in ("kind", "over")}
    torch.manual_seed(place.seed)
    about = environment()  # as it is loaded
    began = time.process_time()
    found = KINDS[config["kind"]](points, row, place, **options)
    seconds = found.seconds or time.process_time() - began
    assert points.test is not None
    x = points.test.x.to(place.device)
    with torch.no_grad():
        log_prob = log_prob_chunked(found.density, x, chunk=5_000).double().cpu()
    mean = Estimate.of(log_prob)
    result = {
        "set": name, "row": row, "nats": f"{mean.value:.3f}", "error": f"{mean.error:.3f}",
        "parameters": found.parameters, "steps": found.steps, "seconds": f"{seconds:.0f}",
        "revision": about["revision"], "machine": machine(place, about),
    }  # fmt: skip
    print(result, flush=True)
    if found.stopped:
        keep(result, place.results / "stopped.csv")
        raise SystemExit(f"{row}: stopped after {found.steps} steps; call again to go on")
    kept = log_probs(place, name, row)
    kept.parent.mkdir(parents=True, exist_ok=True)
    torch.save(log_prob, kept)
    if "over" in config and (other := log_probs(place, name, config["over"])).exists():
        difference = Estimate.of(log_prob - torch.load(other))
        result |= {
            "over": config["over"], "difference": f"{difference.value:.4f}",
            "difference_error": f"{difference.error:.4f}",
        }  # fmt: skip
    keep(result, place.results / "results.csv")


def machine(place: Place, about: dict[str, Any]) -> str:
    if place.device == "cuda":
        return f"{torch.cuda.get_device_name()}, shared"
    return f"{about['processor']}, one core"


def log_probs(place: Place, name: str, row: str) -> Path:
    """The file of a row's log-likelihoods of the test rows."""
    return place.runs / name / "log_probs" / f"{row}.pt"


def rows(place: Place) -> list[dict[str, str]]:
    path = place.results / "results.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def keep(result: dict[str, Any], path: Path) -> None:
    begun = path.exists()
    with path.open("a", newline="") as file:  # one short write: processes do not mix
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not begun:
            writer.writeheader()
        writer.writerow(result)


def table(config: dict[str, Any], place: Place) -> str:
    found = {(row["set"], row["row"]): row for row in rows(place)}
    lines = [
        "| set | model | nats | published | paired difference | parameters | steps | s | on |",
        "|---|---|---:|---:|---|---:|---:|---:|---|",
    ]
    for name, told in config["sets"].items():
        for row in told:
            if one := found.get((name, row)):
                cells = [
                    name, row, f"{float(one['nats']):.2f} ± {float(one['error']):.2f}",
                    PUBLISHED.get((name, row), "–"), paired(one),
                    f"{int(one['parameters']):,}", f"{int(one['steps']):,}", one["seconds"],
                    one["machine"],
                ]  # fmt: skip
                lines.append("| " + " | ".join(cells).replace("| -", "| −") + " |")
    return "\n".join(lines) + "\n"


def paired(one: dict[str, str]) -> str:
    """The mean difference to another row's log-likelihoods of the same points, in words."""
    if not one["difference"]:
        return "–"
    difference = Estimate(float(one["difference"]), float(one["difference_error"]))
    return f"{difference} over {one['over']}"


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", choices=SETS, nargs="+", default=list(SETS))
    parser.add_argument("--rows", nargs="+", help="names of rows in config.yaml")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limit", type=float, help="seconds after which training stops")
    parser.add_argument("--results", type=Path, default=HERE, help="folder of the tables")
    parser.add_argument("--runs", type=Path, default=Path("runs/tabular"), help="of checkpoints")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    place = Place(config["seed"], chosen.device, chosen.limit, chosen.runs, chosen.results)
    place.results.mkdir(parents=True, exist_ok=True)
    done = {(row["set"], row["row"]) for row in rows(place)}
    for name in chosen.set:
        todo = [
            row for row in config["sets"][name]
            if (name, row) not in done and row in (chosen.rows or config["sets"][name])
        ]  # fmt: skip
        points = SETS[name](config["seed"]) if todo else None
        for row in todo:
            assert points is not None
            score(name, row, points, config["sets"][name][row], place)
            (place.results / "table.md").write_text(table(config, place))


if __name__ == "__main__":
    main()
