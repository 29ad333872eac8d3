"""`bench.py train`: where each millisecond of a training step goes, the loop's own work included.

A recipe is trained for some steps as `train` does, with tracking, without evaluations and checkpoints.
"""

import argparse
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from pipelines.arguments import integer
from pipelines.worker_pool import usable_cores
from trainer.benchmark.arguments import add_common, add_recipe, add_timeout, positive
from trainer.benchmark.child import MeasurementError, run_child
from trainer.benchmark.report import BenchmarkReport, ResultTable, interference
from trainer.config.load import load_recipe
from trainer.config.recipe_names import find_recipe
from trainer.errors import RunError
from trainer.monitoring.progress import show_progress
from trainer.setup.embedded_data import render_missing

HELP = "where each millisecond of a training step goes, for a recipe"
WARM = 5
"""Steps that do not count."""
MODEL = ("forward", "loss", "backward", "optimiser")


def add_arguments(job: argparse.ArgumentParser) -> None:
    add_recipe(job, "quickstart", "train")
    steps = f"steps to measure in each round, after {WARM} that do not count (%(default)s)"
    job.add_argument("--steps", type=integer(1), default=40, help=steps)
    job.add_argument("--repeats", type=integer(1), default=2, help="number of rounds (%(default)s)")
    alone = "measure the loader alone for so many seconds (%(default)g)"
    job.add_argument("--loader-seconds", type=positive, default=5.0, metavar="SECONDS", help=alone)
    add_timeout(job)
    add_common(job, "train")


def run(args: argparse.Namespace, report: BenchmarkReport) -> None:
    """Trains in rounds, each in a process of its own, whose files are deleted unless it fails.

    Raises RecipeError for a recipe that is wrong, RunError for what `train` would refuse and for a training
    that ends too early, MeasurementError where one fails otherwise.
    """
    recipe = load_recipe(find_recipe(args.recipe), args.set)
    render_missing(recipe, workers=usable_cores())  # here, as the output of the trainings is not shown
    threads = len(os.sched_getaffinity(0))
    args.out.mkdir(parents=True, exist_ok=True)
    with show_progress("training") as progress:
        progress(0, args.repeats)
        for repeat in range(args.repeats):
            report.measurements.append(_train(args, threads))
            report.tables = [make_table(report.measurements, str(args.recipe))]
            progress(repeat + 1, args.repeats)


def _train(args: argparse.Namespace, threads: int) -> dict[str, Any]:
    # A new folder: one of another name may be a run of the user.
    folder = Path(tempfile.mkdtemp(prefix="train-", dir=args.out.absolute()))
    arguments = {
        "recipe": str(args.recipe),
        "settings": args.set,
        "steps": args.steps + WARM + 1,
        "warm": WARM,
        "loader_seconds": args.loader_seconds,
        "folder": str(folder),
    }
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        try:
            result = run_child("loop_task:measure_loop", arguments, threads=threads, timeout=args.timeout)
        except MeasurementError as error:
            stack.pop_all()
            raise MeasurementError(f"{error}. The files of this training are in {folder}") from error
    if not result["steps"]:
        raise RunError(
            f"the training ended within the {WARM + 1} steps that do not count: leave "
            "optimisation.steps out of --set, and give the steps to measure with --steps"
        )
    return result


def make_table(rounds: list[dict[str, Any]], recipe: str) -> ResultTable:
    """Medians over all steps of all rounds."""
    steps = [step for each in rounds for step in each["steps"]]
    whole = median(step["step"]["seconds"] for step in steps)
    phases = list(dict.fromkeys(name for step in steps for name in step if name != "step"))
    spent = {name: _middle(steps, name, "seconds") for name in phases}
    cpu = {name: _middle(steps, name, "cpu") for name in phases}
    # Of each step, and not of the medians: these do not add up.
    rest = {name: median(_rest(step, name) for step in steps) for name in ("seconds", "cpu")}
    model = median(sum(step.get(name, {}).get("seconds", 0.0) for name in MODEL) for step in steps)
    wait = spent.get("data wait", 0.0)
    rows = [
        (name, "model" if name in MODEL else "loop", *_cells(spent[name], whole), f"{1000 * cpu[name]:.2f}")
        for name in sorted(phases, key=lambda name: -spent[name])
    ]
    rows.append(
        ("the rest of the loop", "loop", *_cells(rest["seconds"], whole), f"{1000 * rest['cpu']:.2f}")
    )
    whole_cpu = median(step["step"]["cpu"] for step in steps)
    rows.append(("whole step", "", *_cells(whole, whole), f"{1000 * whole_cpu:.2f}"))
    overhead = [_overhead(steps, field, MODEL) for field in ("seconds", "cpu")]
    own = [_overhead(steps, field, (*MODEL, "data wait")) for field in ("seconds", "cpu")]
    first = rounds[0]
    alone = median(each["alone"] for each in rounds)
    loader = first["loader"]
    rate = first["global_batch"] / whole
    notes = (
        f"Overhead, all but forward, loss, backward and optimiser: {overhead[0]} of the time, {overhead[1]} "
        f"of the CPU time of the loop's thread; without the data wait {own[0]} and {own[1]}. Model "
        f"{1000 * model:.1f} ms, data wait {100 * wait / whole:.1f} % of the time.",
        f"{rate:.1f} clips/s, {100 * rate / alone:.0f} % of the loader alone on all cores ({alone:.1f} "
        f"clips/s). A clip costs its workers {1000 * loader['read']:.2f} ms to read and "
        f"{1000 * loader['decode']:.2f} ms to decode, and {1000 * loader['augment']:.2f} ms to augment; the "
        f"copy to the device, made ahead, {1000 * loader['transfer']:.2f} ms.",
        "Thread CPU: of the loop's thread alone, which also waits for the other threads of a product.",
        *interference([each["others"] for each in rounds]),
    )
    columns = ("phase", "part", "ms a step", "share", "thread CPU, ms")
    title = f"{recipe}: {len(steps)} steps of {first['global_batch']} clips on {first['device']}, medians"
    return ResultTable(title, columns, tuple(rows), notes)


def _rest(step: dict[str, dict[str, float]], field: str) -> float:
    """What no phase contains."""
    return step["step"][field] - sum(spent[field] for name, spent in step.items() if name != "step")


def _overhead(steps: list[dict[str, dict[str, float]]], field: str, without: tuple[str, ...]) -> str:
    """The median share of a step in all phases but some."""
    shares = [
        1 - sum(step[name][field] for name in without if name in step) / step["step"][field] for step in steps
    ]
    return f"{100 * median(shares):.1f} %"


def _middle(steps: list[dict[str, dict[str, float]]], phase: str, field: str) -> float:
    return median(step.get(phase, {}).get(field, 0.0) for step in steps)


def _cells(seconds: float, whole: float) -> tuple[str, str]:
    return f"{1000 * seconds:.2f}", f"{100 * seconds / whole:.1f} %"
