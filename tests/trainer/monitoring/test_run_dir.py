"""What a run's folder remembers from one start to the next."""

import json
import logging
import resource
import signal
import sys
from pathlib import Path

import pytest

from trainer.errors import RunError
from trainer.monitoring.run_dir import RunDir, check_not_of_run
from trainer.system.files import write_json


def test_the_longest_save_of_earlier_starts(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    assert folder.find_longest_save() == 0
    folder.append_event("checkpoint", step=1, path="x")  # as an older version of this program wrote it
    assert folder.find_longest_save() == 0
    for step, seconds in enumerate((2.5, 40.0, 3.0)):
        folder.append_event("checkpoint", step=step, path="x", seconds=seconds)
        folder.append_event("step", step=step, loss=1.0)
    assert folder.find_longest_save() == 40


def test_what_is_told_may_go_unwritten_and_that_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = RunDir(tmp_path)
    folder.events.mkdir()  # as little to be written as a file on a full disk
    folder.quarantine.mkdir()
    bad = [{"path": f"{number}.mp4", "sample": number, "reason": "cut"} for number in range(3)]
    with caplog.at_level(logging.WARNING, logger="trainer"):
        for number in range(3):
            folder.append_event("step", step=number)
            assert folder.add_to_quarantine(bad[:1]) == bad[:1]
    assert sorted(record.getMessage().split()[2] for record in caplog.records) == [
        str(folder.events),
        str(folder.quarantine),
    ]
    folder.events.rmdir()
    folder.append_event("step", step=3)
    assert [event["step"] for event in folder.read_latest_events()] == [3]


def test_bad_videos_that_found_no_room_are_written_with_the_next(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    bad = [{"path": f"{number}.mp4", "sample": number, "reason": "cut"} for number in range(3)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.monitoring.run_dir.append_lines", _full)
        assert folder.add_to_quarantine(bad[:2]) == bad[:2]
        assert folder.add_to_quarantine(bad[:2]) == []
    assert folder.add_to_quarantine(bad) == bad[2:]
    assert folder.read_quarantined() == {("0.mp4", 0), ("1.mp4", 1), ("2.mp4", 2)}


def test_lines_and_files_take_any_text(tmp_path: Path) -> None:
    """Also a lone surrogate, which stands for a byte that is no UTF-8, and what only Python takes for the end
    of a line.
    """
    folder = RunDir(tmp_path)
    odd = {"path": "caf\udce9\u2028\x85.mp4", "sample": 0, "reason": "\ud800"}
    assert folder.add_to_quarantine([odd]) == [odd]
    assert folder.add_to_quarantine([odd]) == []
    write_json(folder.summary, odd)
    assert json.loads(folder.summary.read_text(encoding="utf-8")) == odd


@pytest.mark.skipif(sys.platform != "linux", reason="limits the size of files as a full disk does")
def test_half_a_line_that_found_no_room_is_taken_back(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    folder.append_event("step", step=1)
    before = folder.events.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 20, limits[1]))
        folder.append_event("step", step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert folder.events.read_bytes() == before


def _full(*_: object) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"graph_share": null}', '{"graph_share": 7.0}'])
def test_a_share_that_cannot_be_read_is_measured_anew(tmp_path: Path, text: str) -> None:
    folder = RunDir(tmp_path)
    assert folder.read_graph_share() is None
    folder.decoding.write_text(text)
    assert folder.read_graph_share() is None
    folder.write_graph_share(0.25)
    assert folder.read_graph_share() == 0.25


def test_a_share_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    folder.decoding.mkdir()
    with pytest.raises(RunError, match=r"decoding\.json cannot be written"):
        folder.write_graph_share(0.25)


def test_a_branch_takes_all_along_but_the_mlflow_run(tmp_path: Path) -> None:
    checkpoint = tmp_path / "first" / "checkpoints" / "step-0000005"
    checkpoint.mkdir(parents=True)
    first, branch = RunDir(tmp_path / "first"), RunDir(tmp_path / "branch")
    (tmp_path / "branch").mkdir()
    for file in first.checkpointed_files:
        (checkpoint / file.name).write_text('{"graph_share": 0.5}')
    for folder in (first, branch):
        folder.copy_missing_from(checkpoint)
        assert folder.read_graph_share() == 0.5
        assert folder.quarantine.exists()
    assert first.mlflow.exists()
    assert not branch.mlflow.exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"count": "x", "settings": 1}', "[" * 100_000])
def test_the_count_of_skipped_steps_belongs_to_the_settings(tmp_path: Path, text: str) -> None:
    folder = RunDir(tmp_path)
    assert folder.read_skipped_steps({"rate": 1.0}) == 0
    folder.write_skipped_steps(3, {"rate": 1.0})
    assert RunDir(tmp_path).read_skipped_steps({"rate": 1.0}) == 3
    assert RunDir(tmp_path).read_skipped_steps({"rate": 0.1}) == 0
    folder.skipped.write_text(text)
    assert folder.read_skipped_steps({"rate": 1.0}) == 0


def test_an_export_replaces_no_file_of_a_run(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    checkpoint = run.checkpoints / "step-0000004"
    checkpoint.mkdir(parents=True)
    exported = run.path / "model.onnx", run.path / "mine.safetensors"
    for file in (run.events, run.recipe, checkpoint / "state.json", *exported):
        file.touch()
    for own in (run.recipe, run.weights, run.scores, checkpoint / "state.json", run.path / "logs/0.log"):
        with pytest.raises(RunError, match="is a file of the run in"):
            check_not_of_run(own)
    link = tmp_path / "link.safetensors"
    link.symlink_to(run.weights)
    with pytest.raises(RunError, match=r"link\.safetensors is a file of the run in"):
        check_not_of_run(link)
    for other in (*exported, run.path / "other.safetensors", tmp_path / "weights.safetensors"):
        check_not_of_run(other)
