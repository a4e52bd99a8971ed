"""The command line: train, evaluate, score, sample, plot, compare, check, list."""

import csv
import json
import os
import re
import shlex
import signal
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

from cnf import __version__ as cnf_version
from cnf import data as densities
from cnf import models
from cnf.arguments import error_message, flags, normalized, required, settings_class
from cnf.catalog import KINDS
from cnf.data import IMAGE_SETS, Columns, Images, Points
from cnf.data.images import PIXELS
from cnf.data.source import names_images
from cnf.data.tabular import expect_writable
from cnf.dynamics.solver import Solver
from cnf.errors import CheckpointError, SolverError, UnknownNameError, optional
from cnf.metrics import Estimate, RowScores, log_prob_chunked, row_scores
from cnf.metrics.code_length import bits_in_nats
from cnf.objectives import OBJECTIVES
from cnf.random import stream
from cnf.sampling import guided
from cnf.training import TrainConfig, fit, load
from cnf.training.batches import in_memory
from cnf.training.history import held_out_nll
from cnf.training.origin import hash_of_rows
from cnf.training.processes import is_first
from cnf.training.progress import status
from cnf.training.run import free_folder, read_config, read_manifest, read_scores

# The objective of a model and its options; that of the others is maximum likelihood.
MATCHING = ("flow-matching", {"times": "skewed"})
UNUSUAL = 0.05  # p-value of a row that is
DEFAULT_OBJECTIVES = {"cnf": MATCHING, "unet": MATCHING}


def train(
    data: str,
    model: str = "cnf",
    options: dict[str, Any] | None = None,
    objective: str | None = None,
    objective_options: dict[str, Any] | None = None,
    test: float = 0.1,
    table: Columns | None = None,
    config: TrainConfig | None = None,
) -> None:
    """Train a model on a density or on your own points, and save everything in a run's folder.

    A model of pictures has uniform dequantization and standardized logits, unless its
    options say otherwise.

    Args:
        data: A density by name (see `cnf list densities`), a picture as a density, a table by name
            (see `cnf list tables`), a file of points (csv, npy, parquet), or pictures: a set by
            name, such as mnist, or a file or folder of them.
        model: A model by name (see `cnf list models`).
        options: The model's options, such as --options.hidden 128,128.
        objective: What is minimized (see `cnf list objectives`). If not given, flow matching with
            more times close to the data for cnf and unet, maximum likelihood for the others.
        objective_options: The objective's options, such as --objective_options.divergence
            hutchinson.
        test: Part of your own points that is held out from training, for `cnf evaluate`; a set by
            name keeps its own test part.
        table: Roles of the columns of your own table; of pictures --context labels.
        config: The settings of the run.

    Raises:
        ValueError: A setting is out of range, or a name is unknown.
    """
    config = config or TrainConfig()
    source = _training_data(data, table) if config.resume else densities.load(data, table)
    if not 0 <= test < 1:
        raise ValueError(f"expected 0 <= test < 1, got {test}")
    if isinstance(source, Points):
        source, _ = source.split(test)
    torch.manual_seed(config.seed)  # the initial weights too follow from the seed
    flow = models.build(model, **{**source.sizes, **(options or {})})
    if objective is None:
        objective, defaults = DEFAULT_OBJECTIVES.get(model, ("maximum-likelihood", {}))
        objective_options = {**defaults, **(objective_options or {})}
    goal = OBJECTIVES.build({"name": objective, **(objective_options or {})})
    if config.folder is None:
        config.folder = free_folder(Path("runs") / f"{source.name}-{model}-{objective}")
    history = fit(flow, goal, source, config)
    scores = [nll for _, nll in history.curve()]
    held_out = f"held-out NLL {scores[-1]:.4f} nats, " if scores else ""
    if scores and flow.dequantization is not None:
        held_out += f"{-scores[-1] / bits_in_nats(flow):.4f} bits/dim, "
    if is_first():
        seconds = f"{history.seconds:.1f} s"
        print(f"{history.steps} steps in {seconds}, {held_out}kept in {config.folder}")
        if history.reason == "interrupted":
            print(f"Interrupted; go on with: cnf train --resume {shlex.quote(str(config.folder))}")
    if history.signal:
        raise SystemExit(128 + history.signal)


