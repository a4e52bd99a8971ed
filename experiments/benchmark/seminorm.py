"""How many backward evaluations the adjoint's seminorm saves in training.

The published figure is a median of 40 %: Kidger et al. (2021), https://arxiv.org/abs/2009.09457.
"""

import statistics
import time
from collections.abc import Callable

import torch
from measure import Options, synchronize
from patches import archive, patches
from tables import markdown, number
from torch import Tensor

import cnf
from cnf.data.toys import toy
from cnf.dynamics import record
from cnf.fields import MLPField
from cnf.transforms import Continuous

TOYS = (
    "8gaussians", "moons", "pinwheel", "checkerboard", "circles", "rings", "swissroll", "2spirals",
)  # fmt: skip
HIDDEN, BATCH, STEPS, LR = (64, 64, 64), 512, 300, 2e-3
DEFAULT, TIGHT = (1e-5, 1e-5), (1e-6, 1e-8)  # rtol, atol; TIGHT is FFJORD's for tables
NORMS = ("seminorm", "full")
ROWS = 100_000  # patches
PAPER = 40  # per cent


def run(options: Options) -> dict:
    found = {}
    for name in TOYS[:2] if options.quick else TOYS:
        found[name] = _case(2, toy(name).sample, DEFAULT, options)
    found["2spirals, 1e-6 and 1e-8"] = _case(2, toy("2spirals").sample, TIGHT, options)
    if not archive().exists():
        return {**found, "skipped": f"BSDS300: {archive()} is absent"}
    x = patches(1_000 if options.quick else ROWS)
    x = x / x.std()

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return x[torch.randint(len(x), (n,), generator=generator)]

    found["BSDS300 patches"] = _case(x.shape[1], draw, DEFAULT, options)
    found["BSDS300 patches, 1e-6 and 1e-8"] = _case(x.shape[1], draw, TIGHT, options)
    return found


def _case(
    dim: int, draw: Callable[..., Tensor], tolerances: tuple[float, float], options: Options
) -> dict:
    """Both norms from the same weights on the same batches, a step of each in turn."""
    steps = 3 if options.quick else STEPS
    runs = {norm: _Run(dim, norm, tolerances, options) for norm in NORMS}
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        x = draw(BATCH, generator).to(options.device)
        for run_ in runs.values():
            torch.manual_seed(step)  # the same probe for both
            run_.step(x)
    rows = {norm: run_.row() for norm, run_ in runs.items()}
    spared = 100 * (1 - rows["seminorm"]["backward"] / rows["full"]["backward"])
    return {"rows": rows, "saved %": spared, "steps": steps}


class _Run:
    """Training by likelihood with the adjoint under one norm."""

    def __init__(
        self, dim: int, norm: str, tolerances: tuple[float, float], options: Options
    ) -> None:
        torch.manual_seed(0)
        field = MLPField(dim, HIDDEN, activation="tanh", frequencies=0, layer="concatsquash")
        rtol, atol = tolerances
        solver = cnf.Solver(rtol=rtol, atol=atol, gradient="adjoint", adjoint_norm=norm)
        flow = cnf.Flow(None, Continuous(field, solver), event_shape=(dim,))
        self.flow, self.device = flow.to(options.device), options.device
        self.optimizer = torch.optim.Adam(flow.parameters(), lr=LR, fused=True)
        # Exact, but for photographs, where three layers take D products, as FFJORD trained.
        self.divergence = "exact" if dim == 2 else "hutchinson"
        self.forward, self.backward, self.seconds, self.losses = [], [], [], []

    def step(self, x: Tensor) -> None:
        start = time.perf_counter()
        with record() as stats:
            loss = -self.flow.log_prob(x, divergence=self.divergence).mean()
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
        synchronize(self.device)
        self.seconds.append(time.perf_counter() - start)
        self.forward.append(stats.forward)
        self.backward.append(stats.backward)
        self.losses.append(loss.item())

    def row(self) -> dict[str, float]:
        """Means over training; the NLL of its last tenth."""
        return {
            "forward": statistics.fmean(self.forward),
            "backward": statistics.fmean(self.backward),
            "ms": 1e3 * statistics.median(self.seconds),
            "final nll": statistics.fmean(self.losses[-max(1, len(self.losses) // 10) :]),
        }


def table(found: dict) -> str:
    cases = {name: case for name, case in found.items() if name != "skipped"}
    lines = []
    for name, case in cases.items():
        semi, full = (case["rows"][norm] for norm in NORMS)
        lines.append(
            (
                name,
                number(full["forward"]),
                number(full["backward"]),
                number(semi["backward"]),
                f"{case['saved %']:.0f} %",
                f"{full['ms']:.0f} → {semi['ms']:.0f}",
                f"{full['final nll']:.3f} → {semi['final nll']:.3f}",
            )  # fmt: skip
        )
    toys = [case["saved %"] for name, case in cases.items() if name in TOYS]
    header = ("", "forward", "backward, full", "seminorm", "saved", "ms a step", "NLL at the end")
    steps = next(iter(cases.values()))["steps"]
    text = markdown(header, lines) + (
        f"\n\nEvaluations a step, means over {steps} steps from the same start; exact "
        "trace on the toys, one Hutchinson probe on the photographs; rtol and atol are "
        "1e-5 where nothing is said. Median over the "
        f"toys: {statistics.median(toys):.0f} % saved (published: {PAPER} %)."
    )
    return text + (f" Skipped: {found['skipped']}." if "skipped" in found else "")
