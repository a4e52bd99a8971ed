"""What a GPU makes of the library: `python experiments/gpu/run.py`, nine minutes at most.

Measures the most telling first, one small question after another, and writes each answer at once
to results-DEVICE.json and tables-DEVICE.md beside this file; what is there already is not measured
again, so that a run that was cut short goes on. What failed is measured again at another revision.
`--quick` on a CPU shows that everything runs.
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
sys.path.append(str(HERE.parent / "benchmark"))  # measure.py, tables.py; last, as both have steps

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
    parser.add_argument("--revision", help=argparse.SUPPRESS)  # that at which `again` began
    given = parser.parse_args()
    device = "cpu" if given.quick else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("expected a CUDA device, got none; --quick tries all of it on a CPU")
    options = Options(device, 4, 2 if given.quick else 9, 2.0, given.quick)
    torch.set_num_threads(options.threads)
    folder = given.out or (Path(tempfile.mkdtemp()) if given.quick else HERE)
    folder.mkdir(parents=True, exist_ok=True)
    name = "cpu" if given.quick else torch.cuda.get_device_name()
    end = time.monotonic() + given.seconds
    revision = given.revision or str(environment()["revision"])
    measure(given.only.split(","), options, folder, name, end, revision)


def measure(
    parts: list[str], options: Options, folder: Path, device: str, end: float, revision: str
) -> None:
    """Answer the questions of these parts until the end, and write what came out."""
    suffix = re.sub(r"\W+", "-", device.lower())
    file = folder / f"results-{suffix}.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    failed = results.setdefault("failed", {})
    for part in parts:
        found = results.setdefault(part, {})
        for name, question in PARTS[part].questions(options).items():
            before = failed.get(name, {}).get("revision") == revision
            if before or name in found or time.monotonic() > end:
                continue
            try:
                found[name] = {"revision": revision, **question()}
                failed.pop(name, None)
            except Exception as error:
                traceback.print_exc()
                words = f"{type(error).__name__}: {error}"[:300]
                failed[name] = {"revision": revision, "error": words}
                write(file, results)
                if options.device == "cuda":  # what failed there may have left it unusable
                    again(end, revision)
            write(file, results)
        if found:
            print(f"## {part}\n\n{PARTS[part].table(found)}\n", flush=True)
        (folder / f"tables-{suffix}.md").write_text(written(results, device))


def write(file: Path, results: dict) -> None:
    file.write_text(json.dumps(results, indent=1) + "\n")


def again(end: float, revision: str) -> None:
    """Go on in a fresh process, for the seconds that are left."""
    left = f"{max(0, end - time.monotonic()):.0f}"
    command = [sys.executable, *sys.argv, "--seconds", left, "--revision", revision]
    os.execv(sys.executable, command)


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
        told = [f"- {k}: {v['error']} (revision {v['revision']})" for k, v in failed.items()]
        text.append("## failed\n\n" + "\n".join(told) + "\n")
    return "\n".join(text)


if __name__ == "__main__":
    main()
