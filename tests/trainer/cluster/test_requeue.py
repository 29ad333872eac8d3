"""The result of each attempt of a job, whether the job is requeued, and the first failure."""

import json
import time
from pathlib import Path

import pytest

from trainer.cluster.requeue import MAX_FRUITLESS, PREFLIGHT_FAILED, Attempt, Attempts, first_failure
from trainer.errors import RunError
from trainer.monitoring.run_dir import RunDir
from trainer.resilience.signals import INTERRUPTED, REQUEUE


def job(restart: int = 0, number: str = "12", *, chained: bool = False, submitted: float = 0.0) -> Attempt:
    return Attempt(number, restart, "n[1-2]", chained, submitted)


def saved(run_dir: Path, step: int) -> None:
    """A checkpoint, as far as attempts inspect one."""
    (run_dir / "checkpoints" / f"step-{step:07d}").mkdir(parents=True)


def lines(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "slurm" / "turns.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("code", "state", "chained", "outcome", "leaves_with"),
    [
        (0, "RUNNING", False, "done", 0),
        (REQUEUE, "RUNNING", False, "requeued", REQUEUE),
        (REQUEUE, "RUNNING", True, "left to the next job", 0),
        (REQUEUE, "COMPLETING", False, "stopped", 1),
        (REQUEUE, "CANCELLED", False, "stopped", 1),
        (INTERRUPTED, "RUNNING", False, "stopped", INTERRUPTED),
        (2, "RUNNING", False, "given up", 2),
        (1, "RUNNING", False, "requeued", REQUEUE),
        (137, "RUNNING", False, "requeued", REQUEUE),
        (137, "RUNNING", True, "left to the next job", 137),
        (REQUEUE, "UNKNOWN", False, "requeued", REQUEUE),
    ],
)
def test_the_outcome_of_an_attempt(
    tmp_path: Path, code: int, state: str, chained: bool, outcome: str, leaves_with: int
) -> None:
    attempts = Attempts(tmp_path)
    attempts.begin(job())
    saved(tmp_path, 5)
    end = attempts.end(job(chained=chained), code=code, state=state)
    assert (end.outcome, end.code) == (outcome, leaves_with)
    begun, ended = lines(tmp_path)
    assert (begun["turn"], begun["step"], begun["nodes"]) == ("begun", -1, "n[1-2]")
    assert (ended["turn"], ended["step"], ended["verdict"], ended["code"]) == ("ended", 5, outcome, code)
    if code not in (0, 2):
        assert "step 5 is saved" in end.reason


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (
            {"failed": {"n2": ["disk: full", "memory: low"]}, "everywhere": []},
            "n2: disk: full, memory: low. To exclude",
        ),
        ({"failed": {"n2": ["disk: full"]}, "everywhere": []}, "submit again with --sbatch=--exclude=n2"),
        (
            {"failed": {}, "everywhere": ["manifests: gone"]},
            "on all nodes, nothing is saved yet: manifests",
        ),
        (None, "wrote no result"),
    ],
)
def test_a_job_is_requeued_for_other_nodes_unless_the_preflight_failed_on_all(
    tmp_path: Path, written: dict[str, object] | None, words: str
) -> None:
    attempts = Attempts(tmp_path)
    attempts.begin(job())
    if written is not None:
        (tmp_path / "slurm" / "preflight.json").write_text(json.dumps(written))
    end = attempts.end(job(), code=PREFLIGHT_FAILED, state="RUNNING")
    hopeless = written is not None and not written["failed"]
    expected = ("given up", PREFLIGHT_FAILED) if hopeless else ("requeued", REQUEUE)
    assert (end.outcome, end.code) == expected
    assert words in end.reason and "nothing is saved yet" in end.reason


@pytest.mark.parametrize("code", [REQUEUE, 1])
def test_three_attempts_without_progress_are_the_last(tmp_path: Path, code: int) -> None:
    attempts = Attempts(tmp_path)
    saved(tmp_path, 4)
    logs = []
    for restart in range(MAX_FRUITLESS):
        logs.append(attempts.begin(job(restart)))
        end = attempts.end(job(restart), code=code, state="RUNNING")
        assert end.outcome == ("requeued" if restart < MAX_FRUITLESS - 1 else "given up")
    assert end.code != REQUEUE
    assert "no progress in 3 attempts in a row (the newest checkpoint is still step 4)" in end.reason
    assert all(str(path) in end.reason for path in logs)


