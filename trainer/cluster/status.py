"""The status table: one line per run, reasons below it, and a count."""

import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.text import Text

from pipelines.formatting import format_list
from trainer.cluster.run_status import RunHistory, RunStatus, State, derive_status, read_job_lines
from trainer.errors import RunError
from trainer.monitoring.run_dir import find_run_dirs
from trainer.system.formatting import format_age
from trainer.system.slurm import QueuedJob, is_available, queue

_COLOURS: dict[State, str] = {
    "given up": "bold red", "failed": "bold red", "unknown": "yellow", "stopped": "yellow",
    "requeued": "cyan", "waiting": "cyan", "running": "green", "finished": "dim",
}  # fmt: skip
"""By state; the states that need a person come first."""

_STATES = list(_COLOURS)
_ALWAYS = ("run", "state", "step")  # columns that are printed although all their cells are empty
_LEFT_ALIGNED = ("run", "state", "where")
_NARROWEST = {"where": 10, "run": 12}  # characters left of a column in a narrow terminal; cut in this order

MAX_REASONS = 12  # lines below the table
_NAMED = 3  # runs that such a line names


@dataclass(frozen=True)
class Overview:
    """The status of several runs."""

    statuses: list[RunStatus]
    slurm_error: str | None


def collect_statuses(places: Sequence[Path]) -> Overview:
    """The status of all runs in these folders. Raises RunError for one that is missing or unreadable."""
    runs = find_runs(places)
    # SLURM is asked first: a job that ends in between has then written its result before it is read.
    queued, error = _ask_slurm({line["job"] for _, path in runs for line in read_job_lines(path)})
    now = time.time()
    return Overview([derive_status(name, RunHistory(path), queued, now) for name, path in runs], error)


def find_runs(places: Sequence[Path]) -> list[tuple[str, Path]]:
    """Each run directory in these folders once, with the name to print."""
    found: dict[Path, tuple[str, Path]] = {}
    for place in places:
        if not place.is_dir():
            raise RunError(f"{place}: there is no such folder; name a run directory, or one that holds some")
        for path in find_run_dirs(place):
            is_below = len(places) == 1 and path != place
            found.setdefault(path.resolve(), (str(path.relative_to(place) if is_below else path), path))
    return list(found.values())


def _ask_slurm(jobs: set[str]) -> tuple[Mapping[str, QueuedJob] | None, str | None]:
    """The queued jobs by number; None where SLURM was not asked or, with the reason, did not answer."""
    if not jobs or not is_available():
        return None, None
    try:
        return {job.id: job for job in queue(sorted(jobs))}, None
    except RunError as error:
        return None, str(error)


def format_json(overview: Overview) -> str:
    """A list with an object per run: the fields of `RunStatus`, `reason` under the name `words`."""
    rows = [asdict(row) for row in overview.statuses]
    rows = [{"words" if key == "reason" else key: value for key, value in row.items()} for row in rows]
    return json.dumps(rows, indent=2, ensure_ascii=False)


def print_overview(overview: Overview, console: Console) -> None:
    """Print the table, the reasons and a count. A terminal gets lines of its width, a file or pipe all."""
    rows = overview.statuses
    for line in _table(rows, console.width if console.is_terminal else None) if rows else ():
        console.print(line, soft_wrap=True, highlight=False)
    reasons = _reasons(rows)
    counts = Counter(row.state for row in rows)
    parts = ", ".join(f"{counts[state]} {state}" for state in reversed(_STATES) if counts[state])
    count = Text(f"{len(rows)} run{'s' * (len(rows) != 1)}{': ' if parts else ''}{parts}")
    lines = [*([Text(), *reasons] if reasons else []), Text(), count]
    if overview.slurm_error is not None:
        lines.append(Text(f"SLURM did not answer: {overview.slurm_error}", style="yellow"))
    for line in lines:
        console.print(line, highlight=False, soft_wrap=not console.is_terminal)


def _table(rows: Sequence[RunStatus], width: int | None) -> list[Text]:
    """A head and a line per run. In a terminal of `width` columns first nodes are cut, then names."""
    table = [_cells(row) for row in rows]
    heads = [head for head in table[0] if head in _ALWAYS or any(cells[head] for cells in table)]
    widths = {head: max(len(head), *(len(cells[head]) for cells in table)) for head in heads}
    surplus = 0 if width is None else sum(widths.values()) + 2 * len(widths) - 2 - width
    for head, least in _NARROWEST.items():
        cut = max(0, min(surplus, widths.get(head, 0) - least))
        if cut:
            widths[head], surplus = widths[head] - cut, surplus - cut
    lines = [Text(_line({head: head for head in heads}, widths), style="bold")]
    for row, cells in zip(rows, table, strict=True):
        if len(row.name) > widths["run"]:  # variants of a sweep differ at the end of their names
            cells["run"] = f"…{row.name[len(row.name) - widths['run'] + 1 :]}"
        line, start = Text(_line(cells, widths)), widths["run"] + 2
        line.stylize(_COLOURS[row.state], start, start + widths["state"])
        lines.append(line)
    return lines


def _line(cells: Mapping[str, str], widths: Mapping[str, int]) -> str:
    parts = (
        cells[head][:width].ljust(width) if head in _LEFT_ALIGNED else cells[head].rjust(width)
        for head, width in widths.items()
    )
    return "  ".join(parts).rstrip()


def _cells(row: RunStatus) -> dict[str, str]:
    """The cells of a run by the head of their column."""
    loss = "nan" if row.diverged else ""
    if row.loss is not None:
        loss = f"{row.loss:.3f}" if abs(row.loss) < 100 else f"{row.loss:.3g}"
    return {
        "run": row.name,
        "state": row.state,
        "step": "" if row.step is None else f"{row.step}/{row.total_steps or '?'}",
        "left": "" if row.seconds_left is None else format_age(row.seconds_left),
        "again": str(row.restarts) if row.restarts else "",
        "loss": loss,
        "top-1": "" if row.top1 is None else f"{100 * row.top1:.1f}%",
        "seen": "" if row.silent is None else format_age(row.silent),
        "where": " ".join(part for part in (row.job, row.nodes) if part),
    }  # fmt: skip


def _reasons(rows: Sequence[RunStatus]) -> list[Text]:
    """A line per state and reason with the runs that have it; those that need a person come first."""
    names: dict[tuple[State, str], list[str]] = {}
    for row in sorted(rows, key=lambda row: _STATES.index(row.state)):
        if row.reason:
            names.setdefault((row.state, row.reason), []).append(row.name)
    lines = []
    for (state, reason), runs in list(names.items())[:MAX_REASONS]:
        lines.append(Text.assemble((state, _COLOURS[state]), f"  {format_list(runs, _NAMED)}: {reason}"))
    if len(names) > MAX_REASONS:
        lines.append(Text(f"and {len(names) - MAX_REASONS} more reasons, see --json", style="dim"))
    return lines
