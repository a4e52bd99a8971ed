"""Bits per dimension of pictures: several models, trained for the same time, and their samples.

`python experiments/images/run.py` trains what config.yaml says, one model after the other, each in
a process and a folder of its own, scores it on test pictures and writes results.csv, table.md and
pictures/. A call ends after `--seconds` for each model; the next one trains on where it ended.
"""

import argparse
import csv
import fcntl
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

import cnf
from cnf.data import Images, load, write_images
from cnf.data.downloads import lying
from cnf.dynamics.divergence import Hutchinson
from cnf.metrics import Estimate
from cnf.metrics.code_length import bits_in_nats, log_prob_of_draws
from cnf.plotting import plot_interpolations, plot_nearest
from cnf.random import stream
from cnf.training.origin import environment
from cnf.transforms.continuous import is_continuous

BEGAN = time.monotonic() - time.process_time()  # with the imports above
HERE = Path(__file__).parent
COLUMNS = [
    "set", "model", "bits_per_dim", "error", "of_more_draws", "error_of_more", "draws", "probes",
    "scored", "seconds", "steps", "pictures", "pictures_per_second", "peak_memory_gb",
    "parameters", "device", "together", "revision", "seed",
]  # fmt: skip


def mnist() -> Images:
    found = load("mnist")
    assert isinstance(found, Images)
    return found


def mnist14() -> Images:
    """The first 10,000 pictures of 14 × 14: means of four pixels, rounded."""
    whole = mnist()
    assert whole.test is not None and whole.validation is not None
    images = Images(halved(whole.x[:10_000]), "mnist14")
    images.validation = Images(halved(whole.validation.x[:1_000]), "mnist14")
    images.test = Images(halved(whole.test.x), "mnist14")
    return images


def halved(x: Tensor) -> Tensor:
    return torch.nn.functional.avg_pool2d(x.float(), 2).round().to(torch.uint8)


def freyfaces() -> Images:
    """A tenth, drawn at random, is the test: frames of a film that have neighbors in training."""
    found = load(lying("freyfaces", ["freyfaces_u8.npz"], "https://cs.nyu.edu/~roweis/data.html"))
    return tested(found)


def cifar4k() -> Images:
    """The first 4,000 training pictures of CIFAR-10, a tenth of them for the test."""
    file = "cifar10_train_first4000_u8.npz"
    return tested(load(lying("cifar10_4k", [file], "https://www.cs.toronto.edu/~kriz/cifar.html")))


def tested(images: Any) -> Images:
    images, test = images.split(0.1)
    images.test = test
    return images


SETS = {"mnist": mnist, "mnist14": mnist14, "freyfaces": freyfaces, "cifar4k": cifar4k}


def settings(config: dict[str, Any], name: str, row: str) -> dict[str, Any]:
    """A model's part of config.yaml on a set."""
    told = {"options": {}, "objective": "maximum-likelihood", **config["models"][row]}
    if config["sets"][name].get("small"):
        small = told["small"]
        told["options"] = {**told["options"], **small.get("options", {})}
        told["train"] = {**told["train"], **small.get("train", {})}
        told["objective"] = small.get("objective", told["objective"])
    return told


@contextmanager
def interrupted_in(seconds: float) -> Iterator[None]:
    """Ctrl-C after so many seconds, on which `fit` saves the run and returns."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def train(
    config: dict[str, Any], name: str, row: str, images: Images, asked: argparse.Namespace
) -> tuple[cnf.Flow, dict[str, Any]]:
    """The flow, trained until the window or its budget ends, and what that took."""
    told = settings(config, name, row)
    torch.manual_seed(config["seed"])
    if "after" in told:
        flow = cnf.load(asked.runs / folder_of(name, told["after"]))
    else:
        preprocess = [{"name": "logit", "alpha": config["sets"][name]["alpha"]}, "standardize"]
        sizes = {**images.sizes, "preprocess": preprocess}
        flow = cnf.models.build(told["model"], **sizes, **told["options"])
    seconds = told.get("share", 1.0) * (asked.budget or config["sets"][name]["seconds"])
    left = asked.seconds - asked.scoring - (time.monotonic() - BEGAN)
    with interrupted_in(max(left, 20.0)):
        history = cnf.fit(
            flow, told["objective"], images,
            {
                **told["train"], "seconds": seconds, "seed": config["seed"],
                "validations": 0,  # one may take longer than a window
                "folder": asked.runs / folder_of(name, row), "resume": "auto",
                "device": asked.device, "progress": False, "checkpoint_seconds": 45.0,
            },
        )  # fmt: skip
    print(
        f"{row}: {history.reason} after {history.steps} steps, {history.seconds:.0f} s", flush=True
    )
    pictures = history.steps * told["train"]["batch_size"]
    return flow, {
        "seconds": round(history.seconds, 1), "steps": history.steps, "pictures": pictures,
        "pictures_per_second": round(pictures / max(history.seconds, 1e-9), 1),
    }  # fmt: skip


def score(
    flow: cnf.Flow, test: Images, config: dict[str, Any], most: int, chunk: int, until: float
) -> dict[str, Any]:
    """Bits per dimension of test pictures, of as many as there is time for.

    Of one draw of the noise for each picture, with one estimate of a continuous flow's trace; of
    flows with an exact density also of more draws.
    """
    seed, estimated = config["seed"], is_continuous(flow.transform)
    order = torch.randperm(len(test.x), generator=stream(seed, "test pictures"))[:most]
    noise, more = stream(seed, "noise of a score"), stream(seed, "noise of more draws")
    probes = stream(seed, "probes of a score")
    divergence = Hutchinson(config["probes"], generator=probes) if estimated else None
    one, many, scale = [], [], bits_in_nats(flow)
    for rows in order.split(chunk):
        if one and time.monotonic() - BEGAN > until:
            break
        x = test.x[rows]
        one.append(log_prob_of_draws(flow, x, divergence=divergence, generator=noise) / scale)
        if not estimated:
            found = log_prob_of_draws(flow, x, draws=config["draws"], generator=more)
            many.append(found / scale)
    bits = Estimate.of(torch.cat(one))
    told = {"bits_per_dim": round(bits.value, 4), "error": round(bits.error, 4)}
    if many:
        bits = Estimate.of(torch.cat(many))
        told |= {"of_more_draws": round(bits.value, 4), "error_of_more": round(bits.error, 4)}
        told["draws"] = config["draws"]
    return {**told, "probes": config["probes"] * estimated, "scored": sum(map(len, one))}


def draw(flow: cnf.Flow, images: Images, seed: int, row: str, stem: Path) -> None:
    """A grid of samples, samples beside the nearest pictures, and what is between pictures."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    grid = stem.with_suffix(".png")
    grid.unlink(missing_ok=True)
    x = flow.sample((64,), generator=stream(seed, "samples"))
    write_images(grid, x.cpu(), images.levels)
    for name, plot in (("nearest", plot_nearest), ("between", plot_interpolations)):
        figure = plot(images, {row: flow})
        figure.savefig(stem.with_name(f"{stem.name}-{name}.png"), bbox_inches="tight")


