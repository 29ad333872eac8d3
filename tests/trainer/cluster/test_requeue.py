"""What becomes of a job after each of its turns, and which failure is told first."""

import json
import time
from pathlib import Path

import pytest

from trainer.cluster.first_failure import first_failure
from trainer.cluster.requeue import MAX_FRUITLESS, PREFLIGHT_FAILED, Attempt, Attempts
from trainer.errors import RunError
from trainer.monitoring.run_dir import RunDir
from trainer.resilience.signals import INTERRUPTED, REQUEUE


def job(restart: int = 0, number: str = "12", *, chained: bool = False, submitted: float = 0.0) -> Attempt:
    return Attempt(number, restart, "n[1-2]", chained, submitted)


def saved(run_dir: Path, step: int) -> None:
    """A checkpoint, as far as turns look at one."""
    (run_dir / "checkpoints" / f"step-{step:07d}").mkdir(parents=True)


def lines(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "slurm" / "turns.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("code", "state", "chained", "verdict", "leaves_with"),
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
def test_what_becomes_of_a_job(
    tmp_path: Path, code: int, state: str, chained: bool, verdict: str, leaves_with: int
) -> None:
    turns = Attempts(tmp_path)
    turns.begin(job())
    saved(tmp_path, 5)
    end = turns.end(job(chained=chained), code=code, state=state)
    assert (end.verdict, end.code) == (verdict, leaves_with)
    begun, ended = lines(tmp_path)
    assert (begun["turn"], begun["step"], begun["nodes"]) == ("begun", -1, "n[1-2]")
    assert (ended["turn"], ended["step"], ended["verdict"], ended["code"]) == ("ended", 5, verdict, code)
    if code not in (0, 2):
        assert "step 5 is saved" in end.words


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (
            {"failed": {"n2": ["disk: full", "clock: off"]}, "everywhere": []},
            "n2: disk: full, clock: off. To do",
        ),
        ({"failed": {"n2": ["disk: full"]}, "everywhere": []}, "submit again with --sbatch=--exclude=n2"),
        (
            {"failed": {}, "everywhere": ["manifests: gone"]},
            "no node is fit, nothing is saved yet: manifests",
        ),
        (None, "the preflight did not come to its end"),
    ],
)
def test_unfit_nodes_are_named_and_others_hoped_for_unless_all_are_unfit(
    tmp_path: Path, written: dict[str, object] | None, words: str
) -> None:
    turns = Attempts(tmp_path)
    turns.begin(job())
    if written is not None:
        (tmp_path / "slurm" / "preflight.json").write_text(json.dumps(written))
    end = turns.end(job(), code=PREFLIGHT_FAILED, state="RUNNING")
    hopeless = written is not None and not written["failed"]
    expected = ("given up", PREFLIGHT_FAILED) if hopeless else ("requeued", REQUEUE)
    assert (end.verdict, end.code) == expected
    assert words in end.words and "nothing is saved yet" in end.words


@pytest.mark.parametrize("code", [REQUEUE, 1])
def test_three_turns_without_a_step_are_the_last(tmp_path: Path, code: int) -> None:
    turns = Attempts(tmp_path)
    saved(tmp_path, 4)
    logs = []
    for restart in range(MAX_FRUITLESS):
        logs.append(turns.begin(job(restart)))
        end = turns.end(job(restart), code=code, state="RUNNING")
        assert end.verdict == ("requeued" if restart < MAX_FRUITLESS - 1 else "given up")
    assert end.code != REQUEUE
    assert "3 turns in a row without a step of progress (step 4 stayed the last one saved)" in end.words
    assert all(str(path) in end.words for path in logs)


def test_a_step_of_progress_begins_the_count_anew(tmp_path: Path) -> None:
    turns = Attempts(tmp_path)
    for restart in range(4 * MAX_FRUITLESS):
        turns.begin(job(restart))
        if restart % 2:
            saved(tmp_path, restart)
        assert turns.end(job(restart), code=1, state="RUNNING").verdict == "requeued"


def test_turns_that_lost_their_node_count_too(tmp_path: Path) -> None:
    """SLURM queues such a job again without asking, and nobody is left to say how the turn ended."""
    turns = Attempts(tmp_path)
    for restart in range(MAX_FRUITLESS):
        turns.begin(job(restart))
    with pytest.raises(RunError, match="no step was saved"):
        turns.begin(job(MAX_FRUITLESS))
    assert lines(tmp_path)[-1]["verdict"] == "given up"
    turns.begin(job(0, "13"))  # who submits it again has mended something