def evaluate(
    run: Path, data: str | None = None, points: int | None = None, draws: int = 1
) -> None:
    """Score a trained flow: gap or NLL, bits/dim, distances between samples, paths, cost.

    Args:
        run: A run's folder or a flow file.
        data: Density, picture or file of held-out points, whose columns are read as the run's
            were (weights may be missing), and all of which are scored. If not given, the data
            that the run was trained on: of your own points, those that training held out.
        points: Largest number of test points; 10,000 if not given, 1,000 of pictures.
        draws: Noise drawn for each picture: with more of it the bound in NLL and bits/dim falls to
            what the flow gives.
    """
    from cnf.race.compare import TEST_PICTURES, TEST_POINTS
    from cnf.race.judge import Judge, draw_test_points
    from cnf.race.tables import scores_table

    flow = load(run)
    source, share = _data(run, data)
    density = None if isinstance(source, Points) else source
    points = points or (TEST_PICTURES if isinstance(source, Images) else TEST_POINTS)
    target = None
    if density is not None:
        test, other = draw_test_points(density, points)
        which = f"{points:,} draws from {density.name}"
    else:
        test, other, which = _test_points(source, share, run if data is None else None)
        rows = torch.randperm(len(test.x), generator=stream(0, "rows to evaluate"))[:points]
        count = f"{len(rows):,}"
        if other is None:  # samples are compared with one half, which the other half is, too
            halves = rows[: len(rows) // 2], rows[len(rows) // 2 :]
            target, other = (test.take(half) for half in halves)
            count += f" of {len(test.x):,}"
        test = test.take(rows)
        which = f"{count} {'pictures' if isinstance(source, Images) else 'rows'}{which}"
    with status("scoring") as say:
        judge = Judge(test, other, density, target=target, draws=draws)
        scores = judge.scores(flow, say=say)
        judge.warn_of_few_steps("evaluate", flow)
    if run.is_dir():
        (run / "evaluation.json").write_text(json.dumps(scores, indent=2) + "\n")
    print(f"Scored on {which}.{'' if density else judge.about(flow)}")
    if "bits_per_dim" in scores:
        nats, bits = (Estimate(scores[k], scores[f"{k}_error"]) for k in ("nll", "bits_per_dim"))
        print(f"{bits} bits/dim, {nats} nats, {draws} draw{'s' * (draws > 1)} of the noise each.")
    _console().print(scores_table(scores, judge.floor))


def score(run: Path, data: str, output: Path | None = None, reference: str | None = None) -> None:
    """Score each row of a file: its log-density and how usual that is, by held-out rows.

    The p-value is two-sided: small for a log-density below, or above, almost all of the held-out
    rows'. Of rows like these, a part of at most 5 % has one of at most 0.05. Each held-out row
    counts the same, whatever its weight.

    Args:
        run: A run's folder or a flow file.
        data: File of rows, or of pictures, whose columns are read as the run's were.
        output: The table of scores, .csv, with the number of each row in the file, from 0;
            RUN/NAME-scores.csv if not given, anew each time.
        reference: File of rows that the flow was not trained on; if not given, those that the
            run has held out.

    Raises:
        ValueError: There are no held-out rows, or the file exists already.
    """
    flow, source = load(run), _rows(run, data)
    if output is not None:
        expect_writable("score", output, (".csv",))
    if reference is None:
        known, which = _held_out_rows(run)
    else:
        known = _rows(run, reference)
        which = f" of {known.name}"
    torch.manual_seed(0)  # noise of dequantization
    with status("scoring"):
        own, held_out = (log_prob_chunked(flow, p.x, p.context) for p in (source, known))
        scores = row_scores(own, held_out)
    places = torch.arange(len(source.x)) if source.rows is None else source.rows
    output = output or (run if run.is_dir() else run.parent) / f"{source.name}-scores.csv"
    with output.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["row", *RowScores._fields])
        writer.writerows(zip(places.tolist(), *(part.tolist() for part in scores), strict=True))
    print(f"Calibrated on {len(known.x):,} rows{which}.")
    _print_lowest(places, scores)
    _print_unusual(scores, held_out)
    if source.incomplete:
        print(f"Left out, as a value is missing: {source.incomplete:,} rows.")
    if (run / "config.yaml").is_file() and Path(data).resolve() == Path(read_config(run)["data"]):
        print("The run was trained on most of these rows, whose log-densities are too high.")
    print(f"The scores: {output}")


def _print_lowest(places: Tensor, scores: RowScores) -> None:
    """Print the ten rows of lowest log-density."""
    table = optional("rich.table", "cli").Table("rank", "row", "log-density", "p-value", box=None)
    for k in scores.rank.argsort()[:10].tolist():
        told = f"{scores.log_density[k]:.4g}", f"{scores.p_value[k]:.2g}"
        table.add_row(str(int(scores.rank[k])), str(int(places[k])), *told)
    _console().print(table)


