"""Which checkpoints are kept: a good one is never deleted because of a bad one."""

import logging
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from trainer.checkpoint.retention import MARGIN, Retention, step_of

CHECKPOINT_BYTES = 10 * MARGIN


def make(folder: Path, *steps: int) -> list[Path]:
    """Folders of checkpoints with placeholder content."""
    paths = [folder / f"step-{step:07d}" for step in steps]
    for path in paths:
        path.mkdir()
        (path / "shard").write_text("x")
    return paths


def retention_of(folder: Path, keep_last: int = 1, keep_best: bool = True) -> Retention:
    return Retention(folder, keep_last=keep_last, keep_best=keep_best)


def left(folder: Path) -> list[str]:
    return [str(int(path.name[5:])) for path in sorted(folder.glob("step-*"))]


def disk_for(folder: Path, checkpoints: int) -> Any:
    """A disk with space for this many checkpoints and the margin."""

    def usage(_: object) -> Any:
        return mock.Mock(free=(checkpoints - len(left(folder))) * CHECKPOINT_BYTES + MARGIN)

    return mock.patch.object(shutil, "disk_usage", usage)


def publish(retention: Retention, path: Path) -> None:
    retention.add_unconfirmed(path)
    retention.confirm(step_of(path))
    retention.finish_deleting()


def test_a_later_damaged_checkpoint_deletes_no_good_one(tmp_path: Path) -> None:
    """30 is good, 40 has no state.json: resuming from 30 sets 40 aside, and the first save replaces 30."""
    retention = retention_of(tmp_path)
    good, _ = make(tmp_path, 30, 40)
    retention.clean_up(30, good)
    assert left(tmp_path) == ["30"]
    assert [path.name[:22] for path in tmp_path.glob("set-aside-*")] == ["set-aside-step-0000040"]
    (new,) = make(tmp_path, 35)
    publish(retention, new)
    assert left(tmp_path) == ["35"]


def test_a_published_checkpoint_stays_beside_an_unknown_newer_one(tmp_path: Path) -> None:
    retention = retention_of(tmp_path, keep_best=False)
    make(tmp_path, 30, 40)
    publish(retention, tmp_path / "step-0000030")
    assert left(tmp_path) == ["30", "40"]


def test_space_is_freed_by_deleting_all_but_the_newest_good_one(tmp_path: Path) -> None:
    retention = retention_of(tmp_path, keep_last=9)
    good, _ = make(tmp_path, 30, 40)
    retention.clean_up(30, good)
    make(tmp_path, 20, 50)  # another program's
    with disk_for(tmp_path, 2):
        assert retention.free_space(60, CHECKPOINT_BYTES) is None
    assert left(tmp_path) == ["30"]
    with disk_for(tmp_path, 1):
        assert "GiB are free" in (retention.free_space(60, CHECKPOINT_BYTES) or "")
    assert left(tmp_path) == ["30"]


def test_the_oldest_is_deleted_first_and_the_best_last(tmp_path: Path) -> None:
    retention = retention_of(tmp_path, keep_last=9)
    retention.record_accuracy(10, 0.9)
    publish(retention, make(tmp_path, 10, 20, 30)[-1])
    assert retention.delete_one() and left(tmp_path) == ["10", "30"]
    assert retention.delete_one() and left(tmp_path) == ["30"]
    assert not retention.delete_one() and left(tmp_path) == ["30"]


def test_the_highest_accuracy_needs_no_checkpoint_and_is_a_number(tmp_path: Path) -> None:
    retention = retention_of(tmp_path)
    assert retention.highest() is None
    for step, top1 in ((1, float("nan")), (2, 0.75), (3, 0.5)):
        retention.record_accuracy(step, top1)
    assert retention.highest() == 0.75 and retention_of(tmp_path).highest() == 0.75


def test_a_folder_that_cannot_be_deleted_has_a_warning_and_others_are_deleted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    retention = retention_of(tmp_path)
    make(tmp_path, 1, 2, 3)
    (tmp_path / ".step-0000001.deleted" / "in the way").mkdir(parents=True)
    with caplog.at_level(logging.WARNING, logger="trainer.checkpoint.retention"):
        publish(retention, tmp_path / "step-0000003")
    assert left(tmp_path) == ["1", "3"]
    assert f"{tmp_path}/step-0000001 cannot be deleted" in caplog.text


