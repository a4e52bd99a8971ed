"""The command line: train, evaluate, sample, plot, compare, check, list."""

import json
import os
import sys
from argparse import ArgumentError
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_type_hints

import torch

from cnf import __version__ as cnf_version
from cnf import data as densities
from cnf import models, objectives
from cnf.arguments import explained, flags, required, settings_class, spelled
from cnf.catalogue import KINDS
from cnf.dynamics.solver import Solver
from cnf.errors import CheckpointError, SolverError, UnknownNameError, optional
from cnf.flow import Flow
from cnf.training import TrainConfig, fit, load
from cnf.training.run import free_folder, scored_rows, trained_on

RECIPES = {"cnf": ("flow-matching", {"times": "skewed"})}  # of other models: likelihood


def train(
    data: str,
    model: str = "cnf",
    options: dict[str, Any] | None = None,
    objective: str | None = None,
    objective_options: dict[str, Any] | None = None,
    config: TrainConfig | None = None,
) -> None:
    """Train a model on a density or on one's own points, and keep everything in a run's folder.

    Args:
        data: A density by name (see `cnf list densities`), a picture, or a file of points (csv,
            npy, parquet).
        model: A model by name (see `cnf list models`).
        options: The model's options, such as --options.hidden 128,128.
        objective: What is minimised (see `cnf list objectives`). If not given, flow matching with
            more times near the data for cnf, maximum likelihood for every other model.
        objective_options: The objective's options, such as --objective_options.divergence
            hutchinson.
        config: The settings of the run.
    """
    config = config or TrainConfig()
    source = densities.load(data)
    torch.manual_seed(config.seed)  # the first weights belong to what a seed repeats
    flow = models.build(model, **{"dim": source.dim, **(options or {})})
    if objective is None:
        objective, recipe = RECIPES.get(model, ("maximum-likelihood", {}))
        objective_options = {**recipe, **(objective_options or {})}
    goal = objectives.build(objective, **(objective_options or {}))
    if config.folder is None:
        config.folder = free_folder(Path("runs") / f"{source.name}-{model}-{objective}")
    history = fit(flow, goal, source, config)
    scores = history.column("val_nll")
    held_out = f"held-out NLL {scores[-1]:.4f} nats, " if scores else ""
    print(f"{history.steps} steps in {history.seconds:.1f} s, {held_out}kept in {config.folder}")
    if history.reason == "interrupted":
        again = f"--config {config.folder}/config.yaml --folder {config.folder} --resume true"
        print(f"Interrupted; go on with: cnf train {again}")
        raise SystemExit(130)


def evaluate(run: Path, data: str | None = None, points: int = 10_000) -> None:
    """Score a trained flow: gap or NLL, distances between samples, paths, cost.

    Args:
        run: A run's folder or a flow file.
        data: Density, picture or file of held-out points; what the run was trained on if not
            given.
        points: Test points at most. Of one's own points every other one is scored, and the rest
            says what two sets of true points are apart.
    """
    from cnf.evaluation.judge import Judge
    from cnf.evaluation.tables import scores_table
    from cnf.training.stream import seeded

    flow, source = _flow_and_data(run, data)
    if source.entropy is None:
        test, other, density = source.x[: 2 * points : 2], source.x[1 : 2 * points : 2], None
    else:
        test, other = (source.sample(points, seeded(number, -9)) for number in (1, 2))
        density = source
    judge = Judge(test, other, density)
    scores = judge.scores(flow)
    if run.is_dir():
        (run / "evaluation.json").write_text(json.dumps(scores, indent=2) + "\n")
    _console().print(scores_table(scores, judge.floor))


def sample(
    run: Path, output: Path, n: int = 1000, seed: int = 0, steps: int | None = None
) -> None:
    """Draw from a trained flow into a file.

    Args:
        run: A run's folder or a flow file.
        output: The file, .npy or .csv; it must not exist.
        n: How many points.
        seed: Seed of the draws.
        steps: Sample a continuous flow with so many midpoint steps instead of its own solver.
    """
    if n < 1:
        raise ValueError(f"expected n >= 1, got {n}")
    flow = load(run)
    if steps is not None:
        flow = flow.with_solver(Solver("midpoint", steps=steps))
    drawn = flow.sample((n,), generator=torch.Generator().manual_seed(seed))
    densities.write_table(output, drawn)
    print(f"{n} points in {output}")


def plot(run: Path, data: str | None = None) -> None:
    """Draw a run's density, samples and trajectories, and an animation, into its figures folder.

    Args:
        run: A run's folder.
        data: Density, picture or file of points to draw beside it; what it was trained on if not
            given.
    """
    from cnf.evaluation.comparison import measured
    from cnf.evaluation.plotting import save_figures

    flow, source = _flow_and_data(run, data)
    folder = (run if run.is_dir() else run.parent) / "figures"
    entropy = source.entropy or 0.0
    curve = [(float(row["seconds"]), float(row["val_nll"]) - entropy) for row in scored_rows(run)]
    results = measured(flow, source, run.stem, curve)
    for path in save_figures(results, folder).values():
        print(str(path))


