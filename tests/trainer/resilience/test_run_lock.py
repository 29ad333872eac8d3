"""One run in a run folder: who holds it, who takes it over, and who does not."""

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.trainer.lock_holder import find_holder
from trainer.errors import RunError
from trainer.resilience.lock_record import HolderState, LockRecord
from trainer.resilience.run_lock import RunLock, acquire

ROOT = Path(__file__).parents[3]
HOLD = (
    "import sys, time\n"
    "from pathlib import Path\n"
    "from trainer.errors import RunError\n"
    "from trainer.resilience.run_lock import acquire\n"
    "try:\n"
    "    lock = acquire(Path(sys.argv[1]), beat=0.1)\n"
    "except RunError as error:\n"
    "    print(f'refused: {error}', flush=True)\n"
    "    sys.exit(2)\n"
    "print('held', flush=True)\n"
    "time.sleep(600)\n"
)


def start(run_dir: Path, *before: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*before, sys.executable, "-c", HOLD, str(run_dir)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)} | variables,
    )  # fmt: skip


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


@contextmanager
def holding(run_dir: Path, *before: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the folder."""
    process = start(run_dir, *before, **variables)
    try:
        assert said(process) == "held"
        yield process
    finally:
        process.kill()
        process.wait()


def rewrite(run_dir: Path, **changes: object) -> Path:
    """Change what the latest lock file says, and leave its sign of life to whoever gives it."""
    file = max((run_dir / "lock").glob("*.json"))
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return file


def test_a_second_run_is_refused_by_name_and_the_next_one_after_a_kill_is_not(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with holding(run_dir) as process:
        with pytest.raises(RunError) as caught:
            acquire(run_dir)
        words = str(caught.value)
        assert f"process {process.pid} on {os.uname().nodename}" in words
        assert "--run-dir" in words and f"kill {process.pid}" in words
        assert find_holder(run_dir) is not None
        process.send_signal(signal.SIGSTOP)  # it is there, though it gives no sign
        with pytest.raises(RunError, match=str(process.pid)):
            acquire(run_dir)
        process.kill()
        process.wait()
        assert find_holder(run_dir) is None
        acquire(run_dir, waiting=pytest.fail).release()


def test_a_zombie_holds_nothing(tmp_path: Path) -> None:
    with holding(tmp_path) as process:
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and was not reaped
        acquire(tmp_path, waiting=pytest.fail).release()


def test_of_many_that_come_after_a_kill_one_gets_the_folder(tmp_path: Path) -> None:
    with holding(tmp_path) as process:
        process.kill()
        process.wait()
    several = [start(tmp_path) for _ in range(6)]
    try:
        words = [said(process) for process in several]
        assert words.count("held") == 1
        assert sum(text.startswith("refused: ") for text in words) == 5
        holder = find_holder(tmp_path)
        assert holder is not None and holder.pid == several[words.index("held")].pid
    finally:
        for process in several:
            process.kill()
            process.wait()
    assert [path.name for path in (tmp_path / "lock").iterdir()] == ["000002.json"]


def test_of_many_that_take_over_at_once_one_wins(tmp_path: Path) -> None:
    locks: list[RunLock] = []

    def attempt(_: int) -> bool:
        try:
            locks.append(acquire(tmp_path, on_loss=lambda _: None))
        except RunError:
            return False
        return True

    for _ in range(10):
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(attempt, range(8))) == 1
        rewrite(tmp_path, start=1)  # a process of another time had this number
    for lock in locks:
        lock.release()


def test_a_holder_elsewhere_that_gives_signs_of_life_is_not_taken_over(tmp_path: Path) -> None:
    with holding(tmp_path) as process:
        rewrite(tmp_path, boot="another machine", host="elsewhere")
        said_waiting: list[str] = []
        with pytest.raises(RunError, match=f"process {process.pid} on elsewhere"):
            acquire(tmp_path, stale=60, waiting=said_waiting.append)
        assert len(said_waiting) == 1 and "elsewhere" in said_waiting[0]


def test_a_holder_elsewhere_without_signs_of_life_is_taken_over(tmp_path: Path) -> None:
    lock = acquire(tmp_path, beat=600)
    rewrite(tmp_path, boot="another machine", host="elsewhere")
    second = acquire(tmp_path, stale=0.5, waiting=lambda _: None, on_loss=lambda _: None)
    file = rewrite(tmp_path, boot="another machine")
    hours_ago = time.time() - 7200
    os.utime(file, (hours_ago, hours_ago))
    third = acquire(tmp_path, waiting=pytest.fail)  # an age by the file system's own clock
    for held in (lock, second, third):
        held.release()


def test_a_holder_that_lost_the_folder_hears_of_it(tmp_path: Path) -> None:
    lost: list[str] = []
    lock = acquire(tmp_path, beat=0.05, on_loss=lost.append)
    own = json.loads((tmp_path / "lock/000001.json").read_text())
    (tmp_path / "lock/000002.json").write_text(json.dumps(own | {"host": "elsewhere", "pid": 77}))
    deadline = time.monotonic() + 60
    while not lost and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(lost) == 1 and "process 77 on elsewhere" in lost[0]
    lock.release()


def test_what_was_given_back_is_free_and_a_folder_without_a_run_is_gone(tmp_path: Path) -> None:
    run_dir = tmp_path / "a/run"
    acquire(run_dir).release()
    assert not run_dir.exists()
    lock = acquire(run_dir)
    (run_dir / "recipe.yaml").write_text("name: x\n")
    lock.release()
    assert json.loads((run_dir / "lock/000001.json").read_text())["released"] is True
    assert find_holder(run_dir) is None
    lock = acquire(run_dir, waiting=pytest.fail)
    assert find_holder(run_dir) is not None
    lock.release()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": 3}', "\0", '{"pid": "x"}', "[" * 100_000])
def test_a_lock_that_says_nothing_counts_by_its_age(text: str, tmp_path: Path) -> None:
    (tmp_path / "lock").mkdir()
    (tmp_path / "lock/000007.json").write_text(text)
    acquire(tmp_path, stale=0.3, waiting=lambda _: None).release()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("")
    with pytest.raises(RunError, match="cannot write the lock of the folder"):
        acquire(tmp_path)


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    lock = acquire(tmp_path, beat=0.05)
    with pytest.raises(RunError, match=f"process {os.getpid()}"):
        acquire(tmp_path)
    rewrite(tmp_path, boot="another machine")
    with pytest.raises(RunError, match="last heartbeat"):  # the file itself is touched
        acquire(tmp_path, stale=60, waiting=lambda _: None)
    lock.release()


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_another_container_of_the_same_machine(tmp_path: Path) -> None:
    """Its process numbers mean nothing here; the kernel gives back its file lock when it ends."""
    container = ("unshare", "--pid", "--fork", "--kill-child")
    with holding(tmp_path, *container) as process:
        with pytest.raises(RunError, match="in use"):
            acquire(tmp_path, waiting=pytest.fail)
        record = find_holder(tmp_path)
        assert record is not None and record.pid == 1
        process.kill()
        process.wait()
        deadline = time.monotonic() + 60
        while find_holder(tmp_path) is not None and time.monotonic() < deadline:
            time.sleep(0.02)
        acquire(tmp_path, waiting=pytest.fail).release()


SQUEUE = """#!/bin/sh
for last; do :; done
echo "$last" >> {folder}/asked
case "$*" in
  *--steps*) cat {folder}/steps ;;
  *) cat {folder}/state; [ -s {folder}/state ] || {{ echo 'Invalid job id specified' >&2; exit 1; }} ;;
