"""The project's own tests that run on a device, as findings."""

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from pipelines.parallel import usable_cores
from trainer.verification.steps import Task

ROOT = Path(__file__).parents[2]


def run_tests(task: Task) -> None:
    """Run pytest over the tests marked `on_device`; each failed test is a finding.

    Raises RuntimeError where pytest came to no result.
    """
    results = task.folder / "junit.xml"
    results.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "on_device and not soak",
        "-vv",  # each test by name, as soon as it is done: pytest's settings here have -q
        "--device",
        task.device.type,
        f"--junit-xml={results}",
    ]
    if (workers := min(8, usable_cores() // 2)) > 1:
        command += ["--numprocesses", str(workers), "--dist", "loadfile"]
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if not results.exists():
        raise RuntimeError(f"pytest ended with {code} and wrote no results")
    passed = 0
    for case in ElementTree.parse(results).iter("testcase"):
        name = f"{case.get('classname', '').removeprefix('tests.')}::{case.get('name')}"
        wrong = [*case.iter("failure"), *case.iter("error")]
        if wrong:
            task.report.check(name, False, str(wrong[0].get("message"))[:300], "passes")
        elif (skipped := case.find("skipped")) is not None:
            task.report.measure(name, f"skipped: {skipped.get('message')}"[:300])
        else:
            passed += 1
    task.report.check("tests marked on_device", passed > 0 and code == 0, f"{passed} passed", "all pass")
