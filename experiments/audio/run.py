"""Spoken digits as waveforms: bits per sample, what is heard of samples, spectrograms.

`python experiments/audio/run.py` makes the data by espeak-ng, runs what config.yaml says and
results.csv lacks, writes WAVs of samples to runs/audio/, and table.md. `--config` names another
file, whose results lie beside it; `--pictures` draws the spectrograms of kept samples instead.
"""

import argparse
import csv
import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from baselines import COMPRESSORS, PerDigit, Predictor, compressed
from digits import WORDS, spoken_digits, write_wav
from spectra import Listener, loudness, periodicity, spectrogram, spectrum_error
from torch import Tensor

import cnf
from cnf.data import Images
from cnf.metrics import Estimate
from cnf.metrics.code_length import log_prob_of_draws
from cnf.random import stream
from cnf.sampling import guided
from cnf.training.origin import environment
from cnf.transforms import Compose
from cnf.transforms.continuous import is_continuous
from cnf.transforms.preprocessing import PREPROCESSING

HERE = Path(__file__).parent
RUNS = HERE.parent.parent / "runs" / "audio"
COLUMNS = [
    "model", "seed", "bits", "error", "scored", "samples", "accuracy", "loudness",
    "spectrum_error", "periodicity", "steps", "parameters", "core_seconds", "revision",
]  # fmt: skip
Row = dict[str, Any]


def trained(told: Row, images: Images, config: Row, seed: int) -> tuple[cnf.Flow, Row]:
    """A model by its name, and what its training took."""
    torch.manual_seed(seed)
    sizes = {**images.sizes, "preprocess": told["preprocess"]}
    flow = cnf.models.build(told["model"], **sizes, **told["options"])
    settings = {**config["train"], **told["train"], "seed": seed}
    history = cnf.fit(flow, told["objective"], images, settings)
    if history.signal:  # an interrupted fit is no result
        raise SystemExit(128 + history.signal)
    parameters = sum(p.numel() for p in flow.parameters())
    return flow, {"steps": history.steps, "parameters": parameters}


def bits_of(log_prob: Tensor, x: Tensor) -> Row:
    """Bits per sample, in the mean over utterances, and its standard error."""
    found = Estimate.of(-log_prob / (x[0].numel() * np.log(2)))
    return {"bits": f"{found.value:.4f}", "error": f"{found.error:.4f}", "scored": len(x)}


def heard(x: Tensor, labels: Tensor, test: Images, listener: Listener) -> Row:
    """What is measured of utterances beside real ones of the test."""
    return {
        "samples": len(x), "accuracy": f"{listener.accuracy(x, labels):.4f}",
        "loudness": f"{loudness(x) - loudness(test.x):.2f}",
        "spectrum_error": f"{spectrum_error(x, labels, test.x, test.labels, listener.rate):.2f}",
        "periodicity": f"{periodicity(x, listener.rate):.3f}",
    }  # fmt: skip


def rows_of_model(
    name: str, seed: int, images: Images, listener: Listener, config: Row
) -> list[Row]:
    """A model's row, and one for each other weight of guidance."""
    told, test, began = config["models"][name], images.test, time.process_time()
    flow, took = trained(told, images, config, seed)
    took["core_seconds"] = f"{time.process_time() - began:.0f}"
    (RUNS / "flows").mkdir(parents=True, exist_ok=True)
    cnf.save(flow, RUNS / "flows" / f"{name}-{seed}.safetensors")
    scored, sampler, divergence = flow, flow, None
    if is_continuous(flow.transform):
        scored, sampler = (flow.with_solver(cnf.Solver.of(told[k])) for k in ("scores", "draws"))
        divergence = cnf.Hutchinson(told["probes"], generator=stream(seed, "probes"))
    n = config["scored"]
    found = log_prob_of_draws(
        scored, test.x[:n], test.context[:n], chunk=config["chunk"], divergence=divergence,
        generator=stream(seed, "noise"),
    )  # fmt: skip
    labels, rows = torch.arange(config["samples"]) % len(WORDS), []
    context = torch.nn.functional.one_hot(labels, len(WORDS)).float()
    for weight in (None, *told.get("guidance", ())):
        title = name if weight is None else f"{name}, guidance {weight:g}"
        source = sampler if weight is None else guided(sampler, weight)
        generator = stream(seed, "samples")
        parts = [source.sample((), c, generator=generator) for c in context.split(config["chunk"])]
        own = {"model": title, **(bits_of(found, test.x[:n]) if weight is None else {}), **took}
        rows.append(
            own | heard(keep(title, seed, torch.cat(parts), config), labels, test, listener)
        )
    return rows


def rows_of_baseline(
    name: str, seed: int, images: Images, listener: Listener, config: Row
) -> list[Row]:
    """A baseline's row."""
    told, test, n = config["baselines"][name], images.test, config["scored"]
    began = time.process_time()
    shape = {"event_shape": tuple(images.x.shape[1:])}
    parts = [PREPROCESSING.build(part, "run", shape) for part in told["preprocess"]]
    model = PerDigit(images, Compose(parts[::-1]), told["estimator"], seed)
    took = {"core_seconds": f"{time.process_time() - began:.0f}"}
    found = model.log_prob(test.x[:n], test.labels[:n], stream(seed, "noise"))
    labels = torch.arange(config["samples"]) % len(WORDS)
    x = keep(name, seed, model.sample(labels, seed), config)
    return [
        {"model": name, **bits_of(found, test.x[:n]), **took, **heard(x, labels, test, listener)}
    ]


