"""Progress of long work: a bar in a terminal, else a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.text import Text

# A log file of a ten-hour job gets about four thousand lines.
_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def show_progress(work: str, file: TextIO | None = None) -> Iterator[Callable[[int, int], None]]:
    """Yield a function of (done, total) that shows them with rate and remaining time.

    file: output; None is standard output.
    """
    file = file or sys.stdout
    if not file.isatty():
        yield ProgressLines(work, lambda text: print(text, file=file, flush=True))
        return
    columns = (
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )
    # Standard output is redirected, to print above the bar, only if the bar is there.
    with Progress(*columns, console=Console(file=file), redirect_stdout=file is sys.stdout) as progress:
        task = progress.add_task(work, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(format_rate(speed) if speed else "")


class ProgressLines:
    """A function of (done, total) that prints a line every ten seconds and at the end."""

    def __init__(self, work: str, print_line: Callable[[str], None]) -> None:
        self._work = work
        self._print = print_line
        self._begin = self._last = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - self._last < _SECONDS_BETWEEN_LINES:
            return
        self._last = now
        spent = max(now - self._begin, 1e-9)
        parts = [f"{self._work}: {done} of {total}"]
        if done == total == 1:
            parts.append(f"{spent:.3g} s")
        elif done:
            parts.append(format_rate(done / spent))
            parts += [f"{(total - done) * spent / done:.0f} s left"] * (done < total)
        self._print(", ".join(parts))


def format_rate(rate: float) -> str:
    """Items per second: `1,234/s`, `29.9/s`, and below one `33 s each`. rate: above 0."""
    if rate < 1:
        return f"{1 / rate:.3g} s each"
    return f"{rate:,.0f}/s" if rate >= 100 else f"{rate:.3g}/s"