def test_an_accuracy_that_cannot_be_written_is_written_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    retention = retention_of(tmp_path)
    make(tmp_path, 1, 2)
    blocked = tmp_path / ".accuracy.json.partial"
    blocked.mkdir()
    with caplog.at_level(logging.WARNING, logger="trainer"):
        retention.record_accuracy(1, 0.9)
        retention.record_accuracy(2, 0.5)
    assert caplog.text.count("accuracy.json") == 1, "once is enough"
    assert retention.best() == (tmp_path / "step-0000001", 0.9)
    assert not (tmp_path / "accuracy.json").exists()
    blocked.rmdir()
    retention.record_accuracy(3, 0.1)
    assert retention_of(tmp_path).best() == (tmp_path / "step-0000001", 0.9)


def test_older_checkpoints_stay_until_the_newest_is_confirmed(tmp_path: Path) -> None:
    retention = retention_of(tmp_path)
    old, new = make(tmp_path, 10, 20)
    retention.clean_up(20, old)
    retention.add_unconfirmed(new)
    retention.confirm(19)
    retention.finish_deleting()
    assert left(tmp_path) == ["10", "20"], "a finite step before it does not confirm it"
    retention.confirm(20)
    retention.finish_deleting()
    assert left(tmp_path) == ["20"]


def test_a_checkpoint_is_withdrawn_and_restored_if_confirmed_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    retention = retention_of(tmp_path)
    make(tmp_path, 10)
    (new,) = make(tmp_path, 20)
    retention.clean_up(20, new)
    assert retention.withdraw(10, "the gradient of step 21 is not finite")
    assert left(tmp_path) == ["10"] and not retention.withdraw(10, "again")
    assert "step-0000020 is renamed to not-finite-step-0000020: the gradient of step 21" in caplog.text
    retention.confirm(21)
    retention.finish_deleting()
    assert left(tmp_path) == ["20"]
    # The next start finds a checkpoint that a killed process had withdrawn.
    assert retention.withdraw(10, "confirmed already") is False
    new.rename(tmp_path / "not-finite-step-0000020")
    caplog.clear()
    retention = retention_of(tmp_path)
    retention.clean_up(10)
    assert [path.name for path in retention.withdrawn()] == ["not-finite-step-0000020"]
    # A withdrawn checkpoint is the first to be deleted when the disk is full.
    make(tmp_path, 10)
    with disk_for(tmp_path, 1):
        retention.free_space(30, CHECKPOINT_BYTES)
    assert retention.withdrawn() == [] and left(tmp_path) == ["10"]


def test_a_confirmed_checkpoint_is_never_withdrawn(tmp_path: Path) -> None:
    """The first step of each start is not finite, as on a broken device."""
    for path in make(tmp_path, 80, 90, 100):
        publish(retention_of(tmp_path, keep_last=3), path)
    for _ in range(3):
        retention = retention_of(tmp_path, keep_last=3)
        newest = retention.visible()[-1]
        retention.clean_up(step_of(newest), newest)
        retention.withdraw(-1, "the gradient of the first step is not finite")
        assert left(tmp_path) == ["80", "90", "100"]
    # Without the record of confirmations, only the newest is withdrawn.
    (tmp_path / "confirmed.json").unlink()
    for _ in range(3):
        retention = retention_of(tmp_path, keep_last=3)
        newest = retention.visible()[-1]
        retention.clean_up(step_of(newest), newest)
        retention.withdraw(-1, "the gradient of the first step is not finite")
        assert left(tmp_path) == ["80", "90"]
    # Resuming from an older checkpoint removes the confirmations of later steps.
    retention_of(tmp_path).clean_up(80, tmp_path / "step-0000080")
    (new,) = make(tmp_path, 90)
    retention = retention_of(tmp_path)
    retention.clean_up(90, new)
    assert retention.withdraw(-1, "the gradient of step 91 is not finite")


def test_a_link_is_removed_and_its_target_is_kept(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (behind,) = make(elsewhere, 10)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-0000010").symlink_to(behind)
    (good,) = make(folder, 20)
    retention = retention_of(folder)
    publish(retention, good)
    assert left(folder) == ["20"] and not list(folder.glob(".*"))
    (folder / ".step-0000010.deleted").symlink_to(behind)  # as a killed process leaves it
    (folder / ".step-0000011.partial").write_text("no folder")
    retention_of(folder).clean_up(20, good)
    assert not list(folder.glob(".*")) and (behind / "shard").exists()
