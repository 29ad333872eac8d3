"""Of many ranks that failed, the one that failed first: the others mostly follow from it."""

import json
import re
from pathlib import Path
from typing import Any

_TAIL = 4096  # bytes at the end of a rank's log that are shown of
_SHOWN = 6  # lines of it

# srun: error: n2: task 1: Killed      srun: error: n[1-2]: tasks 0-1: Exited with exit code 1
_SRUN = re.compile(r"srun: error: (?P<node>\S+): tasks? (?P<ranks>[\d,-]+): (?P<what>.*)")


def first_failure(run_dir: Path, logs: Path, since: float) -> str:
    """What failed first in a turn, in words, with the end of that rank's log.

    run_dir: the run's folder, where a rank that fails leaves a note. logs: of the turn's ranks, with
    srun's own words in `srun.log`. since: the turn's beginning, seconds since 1970.
    """
    said = _srun_said(logs)
    if (
        said is not None and said[1]
    ):  # a rank that is killed leaves no note; what others note is that it is gone
        return said[0]
    noted = first_crash_report(run_dir, since) or (said[0] if said is not None else None)
    return noted or _rank_said(logs, 0) or f"no rank left a word; see {logs}"


def first_crash_report(run_dir: Path, since: float) -> str | None:
    """The earliest note that a rank left since then, in words with its traceback; None without."""
    notes = [note for note in _notes(run_dir) if note["time"] >= since]
    if not notes:
        return None
    first = min(notes, key=lambda note: note["time"])
    others = f" ({len(notes) - 1} more failed after it)" if len(notes) > 1 else ""
    place = f"rank {first['rank']} on {first['node']}"
    return f"{place} failed first{others}: {first['words']}\n{first['traceback'].rstrip()}"


def _notes(run_dir: Path) -> list[dict[str, Any]]:
    found = []
    for path in (run_dir / "failures").glob("rank-*.json"):
        try:
            note = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue  # cut off by the end of its rank
        if isinstance(note, dict) and note.keys() >= {"time", "rank", "node", "words", "traceback"}:
            found.append(note)
    return found


def _srun_said(logs: Path) -> tuple[str, bool] | None:
    """The first rank that srun reports, in words, and whether a signal ended it."""
    path = logs / "srun.log"
    if not path.exists():
        return None
    match = _SRUN.search(path.read_text(encoding="utf-8", errors="replace"))
    if match is None:
        return None
    rank = int(re.split("[,-]", match["ranks"])[0])
    said = _rank_said(logs, rank)
    several = "s" if re.search("[,-]", match["ranks"]) else ""
    words = f"rank{several} {match['ranks']} on {match['node']} ended first: {match['what']}"
    return (f"{words}\n{said}" if said else words), not match["what"].startswith("Exited")


def last_message(logs: Path, rank: int, mark: str) -> str | None:
    """The last line of a rank's log that begins with a mark, and what follows it; without the mark itself."""
    lines = _tail(logs / f"rank-{rank}.log")
    begins = [number for number, line in enumerate(lines) if line.startswith(mark)]
    return "\n".join(lines[begins[-1] :]).removeprefix(mark).strip() if begins else None


def _rank_said(logs: Path, rank: int) -> str | None:
    path = logs / f"rank-{rank}.log"
    shown = [line for line in _tail(path) if line.strip()][-_SHOWN:]
    return f"the end of {path}:\n" + "\n".join(f"  {line}" for line in shown) if shown else None


def _tail(path: Path) -> list[str]:
    """The last lines of a log; none where there is no log."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - _TAIL))
        return file.read().decode(errors="replace").splitlines()
