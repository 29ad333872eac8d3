"""Runs an ablation on this machine: one training after another, what is finished is skipped."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from trainer.cluster.chain import Stage, is_finished
from trainer.paper.ablation import Ablation
from trainer.resilience.signals import INTERRUPTED, REQUEUE
from trainer.system.child_process import run_child
from trainer.system.formatting import format_duration, format_percent
from trainer.tracking.comparison.folder_source import read_folder

STOPPED = (INTERRUPTED, REQUEUE)
"""Exit codes of a training that was asked to stop, and continues with the same command."""


def unfinished(ablation: Ablation, seeds: int, home: Path) -> list[Stage]:
    """The trainings that have not ended with their last step, in order. Raises RecipeError where a finished
    one had other settings, also for its evaluation."""
    runs = ablation.runs(seeds, home)
    return [stage for _, _, stage in runs if not is_finished(stage, compares_views=True)]


def train_all(
    stages: Sequence[Stage],
    home: Path,
    command: Callable[[list[str]], Sequence[str]],
    parent: str | None,
    *,
    print_line: Callable[[str], None] = print,
) -> int:
    """Train the stages one after another, each with its output in `home/output/NAME.log`.

    A training that fails is named, and the next one starts. One that was stopped ends the ablation; the same
    command continues it from its checkpoint.

    Args:
        stages: the trainings.
        home: folder of the ablation.
        command: the command line for arguments of launch/train.py.
        parent: MLflow's id of the parent run.
        print_line: prints a line of progress.

    Returns:
        The exit code: 0 where all are finished, 2 where some failed, else that of the stopped one.
    """
    (home / "output").mkdir(parents=True, exist_ok=True)
    failed = 0
    begin = time.monotonic()
    for number, stage in enumerate(stages, 1):
        output = home / "output" / f"{stage.name}.log"
        before = f"{number} of {len(stages)}: {stage.name}"
        print_line(f"{before}, output in {output}")
        arguments = [*stage.arguments, *(["--set", f"tracking.parent_run={parent}"] if parent else [])]
        code = run_child(command(arguments), output=output)
        if code in STOPPED:
            print_line(f"{before}: stopped; the same command continues")
            return code
        if code:
            failed += 1
            print_line(f"{before}: failed with exit code {code}, see {output}")
        else:
            print_line(f"{before}: {_result(stage)}{_time_left(begin, number, len(stages))}")
    return 2 if failed else 0


def _result(stage: Stage) -> str:
    last = read_folder(stage.run_dir).last
    return "finished" if last is None else f"top-1 {format_percent(last.top1)}"


def _time_left(begin: float, done: int, total: int) -> str:
    """The time that the others will take if they take as long as those of this call."""
    if done == total:
        return ""
    each = (time.monotonic() - begin) / done
    return f"; about {format_duration(each * (total - done))} left"
