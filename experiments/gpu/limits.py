"""What the device can do: bytes copied, matrix products by precision."""

from collections.abc import Callable

import torch
from measure import Options, interleaved
from tables import markdown, number

SIZE = 8192
PRODUCTS = {"float32": (torch.float32, False), "TF32": (torch.float32, True),
            "bfloat16": (torch.bfloat16, False)}  # fmt: skip


def questions(options: Options) -> dict[str, Callable[[], dict]]:
    return {"copy": lambda: copied(options)} | {
        f"product, {name}": lambda kind=kind: product(*kind, options)
        for name, kind in PRODUCTS.items()
    }


def copied(options: Options) -> dict:
    source = torch.randn(1_000 if options.quick else 2**29, device=options.device)
    target = torch.empty_like(source)
    ms = interleaved({"copy": lambda: target.copy_(source)}, options)["copy"]["median"]
    return {"GB/s": 2 * source.numel() * 4 / ms / 1e6}


def product(dtype: torch.dtype, tf32: bool, options: Options) -> dict:
    size = 64 if options.quick else SIZE
    a, b = (torch.randn(size, size, device=options.device, dtype=dtype) for _ in range(2))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        ms = interleaved({"product": lambda: a @ b}, options)["product"]["median"]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    return {"TFLOP/s": 2 * size**3 / ms / 1e9}


def table(found: dict[str, dict]) -> str:
    lines = [
        (name, number(row[unit]), unit)
        for name, row in found.items()
        for unit in ("GB/s", "TFLOP/s")
        if unit in row
    ]
    return markdown(("", "rate", "unit"), lines)
