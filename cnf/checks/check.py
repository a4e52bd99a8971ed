"""Is this flow right? `check` finds a wrong one, and says so in words."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from cnf.checks import behavior, log_density, one_to_one
from cnf.checks.case import Case, NotApplicable, Outcome, reference
from cnf.checks.gradients import gradients
from cnf.checks.one_probe import OneProbe
from cnf.data.arrays import as_numbers
from cnf.distributions import StandardNormal
from cnf.dynamics import numerical
from cnf.dynamics.divergence import AFFORDABLE, exact_directions, is_exact
from cnf.errors import abbreviated, expect_counts, expect_event, expect_finite
from cnf.flow import Flow
from cnf.random import preserved, reseed
from cnf.transforms.context import StandardizeContext
from cnf.transforms.continuous import Continuous

__all__ = ["CHECKS", "CheckReport", "Finding", "check"]

# What a flow is asked, in this order: nothing else can be measured where a first one fails.
CHECKS: dict[str, Callable[[Case], Outcome | list[Outcome]]] = {
    "determinism": behavior.determinism,  # the same x gives the same log_prob
    "one to one": one_to_one.near,  # steps that are the model do not fold
    "one to one far out": one_to_one.far,  # nor where few points are
    "finite": behavior.finite,  # no NaN or infinity
    "dtype": behavior.dtype,  # float64 in, float64 out
    "mass": log_density.mass,  # ∫p = 1
    "log-determinant": log_density.log_determinant,  # ladj = log|det Jacobian|, both ways
    "round trip": behavior.round_trip,  # decode(encode(x)) = x
    "consistency": behavior.consistency,  # sample_and_log_prob = log_prob of the samples
    "batch independence": behavior.batch_independence,  # a row does not see its neighbors
    "solver": behavior.solver,  # a tighter solver gives the same
    "gradients": gradients,  # reach every parameter, the same in train and in eval mode
}


FIRST = ("determinism", "one to one")  # log_prob is noise, or that of one of several preimages
COSTLY_ROWS = 2  # points, where an exact trace is out of reach


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Attributes:
        name: A name in `CHECKS`.
        passed: None where the check does not apply; the message gives the reason.
        measured: The error measured, or None where nothing could be.
        tolerance: The largest error allowed.
        message: What was measured; after a failure also what is likely wrong and what to do.
    """

    name: str
    passed: bool | None
    measured: float | None
    tolerance: float | None
    message: str

    def __str__(self) -> str:
        mark = {True: "✓", False: "✗", None: "–"}[self.passed]
        bound = ""
        if self.measured is not None and self.tolerance:
            bound = f" ({self.measured:.2g} of {self.tolerance:.2g} allowed)"
        return f"{mark} {self.name:<19}{self.message}{bound}"


@dataclass(frozen=True)
class CheckReport:
    """The findings of `check`; true if none of them is a failure, and readable when printed.

    Attributes:
        findings: One for each check, in the order of `CHECKS`.
        notes: What the reader should know about how it was checked.
    """

    findings: list[Finding]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> list[Finding]:
        """The findings that are failures."""
        return [finding for finding in self.findings if finding.passed is False]

    def __bool__(self) -> bool:
        return self.ok

    def __getitem__(self, name: str) -> Finding:
        return {finding.name: finding for finding in self.findings}[name]

    def __str__(self) -> str:
        return "\n".join([*map(str, self.findings), *(f"  {note}" for note in self.notes)])