def compare(
    data: str,
    seconds: float | None = None,
    steps: int | None = None,
    contestants: list[str] | None = None,
    seeds: list[int] | None = None,
    folder: Path | None = None,
    device: str = "auto",
    w2_points: int = 2_000,
) -> None:
    """Race likelihood training, flow matching and discrete flows on one density; write a report.

    Args:
        data: A density by name (see `cnf list densities`), a picture, or a file of points (csv,
            npy, parquet).
        seconds: Budget of each contestant in seconds of training; 60 if neither is given.
        steps: Budget of each contestant in optimiser steps.
        contestants: Who runs, such as nsf,realnvp (see `cnf list contestants`); cnf-likelihood,
            cnf-flow-matching, cnf-both, ffjord, realnvp and nsf if not given.
        seeds: One run for each, such as 0,1,2; 0 if none is given.
        folder: Where everything is written; it must not exist. runs/compare-… if not given.
        device: "auto", "cpu", "cuda" or "mps".
        w2_points: Points for the exact W2 distance.
    """
    from cnf.evaluation import comparison
    from cnf.evaluation.report import write_report
    from cnf.evaluation.tables import results_table

    source = densities.load(data)
    folder = folder or free_folder(Path("runs") / f"compare-{source.name}")
    seconds = 60.0 if seconds is None and steps is None else seconds
    results = comparison.compare(
        contestants, source, seconds=seconds, steps=steps, seeds=seeds or [0], folder=folder,
        device=device, w2_points=w2_points, say=lambda line: _console().rule(line, align="left"),
    )  # fmt: skip
    page = write_report(results, folder)
    _console().print(results_table(results))
    print(f"The report: {page.resolve()}")


def check(run: Path, data: str | None = None) -> None:
    """Look for what is wrong with a flow: mass, log-determinants, round trip, gradients, solver.

    Exits with 1 where something is wrong.

    Args:
        run: A run's folder or a flow file.
        data: Density, picture or file whose points are used; the flow's own samples if not given.
    """
    from cnf.evaluation import check as check_flow

    x = None if data is None else densities.load(data).sample(64, torch.Generator().manual_seed(0))
    report = check_flow(load(run), x)
    print(str(report))
    if not report.ok:
        raise SystemExit(1)


def list_names(kind: str | None = None) -> None:
    """Show the names that the other commands take.

    Args:
        kind: One kind only, such as models or densities.
    """
    from cnf.evaluation import CONTESTANTS, METRICS

    escape = optional("rich.markup", "cli").escape
    kinds = {**KINDS, "contestants": CONTESTANTS, "metrics": METRICS}
    if kind is not None and kind not in kinds:
        raise UnknownNameError("kind", kind, kinds)
    for name in [kind] if kind else kinds:
        table = optional("rich.table", "cli").Table(title=name, box=None, show_header=False)
        table.title_justify, table.title_style = "left", "bold"
        for entry, thing in kinds[name].items():
            table.add_row(f"  {entry}", escape(_first_line(thing)))
        _console().print(table)


COMMANDS: dict[str, Callable[..., None]] = {
    "train": train,
    "evaluate": evaluate,
    "sample": sample,
    "plot": plot,
    "compare": compare,
    "check": check,
    "list": list_names,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The `cnf` command. What a user can cause ends in one line and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given:
        _parser().print_help()
        raise SystemExit(2)
    name, *words = given
    if name.startswith("-"):
        _parser().parse_args(given)
    try:
        options = _options(name, words)
        COMMANDS[name](**options)
    except KeyboardInterrupt:
        print("Interrupted.", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # of `cnf list | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (ValueError, TypeError, OSError, ImportError, SolverError, CheckpointError) as error:
        if os.environ.get("CNF_TRACEBACK"):
            raise
        command = f"cnf {name}" if name in COMMANDS else "cnf"
        print(f"{command}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def _options(name: str, words: list[str]) -> dict[str, Any]:
    """The arguments of a command's function from its words."""
    if name not in COMMANDS:
        raise UnknownNameError("command", name, COMMANDS)
    function = COMMANDS[name]
    kinds = flags(function) | ({"config": Path, "print_config": None} if name == "train" else {})
    words = spelled(words, kinds, required(function) or kinds)
    try:
        parsed = _parser().parse_args([name, *words])
    except ArgumentError as error:
        file = next((word[9:] for word in words if word.startswith("--config=")), None)
        raise ValueError(explained(error, kinds) + (f" (in {file})" if file else "")) from error
    options = parsed[name].as_dict()
    options.pop("config", None)
    for argument, kind in get_type_hints(function).items():
        if settings := settings_class(kind):
            own = {field.name: options.pop(field.name) for field in fields(settings)}
            options[argument] = settings(**own)
    return options


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


def _flow_and_data(run: Path, data: str | None) -> tuple[Flow, Any]:
    return load(run), densities.load(data or trained_on(run))


def _first_line(thing: Any) -> str:
    thing = thing if callable(thing) or thing is None else type(thing)
    return ((thing.__doc__ if thing else "") or "").strip().split("\n")[0]


def _console() -> Any:
    return optional("rich.console", "cli").Console()
