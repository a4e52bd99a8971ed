"""Memory of deep stacks: activations kept, and recomputed by inversion.

RealNVP, D = 8, nets with two hidden layers of 64, 8,192 rows: growth of memory in one training
step, and the time of one, each in a fresh process. For memory glibc is told to return blocks at
once: what it keeps for later is not what the step needs.
"""

import os
import time

import torch
from measure import Options, Peak, fresh
from tables import markdown, number

import cnf
from cnf.transforms import Compose

DIM, ROWS = 8, 8192
RETURN = "MALLOC_MMAP_THRESHOLD_"


def run(options: Options) -> dict:
    layers, rows = ((2, 4), 64) if options.quick else ((4, 32), ROWS)
    found = {}
    for count in layers:
        for recompute in (False, True):
            arguments = (count, recompute, options.device, rows)
            timed = fresh(options, _step, *arguments)
            os.environ[RETURN] = "131072"
            held = fresh(options, _step, *arguments)
            del os.environ[RETURN]
            case = f"{count} layers, {'recomputed' if recompute else 'kept'}"
            found[case] = {"mb": held["mb"], "ms": timed["ms"]}
    return found


def _step(layers: int, recompute: bool, device: str, rows: int) -> dict:
    torch.manual_seed(0)
    plain = cnf.models.build("realnvp", dim=DIM, layers=layers, preprocess=None)
    transform = Compose(list(plain.transform.transforms), recompute=recompute)  # pyright: ignore
    flow = cnf.Flow(None, transform, event_shape=(DIM,)).to(device)
    x = torch.randn(rows, DIM, device=device)
    (-flow.log_prob(x[:8]).mean()).backward()  # what is made once is made
    peak, start = Peak(device), time.perf_counter()
    (-flow.log_prob(x).mean()).backward()
    return {"mb": peak.growth(), "ms": 1e3 * (time.perf_counter() - start)}


def table(found: dict) -> str:
    lines = [(case, number(v["mb"]), number(v["ms"])) for case, v in found.items()]
    return markdown(("one step", "MB", "ms"), lines)
