"""Scaling over processes: measured on two of a CPU, predicted for many GPUs.

`python experiments/scaling/run.py [--repeats 4] [--quick]`, on a machine with two idle cores.
Interleaves one process alone, one beside an independent copy of itself, and two that share each
step, one thread each; counts what steps cost; fits the cost model. Writes results.json, tables.md
and scaling.webp beside this file, and README.md's part between its marks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "benchmark"))  # measure.py, tables.py

import report  # noqa: E402
from cases import CASES, QUICK  # noqa: E402
from costs import counted  # noqa: E402
from job import WAYS  # noqa: E402
from measure import summary  # noqa: E402
from picture import draw  # noqa: E402

from cnf.training.origin import environment  # noqa: E402

SEED = 0
MARKS = "<!-- measured -->", "<!-- /measured -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=4, help="jobs of each way, in turn")
    parser.add_argument("--out", type=Path, help="folder; a temporary one with --quick")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    given = parser.parse_args()
    folder = given.out or (Path(tempfile.mkdtemp()) if given.quick else HERE)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    start = time.perf_counter()
    load = os.getloadavg()
    results = {
        "about": {
            "machine": environment(), "seed": SEED, "repeats": given.repeats,
            "load before": [round(value, 2) for value in load],
        },
        "seconds": measured(given.repeats, given.quick),
        "costs": {
            name: {rows: counted(case, rows) for rows in (min(case.rows), max(case.rows))}
            for name, case in (QUICK if given.quick else CASES).items()
        },
    }  # fmt: skip
    results["about"]["minutes"] = round((time.perf_counter() - start) / 60, 1)
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    written(folder)
    print(f"Written to {folder}")


def measured(repeats: int, quick: bool) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """A `summary` of the seconds of a step: by case, rows for each process, and way."""
    jobs = [(way, job(way, quick)) for _ in range(repeats) for way in WAYS]
    return {
        name: {
            rows: {way: summary([f[name][rows] for w, f in jobs if w == way]) for way in WAYS}
            for rows in jobs[0][1][name]
        }
        for name in jobs[0][1]
    }


def job(way: str, quick: bool) -> dict[str, dict[str, float]]:
    """What one job printed: seconds of a step by case and rows for each process."""
    command = [sys.executable, str(HERE / "job.py"), way, *["--quick"] * quick]
    kept = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "NODE_RANK")}
    environ = {**kept, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environ)
    return json.loads(run.stdout.splitlines()[-1])


def written(folder: Path) -> None:
    """Write the tables and the picture of the results in a folder, and into its README's part."""
    results = json.loads((folder / "results.json").read_text())
    text = report.written(results)
    (folder / "tables.md").write_text(text)
    draw(results, folder / "scaling.webp")
    page = folder / "README.md"
    if page.exists():
        before, rest = page.read_text().split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        page.write_text(f"{before}{MARKS[0]}\n{report.measured_part(results)}\n{MARKS[1]}{after}")
    print(text)


if __name__ == "__main__":
    main()
