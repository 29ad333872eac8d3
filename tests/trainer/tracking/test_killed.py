"""Creation of the database in spite of crashes, and runs that are killed at any moment."""

import errno
import json
import os
import random
import shlex
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.tracking.mlflow_client import TIMEOUT, client
from trainer.errors import RunError
from trainer.tracking import sqlite_store
from trainer.tracking.mlflow_tracker import MlflowTracker, check_tracking, deliver_outbox, find_mlflow_run_id
from trainer.tracking.outbox import Outbox
from trainer.tracking.sqlite_store import DatabaseBusy, ensure_database, is_partial

ROOT = Path(__file__).parents[3]


def test_a_database_is_created_once_in_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    here = tmp_path / "100%25 a?b#ü"
    here.mkdir()
    path = here / "mlflow.db"
    # What an interrupted first creation leaves: some tables, no version, no data.
    with sqlite3.connect(path) as half:
        half.execute("CREATE TABLE experiments (experiment_id INTEGER, name TEXT)")
        half.execute("CREATE TABLE runs (run_uuid TEXT)")
    half.close()
    (here / ".mlflow.db.1.partial").write_text("of a process that was killed")
    with pytest.raises(DatabaseBusy):  # its creator may still be working
        ensure_database(path)
    monkeypatch.setattr(sqlite_store, "IDLE_SECONDS", 0.0)
    results: list[bool] = []
    makers = [threading.Thread(target=lambda: results.append(ensure_database(path))) for _ in range(4)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(TIMEOUT)
    assert sorted(results) == [False, False, False, True]
    assert not is_partial(path)
    assert caplog.text.count("incomplete") == 2  # logged once, with both names
    (aside,) = here.glob("mlflow.db.incomplete-*")
    assert sorted(file.name for file in here.iterdir()) == ["mlflow.db", aside.name]
    assert sorted(file.name for file in tmp_path.iterdir()) == [here.name]

    monkeypatch.chdir(here)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (here / "run").mkdir()
    tracker = MlflowTracker(here / "run", uri=None, experiment="e", run_name="r")
    (here / "run" / "file.txt").write_text("hello")
    tracker.upload_artifact(here / "run" / "file.txt")
    assert tracker.close("FINISHED", TIMEOUT) == 0
    command = tracker.how_to_see()
    assert command is not None
    pasted = shlex.split(command.splitlines()[0])[-1]
    assert client(pasted).get_run(find_mlflow_run_id(here / "run")).info.status == "FINISHED"
    assert len(list(here.glob("mlartifacts/*/artifacts/file.txt"))) == 1
    assert sorted(file.name for file in tmp_path.iterdir()) == [here.name]


def test_a_database_with_data_is_never_renamed(
    tmp_path: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_store, "IDLE_SECONDS", 0.0)
    for number, table in enumerate(("runs", "registered_models")):
        path = tmp_path / f"{number}.db"
        with sqlite3.connect(path) as used:
            used.execute("CREATE TABLE experiments (name TEXT)")
            used.execute(f"CREATE TABLE {table} (name TEXT)")
            used.execute(f"INSERT INTO {table} VALUES ('a')")
        used.close()
        assert not is_partial(path)
    # Whole, without a run, and made by another version of MLflow, which says itself what to do with it.
    ensure_database(Path(store.removeprefix("sqlite:///")))
    whole = tmp_path / "whole.db"
    shutil.copy(store.removeprefix("sqlite:///"), whole)
    with sqlite3.connect(whole) as made:
        for table in ("runs", "registered_models", "trace_info", "datasets"):
            made.execute(f"DELETE FROM {table}")
        made.execute("DELETE FROM experiments WHERE experiment_id != 0")
        made.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    made.close()
    assert not is_partial(whole) and not ensure_database(whole)
    with pytest.raises(Exception, match="mlflow db upgrade"):
        client(f"sqlite:///{whole}").search_experiments()
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as foreign:
        foreign.execute("CREATE TABLE albums (name TEXT)")
    foreign.close()
    assert not is_partial(other)


def test_a_locked_database_is_waited_for(
    tmp_path: Path, store: str, start: Callable[..., MlflowTracker], caplog: pytest.LogCaptureFixture
) -> None:
    assert start().close("KILLED", TIMEOUT) == 0
    copy = tmp_path / "copy.db"
    shutil.copy(store.removeprefix("sqlite:///"), copy)
    other = tmp_path / "other"
    other.mkdir()
    with sqlite3.connect(copy, isolation_level=None, check_same_thread=False) as holder:
        holder.execute("BEGIN EXCLUSIVE")
        tracker = MlflowTracker(other, uri=f"sqlite:///{copy}", experiment="e", run_name="r")
        tracker.record_metrics(1, {"loss": 1.0})
        deadline = time.monotonic() + TIMEOUT
        while "upload to MLflow fails" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
        holder.execute("ROLLBACK")
    holder.close()
    assert tracker.close("FINISHED", TIMEOUT) == 0
    assert "locked" in caplog.text and "works again" in caplog.text
    assert not (other / "mlflow.rejected.jsonl").exists()


@pytest.mark.parametrize("content", [b"", b"\x00" * 40, b"12", b"-5\n", b"999999999\n", b"{}", b"\xff"])
def test_damaged_files_cost_no_record_and_no_traceback(
    tmp_path: Path,
    store: str,
    start: Callable[..., MlflowTracker],
    content: bytes,
    request: pytest.FixtureRequest,
) -> None:
    first = start()
    first.record_metrics(1, {"loss": 1.0})
    assert first.close("KILLED", TIMEOUT) == 0
    run_id = find_mlflow_run_id(tmp_path)
    copy = tmp_path / "checkpoints" / "step-0000001" / "mlflow_run.json"
    copy.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "mlflow_run.json", copy)
    (tmp_path / "mlflow.offset").write_bytes(content)
    place = tmp_path / "mlflow_run.json"
    place.write_bytes(content)
    # Reading changes nothing.
    before = sorted(tmp_path.iterdir())
    check_tracking(tmp_path, uri=store, experiment=request.node.name)
    assert find_mlflow_run_id(tmp_path) == run_id
    assert sorted(tmp_path.iterdir()) == before and place.read_bytes() == content
    second = start(step=1)
    second.record_metrics(2, {"loss": 2.0})
    assert second.close("FINISHED", TIMEOUT) == 0
    assert find_mlflow_run_id(tmp_path) == run_id == json.loads(place.read_text())["run_id"]
    (aside,) = tmp_path.glob("mlflow_run.json.damaged-*")
    assert aside.read_bytes() == content
    assert [value.step for value in client(store).get_metric_history(run_id, "loss")] == [1, 2]