def _print_unusual(scores: RowScores, held_out: Tensor) -> None:
    """Print which parts of the rows have too low a log-density, and too high a one."""
    unusual = scores.p_value <= UNUSUAL
    high = unusual & (scores.log_density > held_out.nanmedian())
    low, high, both = (f"{part.double().mean():.1%}" for part in (unusual & ~high, high, unusual))
    least = 2 / (len(held_out) + 1)
    print(
        f"{both} of {len(unusual):,} rows have a p-value of at most {UNUSUAL}: {low} of low and "
        f"{high} of high log-density; the least p-value that there can be is {least:.2g}."
    )


def _rows(run: Path, data: str) -> Points:
    """The rows of a file, its columns read as the run's were; incomplete ones are left out."""
    columns = None
    if densities.has_columns(data):
        known = _columns(read_config(run)) if (run / "config.yaml").is_file() else Columns()
        columns = replace(known, weight=None, drop_missing=not names_images(data))
    source = densities.load(data, columns)
    if not isinstance(source, Points):
        raise ValueError(f"score: expected a file of rows, got {data}, a density")
    return source


def _held_out_rows(run: Path) -> tuple[Points, str]:
    """Rows that the run was not trained on, and a description of them."""
    if not (run / "config.yaml").is_file():
        raise ValueError(f"score: {run} has no held-out rows; give a file of some: --reference")
    source, share = _data(run, None)
    if not isinstance(source, Points):
        drawn = source.sample(10_000, stream(0, "reference"))
        return Points(drawn), f" drawn from {source.name}"
    test, rest, which = _test_points(source, share, run)
    if rest is None:
        raise ValueError(
            f"score: this run has held out no rows of {source.name}; give a file of some: "
            "--reference, or train with --test 0.1"
        )
    return test, which


def _test_points(
    source: Points, share: float, run: Path | None
) -> tuple[Points, Points | None, str]:
    """Points to score, others for the floor if there are any, and a description of the former.

    Args:
        source: All points.
        share: Part of them that training held out.
        run: The folder of the run that was trained on the rest; None if none was.
    """
    if run is None:
        return source, None, f" of {source.name}, samples against half of them"
    rest, test = source.split(share)
    known = _expect_trained_on(run, rest)
    if len(test.x) < 2:
        return source, None, " that training has seen; give others by --data"
    if known:
        return test, rest, " that training never saw"
    doubt = f"as {source.name} is now; this run does not tell whether the file has changed"
    return test, rest, f" put aside before training, {doubt}"


def _expect_trained_on(run: Path, rest: Points) -> bool:
    """Whether the run recorded its training rows; raise ValueError unless they are these."""
    before = read_manifest(run).get("rows")
    if before is not None and before != hash_of_rows(in_memory(rest)):
        raise ValueError(
            f"{rest.name} holds other rows than those that the run was trained on, so which of "
            "them training has seen is not known; give held-out rows by --data"
        )
    return before is not None


def sample(
    run: Path,
    output: Path,
    n: int = 1000,
    seed: int = 0,
    steps: int | None = None,
    context: list[str] | None = None,
    guidance: float | None = None,
) -> None:
    """Draw points from a trained flow and write them to a file.

    Args:
        run: A run's folder or a flow file.
        output: The file, .npy or .csv; of pictures .png, a grid of them, .npy or .npz. It must not
            exist. Its folder is created if necessary.
        n: Number of points.
        seed: Seed of the draws.
        steps: Number of midpoint steps to sample a continuous flow in, instead of its own solver.
        context: Condition of the samples: a value or label for each context column in order, or
            name=value, such as species=cat,age=3.
        guidance: Weight of the context by classifier-free guidance: 1 changes nothing, above it
            counts for more. The model needs --options.null_context true, and its training
            --objective_options.context_dropout 0.1.

    Raises:
        TypeError: Guidance is asked of a flow that is not continuous.
        ValueError: A setting is out of range, the file exists, the context does not fit, or
            guidance is asked of a flow that was built without null_context.
    """
    if n < 1:
        raise ValueError(f"expected --n to be at least 1, got {n}")
    flow = load(run)
    pictures = len(flow.event_shape) == 3
    endings = PIXELS if pictures else (".npy", ".csv")
    expect_writable("sample", output, endings)  # before the draws, which may take long
    if steps is not None:
        flow = flow.with_solver(Solver("midpoint", steps=steps))
    if guidance is not None:
        flow = guided(flow, guidance)
    reading = _columns(read_config(run)) if (run / "config.yaml").is_file() else Columns()
    given = None
    if context is not None:  # in float64: float32 would round a time in seconds
        given = torch.tensor(reading.parse("sample", context), dtype=torch.float64)
    if given is None and flow.context_dim:
        wanted = ", ".join(reading.context or [f"{flow.context_dim} numbers"])
        raise ValueError(f"this flow is conditioned on {wanted}; give --context")
    drawn = flow.sample((n,), given, generator=torch.Generator().manual_seed(seed))
    if pictures:
        densities.write_images(output, drawn, getattr(flow.dequantization, "levels", None))
    else:
        densities.write_table(output, drawn, reading.header)
    print(f"{n} {'pictures' if pictures else 'points'} in {output}")


