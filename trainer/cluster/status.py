"""Many runs at a glance: a line each, what is to be said of some of them below, and a count."""

import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.cluster.run_status import RunHistory, RunStatus, State, derive_status, duration, is_gone
from trainer.cluster.slurm import QueuedJob, is_available, queue
from trainer.errors import RunError
from trainer.system.terminal import PipeConsole

STATES: tuple[State, ...] = (
    "given up", "failed", "unknown", "stopped", "requeued", "waiting", "running", "finished",
)  # fmt: skip
"""What asks for a person first."""

_COLOURS: dict[State, str] = {
    "given up": "bold red",
    "failed": "bold red",
    "unknown": "yellow",
    "stopped": "yellow",
    "requeued": "cyan",
    "waiting": "cyan",
    "running": "green",
    "finished": "dim",
}

_ALWAYS = ("run", "state", "step")
"""Columns that are shown though no run fills them."""

_SIDES: dict[str, Literal["left", "right"]] = {"run": "left", "state": "left", "where": "left"}

_MARKS = ("recipe.yaml", "slurm/jobs.jsonl", "slurm/turns.jsonl")
"""One of them makes a folder that of a run: training writes the first, a job that waits the others."""

NOTES = 12  # lines below the table
NAMED = 3  # runs that a note names
NAME = 32  # characters of a run's name there
LONGEST = 240  # characters of a note's words; --json has them all
LEAST_NAME = 12  # characters that remain of a run's name
LEAST_PLACE, LEAST_JOB = 22, 10  # of where it is: a job's number and some nodes; the number alone


@dataclass(frozen=True)
class Overview:
    """standings: of all runs, in the order of their names. trouble: why SLURM could not be asked, if so."""

    statuses: list[RunStatus]
    trouble: str | None


def collect_statuses(places: Sequence[Path]) -> Overview:
    """How the runs in these folders stand now. Raises RunError for a folder that is not there."""
    runs = list(find_run_dirs(places))
    found = [RunHistory(path) for _, path in runs]
    queued, trouble = _ask({job for history in found for job in history.jobs})
    now = time.time()
    statuses = [
        # What a job said last, it said after its folder was read and before SLURM was asked.
        derive_status(name, RunHistory(path) if is_gone(history, queued) else history, queued, now)
        for (name, path), history in zip(runs, found, strict=True)
    ]
    return Overview(statuses, trouble)


