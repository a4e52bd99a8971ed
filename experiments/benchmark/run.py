"""Benchmarks: this library beside its peers, and beside the machine's limits.

`make bench`, or `python experiments/benchmark/run.py [--only likelihood,logprob] [--threads 2]
[--repeats 15] [--limit 60] [--device auto] [--quick]` (with the extra `bench`, and torchcfm,
nflows and normflows without what they drag in: README.md says how). One file holds each question.
Prints the tables as they come; writes results.json and tables.md beside this file, on CUDA with
the device's name in theirs. With --only the other questions' results stay as they are: each names
its own revision. Ratios are what counts; absolute times are this machine's.
"""

import argparse
import json
import re
import sys
import tempfile
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import convolutions
import couplings
import discrete
import imports
import jitted
import launches
import likelihood
import logprob
import matching
import memory
import recompute
import regularized
import roofline
import seminorm
import steps
import torch
import unet
from measure import Options

from cnf.training.origin import environment

HERE = Path(__file__).parent
PEERS = ("zuko", "torchcfm", "nflows", "normflows", "diffrax", "flowjax", "jax")
QUESTIONS = {
    "likelihood": likelihood, "jitted": jitted, "logprob": logprob, "memory": memory,
    "seminorm": seminorm,
    "regularized": regularized, "roofline": roofline, "matching": matching, "couplings": couplings,
    "discrete": discrete, "recompute": recompute, "imports": imports, "unet": unet,
    "convolutions": convolutions, "launches": launches, "steps": steps,
}  # fmt: skip


def parsed() -> tuple[Options, list[str], Path]:
    """Options, the questions to answer, and the folder to write to."""
    defaults = Options()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default=",".join(QUESTIONS), help="questions, by commas")
    parser.add_argument("--threads", type=int, default=defaults.threads, help="torch's threads")
    parser.add_argument("--repeats", type=int, default=defaults.repeats, help="timed calls each")
    parser.add_argument("--limit", type=float, default=defaults.limit, help="seconds a contestant")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="folder; a temporary one with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    given = parser.parse_args()
    names = given.only.split(",")
    for name in names:
        if name not in QUESTIONS:
            parser.error(f"unknown question {name!r}; known: {', '.join(QUESTIONS)}")
    device = given.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    repeats = min(2, given.repeats) if given.quick else given.repeats
    options = Options(device, given.threads, repeats, given.limit, given.quick)
    folder = given.out or (Path(tempfile.mkdtemp()) if given.quick else HERE)
    return options, names, folder


def main() -> None:
    options, names, folder = parsed()
    torch.set_num_threads(options.threads)
    folder.mkdir(parents=True, exist_ok=True)
    suffix = ""
    if options.device == "cuda":
        suffix = "-" + re.sub(r"\W+", "-", torch.cuda.get_device_name().lower())
    file = folder / f"results{suffix}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    results = {name: results[name] for name in QUESTIONS if name in results}
    failed = []
    for name in names:
        start = time.perf_counter()
        try:
            found = QUESTIONS[name].run(options)
        except Exception:  # it must not cost the others their hours
            traceback.print_exc()
            failed.append(name)
            continue
        took = time.perf_counter() - start
        results[name] = {"about": _about(options, took), "found": found}
        print(f"## {name} ({took:.0f} s)\n\n{QUESTIONS[name].table(found)}\n", flush=True)
        file.write_text(json.dumps(results, indent=1) + "\n")  # at once: a later one may fail
        (folder / f"tables{suffix}.md").write_text(_tables(results))
    print(f"Written to {folder}")
    if failed:
        sys.exit(f"Failed: {', '.join(failed)}")


def _about(options: Options, seconds: float) -> dict:
    peers = {}
    for name in PEERS:
        with suppress(metadata.PackageNotFoundError):  # JAX's are for some questions only
            peers[name] = metadata.version(name)
    return {"machine": environment(), **peers, **asdict(options), "seconds": round(seconds, 1)}


def _tables(results: dict) -> str:
    """Every question's tables, with what made them."""
    parts = []
    for name in QUESTIONS:
        if name not in results:
            continue
        about, found = results[name]["about"], results[name]["found"]
        host = about["machine"]
        where = host["gpu"] if about["device"] == "cuda" else host["processor"]
        made_by = [
            f"Revision {host['revision']}", where, f"{about['threads']} threads",
            *(f"{tool} {host[tool]}" for tool in ("torch", "torchdiffeq")),
            *(f"{peer} {about[peer]}" for peer in PEERS if peer in about),
        ]  # fmt: skip
        parts.append(
            f"## {name}\n\n{QUESTIONS[name].__doc__}\n\n{QUESTIONS[name].table(found)}\n\n"
            f"{', '.join(made_by)}.\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    main()
