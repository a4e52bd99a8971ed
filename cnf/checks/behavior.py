"""The checks of how a flow behaves: the same answer again, in any batch, dtype and direction."""

import copy
import math

import torch

from cnf.checks.case import NATS, Case, NotApplicable, Outcome, in_mode, reference
from cnf.dynamics.divergence import DIVERGENCES, Hutchinson, Learned
from cnf.errors import abbreviated
from cnf.transforms.continuous import Continuous

MODES = {False: "eval", True: "train"}  # `module.training` in words
_NOISE = 1e-5  # relative; more than what non-deterministic sums on a GPU leave in float32


def determinism(case: Case) -> list[Outcome]:
    """The right-hand side is a function of (t, x), and log_prob of x: nothing is drawn anew."""
    divergences = [DIVERGENCES.build(part.divergence or "exact") for part in case.continuous]
    if estimates := [each for each in divergences if isinstance(each, Hutchinson | Learned)]:
        words = (
            f"log_prob is an estimate ({type(estimates[0]).__name__}) without being asked for one"
        )
        remedy = (
            "build Continuous with divergence='exact' and ask for the estimate where it is wanted:"
            " log_prob(x, divergence=…)"
        )
        return [Outcome(math.inf, 0.0, words, remedy)]
    outcomes = [_right_hand_side(case, part, mode) for part in case.continuous for mode in MODES]
    if not all(outcome.passed for outcome in outcomes):
        return outcomes  # a solve of noise would take for ever
    for mode in MODES:
        flow = in_mode(case.flow, mode)
        x, _, context = case.rows(flow, 16)
        first, second = (flow.log_prob(x, context).nan_to_num() for _ in range(2))
        change, size = (first - second).abs().max(), 1 + first.abs().max()
        words = (
            f"log_prob of the same points, twice in {MODES[mode]} mode: {change:.2g} nats apart"
        )
        remedy = (
            "dropout, or a divergence estimated with new probes in every call; log_prob must be "
            "exact unless asked: drop the noise, or build Continuous with divergence='exact'"
        )
        measured = (change / size).item()  # a NaN that comes twice is told by another check
        outcomes.append(Outcome(measured, _NOISE, words, remedy))
    return outcomes


def _right_hand_side(case: Case, part: Continuous, mode: bool) -> Outcome:
    part = copy.deepcopy(part).train(mode)
    like = reference(case.flow)
    draw = torch.randn(8, *part.field.event_shape, generator=case.generator).to(like)
    context = torch.randn(8, part.context_dim, generator=case.generator).to(like)
    divergence = DIVERGENCES.build(part.divergence or "exact")
    probe = divergence.draw(draw)
    time = draw.new_tensor(0.4)
    shown = context if part.context_dim else None
    first, second = (divergence.rates(part.field, time, draw, shown, probe)[:2] for _ in range(2))
    change = [
        ((a - b).abs().max() / (1 + a.abs().max())).nan_to_num().item()
        for a, b in zip(first, second, strict=True)
    ]
    what = "velocity" if change[0] > _NOISE else "divergence"
    words = (
        f"the field's {what} at one (t, x), twice in {MODES[mode]} mode: {max(change):.2g} apart"
    )
    remedy = (
        "noise is drawn anew on every evaluation, so that the ODE's right-hand side is no "
        "function of (t, x): draw it once per solve (in Divergence.draw), and take dropout out"
    )
    return Outcome(max(change), _NOISE, words, remedy)


def finite(case: Case) -> Outcome:
    """No NaN or infinity in the log-density of the data."""
    x, _, context = case.rows(case.flow)
    bad = (~case.flow.log_prob(x, context).isfinite()).nonzero().flatten().tolist()
    words = f"log_prob is NaN or infinite in {len(bad)} of {len(x)} rows ({abbreviated(bad)})"
    words = words if bad else f"log_prob is finite in all {len(x)} rows"
    remedy = (
        "look for a log of zero or less, a division by zero, data outside the flow's support, "
        "divergence=None, or weights that training has blown up"
    )
    return Outcome(len(bad), 0, words, remedy)