def plot(run: Path, data: str | None = None) -> None:
    """Plot a run's density, samples, trajectories and an animation in its figures folder.

    Args:
        run: A run's folder.
        data: Density, picture or file of points to plot for comparison; the training data if not
            given.
    """
    from cnf.race.compare import as_results
    from cnf.race.figures import save_figures, what_is_left_out

    flow, (source, _) = load(run), _data(run, data)
    folder = (run if run.is_dir() else run.parent) / "figures"
    entropy = source.entropy or 0.0
    scored = ((float(row["seconds"]), held_out_nll(row)) for row in read_scores(run))
    curve = [(seconds, nll - entropy) for seconds, nll in scored if nll is not None]
    results = as_results(flow, source, run.stem, curve)
    for path in save_figures(results, folder).values():
        print(str(path))
    if left_out := what_is_left_out(source):
        print(left_out)


def compare(
    data: str,
    seconds: float | None = None,
    steps: int | None = None,
    contestants: list[str] | None = None,
    seeds: list[int] | None = None,
    folder: Path | None = None,
    device: str = "auto",
    w2_points: int = 2_000,
    patience: int | None = None,
    workers: int = 1,
    table: Columns | None = None,
    resume: bool = False,
    progress: bool = True,
) -> None:
    """Race likelihood training, flow matching and discrete flows on one density; write a report.

    Args:
        data: A density by name (see `cnf list densities`), a picture, a file of points (csv, npy,
            parquet), or pictures by name (mnist) or path.
        seconds: Budget of each contestant in seconds of training; 60 if neither is given.
        steps: Budget of each contestant in optimizer steps.
        contestants: Names of the contestants, such as nsf,realnvp (see `cnf list contestants`);
            cnf-likelihood, cnf-flow-matching, cnf-both, ffjord, realnvp and nsf if not given.
        seeds: Seeds of the runs of each contestant, such as 0,1,2; 0 if none is given.
        folder: Folder of the results; it must not exist. runs/compare-… if not given.
        device: "auto", "cpu", "cuda" or "mps".
        w2_points: Number of points for the exact W2 distance.
        patience: Stop after so many of eight validations without a better one, and keep the best
            weights, for data of few rows; the whole budget if not given.
        workers: Number of runs that train at a time, each in its own process, on its share of the
            cores, and of the GPUs.
        table: Roles of the columns of your own table.
        resume: Continue the race in `folder`, without the contestants that have finished.
        progress: Show progress bars.

    Raises:
        ValueError: A setting is out of range, or a name is unknown.
    """
    from cnf.race import compare as race
    from cnf.race.figures import what_is_left_out
    from cnf.race.report import write_report
    from cnf.race.tables import results_table

    escape = optional("rich.markup", "cli").escape
    if resume and folder is None:
        raise ValueError("expected --folder beside --resume, the race to go on with")
    source = densities.load(data, table)
    folder = folder or free_folder(Path("runs") / f"compare-{source.name}")
    seconds = 60.0 if seconds is None and steps is None else seconds
    try:
        results = race(
            source, contestants, seconds=seconds, steps=steps, seeds=seeds or [0], folder=folder,
            device=device, w2_points=w2_points, patience=patience, workers=workers,
            resume=resume, progress=progress,
            say=lambda line: _console().rule(escape(line), align="left"),
        )  # fmt: skip
    except KeyboardInterrupt as stop:
        way = f"--folder {shlex.quote(str(folder))} --resume"
        print(f"Interrupted; go on with the same command and {way}")
        raise SystemExit(_exit_code(stop)) from None
    _console().print(results_table(results))
    with status("drawing the pictures", progress):
        page = write_report(results, folder)
    if left_out := what_is_left_out(source):
        print(left_out)
    print(f"The report: {page.resolve()}")


