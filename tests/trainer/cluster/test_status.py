"""The status of runs: from run directories as trainings and jobs write them, and from SLURM's queue."""

import errno
import io
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.integration.processes import ROOT
from trainer.checkpoint.retention import Retention
from trainer.cluster.requeue import Attempt, Attempts
from trainer.cluster.run_status import RunHistory, RunStatus, derive_status
from trainer.cluster.status import MAX_REASONS, collect_statuses, find_runs, format_json, print_overview
from trainer.errors import RunError
from trainer.monitoring.run_dir import RunDir
from trainer.resilience.crash_report import write_crash_report
from trainer.resilience.lock_record import LockRecord
from trainer.resilience.run_lock import STALE
from trainer.resilience.signals import INTERRUPTED, REQUEUE
from trainer.system.files import append_lines
from trainer.system.formatting import format_age
from trainer.system.slurm import QueuedJob
from trainer.tracking.comparison.folder_source import find_compared_runs

TOTAL = 60


class Run:
    """A run directory, written as a training and its jobs write it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = RunDir(path)
        self.attempts = Attempts(path)

    def create(self) -> "Run":
        self.folder.create(recipe="name: x\n", environment={"hostname": "login3"})
        return self

    def start(self, step: int = 0) -> "Run":
        self.create()
        self.folder.append_event("start", step=step, total_steps=TOTAL, world_size=2)
        return self

    def steps(self, first: int, last: int, *, pace: float = 2.0, starts: int = 1, **more: Any) -> "Run":
        for step in range(first, last + 1):
            values = {
                "loss": 3.0 - step / TOTAL,
                "spent": pace * step,
                "starts": starts,
                "total_steps": TOTAL,
            }
            self.folder.append_event("step", step=step, **{**values, **more})
        return self

    def holds_lock(self, since: float = 0.0) -> "Run":
        """The lock of a process that began then and whose heartbeat is new."""
        record = LockRecord.own("token", flock=False)
        (self.path / "lock").mkdir(exist_ok=True)
        (self.path / "lock" / "000001.json").write_text(json.dumps(asdict(replace(record, since=since))))
        return self

    def saved(self, step: int) -> "Run":
        (self.folder.checkpoints / f"step-{step:07d}").mkdir(parents=True)
        return self

    def submitted(self, job: str = "12") -> "Run":
        (self.path / "slurm").mkdir(parents=True, exist_ok=True)
        line = {"job": job, "time": round(time.time(), 3), "nodes": 2, "script": "/s", "log": "/l"}
        append_lines(self.path / "slurm" / "jobs.jsonl", [line])
        return self

    def begun(self, restart: int = 0, job: str = "12") -> "Run":
        self.attempts.begin(Attempt(job, restart, "n[1-2]"))
        return self

    def ended(
        self, code: int, restart: int = 0, job: str = "12", *, state: str = "RUNNING", chained: bool = False
    ) -> "Run":
        self.attempts.end(Attempt(job, restart, "n[1-2]", chained), code=code, state=state)
        return self

    def status(self, *queue: QueuedJob, age: float = 1.0, asked: bool = True) -> RunStatus:
        """So many seconds later. asked: whether SLURM was."""
        by_job = {job.id: job for job in queue} if asked else None
        return derive_status("x", RunHistory(self.path), by_job, time.time() + age)


def queued(state: str, reason: str = "None", job: str = "12", nodes: str = "") -> QueuedJob:
    return QueuedJob(id=job, state=state, reason=reason, nodes=nodes)


RUNNING = queued("RUNNING", nodes="n[1-2]")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "runs" / "x")


def test_a_run_by_hand_that_makes_progress(run: Run) -> None:
    run.start().steps(1, 20, pace=3.0).holds_lock()
    row = run.status()
    assert (row.state, row.reason, row.step, row.total_steps, row.restarts) == ("running", "", 20, TOTAL, 0)
    assert row.seconds_left == pytest.approx(3.0 * 40)
    assert row.loss == pytest.approx(3.0 - 20 / TOTAL)
    assert (row.job, row.nodes) == (None, "login3")
    assert row.silent is not None and 0.9 < row.silent < 30


def test_a_run_by_hand_is_there_as_long_as_its_lock_shows_it(run: Run) -> None:
    run.start().steps(1, 20)
    assert run.status(age=STALE + 5).state == "unknown"
    later = time.time() + STALE
    run.holds_lock()
    os.utime(run.path / "lock" / "000001.json", (later, later))
    assert run.status(age=STALE + 5).state == "running"
    run.holds_lock()
    assert run.status().state == run.status(age=STALE - 10).state == "running"
    row = run.status(age=STALE + 65)
    assert (row.state, row.reason) == ("unknown", "no heartbeat for 4m")


def test_a_run_whose_process_of_this_machine_is_gone_has_failed(run: Run) -> None:
    run.start().steps(1, 20).holds_lock()
    lock = run.path / "lock" / "000001.json"
    record = json.loads(lock.read_text())
    lock.write_text(json.dumps(record | {"start": record["start"] + 1}))  # another process has the number
    row = run.status()
    assert row.state == "failed" and "process ended" in row.reason


def test_a_run_that_begins_again_is_starting_whatever_it_recorded_before(run: Run) -> None:
    run.create()
    assert (run.status().state, run.status().reason) == ("unknown", "no event yet")
    run.holds_lock()
    assert (run.status().state, run.status().reason) == ("running", "starting")
    run.start().steps(1, 5)
    for event, values in (("left", {"reason": "SIGTERM"}), ("failed", {"words": "a shape is wrong"})):
        run.folder.append_event(event, step=5, **values)
        assert run.status().state == {"left": "stopped", "failed": "failed"}[event]
    run.holds_lock(since=time.time() + 1)
    assert (run.status().state, run.status().reason) == ("running", "starting")


def test_a_run_that_ended(run: Run) -> None:
    run.start().steps(1, TOTAL)
    run.folder.append_event("end", top1=0.875, steps=TOTAL)
    row = run.status(age=10**6)
    assert (row.state, row.reason, row.step, row.seconds_left) == ("finished", "", TOTAL, None)


def test_a_run_that_was_asked_to_leave(run: Run) -> None:
    run.start().steps(1, 20)
    run.folder.append_event("left", step=20, reason="the file STOP")
    row = run.status(age=10**6)
    assert (row.state, row.reason) == ("stopped", "by the file STOP")
    run.start(20).holds_lock()
    assert run.status().state == "running"


def test_a_run_whose_rank_wrote_a_crash_report(run: Run) -> None:
    from trainer.distributed.environment import find_environment

    run.start().steps(1, 5).holds_lock()
    time.sleep(0.01)
    write_crash_report(run.path, find_environment("cpu", {}), ValueError("a shape is wrong"))
    row = run.status()
    assert row.state == "failed"
    assert "failed first: ValueError: a shape is wrong" in row.reason and "\n" not in row.reason
    time.sleep(0.01)
    run.start(5)
    assert run.status().state == "running"  # the crash report is of the start before


def test_a_run_that_hung(run: Run) -> None:
    run.start().steps(1, 5)
    (run.path / "hangs").mkdir()
    (run.path / "hangs" / "summary.txt").write_text("no progress for 1200 s: rank 1 waits\n")
    later = time.time() + 1
    os.utime(run.path / "hangs" / "summary.txt", (later, later))
    row = run.status()
    assert (row.state, row.reason) == ("failed", "no progress for 1200 s: rank 1 waits")


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("Resources", "all suitable nodes are in use (Resources)"),
        ("Priority", "other jobs come first (Priority)"),
        ("QOSMaxJobsPerUserLimit", "a limit of its QOS (QOSMaxJobsPerUserLimit)"),
        ("BeginTime", "its begin time has not come"),
        ("Dependency", "another job has to end first (Dependency)"),
        ("ReqNodeNotAvail, UnavailableNodes:n2", "a node it needs is down or reserved"),
        ("PartitionNodeLimit", "more nodes than its partition allows"),
        ("JobHeldUser", "scontrol release"),
        ("SomethingNew", "SomethingNew"),
    ],
)
def test_the_reason_of_a_waiting_job_is_printed_in_plain_words(run: Run, reason: str, words: str) -> None:
    run.submitted()
    row = run.status(queued("PENDING", reason))
    assert row.state == "waiting" and words in row.reason
    assert (row.job, row.nodes, row.step, row.silent) == ("12", "", None, None)


def test_a_job_that_waits_where_slurm_was_not_asked(run: Run) -> None:
    row = run.submitted().status(asked=False, age=185)
    assert (row.state, row.reason) == ("waiting", "submitted; SLURM was not asked")


def test_a_job_that_left_the_queue_before_it_began(run: Run) -> None:
    row = run.submitted().status()
    assert row.state == "unknown" and "left the queue before it began" in row.reason


def test_a_job_that_runs(run: Run) -> None:
    run.submitted().begun()
    assert run.status(RUNNING).reason == "starting"
    time.sleep(0.01)
    run.start().steps(1, 9)
    row = run.status(RUNNING)
    assert (row.state, row.reason, row.job, row.nodes) == ("running", "", "12", "n[1-2]")
    assert run.status(RUNNING, age=10**6).state == "running"
    run.holds_lock()
    assert run.status(asked=False).state == "running"
    assert run.status(asked=False, age=725).state == "unknown"
    assert run.status(asked=False).nodes == "n[1-2]"


def test_a_job_that_is_queued_again(run: Run) -> None:
    run.submitted().begun().start().steps(1, 9).saved(9)
    run.folder.append_event("left", step=9, reason="SIGUSR1")
    run.ended(REQUEUE)
    row = run.status(queued("PENDING", "BeginTime"), age=600)
    assert row.state == "requeued" and row.reason.startswith(
        "asked to leave, step 9 is saved; its begin time"
    )
    assert run.status(asked=False, age=600).state == "requeued"
    row = run.status(age=600)
    assert row.state == "unknown" and "the queue has no such job" in row.reason


def test_a_job_whose_node_was_lost(run: Run) -> None:
    run.submitted().begun().start().steps(1, 9)
    row = run.status(queued("PENDING", "BeginTime"), age=100)
    assert row.state == "requeued" and "its last attempt ended without a result" in row.reason
    row = run.status(age=100)
    assert (row.state, row.job) == ("failed", "12") and "job 12 left the queue" in row.reason


def test_the_result_of_an_attempt_stays(run: Run) -> None:
    run.submitted().begun().start().steps(1, 9)
    run.ended(INTERRUPTED)
    assert run.status(age=600).state == "stopped"
    assert run.status(age=600, asked=False).state == "stopped"
    time.sleep(0.01)
    run.submitted("13")
    row = run.status(queued("PENDING", "Priority", job="13"))
    assert (row.state, row.job) == ("waiting", "13")
    run.begun(job="13").ended(2, job="13")
    row = run.status(age=600)
    assert row.state == "given up" and row.reason.startswith("correct this first")
    assert (row.job, row.restarts) == ("13", 1)


def test_a_chain_of_jobs(run: Run) -> None:
    for job in ("12", "13"):
        run.submitted(job)
    time.sleep(0.01)
    run.begun().start().steps(1, 9).holds_lock()
    next_one = queued("PENDING", "Dependency", job="13")
    row = run.status(RUNNING, next_one)
    assert (row.state, row.job) == ("running", "12")
    assert run.status(asked=False).state == "running"
    run.ended(REQUEUE, chained=True)
    row = run.status(next_one)
    assert (row.state, row.job) == ("waiting", "13")
    row = run.status()
    assert row.state == "stopped" and "the queue has no next job" in row.reason


def test_a_run_that_a_job_finished(run: Run) -> None:
    run.submitted().begun().start().steps(1, TOTAL)
    run.folder.append_event("end", steps=TOTAL)
    assert run.status(RUNNING).state == "finished"
    run.ended(0)
    row = run.status(age=600)
    assert (row.state, row.reason, row.job, row.nodes) == ("finished", "", "12", "n[1-2]")


def test_a_run_that_goes_on_by_hand_after_its_job(run: Run) -> None:
    run.submitted().begun().start().steps(1, 9)
    run.ended(INTERRUPTED)
    time.sleep(0.01)
    run.start(9).steps(10, 12).holds_lock()
    row = run.status()
    assert (row.state, row.job, row.nodes, row.step) == ("running", None, "login3", 12)


def test_restarts_are_counted_whoever_made_them(run: Run) -> None:
    run.start().steps(1, 5)
    run.start(5).steps(6, 9, starts=2)
    assert run.status().restarts == 1
    run.steps(10, 3000, starts=4)  # more events than are read
    assert not RunHistory(run.path).last("start")
    row = run.status()
    assert (row.restarts, row.step, row.total_steps) == (3, 3000, TOTAL)
    run.start(2990)
    assert run.status().restarts == 4
    for restart in range(7):
        run.saved(restart).begun(restart)
    assert run.status().restarts == 6


def test_the_step_and_the_pace_are_of_the_latest_start(run: Run) -> None:
    run.start().steps(1, 50, pace=1.0)
    assert run.status().seconds_left == pytest.approx(10.0)
    run.start(40)
    assert (run.status().step, run.status().seconds_left) == (40, None)
    for step, spent in ((41, 900.0), (42, 901.0)):
        run.folder.append_event("step", step=step, spent=spent)
    assert run.status().seconds_left == pytest.approx(18.0)


def test_the_accuracy_is_that_of_the_last_evaluation(run: Run) -> None:
    run.start().steps(1, 5)
    assert run.status().top1 is None
    retention = Retention(run.folder.checkpoints, keep_last=1, keep_best=True)
    for step, top1 in ((10, 0.8), (9, 0.9)):
        retention.record_accuracy(step, top1)
    assert run.status().top1 == 0.8
    run.folder.append_event("evaluation", step=20, top1=0.7, top5=1.0)
    assert run.status().top1 == 0.7


def test_a_loss_that_is_not_finite_is_seen(run: Run) -> None:
    run.start().steps(1, 3, loss=float("nan"))
    row = run.status()
    assert (row.loss, row.diverged) == (None, True)
    assert " nan " in shown(run.path.parent)


def damage_events(run: Run) -> None:
    run.folder.events.write_bytes(os.urandom(5000))


def cut_events(run: Run) -> None:
    text = run.folder.events.read_text()
    run.folder.events.write_text(text[: len(text) - 20])


def odd_events(run: Run) -> None:
    odd = [
        {},
        {"event": 3},
        {"event": "step"},
        {"event": "step", "time": "x"},
        {"event": "step", "time": 1e9},
    ]
    run.folder.events.write_text(
        "".join(json.dumps(line) + "\n" for line in [*odd, {"event": "step", "time": 1, "step": "a"}])
        + "[1]\n7\n"
    )


def events_are_a_folder(run: Run) -> None:
    run.folder.events.unlink()
    run.folder.events.mkdir()


def odd_turns(run: Run) -> None:
    (run.path / "slurm").mkdir()
    for name in ("turns.jsonl", "jobs.jsonl"):
        lines = [
            {"turn": "ended", "time": 1e9, "job": "12"},
            {"turn": 1},
            {"job": "3"},
            {"turn": "begun", "time": 2},
        ]
        append_lines(run.path / "slurm" / name, lines)


def odd_small_files(run: Run) -> None:
    run.folder.environment.write_text("[1")
    (run.folder.checkpoints / "accuracy.json").write_text('{"a": {}}')
    (run.path / "failures").mkdir()
    (run.path / "failures" / "rank-00000.json").write_text("[]")
    (run.path / "failures" / "rank-00001.json").write_text(
        '{"time": "never", "rank": 0, "node": 1, "words": 2, "traceback": 3}'
    )


@pytest.mark.parametrize(
    "damage", [damage_events, cut_events, odd_events, events_are_a_folder, odd_turns, odd_small_files]
)
def test_a_damaged_file_harms_only_its_own_line(tmp_path: Path, damage: Callable[[Run], None]) -> None:
    for name in ("a", "b", "c"):
        Run(tmp_path / name).start().steps(1, 5).holds_lock()
    damage(Run(tmp_path / "b"))
    rows = collect_statuses([tmp_path]).statuses
    assert [row.name for row in rows] == ["a", "b", "c"]
    assert [row.state for row in rows[::2]] == ["running", "running"]
    if damage in (damage_events, events_are_a_folder):
        assert rows[1].state == "running" and "events.jsonl" in rows[1].reason
    assert "3 runs: " in shown(tmp_path)
    json.loads(format_json(collect_statuses([tmp_path])))


ODD = (
    "1e400", "-1e400", "NaN", "9" * 4000, "9" * 5000, "1e308", "-1", "true", "null", '""', '"x"', "[]", "{}",
    "0", "[" * 3000 + "]" * 3000,
)  # fmt: skip


def with_odd_values(file: Path, chance: random.Random) -> None:
    """Give one field of one line a value that no run writes."""
    lines = file.read_text().splitlines()
    number = chance.randrange(len(lines))
    record = {key: json.dumps(value) for key, value in json.loads(lines[number]).items()}
    record[chance.choice(list(record))] = chance.choice(ODD)
    lines[number] = "{" + ", ".join(f"{json.dumps(key)}: {value}" for key, value in record.items()) + "}"
    file.write_text("\n".join(lines) + "\n")


def test_an_error_shows_at_once_and_until_the_next_start(tmp_path: Path) -> None:
    run = Run(tmp_path / "x").start().steps(1, 12).holds_lock()
    run.folder.append_event("failed", step=12, words="step 12 changed nothing\nmore")
    found = run.status()
    assert (found.state, found.reason, found.step) == ("failed", "step 12 changed nothing", 12)
    assert run.start(10).status().state == "running"


def test_odd_values_of_one_run_hinder_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what the run reads of its own directory at its next start."""
    monkeypatch.setenv("PATH", "")  # without SLURM
    Run(tmp_path / "good").start().steps(1, 2)
    whole = Run(tmp_path / "odd").start().steps(1, 4).holds_lock().submitted().begun().ended(REQUEUE)
    whole.folder.append_event("evaluation", step=4, videos=1, bad=0, top1=0.5, top5=0.5)
    whole.folder.append_event("checkpoint", step=4, path="x", seconds=1.0)
    whole.folder.append_event("left", step=4, reason="SIGTERM")
    slurm = whole.path / "slurm"
    files = [whole.folder.events, slurm / "turns.jsonl", slurm / "jobs.jsonl", *whole.path.glob("lock/*")]
    texts = {file: file.read_text() for file in files}
    chance = random.Random(7)
    for _ in range(150):
        for file, text in texts.items():
            file.write_text(text)
            with_odd_values(file, chance)
        rows = collect_statuses([tmp_path]).statuses
        assert [row.name for row in rows] == ["good", "odd"]
        json.loads(format_json(collect_statuses([tmp_path])), parse_constant=pytest.fail)
        assert "2 runs: " in shown(tmp_path)
        assert whole.folder.read_last_spent()[0] >= 0 and whole.folder.find_longest_save() >= 0
        whole.attempts.is_finished()