def test_a_newer_checkpoint_begins_the_count_anew(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    for restart in range(4 * MAX_FRUITLESS):
        attempts.begin(job(restart))
        if restart % 2:
            saved(tmp_path, restart)
        assert attempts.end(job(restart), code=1, state="RUNNING").outcome == "requeued"


def test_attempts_that_lost_their_node_count_too(tmp_path: Path) -> None:
    """SLURM requeues such a job by itself, and no script records the end of the attempt."""
    attempts = Attempts(tmp_path)
    for restart in range(MAX_FRUITLESS):
        attempts.begin(job(restart))
    with pytest.raises(RunError, match="no checkpoint was saved"):
        attempts.begin(job(MAX_FRUITLESS))
    assert lines(tmp_path)[-1]["verdict"] == "given up"
    attempts.begin(job(0, "13"))  # a new submission may begin


def test_attempts_that_slurm_ended_do_not_count(tmp_path: Path) -> None:
    """A job may be preempted many times."""
    attempts = Attempts(tmp_path)
    for restart in range(3 * MAX_FRUITLESS):
        assert attempts.begin(job(restart)) is not None
        attempts.end(job(restart), code=143, state="PREEMPTED")


def test_the_jobs_of_a_chain_count_together(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    for number in range(MAX_FRUITLESS):
        attempts.begin(job(number=str(number), chained=True))
        end = attempts.end(job(number=str(number), chained=True), code=1, state="RUNNING")
    assert end.outcome == "given up"
    assert attempts.begin(job(number="9", chained=True)) is None, (
        "the next job does not begin what was given up"
    )


@pytest.mark.parametrize(("code", "goes_on"), [(INTERRUPTED, False), (2, False), (REQUEUE, True), (1, True)])
def test_a_chain_ends_where_a_person_stopped_it_or_must_correct_something(
    tmp_path: Path, code: int, goes_on: bool
) -> None:
    attempts = Attempts(tmp_path)
    attempts.begin(job(number="1", chained=True))
    attempts.end(job(number="1", chained=True), code=code, state="RUNNING")
    assert (attempts.begin(job(number="2", chained=True)) is not None) == goes_on
    later = job(number="3", chained=True, submitted=time.time() + 1)
    assert attempts.begin(later) is not None, "another chain may begin"


def test_a_chain_begins_nothing_after_the_run_is_done(tmp_path: Path) -> None:
    RunDir(tmp_path).append_event("end")
    assert Attempts(tmp_path).begin(job(chained=True)) is None
    assert Attempts(tmp_path).begin(job()) is not None


def test_the_message_of_a_user_error_is_that_of_rank_0(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    logs = attempts.begin(job())
    assert logs is not None
    (logs / "srun.log").write_text("srun: error: n2: task 1: Exited with exit code 2\n")
    (logs / "rank-0.log").write_text("starting\nerror: data/train.arrow is missing;\nmake it\n")
    end = attempts.end(job(), code=2, state="RUNNING")
    assert end.reason == "correct this first: data/train.arrow is missing;\nmake it"


def test_a_line_that_a_lost_node_cut_off_is_passed_over(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    attempts.begin(job())
    with open(tmp_path / "slurm" / "turns.jsonl", "a") as file:
        file.write('{"turn": "begun", "jo')
    attempts.begin(job(1))
    assert attempts.end(job(1), code=1, state="RUNNING").outcome == "requeued"


def test_only_a_run_whose_last_event_is_its_end_is_finished(tmp_path: Path) -> None:
    attempts, folder = Attempts(tmp_path), RunDir(tmp_path)
    assert not attempts.is_finished()
    for event, finished in (("start", False), ("step", False), ("end", True), ("start", False)):
        folder.append_event(event)
        assert attempts.is_finished() == finished


def note(run_dir: Path, rank: int, time: float, words: str) -> None:
    folder = run_dir / "failures"
    folder.mkdir(exist_ok=True)
    record = {"time": time, "rank": rank, "node": f"n{rank}", "words": words, "traceback": f"at line {rank}"}
    (folder / f"rank-{rank:05d}.json").write_text(json.dumps(record))


def test_the_earliest_crash_report_of_this_attempt_is_the_first_failure(tmp_path: Path) -> None:
    note(tmp_path, 1, 50.0, "of an earlier attempt")
    note(tmp_path, 2, 103.0, "a follower")
    note(tmp_path, 3, 101.5, "the cause")
    (tmp_path / "failures" / "rank-00004.json").write_text('{"time": 1')
    assert first_failure(tmp_path, tmp_path, since=100.0) == (
        "rank 3 on n3 failed first (1 more failed after it): the cause\nat line 3"
    )


def test_a_rank_that_was_killed_is_known_from_srun(tmp_path: Path) -> None:
    (tmp_path / "srun.log").write_text(
        "srun: created\nsrun: error: gpu[03-04]: tasks 5-6: Killed\nsrun: error: gpu01: task 0: Exited"
    )
    (tmp_path / "rank-5.log").write_text("step 1\n\nstep 2\n")
    assert first_failure(tmp_path, tmp_path, since=0.0) == (
        f"ranks 5-6 on gpu[03-04] ended first: Killed\nthe end of {tmp_path}/rank-5.log:\n  step 1\n  step 2"
    )


def test_crash_reports_of_other_ranks_are_not_the_cause_where_one_was_killed(tmp_path: Path) -> None:
    note(tmp_path, 0, 101.0, "the other end is gone")
    (tmp_path / "srun.log").write_text(
        "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Exited with 1\n"
    )
    assert first_failure(tmp_path, tmp_path, since=100.0) == "rank 1 on n2 ended first: Killed"
    (tmp_path / "srun.log").write_text("srun: error: n1: task 0: Exited with exit code 1\n")
    assert first_failure(tmp_path, tmp_path, since=100.0).startswith("rank 0 on n0 failed first")


def test_without_any_output_the_logs_are_named(tmp_path: Path) -> None:
    assert first_failure(tmp_path, tmp_path, since=0.0) == f"no rank wrote anything; see {tmp_path}"