def rows_of_real(_: str, __: str, images: Images, listener: Listener, config: Row) -> list[Row]:
    """What is measured of real utterances: of other voices, as a floor, and those of the test."""
    n, test, other = config["samples"], images.test, images.validation
    keep("real", 0, test.x[:n], config)
    return [
        {"model": "real", **heard(test.x, test.labels, test, listener)},
        {"model": "real, other voices", **heard(other.x[:n], other.labels[:n], test, listener)},
    ]


def rows_of_predictor(_: str, __: str, images: Images, ___: Listener, config: Row) -> list[Row]:
    """A lossless code that is learned from the training utterances."""
    test, predictor = images.test.x[: config["scored"]], Predictor(images.x, **config["predictor"])
    return [{"model": "predictor", **bits_of(-np.log(2) * predictor.code_length(test), test)}]


def rows_of_compressor(name: str, _: str, images: Images, __: Listener, config: Row) -> list[Row]:
    """Python's compressors, of all scored test utterances in one file."""
    test = images.test.x[: config["scored"]]
    return [{"model": name, "bits": f"{compressed(name, test):.4f}", "scored": len(test)}]


def keep(title: str, seed: int, x: Tensor, config: Row) -> Tensor:
    """Write samples as they are, and the digits 0 to 9 as a WAV; returns them."""
    stem = RUNS / "samples" / f"{title.lower().replace(', ', '-').replace(' ', '-')}-{seed}"
    write_wav(stem.with_suffix(".wav"), x[: len(WORDS)], config["rate"])
    np.save(stem.with_suffix(".npy"), x.to(torch.uint8).numpy())
    return x


def draw_pictures(config: Row, folder: Path) -> None:
    """A picture of spectrograms for each digit (columns) of the kept samples (rows)."""
    from matplotlib.figure import Figure

    for path, titles in config["pictures"].items():
        figure = Figure(figsize=(12, 1.25 * len(titles)), layout="constrained")
        for row, title in enumerate(titles):
            x = torch.from_numpy(np.load(RUNS / "samples" / f"{title}-0.npy"))[: len(WORDS)]
            power = 10 * np.log10(spectrogram(x, 16) + 1e-6)
            for k, word in enumerate(WORDS):
                axes = figure.add_subplot(len(titles), len(WORDS), row * len(WORDS) + k + 1)
                axes.imshow(
                    power[k], origin="lower", aspect="auto", cmap="magma", vmin=-50, vmax=-5
                )
                axes.set(xticks=[], yticks=[])
                if row == 0:
                    axes.set_title(word, fontsize=9)
                if k == 0:
                    axes.set_ylabel(title, fontsize=9)
        figure.savefig(folder / path, dpi=80, pil_kwargs={"quality": 70})


def table(rows: list[Row], config: Row) -> str:
    """Means over seeds with their standard errors."""
    names = list(dict.fromkeys(row["model"] for row in rows))
    heads = ["", "bits per sample", "digit recognized", "loudness, dB", "spectrum error, dB"]
    heads += ["periodicity", "steps", "parameters", "core seconds"]
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    for name in names:
        own = [row for row in rows if row["model"] == name]

        def mean(key: str, digits: int, own: list[Row] = own) -> str:
            values = torch.tensor([float(row[key]) for row in own if row[key] != ""])
            if not len(values):
                return "–"
            if digits and len(values) > 1:
                return (
                    f"{values.mean():.{digits}f} ± {values.std() / len(values) ** 0.5:.{digits}f}"
                )
            return f"{values.mean():,.{digits}f}"

        cells = [name, mean("bits", 3), mean("accuracy", 3), mean("loudness", 1)]
        cells += [mean("spectrum_error", 1), mean("periodicity", 2), mean("steps", 0)]
        cells += [mean("parameters", 0), mean("core_seconds", 0)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cases(config: Row) -> list[tuple[str, Callable[..., list[Row]]]]:
    """The rows of each seed, and what makes them; what has no seed is made once."""
    plain = {"real": rows_of_real, "predictor": rows_of_predictor}
    plain |= dict.fromkeys(COMPRESSORS, rows_of_compressor)
    told = [plain, dict.fromkeys(config["baselines"], rows_of_baseline)]
    told += [dict.fromkeys(config["models"], rows_of_model)]
    return [case for part in told for case in part.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--pictures", action="store_true", help="draw kept samples, run nothing")
    asked = parser.parse_args()
    config, folder = yaml.safe_load(asked.config.read_text()), asked.config.parent
    results = folder / "results.csv"
    if asked.pictures:
        (folder / "pictures").mkdir(exist_ok=True)
        return draw_pictures(config, folder / "pictures")
    torch.set_num_threads(1)
    (RUNS / "samples").mkdir(parents=True, exist_ok=True)
    images = spoken_digits(
        RUNS / "data", config["shape"], config["rate"], config["accents"], config["parts"]
    )
    listener = Listener(images.x, images.labels, config["rate"])
    rows: list[Row] = list(csv.DictReader(results.open())) if results.exists() else []
    done, revision = {(row["model"], row["seed"]) for row in rows}, environment()["revision"]
    for seed, (name, rows_of) in itertools.product(config["seeds"], cases(config)):
        seed = seed if name in {**config["baselines"], **config["models"]} else ""
        if (name, str(seed)) in done:
            continue
        for row in rows_of(name, seed, images, listener, config):
            row |= {"seed": seed, "revision": revision}
            rows.append({key: str(row.get(key, "")) for key in COLUMNS})
            print(rows[-1], flush=True)
            done.add((row["model"], str(seed)))
        with results.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    (folder / "table.md").write_text(table(rows, config) + "\n")
    print(table(rows, config))


if __name__ == "__main__":
    main()
