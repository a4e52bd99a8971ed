"""Variational autoencoders with flows for posterior, prior or decoder, beside the Gaussian ones.

`python experiments/vae/run.py` runs what config.yaml says and is not in results.csv yet, then
writes table.md and pictures/. `--sets mnist` and `--seeds 0` run a part of it.
"""

import argparse
import csv
import math
import os
import statistics
import warnings
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor
from vae import LEVELS, VAE, NegativeELBO

import cnf
from cnf.data.images import image_grid
from cnf.data.images import mnist as images_of_mnist
from cnf.metrics import Estimate, log_evidence
from cnf.random import stream
from cnf.training.origin import environment

HERE = Path(__file__).parent
PATH = HERE / "results.csv"
WEIGHTS = HERE.parent.parent / "runs" / "vae"
COLUMNS = [
    "set", "model", "seed", "negative_elbo", "error", "negative_elbo_of_bound", "negative_bound",
    "train_solver_change", "train_loss", "steps", "ms_per_step", "parameters", "revision",
]  # fmt: skip


def mnist() -> tuple:
    """Gray levels in [0, 1] to train on, and test pictures that are binarized once."""
    images = images_of_mnist()
    x, test = (each.x.flatten(1) / 255.0 for each in (images, images.test) if each is not None)
    return x, None, (torch.rand(test.shape, generator=stream(0, "test")) < test).float()


def freyfaces() -> tuple:
    """Gray levels 0 to 255 in random order: 1,565 to train, 200 to validate, 200 to test."""
    file = Path(os.environ["CNF_DATA"]) / "freyfaces" / "freyfaces_u8.npz"
    x = torch.from_numpy(np.load(file)["images"]).flatten(1).float()
    return x[torch.randperm(len(x), generator=stream(0, "split"))].split([1565, 200, 200])


SETS = {"mnist": mnist, "freyfaces": freyfaces}


def built(config: dict, name: str, model: str, pixels: int, seed: int) -> VAE:
    torch.manual_seed(seed)
    return VAE(pixels, **{**config["sets"][name]["vae"], **config["sets"][name]["models"][model]})


def run(config: dict, name: str, model: str, seed: int) -> dict:
    revision = environment()["revision"]  # of the code that is loaded
    x, validation, test = SETS[name]()
    vae = built(config, name, model, x.shape[1], seed)
    settings = cnf.TrainConfig(
        **config["sets"][name]["fit"], seed=seed, device="cpu", compile=False, progress=False
    )
    objective = NegativeELBO(binarize=name == "mnist")
    history = cnf.fit(vae, objective, x, settings, validation=validation)
    if history.reason == "interrupted":
        raise SystemExit(f"{name}, {model}, seed {seed}: interrupted, and not scored")
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    torch.save(vae.state_dict(), WEIGHTS / f"{name} {model} {seed}.pt")
    return {
        "set": name, "model": model, "seed": seed,
        **scores(vae, test, config, seed),
        "train_loss": f"{history.records[-1]['loss']:.2f}", "steps": history.steps,
        "ms_per_step": f"{1e3 * history.seconds / history.steps:.1f}",
        "parameters": sum(p.numel() for p in vae.parameters()),
        "revision": revision,
    }  # fmt: skip


def scores(vae: VAE, test: Tensor, config: dict, seed: int) -> dict[str, str]:
    """In nats: the negative ELBO of all, and both bounds of some; ODEs by a tighter solver."""
    draws, tight = config["draws"], vae.with_solver(cnf.Solver.of(config["solver"]))
    elbo, _ = evidence(tight, test, draws["elbo"], seed, draws["together"])
    some = test[: draws["pictures"]]
    of_bound, bound = evidence(tight, some, draws["bound"], seed, 50)
    change = 0.0
    if vae.odes:
        own, _ = evidence(vae, some, draws["elbo"], seed, draws["together"])
        same, _ = evidence(tight, some, draws["elbo"], seed, draws["together"])
        change = (own - same).mean().item()
    value = Estimate.of(-elbo)
    return {
        "negative_elbo": f"{value.value:.4f}", "error": f"{value.error:.4f}",
        "negative_elbo_of_bound": f"{-of_bound.mean().item():.4f}",
        "negative_bound": f"{-bound.mean().item():.4f}", "train_solver_change": f"{change:.4f}",
    }  # fmt: skip


