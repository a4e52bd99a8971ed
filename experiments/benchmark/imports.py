"""What `import cnf` adds to importing torch and torchdiffeq, in new processes."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

from measure import Options, interleaved
from tables import markdown, number, spread

BASE = "import torch, torchdiffeq"
STATEMENTS = {"torch and torchdiffeq": BASE, "and cnf": BASE + ", cnf"}


def run(options: Options) -> dict:
    calls = {
        name: partial(subprocess.run, [sys.executable, "-c", statement], check=True)
        for name, statement in STATEMENTS.items()
    }
    return interleaved(calls, replace(options, repeats=min(9, options.repeats)), warmups=1)


def table(found: dict) -> str:
    base, whole = (found[name]["median"] for name in STATEMENTS)
    lines = [(name, spread(ms)) for name, ms in found.items()]
    return markdown(("", "ms (quartiles)"), lines) + (
        f"\n\n`import cnf` itself: {number(max(0.0, whole - base))} ms."
    )
