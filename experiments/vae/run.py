"""Variational autoencoders with flows for posterior, prior or decoder, beside the Gaussian ones.

`python experiments/vae/run.py` runs what config.yaml says and is not in results.csv yet, then
writes table.md and pictures/. `--sets mnist` and `--seeds 0` run a part of it.
"""

import argparse
import csv
import math
import os
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
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
BITS = 560 * math.log(2)  # nats in a bit per dimension of Frey faces
WEIGHTS = HERE.parent.parent / "runs" / "vae"
COLUMNS = [
    "set", "model", "seed", "negative_elbo", "error", "negative_elbo_of_bound", "negative_bound",
    "train_solver_change", "validation", "train_loss", "steps", "ms_per_step", "parameters",
    "revision",
]  # fmt: skip


def mnist(pool: int) -> tuple:
    """Gray levels in [0, 1] of averages over squares; test pictures are binarized once."""
    images = images_of_mnist()
    x, validation, test = (
        F.avg_pool2d(each.x / 255.0, pool).flatten(1)
        for each in (images, images.validation, images.test)
        if each is not None
    )
    return x, validation, (torch.rand(test.shape, generator=stream(0, "test")) < test).float()


def freyfaces() -> tuple:
    """Gray levels 0 to 255 in random order: 1,565 to train, 200 to validate, 200 to test."""
    file = Path(os.environ["CNF_DATA"]) / "freyfaces" / "freyfaces_u8.npz"
    x = torch.from_numpy(np.load(file)["images"]).flatten(1).float()
    return x[torch.randperm(len(x), generator=stream(0, "split"))].split([1565, 200, 200])


DATA = {"mnist": partial(mnist, 1), "mnist14": partial(mnist, 2), "freyfaces": freyfaces}


def built(config: dict, name: str, model: str, pixels: int, seed: int) -> VAE:
    """A model with its first weights, where there is a "common" one with that one's."""
    group, options = config["sets"][name], dict(config["sets"][name]["models"].get(model, {}))
    options.pop("lr", None)
    torch.manual_seed(seed)
    vae = VAE(pixels, **{**group["vae"], **options})
    if "common" in group and model != "common":
        common = built(config, name, "common", pixels, seed)
        common.load_state_dict(torch.load(weights_of(name, "common", seed)))
        vae.shared().load_state_dict(common.shared().state_dict())
    return vae


def weights_of(name: str, model: str, seed: int) -> Path:
    return WEIGHTS / f"{name} {model} {seed}.pt"


def settings_of(config: dict, name: str, model: str, seed: int) -> cnf.TrainConfig:
    """How a model is trained: those that go on from "common" draw other batches than it did."""
    group = config["sets"][name]
    own = {k: v for k, v in group["models"].get(model, {}).items() if k == "lr"}
    settings = group["common"] if model == "common" else {**group["fit"], **own}
    seed = seed if model == "common" or "common" not in group else 1_000 + seed
    return cnf.TrainConfig(**settings, seed=seed, device="cpu", compile=False, progress=False)