def evidence(vae: VAE, x: Tensor, draws: int, seed: int, rows: int) -> tuple[Tensor, Tensor]:
    """ELBO and importance-weighted bound of each picture."""
    found, generator = [], stream(seed, "scores")
    torch.manual_seed(seed)  # for the noise of dequantization
    for part in x.split(rows):

        def log_joint(z: Tensor, features: Tensor, part: Tensor = part) -> Tensor:
            return vae.log_joint(part.repeat(len(z) // len(part), 1), z)

        with torch.no_grad(), warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "log_evidence: one of"
            )  # the bound is one all the same
            h = vae.features(part)
            told = log_evidence(vae.posterior, log_joint, draws, h, generator=generator)
        found.append((told.elbo, told.value))
    elbo, bound = zip(*found, strict=True)
    return torch.cat(elbo), torch.cat(bound)


def table(rows: list[dict], name: str, models: list[str]) -> str:
    """Means over seeds with their standard errors, and what is gained, seed by seed."""
    own = [row for row in rows if row["set"] == name]
    unit = 1.0 if name == "mnist" else 560 * math.log(2)
    lines = [
        f"| {name} | seeds | -ELBO | gained over its Gaussian | each seed | "
        "-ELBO, some pictures | bound of -log p(x), these | training's solver | ms/step | "
        "parameters |",
        "|---|---|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for model in models:
        group = {row["seed"]: row for row in own if row["model"] == model}
        base = "Gaussian decoder" if "decoder" in model else "Gaussian"
        against = {row["seed"]: row for row in own if row["model"] == base}
        if not group:
            continue

        def column(key: str, group: dict = group, unit: float = unit) -> Tensor:
            return torch.tensor([float(row[key]) / unit for row in group.values()])

        gains = [
            (float(against[seed]["negative_elbo"]) - float(row["negative_elbo"])) / unit
            for seed, row in group.items()
            if seed in against
        ]
        seeds = ", ".join(group)
        told = ["–", "–"]
        if model != base and gains:
            told = [str(Estimate.of(torch.tensor(gains))), ", ".join(f"{g:.2f}" for g in gains)]
        size = statistics.fmean(float(row["ms_per_step"]) for row in group.values())
        change = column("train_solver_change").mean().item()
        lines.append(
            f"| {model} | {seeds} | {Estimate.of(column('negative_elbo'))} | "
            f"{told[0]} | {told[1]} | "
            f"{column('negative_elbo_of_bound').mean():.2f} | "
            f"{Estimate.of(column('negative_bound'))} | {f'{change:+.3f}' if change else '–'} | "
            f"{size:.0f} | {int(next(iter(group.values()))['parameters']):,} |"
        )
    return "\n".join(lines)


def draw_pictures(config: dict, name: str, model: str, shape: tuple[int, int]) -> None:
    """Samples of the prior, and test pictures above their reconstructions."""
    import matplotlib.image

    _, _, test = SETS[name]()
    vae = built(config, name, model, test.shape[1], 0)
    vae.load_state_dict(torch.load(WEIGHTS / f"{name} {model} 0.pt"))
    with torch.no_grad():
        z = vae.eval().prior.sample((40,), generator=stream(0, "pictures"))
        some = test[:10]
        again = vae.posterior.sample(1, vae.features(some), generator=stream(1, "pictures"))[0]
        rows = [some / vae.scale, vae.decoder.mean(again), vae.decoder.mean(z)]
    pixels = (torch.cat(rows) * (LEVELS - 1)).round().reshape(-1, 1, *shape)
    grid = image_grid(pixels, columns=10)
    path = HERE / "pictures" / f"{name}-{model}.png".lower().replace(" ", "-")
    matplotlib.image.imsave(path, grid, cmap="gray", vmin=0, vmax=255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--sets", nargs="*", default=list(SETS))
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--results", type=Path, default=PATH)
    parser.add_argument("--pictures", nargs="*", metavar="SET:MODEL", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = yaml.safe_load(arguments.config.read_text())
    path = arguments.results
    seeds = arguments.seeds or config["seeds"]
    for seed in [] if arguments.pictures else seeds:  # pictures are of what has been trained
        for name in arguments.sets:
            for model in arguments.models or config["sets"][name]["models"]:
                rows = list(csv.DictReader(path.open())) if path.exists() else []
                if (name, model, str(seed)) in {(r["set"], r["model"], r["seed"]) for r in rows}:
                    continue
                row = run(config, name, model, seed)
                print(row, flush=True)
                with path.open("a", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    if file.tell() == 0:
                        writer.writeheader()
                    writer.writerow(row)
    rows = list(csv.DictReader(path.open()))
    run_sets = [name for name in config["sets"] if any(row["set"] == name for row in rows)]
    parts = [table(rows, name, list(config["sets"][name]["models"])) for name in run_sets]
    (HERE / "table.md").write_text("\n\n".join(parts) + "\n")
    for each in arguments.pictures:
        name, model = each.split(":")
        draw_pictures(config, name, model, {"mnist": (28, 28), "freyfaces": (28, 20)}[name])


if __name__ == "__main__":
    main()