def check(
    flow: Flow,
    x: Any = None,
    *,
    context: Any = None,
    n: int = 64,
    seed: int = 0,
) -> CheckReport:
    r"""Check a flow: ∫p = 1, log-determinants, round trip, gradients, batch, solver and dtype.

    It works on copies: the flow, its mode, its gradients and torch's random state stay as they
    are. Where an exact trace takes more than 128 directions, as of pictures, it is replaced by one
    fixed probe, which everything but its being the trace can be asked of.

    >>> import cnf
    >>> report = check(cnf.models.build("realnvp", dim=2))
    >>> report.ok, report["mass"].passed
    (True, True)

    Args:
        flow: Any flow; best after some training, or with random weights: in an identity, most of
            what can be wrong is zero.
        x: Data, a tensor, array or table of shape (\*batch, \*event); at most n random rows are
            used. By default samples of the flow, a quarter of them from the tails.
        context: Condition, a tensor, array or table of shape (\*batch, C) or one that broadcasts
            to it; by default one row of numbers that are standard normal where
            `context_preprocess` has standardized.
        n: Points.
        seed: Seed of everything random.

    Raises:
        TypeError: Not a flow.
        ValueError: x or context of a wrong shape, or x empty or not finite.
    """
    if not isinstance(flow, Flow):
        raise TypeError(f"check: expected a cnf.Flow, got {type(flow).__name__}")
    expect_counts("check", n=n)
    x = None if x is None else _data(flow, as_numbers("check", "x", x))
    batch = None if x is None else x.shape[: x.dim() - len(flow.event_shape)]
    generator = Generator().manual_seed(seed)
    notes = ["checked in eval mode; the flow is in train mode, and stays so"] * flow.training
    if flow.context_dim and context is None:
        row = _any_context(flow, generator).to(reference(flow))
        context = row.expand(*(batch or ()), flow.context_dim)
        notes.append(_of_context(flow, row))
    else:
        context = None if context is None else as_numbers("check", "context", context)
        context = flow.inner_context("check", context, batch)
    if flow.dequantization is not None:
        notes.append("dequantization was left out: what is checked is the continuous density")
    if costly := list(_costly(flow)):
        n = min(n, COSTLY_ROWS)
        size = max(exact_directions(part.field) for part in costly)
        notes.append(
            f"an exact trace takes {size} directions for each evaluation: log-determinants are "
            f"those of one probe, the same in every call, and all was asked at {n} points only"
        )
    # That rows far out fold is a finding, and no warning.
    with _untouched(flow, seed), torch.no_grad(), numerical.watched():
        try:
            case = _case(flow, x, context, n, generator)
        except Exception as error:
            return CheckReport([Finding("set-up", False, None, None, _told(error))], tuple(notes))
        return CheckReport(_findings(case), tuple(notes))


def _costly(flow: Flow) -> Iterator[Continuous]:
    """The ODEs whose exact trace is out of reach for as many solves as checks take."""
    for part in flow.modules():
        if isinstance(part, Continuous) and is_exact(part.divergence):
            if exact_directions(part.field) > AFFORDABLE:
                yield part


def _any_context(flow: Flow, generator: Generator) -> Tensor:
    """A row as `context_preprocess` may give it: numbers of unit scale, and one label."""
    row, labels = torch.randn(flow.context_dim, generator=generator), _labels(flow).nonzero()
    if len(labels):
        row[labels] = 0.0
        row[labels[torch.randint(len(labels), (), generator=generator)]] = 1.0
    return row


def _labels(flow: Flow) -> Tensor:
    """Which columns of the context `context_preprocess` has found to be zeros and ones."""
    part = flow.context_preprocess
    if not isinstance(part, StandardizeContext) or not part.fitted:
        return torch.zeros(flow.context_dim, dtype=torch.bool)
    return ((part.columns.loc == 0) & (part.columns.scale == 1)).cpu()


def _of_context(flow: Flow, row: Tensor) -> str:
    """Which context was taken where none was given, and in which units."""
    numbers = abbreviated([f"{number:.2g}" for number in row.tolist()])
    units = "in the units of the data's contexts"
    if flow.context_preprocess is not None:
        units = "in scales from the mean, as context_preprocess gives contexts"
    kinds = "standard normal numbers"
    if _labels(flow).any():
        kinds = "one label of its columns of zeros and ones, and standard normal numbers elsewhere"
    return (
        f"context: none was given; a row of {kinds} was taken, [{numbers}], "
        f"{units}; to check at contexts of your own give context=…, or --data on the command line"
    )


