"""Maps of the densities that run.py has trained, beside kernels."""

from pathlib import Path

import earth
import matplotlib.pyplot as plt
import torch
import yaml
from run import log_density

import cnf

HERE = Path(__file__).parent
SIDE = 48  # of the map, in latitude
SEED = 0


def main() -> None:
    config = yaml.safe_load((HERE / "config.yaml").read_text())
    latitude = (torch.arange(SIDE, dtype=torch.float64) + 0.5) * 180 / SIDE - 90
    longitude = (torch.arange(2 * SIDE, dtype=torch.float64) + 0.5) * 180 / SIDE - 180
    x = earth.unit_vectors(torch.cartesian_prod(latitude, longitude))
    names = [*config["flows"], "kernels"]
    figure, axes = plt.subplots(
        len(config["earth"]), len(names), figsize=(12, 8.6), layout="constrained",
        subplot_kw={"projection": "mollweide"},
    )  # fmt: skip
    for row, data in zip(axes, config["earth"], strict=True):
        parts = earth.split(earth.read(data), SEED)
        for axis, name in zip(row, names, strict=True):
            if name == "kernels":
                log_p = earth.kernel_log_density(x, parts.train, earth.fitted_concentration(parts))
            else:
                flow = cnf.load(HERE / "runs" / f"{data}-{name}-{SEED}.safetensors")
                log_p = log_density(flow, config["flows"][name]["chart"], x)
            axis.pcolormesh(
                torch.deg2rad(longitude), torch.deg2rad(latitude),
                log_p.reshape(SIDE, -1).clamp(min=-6), cmap="magma", vmin=-6, vmax=3,
                shading="gouraud", rasterized=True,
            )  # fmt: skip
            test = parts.test[:400]
            axis.scatter(
                torch.atan2(test[:, 1], test[:, 0]), test[:, 2].clamp(-1, 1).asin(), s=0.8,
                c="cyan", linewidths=0,
            )  # fmt: skip
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"{data}, {name}", fontsize=9)
    (HERE / "pictures").mkdir(exist_ok=True)
    figure.savefig(HERE / "pictures" / "earth.webp", dpi=90, pil_kwargs={"quality": 70})


if __name__ == "__main__":
    with torch.no_grad():
        main()
