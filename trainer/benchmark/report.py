"""The results of a job as tables in the terminal, JSON and Markdown."""

import json
import os
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.benchmark.report import INTERFERENCE_THRESHOLD, processor, versions
from pipelines.formatting import format_markdown_row

RIGHT_FROM = 2
"""Columns from this one on are numbers, flush right."""


@dataclass(frozen=True)
class ResultTable:
    """One table of a report."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    """Lines below the table."""


@dataclass
class BenchmarkReport:
    """What a job has measured so far. `tables` is empty until the job has something to show."""

    job: str
    measurements: list[dict[str, Any]] = field(default_factory=list)
    """Every measurement with its raw numbers, for results.json."""
    tables: list[ResultTable] = field(default_factory=list)

    def print(self, console: Console) -> None:
        for table in self.tables:
            shown = Table(title=table.title, title_justify="left")
            for number, name in enumerate(table.columns):
                shown.add_column(name, justify="right" if number >= RIGHT_FROM else "left", overflow="fold")
            for row in table.rows:
                shown.add_row(*row)
            console.print(shown)
            for note in table.notes:
                console.print(note, highlight=False, markup=False)

    def write(self, folder: Path) -> None:
        """Write `results.json` (everything) and `results.md` (the tables)."""
        folder.mkdir(parents=True, exist_ok=True)
        about = self.about()
        content = {
            **about,
            "measurements": self.measurements,
            "tables": [asdict(table) for table in self.tables],
        }
        (folder / "results.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        (folder / "results.md").write_text(self.markdown(about), encoding="utf-8")

    def about(self) -> dict[str, Any]:
        """The job, the machine and the versions."""
        try:
            deepspeed = version("deepspeed")
        except PackageNotFoundError:
            deepspeed = "not installed"
        return {
            "job": self.job,
            "cores": len(os.sched_getaffinity(0)),
            "processor": processor(),
            "versions": {**versions(), "deepspeed": deepspeed},
        }

    def markdown(self, about: dict[str, Any]) -> str:
        installed = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
        lines = [f"{about['cores']} cores of {about['processor']}; {installed}.", ""]
        for table in self.tables:
            lines += [f"## {table.title}", "", format_markdown_row(table.columns)]
            rules = ["---:" if number >= RIGHT_FROM else "---" for number in range(len(table.columns))]
            lines += ["|" + "|".join(rules) + "|", *map(format_markdown_row, table.rows), "", *table.notes]
            lines += [""] if table.notes else []
        return "\n".join(lines)


def written_at(folder: Path) -> int | None:
    """When the results in a folder were written, in nanoseconds; None where there are none."""
    results = folder / "results.json"
    return results.stat().st_mtime_ns if results.exists() else None


def interference(shares: list[float]) -> tuple[str, ...]:
    """A note where other programs used more than a twentieth of a core. shares: cores that they used."""
    if max(shares, default=0.0) < INTERFERENCE_THRESHOLD:
        return ()
    return (
        f"Other programs used {min(shares):.2f} to {max(shares):.2f} cores during the measurements: compare "
        "CPU seconds, and measure again on an idle machine for the rates per second.",
    )