def check(run: Path, data: str | None = None) -> None:
    """Check a flow for errors: mass, log-determinants, round trip, gradients, solver.

    The exit code is 1 if a check fails.

    Args:
        run: A run's folder or a flow file.
        data: Density, picture or file whose points are used, its columns read as the run's were.
            If not given, the flow's own samples or, for a flow with a context, the table that the
            run was trained on, if it still exists.
    """
    from cnf.checks import check as check_flow

    flow, x, context = load(run), None, None
    where = "its own samples"
    if data is not None or (flow.context_dim and _has_training_table(run)):
        source, draw = _data(run, data)[0], torch.Generator().manual_seed(0)
        if isinstance(source, Points):
            rows = source.take(source.draw(64, draw))
            x, context = rows.x, rows.context
        else:
            x = source.sample(64, draw)
        with_contexts = "" if context is None else ", with their contexts"
        where = f"{len(x)} rows of {source.name}{with_contexts}"
    report = check_flow(flow, x, context=context)
    print(f"Checked at {where}.")
    print(str(report))
    if not report.ok:
        raise SystemExit(1)


def list_names(kind: str | None = None) -> None:
    """List the names that the other commands accept.

    Args:
        kind: A single kind, such as models or densities; all if not given.
    """
    escape = optional("rich.markup", "cli").escape
    if kind is not None and kind not in KINDS:
        raise UnknownNameError("kind", kind, KINDS)
    for name in [kind] if kind else KINDS:
        table = optional("rich.table", "cli").Table(title=name, box=None, show_header=False)
        table.title_justify, table.title_style = "left", "bold"
        for entry, thing in KINDS[name].items():
            about = getattr(thing, "about", None) or _first_line(thing)
            table.add_row(f"  {entry}", escape(about))
        _console().print(table)


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "evaluate": evaluate,
    "score": score,
    "sample": sample,
    "plot": plot,
    "compare": compare,
    "check": check,
    "list": list_names,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the `cnf` command; errors that a user can cause print one line and exit with code 2.

    Args:
        arguments: Words of the command line; those of the process if None.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        _parser().print_help()
        raise SystemExit(2)
    name, *words = given
    if name.startswith("-"):
        _parser().parse_args(given)
    try:
        with _warnings_in_a_line():
            options = _options(name, words)
            COMMANDS[name](**options)
    except KeyboardInterrupt as stop:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(_exit_code(stop)) from None
    except BrokenPipeError:  # the reader has closed the pipe, as in `cnf list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (ValueError, TypeError, OSError, ImportError, SolverError, CheckpointError) as error:
        if os.environ.get("CNF_TRACEBACK"):
            raise
        command = f"cnf {name}" if name in COMMANDS else "cnf"
        print(f"{command}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _exit_code(stop: KeyboardInterrupt) -> int:
    """That of a process which the same signal ended."""
    return 128 + getattr(stop, "number", signal.SIGINT)


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """A context manager in which a warning prints its text without the line of code."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: (
        f"warning: {' '.join(str(message).split())}\n"
    )
    try:
        yield
    finally:
        warnings.formatwarning = before


def _resumed(words: list[str]) -> list[str]:
    """Expand `--resume RUN` to flags; the folder of a run is that of its config file."""
    given = dict(word[2:].split("=", 1) for word in words if "=" in word)
    resume, config = given.get("resume"), given.get("config")
    if resume in (None, "true", "false", "auto"):
        goes_on = resume in ("true", "auto") and config is not None and "folder" not in given
        return [*words, f"--folder={Path(str(config)).parent}"] if goes_on else words
    run = Path(str(resume))
    if not (run / "config.yaml").is_file():
        raise ValueError(f"there is no run to resume in {run}: it has no config.yaml")
    rest = [word for word in words if word != f"--resume={resume}"]
    return [f"--config={run / 'config.yaml'}", f"--folder={run}", "--resume=true", *rest]


def _options(name: str, words: list[str]) -> dict[str, Any]:
    """Parse the words of a command to the arguments of its function."""
    if name not in COMMANDS:
        raise UnknownNameError("command", name, COMMANDS)
    function = COMMANDS[name]
    kinds = flags(function) | ({"config": Path, "print_config": None} if name == "train" else {})
    words = normalized(words, kinds, required(function) or kinds)
    words = _resumed(words) if name == "train" else words
    file = next((word[9:] for word in words if word.startswith("--config=")), None)
    words = [*words, *_one_budget(words)] if file else words
    try:
        parsed = _parser().parse_args([name, *_former_defaults(file), *words])
    except ArgumentError as error:
        raise ValueError(
            error_message(error, kinds) + (f" (in {file})" if file else "")
        ) from error
    options = parsed[name].as_dict()
    options.pop("config", None)
    for argument, kind in get_type_hints(function).items():
        if settings := settings_class(kind):
            own = {field.name: options.pop(field.name) for field in fields(settings)}
            options[argument] = settings(**own)
    return options


def _one_budget(words: list[str]) -> list[str]:
    """Flags for a budget that takes the place of the one in a configuration."""
    given = {word[2:].split("=", 1)[0] for word in words}
    if "seconds" in given and "steps" not in given:
        return ["--steps=null", "--ticks=null"]
    return ["--seconds=null"] if "steps" in given and "seconds" not in given else []


def _former_defaults(config: str | None) -> list[str]:
    """Flags for a configuration from before there was a test part, which trains on all rows."""
    path = Path(config or "")
    lines = path.read_text().splitlines() if path.is_file() else []
    known = any(line.startswith("test:") for line in lines)
    return ["--test=0"] if any(line.startswith("ticks:") for line in lines) and not known else []


def _parser() -> Any:
    jsonargparse = optional("jsonargparse", "cli")
    about = f"{__doc__} Flags may be written with dashes, and lists as a,b,c."
    parser = jsonargparse.ArgumentParser(prog="cnf", description=about, exit_on_error=False)
    parser.add_argument(
        "--version", action="version", version=f"cnf {cnf_version}, torch {torch.__version__}"
    )
    commands = parser.add_subcommands()
    for name, function in COMMANDS.items():
        first = _first_line(function)
        usage = " ".join([f"cnf {name}", *map(str.upper, required(function)), "[--flag value …]"])
        command = jsonargparse.ArgumentParser(usage=usage, exit_on_error=False)
        if name == "train":
            told = "YAML file of these flags, such as RUN/config.yaml."
            command.add_argument("--config", action="config", help=told)
        hints = get_type_hints(function).items()
        settings = {argument: own for argument, kind in hints if (own := settings_class(kind))}
        command.add_function_arguments(function, as_positional=False, skip=set(settings))
        for own in settings.values():
            command.add_class_arguments(own)
        commands.add_subcommand(name, command, help=first)
    return parser


def _data(run: Path, data: str | None) -> tuple[Any, float]:
    """The named data, or those that the run was trained on, and the part that it held out.

    A table is read with the columns of the run.
    """
    if data is not None and not (run / "config.yaml").is_file():
        return densities.load(data), 0.0
    settings = read_config(run)
    name = data or settings["data"]
    columns = _columns(settings) if densities.has_columns(name) else None
    found = _training_data(name, columns) if data is None else _other_data(name, columns)
    return found, settings.get("test", 0.0)


def _other_data(name: str, columns: Columns | None) -> Any:
    """Data that the run was not trained on, whose column of weights may be missing."""
    try:
        return densities.load(name, columns)
    except ValueError as error:
        if columns is None or f"unknown column {columns.weight!r}" not in str(error):
            raise
        print(f"{name} has no column {columns.weight}: every row counts the same.")
        return densities.load(name, replace(columns, weight=None))


def _training_data(name: str, columns: Columns | None) -> Any:
    """The data that a run was trained on."""
    try:
        return densities.load(name, columns)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; the run was trained on it: if it has moved, say where: --data FILE"
        ) from None


def _has_training_table(run: Path) -> bool:
    """Whether the table, or the pictures, that a run was trained on still exist."""
    if not (run / "config.yaml").is_file():
        return False
    data = read_config(run)["data"]
    return data in IMAGE_SETS or Path(data).exists()


def _columns(settings: dict[str, Any]) -> Columns:
    """The roles of the columns of a run's table."""
    names = {field.name for field in fields(Columns)}
    return Columns(**{name: value for name, value in settings.items() if name in names})


def _first_line(thing: Any) -> str:
    thing = thing if callable(thing) or thing is None else type(thing)
    first = ((thing.__doc__ if thing else "") or "").strip().split("\n")[0]
    return re.sub(r":math:`(.*?)`", r"\1", first)


def _console() -> Any:
    return optional("rich.console", "cli").Console()
