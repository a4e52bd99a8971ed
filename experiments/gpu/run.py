"""What a GPU makes of the library: `python experiments/gpu/run.py`, nine minutes at most.

Measures the most telling first, one small question after another, and writes each answer at once
to results-DEVICE.json and tables-DEVICE.md beside this file; what is there already is not measured
again, so that a run that was cut short goes on. `--quick` on a CPU shows that everything runs.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "benchmark"))  # measure.py, tables.py

import gap  # noqa: E402
import limits  # noqa: E402
import pictures  # noqa: E402
import steps  # noqa: E402
from measure import Options  # noqa: E402

from cnf.training.origin import environment  # noqa: E402

PARTS = {"limits": limits, "steps": steps, "pictures": pictures, "gap": gap}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=500, help="no question begins after them")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, by commas")
    parser.add_argument("--out", type=Path, help="folder; a temporary one with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, on a CPU")
    given = parser.parse_args()
    device = "cpu" if given.quick else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device, got none; --quick tries all of it on a CPU")
    options = Options(device, 4, 2 if given.quick else 9, 2.0, given.quick)
    torch.set_num_threads(options.threads)
    folder = given.out or (Path(tempfile.mkdtemp()) if given.quick else HERE)
    folder.mkdir(parents=True, exist_ok=True)
    name = "cpu" if given.quick else torch.cuda.get_device_name()
    measure(given.only.split(","), options, folder, name, time.monotonic() + given.seconds)


def measure(parts: list[str], options: Options, folder: Path, device: str, end: float) -> None:
    """Answer the questions of these parts until the end, and write what came out."""
    suffix = re.sub(r"\W+", "-", device.lower())
    file = folder / f"results-{suffix}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    for part in parts:
        found = results.setdefault(part, {})
        for name, question in PARTS[part].questions(options).items():
            if name in results.get("failed", {}) or name in found or time.monotonic() > end:
                continue
            try:
                found[name] = {"revision": environment()["revision"], **question()}
            except Exception as error:
                traceback.print_exc()
                results.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"[:300]
                write(file, results)
                if options.device == "cuda":  # what failed there may have left it unusable
                    again(end)
            write(file, results)
        if found:
            print(f"## {part}\n\n{PARTS[part].table(found)}\n", flush=True)
        (folder / f"tables-{suffix}.md").write_text(written(results, device))


def write(file: Path, results: dict) -> None:
    file.write_text(json.dumps(results, indent=1) + "\n")


def again(end: float) -> None:
    """Go on in a fresh process, for the seconds that are left."""
    left = max(0, end - time.monotonic())
    os.execv(sys.executable, [sys.executable, *sys.argv, "--seconds", f"{left:.0f}"])


def written(results: dict, device: str) -> str:
    """Every part's table under the device's name."""
    text = [f"# {device}\n"]
    for part, found in results.items():
        if found and part in PARTS:
            revisions = sorted({row["revision"] for row in found.values()})
            text.append(
                f"## {part}\n\n{PARTS[part].__doc__}\n\n{PARTS[part].table(found)}\n\n"
                f"Revision {', '.join(revisions)}; torch {torch.__version__}; float32.\n"
            )
    if failed := results.get("failed"):
        text.append("## failed\n\n" + "\n".join(f"- {k}: {v}" for k, v in failed.items()) + "\n")
    return "\n".join(text)


if __name__ == "__main__":
    main()
