"""The console of a run: a live bar in a terminal, plain lines in a file, nothing on ranks other than 0."""

import logging
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Self, TextIO

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from trainer.monitoring.progress import ProgressLines
from trainer.monitoring.throughput import Rates
from trainer.system.formatting import format_duration, format_gmacs, format_percent

_LOGGERS = ("trainer", "pipelines", "models")
"""Loggers whose warnings the display prints."""


class Display:
    """Prints nothing, for all ranks but the first; base class of the other displays."""

    def __enter__(self) -> Self:
        self._handler = _ToDisplay(self)
        for name in _LOGGERS:
            logging.getLogger(name).addHandler(self._handler)
            logging.getLogger(name).propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        for name in _LOGGERS:
            logging.getLogger(name).removeHandler(self._handler)
            logging.getLogger(name).propagate = True

    def step(
        self, step: int, *, epoch: float, loss: float, learning_rate: float, rates: Rates, seconds_left: float
    ) -> None:
        """Show the progress of training.

        Args:
            step: optimiser steps done.
            epoch: passes over the data done.
            loss: of this step.
            learning_rate: of this step.
            rates: see `ThroughputMeter.rates`.
            seconds_left: until the last step.
        """
        figures = [
            f"epoch {epoch:.2f}",
            f"loss {loss:.4f}",
            f"lr {learning_rate:.2e}",
            f"{rates.clips_per_second:.1f} clips/s",
            f"wait {format_percent(rates.data_wait_share, 0)}",
            f"{rates.memory_peak / 2**30:.1f} GiB",
        ]
        if rates.mfu is not None:
            figures.append(f"MFU {format_percent(rates.mfu, 0)}")
        self._show_step(step, figures, f"{format_duration(seconds_left)} left")

    def _show_step(self, step: int, figures: Sequence[str], left: str) -> None:
        """Show a step's figures and the remaining time."""

    def evaluating(self, done: int, total: int) -> None:
        """Show the progress of an evaluation, in batches of this rank."""

    def note(self, text: str) -> None:
        """Print a line, such as an evaluation's result."""

    def warn(self, text: str) -> None:
        """Print a warning."""

    def summary(self, summary: Mapping[str, Any], run_dir: Path, mlflow_command: str | None) -> None:
        """Print the table at the end of a run."""


class PlainDisplay(Display):
    """Prints a line every `every` steps, for log files."""

    def __init__(self, total_steps: int, every: int, file: TextIO) -> None:
        self._total = total_steps
        self._every = every
        self._file = file
        self._evaluation = ProgressLines("evaluating: batches", self.note)

    def _show_step(self, step: int, figures: Sequence[str], left: str) -> None:
        if step % self._every == 0 or step in (1, self._total):
            self.note("  ".join([f"step {step}/{self._total}", *figures, left]))

    def evaluating(self, done: int, total: int) -> None:
        if done == 1:
            self._evaluation = ProgressLines("evaluating: batches", self.note)
        if done < total:  # the result is printed at the end
            self._evaluation(done, total)

    def note(self, text: str) -> None:
        with suppress(OSError):  # a log file on a full disk
            print(text, file=self._file, flush=True)

    def warn(self, text: str) -> None:
        self.note(f"warning: {text}")

    def summary(self, summary: Mapping[str, Any], run_dir: Path, mlflow_command: str | None) -> None:
        with suppress(OSError):
            print_unwrapped(Console(file=self._file), summary_table(summary, run_dir, mlflow_command))


class _BarWithFigures(Progress):
    """A bar with the figures on a second line: together they do not fit into 80 columns."""

    figures = "starting"

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        yield Text(self.figures, no_wrap=True, overflow="ellipsis")


