"""Tables of results, of runs and as means over seeds."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from trainer.system.formatting import format_ranges
from trainer.tracking.comparison.differences import NAMES, Group, fields_of
from trainer.tracking.comparison.render import Cell, Column, Table
from trainer.tracking.comparison.runs import ComparedRun

MISSING = "-"
_MOST_RANGES = 8  # of runs' numbers, such as 3-5, that are listed
_MOST_FIELDS = 6  # in a group's label


def percent(value: float) -> str:
    return f"{100 * value:.2f}"


def _rounded_percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _loss(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 100 else f"{value:.3g}"


def _amount(value: float) -> str:
    """About three digits, for hours as well as for thousands of clips."""
    if value >= 10:
        return f"{value:.0f}" if value >= 1000 else f"{value:.1f}"
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


def _result(name: str) -> Callable[[ComparedRun], float | None]:
    return lambda run: run.results.get(name)


@dataclass(frozen=True)
class ResultColumn:
    """A column of numbers."""

    head: str
    key: str
    """Its name in JSON."""
    value: Callable[[ComparedRun], float | None]
    text: Callable[[float], str]
    better: int = 0
    """1 if higher is better, -1 if lower is, 0 if neither."""
    expendable: int = 0
    """See `Column`."""


RESULT_COLUMNS = (
    ResultColumn("best top-1", "best_top1", lambda run: run.best.top1 if run.best else None, percent, 1),
    ResultColumn("top-1", "top1", lambda run: run.last.top1 if run.last else None, percent, 1),
    ResultColumn("best top-5", "best_top5", lambda run: run.best_top5, percent, 1, 5),
    ResultColumn("top-5", "top5", lambda run: run.last.top5 if run.last else None, percent, 1, 3),
    ResultColumn("val loss", "val_loss", lambda run: run.last.loss if run.last else None, _loss, -1),
    ResultColumn("train loss", "train_loss", _result("train_loss"), _loss, -1, 4),
    ResultColumn("clips/s", "clips_per_second", _result("clips_per_second"), _amount, 1),
    ResultColumn("MFU %", "mfu", _result("mfu"), _rounded_percent, 1),
    ResultColumn("hours", "hours", _result("hours"), _amount, 0, 4),
    ResultColumn("GPU-hours", "gpu_hours", _result("gpu_hours"), _amount),
    ResultColumn("wait %", "data_wait_share", _result("data_wait_share"), _rounded_percent, -1, 1),
    ResultColumn("bad", "quarantined", _result("quarantined"), lambda value: f"{value:.0f}", 0, 2),
)
"""In order. Accuracies and `val loss` are of the validation videos, `train loss` is the mean of the last
`LOSS_STEPS` steps."""

_OF_GROUPS = {
    "best_top1": 0, "top1": 1, "top5": 3, "val_loss": 4, "train_loss": 5, "clips_per_second": 2,
    "gpu_hours": 0,
}  # fmt: skip
"""Columns in the table of groups, and their `expendable` there."""


def results_table(runs: Sequence[ComparedRun]) -> Table:
    """A row for each run. Columns without a value are omitted, and the status where all runs finished."""
    measures = [measure for measure in RESULT_COLUMNS if any(measure.value(run) is not None for run in runs)]
    best = {measure.key: _best(measure, runs) for measure in measures}
    columns = [Column("#"), Column("run", numeric=False, name=True)]
    with_status = {run.status for run in runs} != {"finished"}
    with_steps = with_status or len({run.results.get("step") for run in runs}) > 1
    columns += [Column("status", numeric=False)] * with_status + [Column("step", expendable=6)] * with_steps
    columns += [Column(measure.head, expendable=measure.expendable) for measure in measures]
    rows = []
    for number, run in enumerate(runs, start=1):
        row = [Cell(str(number)), Cell(run.name)]
        row += [Cell(run.status)] * with_status + [Cell(_steps(run))] * with_steps
        for measure in measures:
            value = measure.value(run)
            text = MISSING if value is None else measure.text(value)
            row.append(Cell(text, best=text != MISSING and text == best[measure.key]))
        rows.append(row)
    return Table(columns, rows)


def _best(measure: ResultColumn, runs: Sequence[ComparedRun]) -> str | None:
    """The best value as text, so that equal texts are marked alike; None of a single run."""
    values = [value for run in runs if (value := measure.value(run)) is not None]
    if measure.better == 0 or len(values) < 2:
        return None
    best = measure.text(max(values) if measure.better > 0 else min(values))
    return None if all(measure.text(value) == best for value in values) else best


def _steps(run: ComparedRun) -> str:
    step, total = run.results.get("step"), run.results.get("total_steps")
    if step is None:
        return MISSING
    return f"{step:.0f}" if total is None or total == step else f"{step:.0f}/{total:.0f}"


def deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample deviation (n - 1); None for the deviation of a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def group_table(runs: Sequence[ComparedRun], groups: Sequence[Group]) -> Table:
    """Mean ± sample deviation over the finished runs of each group, and their number."""
    measures = [measure for measure in RESULT_COLUMNS if measure.key in _OF_GROUPS]
    labels = group_labels(runs, groups)
    found = []
    for group, label in zip(groups, labels, strict=True):
        members = [runs[index] for index in group]
        finished = [run for run in members if run.status == "finished"]
        more = f" of {len(members)}" if len(finished) < len(members) else ""
        cells = [Cell(label), Cell(f"{len(finished)}{more}")]
        means = []
        for measure in measures:
            values = [value for run in finished if (value := measure.value(run)) is not None]
            cells.append(Cell(_spread(measure, values)))
            means.append(statistics.fmean(values) if values else -math.inf)
        found.append((means[0], cells))
    columns = [Column("runs", numeric=False, wraps=True), Column("n")]
    columns += [Column(measure.head, expendable=_OF_GROUPS[measure.key]) for measure in measures]
    return Table(columns, [cells for _, cells in sorted(found, key=lambda row: row[0], reverse=True)])


def _spread(measure: ResultColumn, values: Sequence[float]) -> str:
    if not values:
        return MISSING
    mean, spread = deviation(values)
    return measure.text(mean) if spread is None else f"{measure.text(mean)} ± {measure.text(spread)}"


def group_labels(runs: Sequence[ComparedRun], groups: Sequence[Group]) -> list[str]:
    """For each group, its numbers of runs and the fields in which it differs from the other groups."""
    firsts = [fields_of(runs[group[0]]) for group in groups]
    names = [
        name
        for name in dict.fromkeys(name for fields in firsts for name in fields)
        if name not in (*NAMES, "seed")
        and not name.startswith("tracking.")
        and len({fields.get(name) for fields in firsts}) > 1
    ]
    labels = []
    for group, fields in zip(groups, firsts, strict=True):
        differing = ", ".join(
            f"{name.rpartition('.')[2]} {fields.get(name, MISSING)}" for name in names[:_MOST_FIELDS]
        )
        more = f" and {len(names) - _MOST_FIELDS} more" if len(names) > _MOST_FIELDS else ""
        labels.append(f"{run_numbers(group)}{f': {differing}{more}' if differing else ''}")
    return labels


def run_numbers(indices: Sequence[int]) -> str:
    """Indices in the list as the numbers of runs in a report, such as `1-3, 7`; of many, the first."""
    parts = format_ranges([index + 1 for index in indices]).split(", ")
    if len(parts) <= _MOST_RANGES:
        return ", ".join(parts)
    return f"{', '.join(parts[: _MOST_RANGES - 2])}, ... ({len(indices)} runs)"
