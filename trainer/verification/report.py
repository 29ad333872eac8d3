"""The results of steps, checks and measurements, as JSON and as a table."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pipelines.formatting import format_markdown_row
from trainer.system.files import write_text

Status = Literal["passed", "failed", "needs a GPU", "not run"]


@dataclass(frozen=True)
class Measurement:
    """A check or a measurement."""

    name: str
    value: str
    """The measured value, with its unit."""
    mark: str = ""
    """The required value; empty for a measurement without a check."""
    passed: bool | None = None
    """None for a measurement without a check."""


@dataclass
class StepReport:
    """The results of one step. Each is written to `path` at once, so that a killed step keeps them."""

    path: Path
    findings: list[Measurement] = field(default_factory=list)

    def measure(self, name: str, value: str) -> None:
        """Add a measurement without a check."""
        self._add(Measurement(name, value))

    def check(self, name: str, passed: bool, value: str, mark: str) -> None:
        """Add a check."""
        self._add(Measurement(name, value, mark, bool(passed)))

    def _add(self, finding: Measurement) -> None:
        self.findings.append(finding)
        outcome = {None: "", True: " - passed", False: " - FAILED"}[finding.passed]
        required = "" if finding.passed is None else f" (required: {finding.mark})"
        print(f"{finding.name}: {finding.value}{outcome}{required}", flush=True)
        write_json(self.path, [asdict(each) for each in self.findings])


@dataclass
class StepResult:
    """The result of a step."""

    name: str
    status: Status
    seconds: float = 0.0
    findings: list[Measurement] = field(default_factory=list)
    reason: str = ""
    """Why it has not passed."""
    output: str = ""
    """The end of its output, where it ended early."""


def read_findings(path: Path) -> list[Measurement]:
    """The results that a step has written; empty where it has written none."""
    if not path.exists():
        return []
    return [Measurement(**each) for each in json.loads(path.read_text(encoding="utf-8"))]


def write_json(path: Path, content: object) -> None:
    """Write a JSON file atomically. Raises OSError."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def markdown_table(results: list[StepResult]) -> str:
    """A table with a row for each check and measurement, and one for each step that has not passed."""
    lines = ["| step | what | measured | required | |", "|---|---|---|---|---|"]
    for result in results:
        for finding in result.findings:
            outcome = {None: "", True: "passed", False: "**failed**"}[finding.passed]
            cells = (result.name, finding.name, finding.value, finding.mark, outcome)
            lines.append(format_markdown_row(cells))
        if result.status != "passed":
            last = " ".join(result.output.split())[-200:]
            why = ": ".join(part for part in (result.reason, last) if part).replace("|", "\\|")
            lines.append(f"| {result.name} | the step | {why} | | {result.status}, {result.seconds:.0f} s |")
    return "\n".join(lines) + "\n"
