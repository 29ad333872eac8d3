"""Runs the project's own tests that run on a device."""

import re
import subprocess
import sys

from pipelines.worker_pool import usable_cores
from trainer.verification.steps import ROOT, VerificationTask

REHEARSED = (
    "tests/gpu",
    "tests/models/test_drop.py",
    "tests/models/test_golden.py",
    "tests/pipelines/augment/test_augment.py",
    "tests/pipelines/test_batch_hash.py",
    "tests/trainer/engine/test_carried_losses.py",
)
"""What runs on a CPU, where `make test` runs all others."""
OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED"
OUTCOME = re.compile(rf"({OUTCOMES}) (tests/\S+)|(tests/\S+) ({OUTCOMES})\b")


def run_tests(task: VerificationTask) -> None:
    """Run the tests marked `on_device` with pytest, and report each failure at once.

    `tests.txt` lists the outcome of each test. A wheel has no tests; the step reports that.
    """
    if not (ROOT / "tests").is_dir():
        task.report.measure(
            "tests on the device", "not run: a wheel has no tests, a clone of the project has"
        )
        return
    command = [sys.executable, "-m", "pytest", "-m", "on_device and not soak", "--device", task.device.type]
    # Prints each test by name when it ends: the settings have -q.
    command += ["-vv", "--tb=short"]
    if not task.gpu:
        command += REHEARSED
    if (workers := min(8, usable_cores() // 2)) > 1:
        command += ["--numprocesses", str(workers), "--dist", "loadfile"]
    outcomes: dict[str, str] = {}
    with (
        open(task.folder / "tests.txt", "w", encoding="utf-8", buffering=1) as names,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            found = read_outcome(line)
            if found is None or found[0] in outcomes:
                continue
            test, outcome = found
            outcomes[test] = outcome
            names.write(f"{outcome} {test}\n")
            if outcome in ("FAILED", "ERROR"):
                task.report.check(test, False, outcome, "PASSED")
    passed = sum(outcome == "PASSED" for outcome in outcomes.values())
    task.report.check(
        "tests on the device",
        passed > 0 and process.returncode == 0,
        f"{passed} of {len(outcomes)} passed, exit code {process.returncode}",
        "all pass or are skipped",
    )


def read_outcome(line: str) -> tuple[str, str] | None:
    """The test and its outcome in a line of pytest's verbose output, with or without pytest-xdist."""
    found = OUTCOME.search(line)
    if found is None:
        return None
    return (found[2], found[1]) if found[2] else (found[3], found[4])