esac
"""
INTERACTIVE, BATCH, EXTERN = "4294967290", "4294967291", "4294967292"


@pytest.fixture
def squeue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Set what squeue answers: to a question for the state, and to one for the steps."""
    (tmp_path / "squeue").write_text(SQUEUE.format(folder=tmp_path))
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    def answers(state: str, steps: str) -> None:
        (tmp_path / "state").write_text("\n".join(state.split()))
        (tmp_path / "steps").write_text("\n".join(steps.split()))

    return answers


def elsewhere(**variables: str) -> LockRecord:
    """The record of a job on another machine."""
    return dataclasses.replace(LockRecord.own("token", flock=False, variables=variables), boot="another")


@pytest.mark.parametrize(
    ("state", "steps", "verdict"),
    [
        ("RUNNING", "7.batch 7.0", HolderState.ALIVE),
        ("RUNNING", "7.batch", HolderState.GONE),
        ("RUNNING", "7.1", HolderState.GONE),
        ("RUNNING", "", HolderState.UNKNOWN),  # squeue lists no steps here
        ("RUNNING", "7.interactive", HolderState.UNKNOWN),
        ("RUNNING", "7+0.0 7+1.0", HolderState.ALIVE),
        ("RUNNING RUNNING", "7.0+0 7.0+1", HolderState.ALIVE),
        ("COMPLETING", "7.batch", HolderState.UNKNOWN),
        (
            "PENDING RUNNING",
            "7_2.0",
            HolderState.UNKNOWN,
        ),  # an array, of a record that does not say which task
        ("PENDING", "", HolderState.GONE),
        ("NODE_FAIL", "", HolderState.GONE),
        ("", "", HolderState.GONE),
    ],
)
def test_slurm_knows_a_holder_elsewhere(
    state: str, steps: str, verdict: HolderState, tmp_path: Path, squeue: Callable[[str, str], None]
) -> None:
    squeue(state, steps)
    job = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_CLUSTER_NAME": "one"}
    record = elsewhere(**job)
    assert record.state(tmp_path / "none", variables={}) is verdict
    # A later start of the same job: SLURM has ended the earlier one. A cluster of another name is not asked.
    again = job | {"SLURM_RESTART_COUNT": "1"}
    assert record.state(tmp_path / "none", variables=again) is HolderState.GONE
    assert record.state(tmp_path / "none", variables={"SLURM_CLUSTER_NAME": "two"}) is HolderState.UNKNOWN