class LiveDisplay(Display):
    """A bar over all steps with the latest figures; printed lines scroll above it."""

    def __init__(self, total_steps: int, first_step: int, console: Console) -> None:
        self._console = console
        self._progress = _BarWithFigures(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[left]}"),
            console=console,
            expand=True,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=first_step, left="")

    def __enter__(self) -> Self:
        self._progress.start()
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._progress.stop()

    def _show_step(self, step: int, figures: Sequence[str], left: str) -> None:
        self._progress.figures = " · ".join(figures)
        self._progress.update(self._task, completed=step, left=left)

    def evaluating(self, done: int, total: int) -> None:
        self._progress.figures = f"evaluating: batch {done}/{total}"

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def warn(self, text: str) -> None:
        self._console.print(text, style="yellow", markup=False, highlight=False)

    def summary(self, summary: Mapping[str, Any], run_dir: Path, mlflow_command: str | None) -> None:
        self._progress.stop()
        print_unwrapped(self._console, summary_table(summary, run_dir, mlflow_command))


def open_display(
    *, is_main: bool, total_steps: int, first_step: int, every: int, file: TextIO | None = None
) -> Display:
    """Choose the display for this rank and output.

    Args:
        is_main: whether this is rank 0; other ranks print nothing.
        total_steps: optimiser steps of the whole training.
        first_step: steps done by earlier starts.
        every: steps between two lines if the output is no terminal.
        file: output; None is standard output.
    """
    if not is_main:
        return Display()
    file = file or sys.stdout
    if isinstance(file, TextIOWrapper):
        file.reconfigure(errors="backslashreplace")  # for characters that the terminal lacks
    console = Console(file=file)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(total_steps, first_step, console)
    return PlainDisplay(total_steps, every, file)


def summary_table(summary: Mapping[str, Any], run_dir: Path, mlflow_command: str | None) -> Table:
    """The results of a run as a table; values that are missing or None are left out.

    Args:
        summary: `top1`, `top5` and `data_wait_share` as shares (0..1), `clips_per_second`, `spent` (text),
            `steps`, `parameters`, `gmacs`, and of the best evaluation `best_top1`, `best_step` and
            `best_weights` (a file name).
        run_dir: the run's directory.
        mlflow_command: the command that opens MLflow; None without tracking.
    """
    shown: dict[str, tuple[str, Callable[[Any], str]]] = {
        "top-1": ("top1", format_percent),
        "top-5": ("top5", format_percent),
        "clips/s": ("clips_per_second", lambda value: f"{value:.1f}"),
        "data wait": ("data_wait_share", lambda value: format_percent(value, 1)),
        "time": ("spent", str),
        "steps": ("steps", lambda value: f"{value:,}"),
        "parameters": ("parameters", lambda value: f"{value:,}"),
        "cost of a view": ("gmacs", format_gmacs),
    }
    table = facts_table()
    for label, (name, text) in shown.items():
        if summary.get(name) is not None:
            table.add_row(label, text(summary[name]))
            if name == "top5" and summary.get("best_top1") is not None:
                table.add_row("best top-1", _best(summary))
    table.add_row("run", str(run_dir))
    if mlflow_command is not None:
        table.add_row("MLflow", mlflow_command)
    return table


def facts_table(rows: Iterable[tuple[str, str]] = (), *, wraps: bool = False) -> Table:
    """A table of names, in bold, and values. wraps: whether a value may take several lines."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(no_wrap=not wraps)
    for row in rows:
        table.add_row(*row)
    return table


def _best(summary: Mapping[str, Any]) -> str:
    """The best evaluation and the file of its weights."""
    file = summary.get("best_weights")
    kept = f"in {file}" if file is not None else "whose weights were not kept"
    return f"{format_percent(summary['best_top1'])} after step {summary['best_step']}, {kept}"


def print_unwrapped(console: Console, table: Table) -> None:
    """Print a table without breaking lines, so that paths and commands can be copied, and without markup: a
    path may contain `[/b]`.
    """
    plain = partial(Console, markup=False, emoji=False, highlight=False)
    unbound = plain(width=10_000).measure(table).maximum
    wide = plain(file=console.file, width=max(console.width, unbound), force_terminal=console.is_terminal)
    with wide.capture() as capture:
        wide.print(table)
    console.file.writelines(f"{line.rstrip()}\n" for line in capture.get().splitlines())
    console.file.flush()


class _ToDisplay(logging.Handler):
    """Prints warnings of our packages with the display, above its bar."""

    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.warn(record.getMessage())