def _findings(case: Case) -> list[Finding]:
    findings: list[Finding] = []
    for name in CHECKS:
        failed = [each for each in findings if each.name in FIRST and each.passed is False]
        measured = [each.name for each in failed if each.measured is not None]
        if measured:
            reason = f"not run, since {measured[0]} failed"
            findings.append(Finding(name, None, None, None, reason))
        else:
            findings.append(_run(name, case))
    return findings


def _run(name: str, case: Case) -> Finding:
    try:
        outcomes = CHECKS[name](case)
    except NotApplicable as reason:
        return Finding(name, None, None, None, str(reason))
    except Exception as error:  # a wrong flow may raise anything; that is a finding too
        return Finding(name, False, None, None, _told(error))
    if isinstance(outcomes, Outcome):
        outcomes = [outcomes]
    worst = next((outcome for outcome in outcomes if not outcome.passed), outcomes[-1])
    message = worst.words if worst.passed else f"{worst.words}: {worst.remedy}"
    return Finding(name, worst.passed, worst.measured, worst.tolerance, message)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _data(flow: Flow, x: Tensor) -> Tensor:
    if flow.dequantization is not None:  # pixels are uint8
        x = x.to(torch.promote_types(x.dtype, flow.dtype))
    expect_event("check", "x", x, flow.event_shape)
    x = x.detach()
    if x.numel() == 0:
        raise ValueError(f"check: expected at least one point, got x of shape {tuple(x.shape)}")
    expect_finite("check", "x", x.reshape(-1, *flow.event_shape))
    return x


def _case(
    flow: Flow, x: Tensor | None, context: Tensor | None, n: int, generator: Generator
) -> Case:
    like = reference(flow)
    rows = n
    if x is not None:
        rows = x[(...,) + (0,) * len(flow.event_shape)].numel()
    elif context is not None:
        context = context.reshape(-1, flow.context_dim)
        context = context.repeat(-(-n // len(context)), 1)[:n]
    flow = copy.deepcopy(flow).eval()
    dequantization, flow.dequantization = flow.dequantization, None
    flow.context_preprocess = None  # the context is an inner one already
    for part in _costly(flow):
        part.divergence = OneProbe()
    if x is not None:
        chosen = torch.randperm(rows, generator=generator)[:n]
        x = x.reshape(rows, *flow.event_shape)[chosen].to(like.device, flow.data_dtype)
        x = x if dequantization is None else dequantization.encode(x)[0]
        if context is not None:
            context = context.reshape(rows, -1)[chosen]
    context = None if context is None else context.detach().to(like)
    z = flow.base.sample((n if x is None else len(x),), generator).to(like)
    x = _samples(flow, z, context) if x is None else x
    double = copy.deepcopy(flow).double()
    return Case(flow, double, _tightened(double), x, z, context, generator)


def _samples(flow: Flow, z: Tensor, context: Tensor | None) -> Tensor:
    if isinstance(flow.base, StandardNormal):  # any other base may end where its samples do
        z = torch.cat([1.5 * z[: len(z) // 4], z[len(z) // 4 :]])
    try:
        x = flow.decode(z, context)
    except Exception:  # the checks themselves will meet it, and tell
        return z.reshape(-1, *flow.event_shape)
    return x if x.isfinite().all() else z.reshape(-1, *flow.event_shape)


def _tightened(flow: Flow) -> Flow:
    """The flow under dopri5 at 1e-8, as good as exact here, with the same way to gradients.

    A flow whose solver's steps are the model stays, as it has no error.
    """
    solvers = [part.solver for part in flow.modules() if isinstance(part, Continuous)]
    if not solvers or any(solver.discrete for solver in solvers):
        return flow
    tight = replace(
        solvers[0], method="dopri5", rtol=1e-8, atol=1e-8, steps=None, grid=None,
        adjoint_rtol=None, adjoint_atol=None,
    )  # fmt: skip
    return flow.with_solver(tight)


@contextmanager
def _untouched(flow: Flow, seed: int) -> Iterator[None]:
    """Seed a flow's own draws (dropout, probes), and leave torch's generators as they were."""
    device = reference(flow).device
    with torch.inference_mode(False), preserved(device):
        reseed(seed, device)
        yield