def find_run_dirs(places: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Each run in these folders, or one folder deeper, as those of sweeps are, with a name to show it under.

    Raises RunError for a folder that is not there.
    """
    for place in places:
        if not place.is_dir():
            raise RunError(f"{place}: there is no such folder; name that of a run, or one that holds runs")
    known: set[Path] = set()
    for place in places:
        for path in [place] if _is_run(place) else _runs_below(place, deeper=True):
            resolved = path.resolve()
            if resolved not in known:
                known.add(resolved)
                alone = len(places) == 1 and path != place
                yield str(path.relative_to(place) if alone else path), path


def _runs_below(folder: Path, *, deeper: bool) -> Iterator[Path]:
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    except OSError:  # of somebody else, or deleted meanwhile
        return
    for name in sorted(names, key=_by_number):
        path = folder / name
        if _is_run(path):
            yield path
        elif deeper:
            yield from _runs_below(path, deeper=False)


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts 2 before 10."""
    return [(int(part or 0), rest) for part, rest in re.findall(r"(\d*)(\D*)", name)]


def _is_run(path: Path) -> bool:
    return any(os.path.exists(path / mark) for mark in _MARKS)


def _ask(jobs: set[str]) -> tuple[Mapping[str, QueuedJob] | None, str | None]:
    """The queue by the jobs' numbers; None where there is none to ask, with why, if it should have been."""
    if not jobs or not is_available():
        return None, None
    try:
        return {job.id: job for job in queue(sorted(jobs))}, None
    except RunError as error:
        return None, str(error)


def format_json(overview: Overview) -> str:
    """A list with an object for each run, see `RunStatus`."""
    return json.dumps([asdict(row) for row in overview.statuses], indent=2, ensure_ascii=False)


def print_overview(overview: Overview, console: Console) -> None:
    """Print the table, the notes below it, and a count; a file or a pipe gets lines of any length."""
    rows = overview.statuses
    width = console.width if console.is_terminal else 10_000
    wide = PipeConsole(file=console.file, width=width, force_terminal=console.is_terminal, highlight=False)
    with wide.capture() as capture:
        if rows:
            wide.print(_table(rows, width))
        notes = _notes(rows)
        for line in ["", *notes] if notes else []:
            wide.print(line)
        wide.print()
        wide.print(_count(rows))
        if overview.trouble is not None:
            wide.print(Text(f"as the folders say, since {overview.trouble}", style="yellow"))
    console.file.writelines(f"{line.rstrip()}\n" for line in capture.get().splitlines())
    console.file.flush()


def _table(rows: Sequence[RunStatus], width: int) -> Table:
    """One line each, whatever the width: first the blanks between columns go, then long lists of nodes, then
    of names what they do not differ by.
    """
    filled = [_cells(row) for row in rows]
    heads = [head for head in filled[0] if head in _ALWAYS or any(cells[head] for cells in filled)]
    widths = {head: max(len(head), *(len(cells[head]) for cells in filled)) for head in heads}
    gap = 2 if sum(widths.values()) + 2 * len(widths) <= width else 1
    surplus = sum(widths.values()) + gap * (len(widths) - 1) - width
    unique = _unique_width([row.name for row in rows])
    for head, least in (("where", LEAST_PLACE), ("run", unique), ("where", LEAST_JOB), ("run", LEAST_NAME)):
        cut = max(0, min(surplus, widths.get(head, 0) - least))
        if cut:
            widths[head], surplus = widths[head] - cut, surplus - cut
    table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold")
    for head in heads:
        table.add_column(head, justify=_SIDES.get(head, "right"), no_wrap=True, width=widths[head])
    for row, cells in zip(rows, filled, strict=True):
        cells["run"] = _end_of(row.name, widths["run"])
        styles = {"state": _COLOURS[row.state]}
        table.add_row(*(Text(cells[head], style=styles.get(head, "")) for head in heads))
    return table


def _cells(row: RunStatus) -> dict[str, str]:
    """By the column's head."""
    return {
        "run": row.name,
        "state": row.state,
        "step": f"{_count_of(row.step)}/{_count_of(row.total_steps)}" if row.step is not None else "",
        "left": "" if row.seconds_left is None else duration(row.seconds_left),
        "again": str(row.restarts) if row.restarts else "",
        "loss": _loss(row),
        "top-1": "" if row.top1 is None else f"{100 * row.top1:.1f}%",
        "seen": "" if row.silent is None else duration(row.silent, figures=1),
        "where": " ".join(part for part in (row.job, row.nodes) if part),
    }


def _count_of(steps: int | None) -> str:
    if steps is None:
        return "?"
    return str(steps) if steps < 100_000 else f"{steps // 1000}k"


def _loss(row: RunStatus) -> str:
    if row.loss is None:
        return "nan" if row.diverged else ""
    return f"{row.loss:.3f}" if abs(row.loss) < 100 else f"{row.loss:.3g}"


def _end_of(name: str, width: int) -> str:
    """Variants of a sweep differ at the end of their names."""
    return name if len(name) <= width else f"…{name[len(name) - width + 1 :]}"


def _unique_width(names: Sequence[str]) -> int:
    """The least to which names may be cut and still differ."""
    longest = max(map(len, names))
    widths = range(min(LEAST_NAME, longest), longest)
    return next(
        (width for width in widths if len({_end_of(name, width) for name in names}) == len(names)), longest
    )


def _notes(rows: Sequence[RunStatus]) -> list[Text]:
    """What is to be said, once for all runs of which it is the same; those that ask for a person first."""
    names: dict[tuple[State, str], list[str]] = {}
    for row in rows:
        if row.words:
            names.setdefault((row.state, row.words), []).append(row.name)
    ordered = sorted(names, key=lambda note: STATES.index(note[0]))
    lines = []
    for state, words in ordered[:NOTES]:
        which = [_end_of(name, NAME) for name in names[state, words]]
        others = f" and {len(which) - NAMED} more" if len(which) > NAMED else ""
        text = words if len(words) <= LONGEST else f"{words[:LONGEST]}…"
        lines.append(Text.assemble((state, _COLOURS[state]), f"  {', '.join(which[:NAMED])}{others}: {text}"))
    if len(ordered) > NOTES:
        lines.append(Text(f"and {len(ordered) - NOTES} more such lines, which --json shows", style="dim"))
    return lines


def _count(rows: Sequence[RunStatus]) -> str:
    counts = Counter(row.state for row in rows)
    parts = ", ".join(f"{counts[state]} {state}" for state in reversed(STATES) if counts[state])
    return f"{len(rows)} run{'' if len(rows) == 1 else 's'}{': ' if parts else ''}{parts}"