def shown(*places: Path) -> str:
    file = io.StringIO()
    print_overview(collect_statuses(places), Console(file=file))
    return file.getvalue()


def test_runs_are_found_one_folder_deeper_too(tmp_path: Path) -> None:
    for name in ("b", "sweep/lr-10", "sweep/lr-2", "a/b/too-deep"):
        Run(tmp_path / name).create()
    Run(tmp_path / "waits").submitted()
    (tmp_path / "bench").mkdir()
    (tmp_path / "notes.txt").touch()
    assert [name for name, _ in find_runs([tmp_path])] == ["b", "sweep/lr-2", "sweep/lr-10", "waits"]
    one = tmp_path / "b"
    assert find_runs([one]) == [(str(one), one)]
    assert len(find_runs([one, tmp_path])) == 4  # none twice
    with pytest.raises(RunError, match="there is no such folder"):
        find_runs([tmp_path / "missing"])


@pytest.mark.parametrize(("call", "path"), [("scandir", ""), ("stat", "/.")])
def test_a_named_folder_that_cannot_be_read_is_an_error_and_one_in_it_is_left_out(
    call: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Run(tmp_path / "good").create()
    folder, real = tmp_path / "secret", getattr(os, call)
    folder.mkdir()

    def refuse(given: Any, *rest: Any, **options: Any) -> Any:
        if str(given) == f"{folder}{path}":
            raise PermissionError(errno.EACCES, "Permission denied", str(given))
        return real(given, *rest, **options)

    monkeypatch.setattr(os, call, refuse)  # the superuser may read everything
    for find in (lambda place: find_runs([place]), find_compared_runs):
        with pytest.raises(RunError, match=f"^{folder} cannot be read: Permission denied$"):
            find(folder)
    assert [name for name, _ in find_runs([tmp_path])] == ["good"]


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Makes SLURM's command do as the script says; returns a file with a line for each call of it."""

    def make(script: str) -> Path:
        folder, calls = tmp_path / "bin", tmp_path / "calls"
        folder.mkdir()
        (folder / "squeue").write_text(f"#!/bin/sh\necho call >> {calls}\n{script}\n")
        (folder / "squeue").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        return calls

    return make


def test_slurm_is_asked_once_and_only_for_jobs(tmp_path: Path, squeue: Callable[[str], Path]) -> None:
    calls = squeue("printf '12_1\\tn1\\tNone\\tRUNNING\\n12_2\\t\\tResources\\tPENDING\\n'")
    Run(tmp_path / "runs" / "by-hand").start().steps(1, 5).holds_lock()
    collect_statuses([tmp_path / "runs"])
    assert not calls.exists()
    for task in ("1", "2", "3"):
        Run(tmp_path / "runs" / "sweep" / task).submitted(f"12_{task}")
    rows = collect_statuses([tmp_path / "runs"]).statuses
    assert [row.state for row in rows] == ["running", "running", "waiting", "unknown"]
    assert calls.read_text() == "call\n"


def test_a_result_that_is_written_while_slurm_is_asked_is_read(
    tmp_path: Path, squeue: Callable[[str], Path]
) -> None:
    run = Run(tmp_path / "runs" / "x").begun()
    line = {"turn": "ended", "job": "12", "time": time.time() + 1, "verdict": "stopped", "words": "scancel"}
    squeue(f"echo '{json.dumps(line)}' >> {run.path}/slurm/turns.jsonl")
    (row,) = collect_statuses([tmp_path / "runs"]).statuses
    assert (row.state, row.reason) == ("stopped", "scancel")


def test_without_an_answer_of_slurm_the_folders_are_shown(
    tmp_path: Path, squeue: Callable[[str], Path]
) -> None:
    squeue("echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    Run(tmp_path / "runs" / "x").submitted().begun().start().steps(1, 5).holds_lock()
    lines = shown(tmp_path / "runs").splitlines()
    assert lines[1].split()[:3] == ["x", "running", "5/60"]
    assert "squeue refuses" in lines[-1] and "Unable to contact slurm controller" in lines[-1]


def many(root: Path, count: int, steps: int = 40) -> None:
    """Runs of one sweep, a third of them running."""
    for number in range(count):
        run = Run(root / "k710-sweep" / f"l14-learning_rate-{number + 1}e-5-head_dropout-0.{number % 5}")
        run.start().steps(1, steps)
        run.holds_lock()
        if number % 3:
            run.folder.append_event("left", step=steps, reason=f"reason {number}")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_forty_runs_fit_into_a_narrow_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    many(tmp_path, 40)
    for run in (tmp_path / "k710-sweep").iterdir():
        attempt = {"turn": "begun", "job": "8812345_10", "time": time.time(), "nodes": "gpu[001-002,017-032]"}
        (run / "slurm").mkdir()
        append_lines(run / "slurm" / "turns.jsonl", [attempt])
    file = Terminal()
    print_overview(collect_statuses([tmp_path]), Console(file=file, width=80))
    lines = [line.replace("\x1b[1m", "").replace("\x1b[0m", "") for line in file.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80
    table = lines[1:41]
    assert len({line.split()[0] for line in table}) == 40  # the names are still distinct
    assert all(" 8812345_1" in line for line in table)
    assert all(f" 40/{TOTAL} " in line for line in table)


def test_a_file_gets_whole_names_and_plain_lines(tmp_path: Path) -> None:
    many(tmp_path, 40)
    text = shown(tmp_path)
    assert "\x1b" not in text and "…" not in text.split("\n\n")[0]
    lines = text.splitlines()
    assert lines[1].split()[0] == "k710-sweep/l14-learning_rate-1e-5-head_dropout-0.0"
    assert lines[-1] == "40 runs: 14 running, 26 stopped"
    notes = text.split("\n\n")[1].splitlines()
    assert len(notes) == MAX_REASONS + 1 and notes[-1].startswith(f"and {26 - MAX_REASONS} more")


def test_equal_reasons_share_a_line(tmp_path: Path) -> None:
    for name in "abcde":
        run = Run(tmp_path / name).start()
        run.folder.append_event("left", step=0, reason="SIGTERM")
    Run(tmp_path / "f").create()
    assert shown(tmp_path).split("\n\n")[1].splitlines() == [
        "unknown  f: no event yet",
        "stopped  a, b, c and 2 more: by SIGTERM",
    ]


def test_five_hundred_runs_are_a_matter_of_seconds(tmp_path: Path) -> None:
    many(tmp_path, 5, steps=400)  # more events than are read
    for number in range(495):
        source = (
            tmp_path / "k710-sweep" / f"l14-learning_rate-{number % 5 + 1}e-5-head_dropout-0.{number % 5}"
        )
        copy = RunDir(tmp_path / f"run-{number}")
        copy.path.mkdir()
        copy.recipe.touch()
        os.link(source / "events.jsonl", copy.events)
    begun = time.process_time()
    assert len(collect_statuses([tmp_path]).statuses) == 500
    assert time.process_time() - begun < 10


def status(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "launch/status.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path: Path) -> None:
    run = Run(tmp_path / "runs" / "x").start().steps(1, 5).holds_lock()
    result = status(tmp_path / "runs")
    assert result.returncode == 0 and result.stdout.splitlines()[1].split()[:3] == ["x", "running", "5/60"]
    (row,) = json.loads(status(run.path, "--json").stdout)
    assert (row["step"], row["state"], row["folder"]) == (5, "running", str(run.path))
    result = status(tmp_path / "nowhere")
    assert result.returncode == 2 and result.stderr.startswith(f"error: {tmp_path}/nowhere: there is no such")
    (tmp_path / "empty").mkdir()
    assert status(tmp_path / "empty").stdout == "\n0 runs\n"
    assert status(tmp_path, "--json", "--watch", "3").returncode == 2
    assert status(tmp_path, "--watch", "0").returncode == 2


def test_it_needs_no_torch() -> None:
    """Whose import takes seconds: too long for a glance."""
    code = "import launch.status, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120).returncode == 0


def test_durations() -> None:
    texts = [format_age(seconds) for seconds in (-3, 59.9, 60, 3599, 3600, 86399, 90000, 10**7)]
    assert texts == ["0s", "59s", "1m", "59m", "1h00m", "23h59m", "1d01h", "115d17h"]
