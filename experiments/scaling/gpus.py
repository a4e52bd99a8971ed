"""What the cost model predicts for many H100s. Nothing here was measured on more than one GPU.

A step's device time is, as on an H200 (experiments/gpu), a fixed time for each kernel and a factor
on flops / rate + bytes / bandwidth. The factor is that of one step measured there, by the H200's
published numbers, and is taken to hold on an H100. The host launches kernels ahead of the device,
so that the longer of the two counts. All-reduces wait for the whole gradient, which is smaller
than one of DDP's buckets (25 MB), and overlap with nothing.

Published numbers:
    H100 SXM, H200 SXM, dense: float32 67, TF32 494.7, bfloat16 989.4 TFLOP/s; 3.35 and 4.8 TB/s;
    NVLink 900 GB/s, half of it each way.
        https://www.nvidia.com/en-us/data-center/h100/
        https://www.nvidia.com/en-us/data-center/h200/
        https://resources.nvidia.com/en-us-tensor-core/gtc22-whitepaper-hopper
    A node of eight, with an adapter of 400 Gb/s InfiniBand for each GPU:
        https://docs.nvidia.com/dgx/dgxh100-user-guide/introduction-to-dgxh100.html
    Latencies of NCCL's trees (LL128), 4.4 + 2 (1.2 · (GPUs of a node - 1) + 8.5 · log2 nodes) μs:
        https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc
"""

import json
import math
from pathlib import Path
from typing import NamedTuple

from costs import Cost, at

RATES = {"float32": 67e12, "TF32": 494.7e12, "bfloat16": 989.4e12}  # flop/s
H100, H200 = 3.35e12, 4.8e12  # bytes/s
NODE = 8
NVLINK, INFINIBAND = 450e9, 50e9  # bytes/s of a GPU, each way
SMALL = 3  # all-reduces or broadcasts of a few bytes in a step: the loss; a signal, in two
KERNEL = 1.9e-6  # seconds of a kernel on few rows, on the H200: 1.85 to 2.05
MEASURED = json.loads(
    (Path(__file__).parent.parent / "gpu" / "results-nvidia-h200.json").read_text()
)


class Step(NamedTuple):
    """What is predicted from which measurement.

    Attributes:
        part: Of the results of experiments/gpu.
        row: The measurement that gives the factor.
        rows: Of that measurement.
        few: The measurement of a step on few rows, which the host's launches decide.
        rate: What products are computed in.
        weak: Rows for each GPU in weak scaling.
        strong: Rows in all in strong scaling.
    """

    part: str
    row: str
    rows: int
    few: str
    rate: str
    weak: int
    strong: int


STEPS = {
    "U-Net, flow matching": Step(
        "pictures", "unet, 64 pictures", 64, "unet, 64 pictures", "TF32", 64, 4_096
    ),
    "cnf, flow matching": Step(
        "steps", "cnf, flow matching, 65,536 rows", 65_536, "cnf, flow matching, 1,024 rows",
        "float32", 65_536, 524_288,
    ),
    "cnf, likelihood": Step(
        "steps", "cnf, likelihood, rk4 × 8, 65,536 rows", 65_536,
        "cnf, likelihood, rk4 × 8, 1,024 rows", "float32", 65_536, 524_288,
    ),
}  # fmt: skip


class Prediction(NamedTuple):
    """Seconds of a step.

    Attributes:
        device: In which its kernels run.
        all_reduce: That its processes take to add up gradients, losses and signals.
        launched: Of the whole, kernels launched one by one, as several processes do today.
        captured: Of the whole, captured as a CUDA graph, as on one GPU today.
    """

    device: float
    all_reduce: float
    launched: float
    captured: float


def predicted(name: str, costs: dict[int, Cost], gpus: int, rows: float) -> Prediction:
    """A step on so many H100s, with `rows` on each.

    Args:
        name: Of the case.
        costs: Its counted costs by rows.
        gpus: How many.
        rows: On each.
    """
    step = STEPS[name]
    host, graph, busy = _of_few(step)
    device = device_seconds(step, costs, rows, H100)
    shared = all_reduce(at(rows, costs).gradient, gpus)
    launched = max(host, device) + shared
    return Prediction(device, shared, launched, device + graph - busy + shared)


def device_seconds(step: Step, costs: dict[int, Cost], rows: float, bandwidth: float) -> float:
    """Seconds in which a step's kernels run.

    Args:
        step: The step.
        costs: Its counted costs by rows.
        rows: On the device.
        bandwidth: Of its memory, bytes/s.
    """
    found = MEASURED[step.part][step.row]
    fixed = KERNEL * found["kernels"]
    factor = (found["busy ms"] / 1e3 - fixed) / _least(at(step.rows, costs), step.rate, H200)
    return fixed + factor * _least(at(rows, costs), step.rate, bandwidth)


def _least(cost: Cost, rate: str, bandwidth: float) -> float:
    """Seconds by published numbers."""
    return cost.flops / RATES[rate] + cost.moved / bandwidth


def _of_few(step: Step) -> tuple[float, float, float]:
    """Seconds of the H200's step on few rows: launched one by one, as a graph, in kernels."""
    found = MEASURED[step.part][step.few]
    ms = found["ms"]
    return tuple(
        value / 1e3
        for value in (
            ms["kernel by kernel"]["median"],
            ms["as one graph"]["median"],
            found["busy ms"],
        )
    )  # pyright: ignore


def all_reduce(gradient: float, gpus: int) -> float:
    """Seconds of a step's all-reduces.

    Whole nodes send over all of their adapters, as many rings as there are of these.

    Args:
        gradient: Bytes.
        gpus: A power of two.
    """
    if gpus == 1:
        return 0.0
    inside, nodes = min(gpus, NODE), max(1, gpus // NODE)
    latency = 4.4e-6 + 2 * (1.2e-6 * (inside - 1) + 8.5e-6 * math.log2(nodes))
    link = NVLINK if nodes == 1 else min(NVLINK, NODE * INFINIBAND)
    return (1 + SMALL) * latency + 2 * (gpus - 1) / gpus * gradient / link


def checks(costs: dict[str, dict[int, Cost]]) -> dict[str, tuple[float, float]]:
    """Predicted and measured seconds of kernels on the H200, where no factor was taken from.

    Args:
        costs: Counted costs by case and rows.
    """
    found = {}
    for name, step in STEPS.items():
        for row, measured in MEASURED[step.part].items():
            case, *_, size = row.rsplit(", ", 1)
            if case == step.row.rsplit(", ", 1)[0] and row != step.row:
                rows = int(size.split()[0].replace(",", ""))
                there = device_seconds(step, costs[name], rows, H200)
                found[f"{name}, {rows:,} rows"] = (there, measured["busy ms"] / 1e3)
    return found