def run(config: dict, name: str, model: str, seed: int) -> dict:
    revision = environment()["revision"]  # of the code that is loaded
    data = config["sets"][name]["data"]
    x, validation, test = DATA[data]()
    vae = built(config, name, model, x.shape[1], seed)
    settings = settings_of(config, name, model, seed)
    objective = NegativeELBO(binarize=data != "freyfaces")
    history = cnf.fit(vae, objective, x, settings, validation=validation)
    if history.reason == "interrupted":
        raise SystemExit(f"{name}, {model}, seed {seed}: interrupted, and not scored")
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    torch.save(vae.state_dict(), weights_of(name, model, seed))
    held_out = history.column("val_loss") or [math.nan]
    return {
        "set": name, "model": model, "seed": seed,
        **scores(vae, test, config, seed),
        "validation": f"{min(held_out) if settings.patience else held_out[-1]:.4f}",
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


def table(rows: list[dict], name: str, models: list[str], bits: float) -> str:
    """Means over seeds with their standard errors, and what is gained, seed by seed.

    Args:
        rows: Those of results.csv.
        name: The set.
        models: Those of the set, in order.
        bits: Nats in a bit per dimension, to tell -ELBO in these as well; 0 not to.
    """
    lines = [
        f"| {name} | -ELBO |{' bits/dim |' * bool(bits)} gained over the Gaussian | each seed | "
        "above its bound | bound of -log p(x) | training's solver | ms/step | parameters |",
        f"|---|---:|{'---:|' * bool(bits)}---:|---|---:|---:|---:|---:|---:|",
    ]
    rows = sorted(rows, key=lambda row: int(row["seed"]))  # they are written as they end
    against = {r["seed"]: r for r in rows if (r["set"], r["model"]) == (name, "Gaussian")}
    for model in models:
        group = {r["seed"]: r for r in rows if (r["set"], r["model"]) == (name, model)}
        if not group:
            continue

        def column(key: str, group: dict = group) -> Tensor:
            return torch.tensor([float(row[key]) for row in group.values()])

        paired = {seed: row for seed, row in group.items() if seed in against}
        told = ["–", "–"]
        if model not in ("common", "Gaussian") and paired:
            key = "negative_elbo"
            gains = [float(against[s][key]) - float(row[key]) for s, row in paired.items()]
            told = [str(Estimate.of(torch.tensor(gains))), ", ".join(f"{g:.3g}" for g in gains)]
        elbo, bound = column("negative_elbo"), column("negative_bound")
        change = column("train_solver_change").mean().item()
        lines.append(
            f"| {model} | {Estimate.of(elbo)} |{f' {Estimate.of(elbo / bits)} |' if bits else ''} "
            f"{told[0]} | {told[1]} | {Estimate.of(column('negative_elbo_of_bound') - bound)} | "
            f"{Estimate.of(bound)} | {f'{change:+.3f}' if change else '–'} | "
            f"{column('ms_per_step').mean():.0f} | {int(column('parameters')[0]):,} |"
        )
    return "\n".join(lines)


def draw_pictures(config: dict, name: str, model: str) -> None:
    """Samples of the prior, and test pictures above their reconstructions."""
    import matplotlib.image

    data = config["sets"][name]["data"]
    _, _, test = DATA[data]()
    shape = {"mnist": (28, 28), "mnist14": (14, 14), "freyfaces": (28, 20)}[data]
    vae = built(config, name, model, test.shape[1], 0)
    vae.load_state_dict(torch.load(weights_of(name, model, 0)))
    with torch.no_grad():
        z = vae.eval().prior.sample((40,), generator=stream(0, "pictures"))
        some = test[:10]
        again = vae.posterior.sample(1, vae.features(some), generator=stream(1, "pictures"))[0]
        rows = [some / vae.scale, vae.decoder.mean(again), vae.decoder.mean(z)]
    pixels = (torch.cat(rows) * (LEVELS - 1)).round().reshape(-1, 1, *shape)
    grid = image_grid(pixels, columns=10)
    path = HERE / "pictures" / f"{name}-{model}.png".lower().replace(",", "").replace(" ", "-")
    matplotlib.image.imsave(path, grid, cmap="gray", vmin=0, vmax=255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=HERE / "config.yaml")
    parser.add_argument("--sets", nargs="*")
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--results", type=Path, default=PATH)
    parser.add_argument("--pictures", nargs="*", metavar="SET:MODEL", default=[])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = yaml.safe_load(arguments.config.read_text())
    sets, path = config["sets"], arguments.results
    models = {
        name: [*(["common"] if "common" in group else []), *group["models"]]
        for name, group in sets.items()
    }
    cases = [
        (name, model, seed)
        for seed in arguments.seeds or config["seeds"]
        for name in arguments.sets or sets
        for model in arguments.models or models[name]
    ]
    for name, model, seed in [] if arguments.pictures else cases:  # of what has been trained
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
    parts = [
        table(rows, name, models[name], BITS if group["data"] == "freyfaces" else 0)
        for name, group in sets.items()
        if any(row["set"] == name for row in rows)
    ]
    if path == PATH:
        (HERE / "table.md").write_text("\n\n".join(parts) + "\n")
    for each in arguments.pictures:
        draw_pictures(config, *each.split(":"))


if __name__ == "__main__":
    main()