@pytest.mark.parametrize(
    ("step", "steps", "verdict"),
    [
        (INTERACTIVE, "7.interactive 7.3", HolderState.ALIVE),
        (INTERACTIVE, "7.Extern 7.Interactive", HolderState.ALIVE),
        (INTERACTIVE, "7.3", HolderState.UNKNOWN),
        (INTERACTIVE, "", HolderState.UNKNOWN),
        (BATCH, "7.batch 7.0", HolderState.ALIVE),
        (BATCH, "7.0", HolderState.UNKNOWN),
        (BATCH, f"7.{BATCH} 7.0", HolderState.ALIVE),
        (EXTERN, "7.extern 7.0", HolderState.ALIVE),
        ("4294967293", "7.0", HolderState.UNKNOWN),
    ],
)
def test_a_step_that_squeue_names_is_not_looked_for_by_number(
    step: str, steps: str, verdict: HolderState, tmp_path: Path, squeue: Callable[[str, str], None]
) -> None:
    squeue("RUNNING", steps)
    assert elsewhere(SLURM_JOB_ID="7", SLURM_STEP_ID=step).state(tmp_path / "none", variables={}) is verdict


@pytest.mark.parametrize("raw", ["127", "123"])  # the last task bears the number of the array itself
@pytest.mark.parametrize(
    ("steps", "verdict"), [("123_4.batch 123_4.0", HolderState.ALIVE), ("123_4.batch", HolderState.GONE)]
)
def test_slurm_is_asked_for_the_task_of_an_array(
    raw: str, steps: str, verdict: HolderState, tmp_path: Path, squeue: Callable[[str, str], None]
) -> None:
    squeue("RUNNING", steps)
    record = elsewhere(SLURM_JOB_ID=raw, SLURM_STEP_ID="0", SLURM_ARRAY_JOB_ID="123", SLURM_ARRAY_TASK_ID="4")
    assert record.state(tmp_path / "none", variables={}) is verdict
    assert set((tmp_path / "asked").read_text().split()) == {"--jobs=123_4"}
    assert "SLURM job 123_4" in record.description and record.advice == "scancel 123_4"
    assert LockRecord.read(record.text()) == record


def test_a_record_of_before_arrays_were_known_is_read(
    tmp_path: Path, squeue: Callable[[str, str], None]
) -> None:
    values = json.loads(elsewhere(SLURM_JOB_ID="127", SLURM_STEP_ID="0").text())
    del values["array_job"], values["array_task"]
    record = LockRecord.read(json.dumps(values))
    assert record is not None
    squeue("RUNNING", "123_4.0")
    assert record.state(tmp_path / "none", variables={}) is HolderState.ALIVE
    assert LockRecord.read(json.dumps(values | {"array_job": 123})) is None
    odd = LockRecord.read(json.dumps(values | {"array_job": "1;x", "array_task": "4"}))
    assert odd is not None and odd.advice == "scancel 127"


def test_a_record_says_the_job() -> None:
    record = LockRecord.own("token", flock=True, variables={"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "x"})
    assert "SLURM job 7" in record.description and record.advice == "scancel 7"
    assert LockRecord.read(record.text()) == record