def test_turns_that_slurm_ended_did_not_fail(tmp_path: Path) -> None:
    """Preempted again and again, a job is not to blame."""
    turns = Attempts(tmp_path)
    for restart in range(3 * MAX_FRUITLESS):
        assert turns.begin(job(restart)) is not None
        turns.end(job(restart), code=143, state="PREEMPTED")


def test_the_jobs_of_a_chain_count_together(tmp_path: Path) -> None:
    turns = Attempts(tmp_path)
    for number in range(MAX_FRUITLESS):
        turns.begin(job(number=str(number), chained=True))
        end = turns.end(job(number=str(number), chained=True), code=1, state="RUNNING")
    assert end.verdict == "given up"
    assert turns.begin(job(number="9", chained=True)) is None, "what was given up is not begun by the next"


@pytest.mark.parametrize(("code", "goes_on"), [(INTERRUPTED, False), (2, False), (REQUEUE, True), (1, True)])
def test_a_chain_ends_where_someone_stopped_it_or_must_mend_something(
    tmp_path: Path, code: int, goes_on: bool
) -> None:
    turns = Attempts(tmp_path)
    turns.begin(job(number="1", chained=True))
    turns.end(job(number="1", chained=True), code=code, state="RUNNING")
    assert (turns.begin(job(number="2", chained=True)) is not None) == goes_on
    later = job(number="3", chained=True, submitted=time.time() + 1)
    assert turns.begin(later) is not None, "another chain is a new word"


def test_a_chain_that_has_done_its_work_begins_nothing(tmp_path: Path) -> None:
    RunDir(tmp_path).append_event("end")
    assert Attempts(tmp_path).begin(job(chained=True)) is None
    assert Attempts(tmp_path).begin(job()) is not None


def test_a_mistake_is_told_in_rank_0s_words(tmp_path: Path) -> None:
    turns = Attempts(tmp_path)
    logs = turns.begin(job())
    assert logs is not None
    (logs / "srun.log").write_text("srun: error: n2: task 1: Exited with exit code 2\n")
    (logs / "rank-0.log").write_text("starting\nerror: data/train.arrow is missing;\nmake it\n")
    end = turns.end(job(), code=2, state="RUNNING")
    assert end.words == "something must be mended first: data/train.arrow is missing;\nmake it"


def test_a_line_that_a_lost_node_cut_off_is_passed_over(tmp_path: Path) -> None:
    turns = Attempts(tmp_path)
    turns.begin(job())
    with open(tmp_path / "slurm" / "turns.jsonl", "a") as file:
        file.write('{"turn": "begun", "jo')
    turns.begin(job(1))
    assert turns.end(job(1), code=1, state="RUNNING").verdict == "requeued"


def test_only_a_run_whose_last_word_is_its_end_is_finished(tmp_path: Path) -> None:
    turns, folder = Attempts(tmp_path), RunDir(tmp_path)
    assert not turns.is_finished()
    for event, finished in (("start", False), ("step", False), ("end", True), ("start", False)):
        folder.append_event(event)
        assert turns.is_finished() == finished


def note(run_dir: Path, rank: int, time: float, words: str) -> None:
    folder = run_dir / "failures"
    folder.mkdir(exist_ok=True)
    record = {"time": time, "rank": rank, "node": f"n{rank}", "words": words, "traceback": f"at line {rank}"}
    (folder / f"rank-{rank:05d}.json").write_text(json.dumps(record))


def test_the_earliest_note_of_this_turn_is_the_first_failure(tmp_path: Path) -> None:
    note(tmp_path, 1, 50.0, "of an earlier turn")
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


def test_what_others_note_of_a_rank_that_was_killed_is_not_the_cause(tmp_path: Path) -> None:
    note(tmp_path, 0, 101.0, "the other end is gone")
    (tmp_path / "srun.log").write_text(
        "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Exited with 1\n"
    )
    assert first_failure(tmp_path, tmp_path, since=100.0) == "rank 1 on n2 ended first: Killed"
    (tmp_path / "srun.log").write_text("srun: error: n1: task 0: Exited with exit code 1\n")
    assert first_failure(tmp_path, tmp_path, since=100.0).startswith("rank 0 on n0 failed first")


def test_without_a_word_from_anyone_the_logs_are_named(tmp_path: Path) -> None:
    assert first_failure(tmp_path, tmp_path, since=0.0) == f"no rank left a word; see {tmp_path}"
