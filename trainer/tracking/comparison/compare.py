"""Compares runs: everything that a report contains."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from pipelines.worker_pool import Progress
from trainer.errors import RunError
from trainer.tracking.comparison.differences import (
    Difference,
    Group,
    data_comparer,
    differences,
    seed_groups,
)
from trainer.tracking.comparison.paired_scores import MOST_TESTED, PairedTest, paired_tests, read_all_scores
from trainer.tracking.comparison.runs import ComparedRun


@dataclass(frozen=True)
class Comparison:
    """The contents of a report."""

    runs: list[ComparedRun]
    """By their best top-1."""
    baseline: int
    """Its index in `runs`."""
    differences: list[Difference]
    groups: list[Group]
    data: list[tuple[int, str]]
    """Index and comparison of its data with the baseline's, of each run but the baseline."""
    tests: list[PairedTest]
    notes: list[str] = field(default_factory=list)


def compare(
    found: Sequence[ComparedRun],
    baseline: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Comparison:
    """Compare runs.

    Args:
        found: the runs, in any order.
        baseline: the source of one of them; None for the best in top-1 that has scores, else the best.
        progress: called with the number of runs whose data are compared, and the number of all.

    Raises RunError without a run.
    """
    if not found:
        raise RunError("there is no run to compare")
    # Runs without an evaluation last, in their order.
    runs = sorted(found, key=lambda run: -math.inf if run.best is None else run.best.top1, reverse=True)
    notes: list[str] = []
    tested = list(range(min(len(runs), MOST_TESTED)))
    named = None if baseline is None else [run.source for run in runs].index(baseline)
    scores = read_all_scores(runs, dict.fromkeys(tested if named is None else [named, *tested]), notes)
    base = named if named is not None else next(iter(scores), 0)
    data = []
    compare_data = data_comparer(runs[base])
    for index, run in enumerate(runs):
        if index != base:
            data.append((index, compare_data(run)))
        progress(index + 1, len(runs))
    tests = paired_tests(scores, base, notes)
    return Comparison(runs, base, differences(runs), seed_groups(runs), data, tests, notes)
