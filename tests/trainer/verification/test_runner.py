"""Steps of a verification: results of steps that are ended, skipped, or failed."""

import json
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from launch.verify_gpu import SECONDS
from trainer.verification import runner
from trainer.verification.device_tests import read_outcome
from trainer.verification.report import Measurement, StepReport, StepResult, markdown_table, read_findings
from trainer.verification.runner import ROOT, run_step, run_steps
from trainer.verification.steps import STEPS, VerificationStep, step_named


def step(name: str, seconds: int = 60, needs_gpu: bool = False) -> VerificationStep:
    return VerificationStep(name, "about", seconds, step_named("machine").function, needs_gpu)


def test_a_step_that_takes_too_long_is_ended_and_reported(tmp_path: Path) -> None:
    told: list[str] = []
    steps = [step("slow", seconds=0)]
    (result,) = run_steps(steps, device="cuda:0", folder=tmp_path, seconds=100, announce=told.append)
    assert (result.status, result.reason) == ("failed", "ended after 0 s")
    (written,) = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert written["status"] == "failed"
    assert "| slow | the step | ended after 0 s" in (tmp_path / "results.md").read_text()
    assert any("slow: failed" in line for line in told)


def test_a_step_for_a_gpu_is_left_out_on_a_cpu(tmp_path: Path) -> None:
    steps = [step("gpu", needs_gpu=True)]
    (result,) = run_steps(steps, device="cpu", folder=tmp_path, seconds=100, announce=print)
    assert result.status == "needs a GPU"
    (written,) = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert written["status"] == "needs a GPU"


def limits(steps: list[VerificationStep], seconds: float, folder: Path) -> list[float]:
    """The time limits that the steps get, if each ends at once."""
    found: list[float] = []

    def ended(step: VerificationStep, *, device: str, folder: Path, limit: float) -> StepResult:
        found.append(round(limit))
        return StepResult(step.name, "passed")

    with mock.patch.object(runner, "run_step", ended):
        run_steps(steps, device="cuda:0", folder=folder, seconds=seconds, announce=lambda _: None)
    return found


def test_a_step_may_use_what_earlier_ones_left_but_no_later_ones_budget(tmp_path: Path) -> None:
    steps = [step("a", 20), step("b", 30), step("c", 50)]
    assert limits(steps, 100, tmp_path) == [20, 50, 100]
    assert limits(steps, 60, tmp_path) == [20, 30, 60], "the first get theirs"
    assert limits(steps[:1], 100, tmp_path) == [60], "three times the budget at most"


def test_no_results_of_an_earlier_verification_remain(tmp_path: Path) -> None:
    (tmp_path / "results.md").write_text("of an earlier one")
    interrupted = mock.patch.object(runner, "describe_environment", side_effect=KeyboardInterrupt)
    with interrupted, pytest.raises(KeyboardInterrupt):
        run_steps([step("a")], device="cpu", folder=tmp_path, seconds=100, announce=print)
    assert "| a | the step |  | | not run, 0 s |" in (tmp_path / "results.md").read_text()


def test_the_budgets_of_all_steps_are_the_default_time() -> None:
    assert sum(each.seconds for each in STEPS) == SECONDS["cuda"] == 480


def test_a_step_without_time_left_is_not_run(tmp_path: Path) -> None:
    (result,) = run_steps([step("late")], device="cpu", folder=tmp_path, seconds=1, announce=print)
    assert result.status == "not run" and "the 1 s for all steps were over" in result.reason


def test_a_step_that_breaks_is_failed_with_the_end_of_its_output(tmp_path: Path) -> None:
    result = run_step(step("no such step"), device="cpu", folder=tmp_path, limit=60)
    assert result.status == "failed"
    assert result.reason == "exit code 1" and "KeyError: 'no such step'" in result.output


def test_each_result_is_written_at_once(tmp_path: Path) -> None:
    report = StepReport(tmp_path / "findings.json")
    report.measure("rate", "7 clips/s")
    assert read_findings(tmp_path / "findings.json") == [Measurement("rate", "7 clips/s")]
    report.check("frames", False, "[0, 2]", "[0, 1]")
    assert read_findings(tmp_path / "findings.json")[1] == Measurement("frames", "[0, 2]", "[0, 1]", False)


def test_the_table_has_a_row_for_each_finding_and_each_step_without() -> None:
    findings = [Measurement("a|b", "1", "2", False), Measurement("c", "3")]
    table = markdown_table(
        [
            StepResult("one", "failed", 3, findings, "why", "long " * 1000 + "end"),
            StepResult("two", "needs a GPU"),
        ]
    )
    assert table.splitlines()[2:] == [
        "| one | a\\|b | 1 | 2 | **failed** |",
        "| one | c | 3 |  |  |",
        f"| one | the step | why: {('long ' * 40 + 'end')[-200:].strip()} | | failed, 3 s |",
        "| two | the step |  | | needs a GPU, 0 s |",
    ]


@pytest.mark.parametrize(
    ("line", "outcome"),
    [
        (
            "[gw3] [ 12%] PASSED tests/gpu/test_run.py::test_a[x-1] ",
            ("tests/gpu/test_run.py::test_a[x-1]", "PASSED"),
        ),
        (
            "tests/models/test_drop.py::test_b FAILED    [ 3%]",
            ("tests/models/test_drop.py::test_b", "FAILED"),
        ),
        ("tests/models/test_drop.py::test_b ", None),
        ("E   assert 1 == 2", None),
    ],
)
def test_outcomes_are_read_from_lines_of_pytest(line: str, outcome: tuple[str, str] | None) -> None:
    assert read_outcome(line) == outcome


def test_each_step_has_a_function_and_a_name_of_its_own() -> None:
    assert len({each.name for each in STEPS}) == len(STEPS)
    for each in STEPS:
        module, _, function = each.function.partition(":")
        source = (ROOT / f"trainer/verification/{module}.py").read_text()
        assert f"def {function}(task: VerificationTask) -> None:" in source


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "nothing"], "there is no step 'nothing'; there are: machine, decoder"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--device", "cpu", "--seconds", "0"], "--seconds must be above 0"),
    ],
    ids=["step", "device", "seconds"],
)
def test_a_mistake_in_the_command_has_a_message(arguments: list[str], words: str) -> None:
    command = [sys.executable, "launch/verify_gpu.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert words in done.stderr and "Traceback" not in done.stderr


def test_an_interrupted_run_keeps_what_the_step_found(tmp_path: Path) -> None:
    def interrupted(step: VerificationStep, *, device: str, folder: Path, limit: float) -> StepResult:
        (folder / step.name).mkdir()
        StepReport(folder / step.name / "findings.json").measure("rate", "7 clips/s")
        raise KeyboardInterrupt

    steps = [step("first"), step("second")]
    with mock.patch.object(runner, "run_step", interrupted), pytest.raises(KeyboardInterrupt):
        run_steps(steps, device="cpu", folder=tmp_path, seconds=100, announce=print)
    first, second = json.loads((tmp_path / "results.json").read_text())["steps"]
    assert (first["status"], first["reason"]) == ("not run", "interrupted")
    assert first["findings"][0]["value"] == "7 clips/s"
    assert second["status"] == "not run"
    assert "| first | rate | 7 clips/s |" in (tmp_path / "results.md").read_text()