def dtype(case: Case) -> Outcome:
    """float64 in, float64 out, of a flow that was moved to float64."""
    x, z, context = case.rows(case.double, 4)
    got = {
        "log_prob": case.double.log_prob(x, context).dtype,
        "encode": case.double.encode(x, context).dtype,
        "decode": case.double.decode(z, context).dtype,
    }
    wrong = [f"{name} gives {kind}" for name, kind in got.items() if kind != torch.float64]
    words = f"of a flow.double(): {', '.join(wrong) or 'float64 throughout'}"
    remedy = "some tensor is made without dtype=x.dtype, or is no buffer, and so is not converted"
    return Outcome(len(wrong), 0, words, remedy)


def round_trip(case: Case) -> list[Outcome]:
    """decode(encode(x)) = x, in units of the data's spread."""
    solvers = [part.solver for part in case.continuous]
    loosest = max([1e-5, *(NATS / 100 if s.fixed else s.rtol for s in solvers)])
    remedies = {
        1e-4: "even in float64 with a tight solver: inverse does not invert forward",
        # the inverse flow may stretch what the solver, or float32, leaves a hundredfold
        100 * loosest: "lost to the solver's tolerance or to the dtype: tighten, or take float64",
    }
    outcomes = []
    for flow, (tolerance, remedy) in zip((case.exact, case.flow), remedies.items(), strict=True):
        x, _, context = case.rows(flow)
        back = flow.decode(flow.encode(x, context), context)
        error = ((back - x).double() / case.scale).square().mean().sqrt().item()
        words = f"decode(encode(x)) misses x by {error:.2g} of its spread"
        outcomes.append(Outcome(error, tolerance, words, remedy))
    return outcomes


def consistency(case: Case) -> Outcome:
    """The log-density that comes with the samples is log_prob of them."""
    _, z, context = case.rows(case.flow)
    shape = () if context is not None else (len(z),)
    x, claimed = case.flow.sample_and_log_prob(shape, context, generator=case.generator)
    # the median: in float32 a few rows where a wild flow stretches much say nothing of the maths
    error = (claimed - case.flow.log_prob(x, context)).abs().median().item()
    words = f"sample_and_log_prob and log_prob of the same samples: {error:.2g} nats apart"
    remedy = (
        "forward and inverse of some transform disagree about the log-determinant, or the solver "
        "or the dtype is too coarse"
    )
    return Outcome(error, 2 * NATS, words, remedy)  # two solves


def batch_independence(case: Case) -> list[Outcome]:
    """log_prob(x)[i] is log_prob(x[i:i+1]), in train and in eval mode."""
    outcomes = []
    for mode in MODES:
        flow = in_mode(case.exact, mode)
        x, _, context = case.rows(flow)
        whole = flow.log_prob(x, context)
        picks = sorted({0, len(x) // 2, len(x) - 1})
        alone = [
            flow.log_prob(x[i : i + 1], None if context is None else context[i : i + 1])
            for i in picks
        ]
        error = (torch.cat(alone) - whole[picks]).abs().max().item()
        words = (
            f"log_prob of a row alone, in {MODES[mode]} mode: {error:.2g} nats from the batch's"
        )
        remedy = (
            "a row depends on its neighbors: batch statistics (BatchNorm, x.mean(0)), or a "
            "reshape that mixes rows"
        )
        outcomes.append(Outcome(error, 1e-4, words, remedy))  # steps shared by a batch, at 1e-8
    return outcomes


def solver(case: Case) -> list[Outcome]:
    """log_prob and samples do not change under a much tighter solver."""
    if not case.continuous:
        raise NotApplicable("no ODE is solved")
    if any(part.solver.discrete for part in case.continuous):
        raise NotApplicable("the solver's steps are the model, and have no error")
    (x, z, context), (x64, z64, context64) = case.rows(case.flow), case.rows(case.exact)
    nats = (case.flow.log_prob(x, context) - case.exact.log_prob(x64, context64)).abs().mean()
    apart = case.flow.decode(z, context) - case.exact.decode(z64, context64)
    share = (apart / case.scale).square().mean().sqrt()
    settings = case.continuous[0].solver
    remedy = "take more steps (or an adaptive method)" if settings.fixed else "lower rtol and atol"
    remedy = f"{settings} is too coarse for this field; {remedy}: flow.with_solver(Solver(…))"
    return [
        Outcome(nats.item(), NATS, f"the solver's error in log_prob is {nats:.2g} nats", remedy),
        Outcome(share.item(), NATS, f"its error in samples is {share:.2g} of the spread", remedy),
    ]