def peak_memory(device: torch.device) -> float:
    """Of this process: on a GPU torch's there, else all that it had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def run_row(config: dict[str, Any], name: str, row: str, asked: argparse.Namespace) -> None:
    """Train a model on, score it and draw from it."""
    torch.set_num_threads(1)
    images = SETS[name]()
    assert images.test is not None
    about = environment()
    flow, took = train(config, name, row, images, asked)
    if asked.device != "auto":
        flow.to(asked.device)
    before = results(asked.out).get((name, row), {}).get("peak_memory_gb", 0.0)
    result = {
        "set": name, "model": row, **took,
        "peak_memory_gb": round(max(peak_memory(flow.device), float(before)), 2),
        "parameters": sum(p.numel() for p in flow.parameters()),
        "device": about["gpu"] if flow.device.type == "cuda" else about["processor"],
        "together": asked.together, "revision": about["revision"], "seed": config["seed"],
    }  # fmt: skip
    torch.backends.cudnn.allow_tf32 = False  # its rounding makes adaptive solvers take more steps
    told = config["sets"][name]
    most, until = asked.scored or told["scored"], asked.seconds - asked.scoring / 3
    result |= score(flow, images.test, config, most, told["chunk"], until)
    print(result, flush=True)
    keep(result, asked.out, config)
    draw(flow, images, config["seed"], row, asked.out / "pictures" / folder_of(name, row))


def folder_of(name: str, row: str) -> str:
    """A row's name in files."""
    return re.sub(r"[^a-z0-9]+", "-", f"{name} {row}".lower())


def results(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of results.csv by set and model."""
    path = out / "results.csv"
    rows = list(csv.DictReader(path.open())) if path.exists() else []
    return {(row["set"], row["model"]): row for row in rows}


def keep(result: dict[str, Any], out: Path, config: dict[str, Any]) -> None:
    """Put a row into results.csv in place of an earlier one, and write table.md."""
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other models are being scored at the same time
        rows = results(out) | {(result["set"], result["model"]): result}
        order = [(name, row) for name in config["sets"] for row in config["models"]]
        with (out / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[key] for key in order if key in rows)
        (out / "table.md").write_text(table(results(out).values(), config))


def table(rows: Iterable[dict[str, str]], config: dict[str, Any]) -> str:
    """The rows beside what was published, in Markdown."""
    lines = [
        "| pictures | model | bits/dim | bits/dim, more draws | published | scored | minutes "
        "| pictures seen | pictures/s | memory, GB | parameters |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        more = f"{float(row['of_more_draws']):.3f}" if row["of_more_draws"] else "–"
        number = config["models"][row["model"]].get("published") or "–"
        cells = [
            row["set"], row["model"],
            f"{float(row['bits_per_dim']):.3f} ± {float(row['error']):.3f}", more,
            number if row["set"] == "mnist" else "–", f"{int(row['scored']):,}",
            f"{float(row['seconds']) / 60:.1f}", f"{int(row['pictures']):,}",
            f"{float(row['pictures_per_second']):,.0f}", f"{float(row['peak_memory_gb']):.1f}",
            f"{int(row['parameters']):,}",
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--set", choices=SETS, default="mnist", help="the pictures")
    parser.add_argument(
        "--models", choices=config["models"], nargs="+", default=list(config["models"])
    )
    parser.add_argument("--seconds", type=float, default=1200.0, help="a model's in this call")
    parser.add_argument("--scoring", type=float, default=60.0, help="of them not for training")
    parser.add_argument("--together", type=int, default=1, help="models trained at once")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--runs", type=Path, default=Path("runs/images"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=HERE, help="tables and pictures")
    parser.add_argument("--budget", type=float, help="seconds of training instead of the set's")
    parser.add_argument("--scored", type=int, help="test pictures instead of the set's")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if len(asked.models) == 1:
        return run_row(config, asked.set, asked.models[0], asked)

    before = {row: config["models"][row].get("after") for row in asked.models}

    def process(row: str) -> int:
        """How many failed of a row and of those that go on with it, one after the other."""
        failed = subprocess.run([sys.executable, *sys.argv, "--models", row]).returncode != 0
        return failed + sum(process(other) for other in before if before[other] == row)

    first = [row for row in before if before[row] not in before]
    with ThreadPoolExecutor(asked.together) as pool:
        failed = sum(pool.map(process, first))
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