def test_a_damaged_reference_needs_a_copy_in_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, start: Callable[..., MlflowTracker]
) -> None:
    place, copy = tmp_path / "mlflow_run.json", tmp_path / "checkpoints" / "step-0000001" / "mlflow_run.json"
    place.write_text("{")
    with pytest.raises(RunError, match=r"mlflow_run\.json is damaged, and no checkpoint has a copy"):
        deliver_outbox(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [place.name]

    assert start().close("KILLED", TIMEOUT) == 0
    run_id = find_mlflow_run_id(tmp_path)
    copy.parent.mkdir(parents=True)
    place.rename(copy)
    place.mkdir()  # damaged, too
    Outbox(tmp_path).mark_delivered(0)
    assert deliver_outbox(tmp_path) == 2
    assert json.loads(place.read_text())["run_id"] == run_id

    def unreadable(*_: object, **__: object) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    # An unreadable file is not a damaged file: nothing is renamed.
    monkeypatch.setattr(Path, "read_text", unreadable)
    with pytest.raises(RunError, match="cannot be read: Input/output error"):
        check_tracking(tmp_path, uri=None, experiment="e")
    assert start().close("FINISHED", 0.0) == 0
    monkeypatch.undo()
    assert find_mlflow_run_id(tmp_path) == run_id and len(list(tmp_path.glob("*.damaged-*"))) == 2


def test_a_full_disk_leaves_whole_lines(tmp_path: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from trainer.tracking.outbox import Outbox\n"
        "outbox = Outbox(Path(sys.argv[1])); outbox.append({'n': 1})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (outbox.size() + 5, resource.RLIM_INFINITY))\n"
        "try: outbox.append({'n': 2, 'text': 'x' * 100})\n"
        "except OSError: pass\n"
        "else: sys.exit('no error')\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))\n"
        "outbox.append({'n': 3})\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert [line for _, line in Outbox(tmp_path).undelivered()] == [b'{"n": 1}\n', b'{"n": 3}\n']


def killed_at_random(folder: Path, *, kills: int, seed: int) -> None:
    """Kill a run at random moments, then let it finish: no record may be missing or stored twice."""
    draw = random.Random(seed)
    run_dir, uri, saved = folder / "run", f"sqlite:///{folder}/mlflow.db", 0
    program = [sys.executable, str(Path(__file__).with_name("track_and_die.py")), str(run_dir), uri]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for kill in range(kills + 1):
        last = 60 * (kills + 1)
        with subprocess.Popen(
            [*program, str(saved), str(last)], stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            assert process.stdout is not None
            if kill < kills:
                assert process.stdout.readline().startswith("step")
                # From the imports over the creation of the database to the middle of an upload.
                time.sleep(draw.uniform(0.0, 5.0))
                process.kill()
            said = process.stdout.read().split("\n")
        reached = max((int(line.split()[1]) for line in said if line.startswith("step ")), default=saved)
        saved = draw.randint(saved, min(reached, last - 1))  # the run goes on from an older checkpoint
    assert "left 0" in said
    run = client(uri).get_run(find_mlflow_run_id(run_dir))
    assert run.info.status == "FINISHED"
    for key in ("train/loss", "speed/clips_per_second"):
        steps = Counter(value.step for value in client(uri).get_metric_history(run.info.run_id, key))
        assert set(steps) == set(range(1, last + 1)) and set(steps.values()) == {1}, key
    experiment = client(uri).get_experiment_by_name("killed")
    assert len(client(uri).search_runs([experiment.experiment_id])) == 1


def test_a_run_killed_at_random_moments_is_whole_in_mlflow(tmp_path: Path) -> None:
    killed_at_random(tmp_path, kills=2, seed=1)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_many_runs_killed_at_random_moments_are_whole_in_mlflow(tmp_path: Path, seed: int) -> None:
    killed_at_random(tmp_path, kills=6, seed=seed)


@pytest.mark.soak
def test_four_first_starts_at_once_share_a_database(tmp_path: Path) -> None:
    program = [sys.executable, str(Path(__file__).with_name("track_and_die.py"))]
    arguments = [f"sqlite:///{tmp_path}/mlflow.db", "0", "20"]
    processes = [
        subprocess.Popen(
            [*program, str(tmp_path / f"run{number}"), *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for number in range(4)
    ]
    assert all("left 0" in process.communicate(timeout=600)[0] for process in processes)
    assert len({find_mlflow_run_id(tmp_path / f"run{number}") for number in range(4)}) == 4
