"""Builds the blocks of a report from a comparison, and its JSON."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

from trainer.evaluation.significance import CONFIDENCE, RESAMPLES
from trainer.monitoring.metric_names import LOSS_STEPS
from trainer.system.files import format_json
from trainer.tracking.comparison.compare import Comparison
from trainer.tracking.comparison.curves import draw_curves
from trainer.tracking.comparison.differences import Difference
from trainer.tracking.comparison.paired_scores import MOST_TESTED, PairedTest
from trainer.tracking.comparison.render import Block, Cell, Column, Heading, Paragraph, Picture, Table
from trainer.tracking.comparison.results import (
    MISSING,
    RESULT_COLUMNS,
    deviation,
    group_table,
    results_table,
    run_numbers,
)

T = TypeVar("T")

_SIDE_BY_SIDE = 4  # runs that have a column each
_MOST_VALUES = 8  # of a field, that are listed
_LONGEST_VALUE = 60  # characters
_MOST_LINES = 30  # of notes on single runs


def report(comparison: Comparison, *, curves: bool) -> list[Block]:
    """All sections in order. curves: whether to draw the picture."""
    blocks: list[Block] = [*_results(comparison), *_differences(comparison)]
    blocks += _groups(comparison) + _data(comparison) + _significance(comparison)
    if curves and (drawn := draw_curves(comparison.runs, comparison.groups)) is not None:
        blocks.append(Picture(*drawn))
    return blocks + _notes(comparison)


def _results(comparison: Comparison) -> list[Block]:
    runs = comparison.runs
    counts = Counter(run.status for run in runs)
    states = ", ".join(f"{count} {status}" for status, count in counts.most_common())
    text = (
        f"{len(runs)} run{'s' * (len(runs) > 1)} ({states}), by best top-1. Accuracies in %; without 'best', "
        f"of the last evaluation, as is 'val loss'; 'train loss': mean of the last {LOSS_STEPS} steps. "
        "GPU-hours: hours x ranks. A run that has not finished: as of its last step."
    )
    return [Heading("Results"), Paragraph(text), results_table(runs)]


def _differences(comparison: Comparison) -> list[Block]:
    found, runs = comparison.differences, comparison.runs
    if len(runs) < 2:
        return []
    heading = Heading("What differs in the recipes")
    if not found:
        return [heading, Paragraph("Nothing but the names.")]
    if len(runs) <= _SIDE_BY_SIDE:
        columns = [Column("field", numeric=False)]
        columns += [Column(f"{number} {run.name}", False, wraps=True) for number, run in enumerate(runs, 1)]
        rows = [[_shortened(value) for value in difference.values] for difference in found]
    else:
        columns = [Column("field", numeric=False), Column("value: runs", numeric=False, wraps=True)]
        rows = [[_listed(difference)] for difference in found]
    return [heading, Table(columns, _by_section(found, rows, len(columns)))]


def _by_section(found: Sequence[Difference], rows: Sequence[Sequence[str]], width: int) -> list[list[Cell]]:
    """The rows with a line before those of each section."""
    table: list[list[Cell]] = []
    section = None
    for difference, values in zip(found, rows, strict=True):
        if difference.section != section:
            section = difference.section
            table.append([Cell(section, best=True), *[Cell("")] * (width - 1)])
        name = difference.field.removeprefix(f"{section}.")
        table.append([Cell(f"  {name}"), *map(Cell, values)])
    return table


def _shortened(value: str | None) -> str:
    if value is None:
        return MISSING
    return value if len(value) <= _LONGEST_VALUE else f"{value[: _LONGEST_VALUE - 1]}…"


def _listed(difference: Difference) -> str:
    """Each value with the numbers of its runs; of many values the range, or their number."""
    indices = _indices_by(enumerate(difference.values))
    if len(indices) <= _MOST_VALUES:
        return " · ".join(f"{_shortened(value)}: {run_numbers(found)}" for value, found in indices.items())
    numbers = [number for value in indices if (number := _number(value)) is not None]
    if len(numbers) == len(indices):
        return f"{len(indices)} values, {min(numbers):g} to {max(numbers):g}"
    common = sorted(indices.items(), key=lambda item: -len(item[1]))[: _MOST_VALUES - 1]
    listed = " · ".join(f"{_shortened(value)}: {run_numbers(found)}" for value, found in common)
    return f"{listed} · {len(indices) - len(common)} more values"


def _indices_by(values: Iterable[tuple[int, T]]) -> dict[T, list[int]]:
    """The indices of each value, in the order of its first."""
    found: dict[T, list[int]] = {}
    for index, value in values:
        found.setdefault(value, []).append(index)
    return found


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:
        return None


def _groups(comparison: Comparison) -> list[Block]:
    if not comparison.groups:
        return []
    text = "Runs that differ in their seed alone: mean ± sample deviation over the n that finished."
    return [Heading("Seeds"), Paragraph(text), group_table(comparison.runs, comparison.groups)]


def _data(comparison: Comparison) -> list[Block]:
    if not comparison.data:
        return []
    by_text = _indices_by(comparison.data)
    base = comparison.runs[comparison.baseline]
    text = f"Compared with run {comparison.baseline + 1} ({base.name}); of two values, its own comes first."
    listed = list(by_text.items())[:_MOST_LINES]
    rows = [[Cell(run_numbers(indices)), Cell(text)] for text, indices in listed]
    columns = [Column("run", numeric=False, wraps=True), Column("data", numeric=False, wraps=True)]
    blocks: list[Block] = [Heading("Same data, same order?"), Paragraph(text), Table(columns, rows)]
    if len(by_text) > len(listed):
        left = sum(len(indices) for indices in list(by_text.values())[len(listed) :])
        blocks.append(Paragraph(f"And {left} more runs, which --json lists."))
    return blocks


_TEST_COLUMNS = (
    Column("#"),
    Column("run", numeric=False, name=True),
    Column("videos"),
    Column("difference"),
    Column(f"{100 * CONFIDENCE:.0f} % interval"),
    Column("only base right"),
    Column("only run right"),
    Column("p"),
    Column("p, Holm"),
)


def _significance(comparison: Comparison) -> list[Block]:
    tests, runs = comparison.tests, comparison.runs
    if len(runs) < 2:
        return []
    if not tests:
        text = (
            "Not tested: it takes scores per video (scores.parquet in the runs' folders) of two runs on the "
            "same videos."
        )
        return [Heading("Significance"), Paragraph(text)]
    base = runs[comparison.baseline]
    adjusted = f", adjusted for {len(tests)} tests by Holm" if len(tests) > 1 else ""
    text = (
        f"Top-1 of the last evaluation against run {comparison.baseline + 1} ({base.name}) on the same "
        f"videos, in points: interval by {RESAMPLES:,} paired bootstrap resamples, p by McNemar's exact test,"
        f" two-sided{adjusted}. This is about these weights on these videos, not about another seed."
    )
    if len(runs) > MOST_TESTED:
        text += f" Of {len(runs)} runs, those of the best {MOST_TESTED} that have scores are tested."
    rows = []
    for test in tests:
        counts = test.pairs.counts
        rows.append(
            [
                Cell(str(test.run + 1)), Cell(runs[test.run].name), Cell(str(counts.videos)),
                Cell(f"{100 * counts.difference:+.2f}"),
                Cell(f"{100 * test.low:+.2f} to {100 * test.high:+.2f}"),
                Cell(str(counts.only_first)), Cell(str(counts.only_second)), Cell(_p(test.p)),
                Cell(_p(test.adjusted)),
            ]
        )  # fmt: skip
    notes = [Paragraph(note) for test in tests if (note := _unpaired(test, runs[test.run].name))]
    return [Heading("Significance"), Paragraph(text), Table(_TEST_COLUMNS, rows), *notes[:_MOST_LINES]]


def _p(value: float) -> str:
    return "< 1e-300" if value == 0 else f"{value:.2g}" if value < 0.001 else f"{value:.3f}"


def _unpaired(test: PairedTest, name: str) -> str | None:
    """The videos that a test leaves out, by reason."""
    pairs = test.pairs
    left_out = {
        "only in the baseline's scores": pairs.only_first,
        "only in this run's": pairs.only_second,
        "not read by one of the two": pairs.unread,
        "under different labels": pairs.other_label,
        "with a path that occurs more than once": pairs.ambiguous,
    }
    counts = [f"{count:,} {reason}" for reason, count in left_out.items() if count]
    views = f"evaluated with other views ({test.views})" if test.views else ""
    parts = [f"videos left out: {', '.join(counts)}"] * bool(counts) + [views] * bool(views)
    return f"Run {test.run + 1} ({name}): {'; '.join(parts)}." if parts else None


def _notes(comparison: Comparison) -> list[Block]:
    by_note = _indices_by((index, note) for index, run in enumerate(comparison.runs) for note in run.notes)
    lines = [f"Run {run_numbers(indices)}: {note}" for note, indices in by_note.items()]
    lines += comparison.notes
    if not lines:
        return []
    more = [f"And {len(lines) - _MOST_LINES} more, which --json lists."] * (len(lines) > _MOST_LINES)
    return [Heading("Notes"), *map(Paragraph, [*lines[:_MOST_LINES], *more])]


def as_json(comparison: Comparison) -> str:
    """Everything, for programs: runs with recipe and results, differences, groups, tests."""
    tests = {test.run: test for test in comparison.tests}
    same = dict(comparison.data)
    runs = [
        {
            "number": index + 1,
            "name": run.name,
            "source": run.source,
            "status": run.status,
            "results": {
                **run.results,
                **{measure.key: measure.value(run) for measure in RESULT_COLUMNS},
                "best_step": run.best.step if run.best else None,
            },
            "data": run.data,
            "data_against_baseline": same.get(index),
            "test_against_baseline": _test_as_json(tests[index]) if index in tests else None,
            "recipe": run.recipe,
            "notes": run.notes,
        }
        for index, run in enumerate(comparison.runs)
    ]
    found = {
        "baseline": comparison.baseline + 1,
        "runs": runs,
        "differences": {difference.field: difference.values for difference in comparison.differences},
        "groups": [_group_as_json(comparison, group) for group in comparison.groups],
        "notes": comparison.notes,
    }
    return format_json(found)


def _test_as_json(test: PairedTest) -> dict[str, Any]:
    counts = test.pairs.counts
    return {
        "videos": counts.videos,
        "difference": counts.difference,
        "interval": [test.low, test.high],
        "only_baseline_right": counts.only_first,
        "only_run_right": counts.only_second,
        "p": test.p,
        "p_holm": test.adjusted,
        "only_in_baseline": test.pairs.only_first,
        "only_in_run": test.pairs.only_second,
    }


def _group_as_json(comparison: Comparison, members: Sequence[int]) -> dict[str, Any]:
    finished = [run for index in members if (run := comparison.runs[index]).status == "finished"]
    found: dict[str, Any] = {"runs": [index + 1 for index in members], "finished": len(finished)}
    for measure in RESULT_COLUMNS:
        values = [value for run in finished if (value := measure.value(run)) is not None]
        if values:
            mean, spread = deviation(values)
            found[measure.key] = {"mean": mean, "deviation": spread, "n": len(values)}
    return found
