"""Runs the steps one after another, each in a process with a time limit, and writes their results."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from trainer.distributed.environment import describe_environment
from trainer.verification.report import StepResult, markdown_table, read_findings, write_json
from trainer.verification.steps import ROOT, VerificationStep

LEAST = 10.0
"""Seconds: no step starts with less than this left for all."""
MOST = 3
"""Times its budget that a step may take on a GPU, where earlier steps left enough."""
SHOWN = 2000
"""Characters of a failed step's output that are kept."""


def run_steps(
    steps: Sequence[VerificationStep],
    *,
    device: str,
    folder: Path,
    seconds: float,
    announce: Callable[[str], None],
) -> list[StepResult]:
    """Run each step; results are rewritten to `folder` after each, as results.json and results.md.

    A step has its own budget and what earlier steps left, on a GPU `MOST` times its budget at most. With
    fewer seconds than all budgets, the first steps, which are the most important, get theirs.

    Args:
        device: `cpu`, or `cuda:0` and so on.
        seconds: for all steps together.
        announce: called with one line before and after each step.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = [StepResult(step.name, "not run") for step in steps]
    # Replaces an earlier verification's results, should this one be interrupted.
    _write(folder, device, {}, results)
    about, deadline = describe_environment(), time.monotonic() + seconds
    for number, step in enumerate(steps):
        left = deadline - time.monotonic()
        if not runnable([step], device):
            results[number].status = "needs a GPU"
        elif left < LEAST:
            results[number].reason = f"the {seconds:.0f} s for all steps were over"
        else:
            announce(f"{step.name} ({number + 1} of {len(steps)}, {left:.0f} s left): {step.about}")
            try:
                spare = left - sum(later.seconds for later in runnable(steps[number + 1 :], device))
                most = MOST * step.seconds if device != "cpu" else left
                limit = min(max(step.seconds, spare), most, left)
                results[number] = run_step(step, device=device, folder=folder, limit=limit)
            except KeyboardInterrupt:
                found = read_findings(folder / step.name / "findings.json")
                results[number] = StepResult(step.name, "not run", findings=found, reason="interrupted")
                _write(folder, device, about, results)
                raise
        _write(folder, device, about, results)
        result = results[number]
        outcome = f"{step.name}: {result.status}, {result.seconds:.0f} s"
        line = ": ".join(part for part in (outcome, result.reason) if part)
        announce("\n".join(part for part in (line, result.output) if part))
    return results


def runnable(steps: Sequence[VerificationStep], device: str) -> list[VerificationStep]:
    """The steps that can run on this device."""
    return [step for step in steps if device != "cpu" or not step.needs_gpu]


def run_step(step: VerificationStep, *, device: str, folder: Path, limit: float) -> StepResult:
    """Run one step in a process; after `limit` seconds kill it and the processes that it started."""
    own = folder / step.name
    if own.exists():
        shutil.rmtree(own)  # of an earlier verification
    own.mkdir(parents=True)
    command = [sys.executable, "-m", f"{__package__}.one_step", step.name, device, str(folder)]
    begun = time.monotonic()
    with open(own / "output.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        reason = output = ""
        try:
            code = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code, reason = 1, f"ended after {limit:.0f} s"
        finally:
            _end(process)
    findings = read_findings(own / "findings.json")
    failed = [finding for finding in findings if finding.passed is False]
    if code != 0:
        output = (own / "output.log").read_text(encoding="utf-8", errors="replace")[-SHOWN:]
        reason = reason or f"exit code {code}"
    elif failed:
        reason = f"{len(failed)} of {len(findings)} checks and measurements failed"
    status = "failed" if code != 0 or failed else "passed"
    seconds = time.monotonic() - begun
    return StepResult(step.name, status, seconds, findings, reason, output)  # type: ignore[arg-type]


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the process group of a step, with processes that outlived it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _write(folder: Path, device: str, about: dict[str, object], results: list[StepResult]) -> None:
    content = {"device": device, "environment": about, "steps": [asdict(result) for result in results]}
    write_json(folder / "results.json", content)
    (folder / "results.md").write_text(markdown_table(results), encoding="utf-8")
