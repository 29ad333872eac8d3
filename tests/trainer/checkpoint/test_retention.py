"""Which checkpoints stay: never is a good one deleted for the sake of one that is not."""

import logging
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from trainer.checkpoint.retention import MARGIN, Retention, step_of

ROOM_OF_ONE = 10 * MARGIN


def make(folder: Path, *steps: int) -> list[Path]:
    """Folders of checkpoints; what lies in them is of no account here."""
    paths = [folder / f"step-{step:07d}" for step in steps]
    for path in paths:
        path.mkdir()
        (path / "shard").write_text("x")
    return paths


def shelf_of(folder: Path, keep_last: int = 1, keep_best: bool = True) -> Retention:
    return Retention(folder, keep_last=keep_last, keep_best=keep_best)


def left(folder: Path) -> list[str]:
    return [str(int(path.name[5:])) for path in sorted(folder.glob("step-*"))]


def disk_for(folder: Path, checkpoints: int) -> Any:
    """A disk with room for so many checkpoints and the margin."""

    def usage(_: object) -> Any:
        return mock.Mock(free=(checkpoints - len(left(folder))) * ROOM_OF_ONE + MARGIN)

    return mock.patch.object(shutil, "disk_usage", usage)


def publish(retention: Retention, path: Path) -> None:
    retention.add_unconfirmed(path)
    retention.confirm(step_of(path))
    retention.finish_deleting()


def test_a_later_one_that_is_damaged_costs_no_good_one(tmp_path: Path) -> None:
    """30 is good, 40 has no state.json: going on from 30, the first save deletes neither 30's heir nor 30."""
    retention = shelf_of(tmp_path)
    good, _ = make(tmp_path, 30, 40)
    retention.clean_up(30, good)
    assert left(tmp_path) == ["30"]
    assert [path.name[:22] for path in tmp_path.glob("set-aside-*")] == ["set-aside-step-0000040"]
    (new,) = make(tmp_path, 35)
    publish(retention, new)
    assert left(tmp_path) == ["35"]


def test_what_was_published_stays_whatever_else_shows_up(tmp_path: Path) -> None:
    retention = shelf_of(tmp_path, keep_best=False)
    make(tmp_path, 30, 40)
    publish(retention, tmp_path / "step-0000030")
    assert left(tmp_path) == ["30", "40"]


def test_room_is_made_of_anything_but_the_newest_good_one(tmp_path: Path) -> None:
    retention = shelf_of(tmp_path, keep_last=9)
    good, _ = make(tmp_path, 30, 40)
    retention.clean_up(30, good)
    make(tmp_path, 20, 50)  # another program's
    with disk_for(tmp_path, 2):
        assert retention.free_space(60, ROOM_OF_ONE) is None
    assert left(tmp_path) == ["30"]
    with disk_for(tmp_path, 1):
        assert "GiB are free" in (retention.free_space(60, ROOM_OF_ONE) or "")
    assert left(tmp_path) == ["30"]


def test_one_is_given_up_oldest_first_and_the_best_last(tmp_path: Path) -> None:
    retention = shelf_of(tmp_path, keep_last=9)
    retention.record_accuracy(10, 0.9)
    publish(retention, make(tmp_path, 10, 20, 30)[-1])
    assert retention.delete_one() and left(tmp_path) == ["10", "30"]
    assert retention.delete_one() and left(tmp_path) == ["30"]
    assert not retention.delete_one() and left(tmp_path) == ["30"]


def test_the_highest_accuracy_needs_no_checkpoint_and_is_a_number(tmp_path: Path) -> None:
    retention = shelf_of(tmp_path)
    assert retention.highest() is None
    for step, top1 in ((1, float("nan")), (2, 0.75), (3, 0.5)):
        retention.record_accuracy(step, top1)
    assert retention.highest() == 0.75 and shelf_of(tmp_path).highest() == 0.75


def test_what_cannot_be_deleted_hinders_nothing_else(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    retention = shelf_of(tmp_path)
    make(tmp_path, 1, 2, 3)
    (tmp_path / ".step-0000001.deleted" / "in the way").mkdir(parents=True)
    with caplog.at_level(logging.WARNING, logger="trainer.checkpoint.retention"):
        publish(retention, tmp_path / "step-0000003")
    assert left(tmp_path) == ["1", "3"]
    assert f"{tmp_path}/step-0000001 cannot be deleted" in caplog.text


def test_an_accuracy_that_cannot_be_written_is_remembered(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    retention = shelf_of(tmp_path)
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
    assert shelf_of(tmp_path).best() == (tmp_path / "step-0000001", 0.9)


def test_older_ones_stay_until_a_finite_step_has_followed(tmp_path: Path) -> None:
    retention = shelf_of(tmp_path)
    old, new = make(tmp_path, 10, 20)
    retention.clean_up(20, old)
    retention.add_unconfirmed(new)
    retention.confirm(19)
    retention.finish_deleting()
    assert left(tmp_path) == ["10", "20"], "what was finite before it says nothing of it"
    retention.confirm(20)
    retention.finish_deleting()
    assert left(tmp_path) == ["20"]


def test_one_of_useless_weights_is_withdrawn_and_comes_back_if_they_are_good_after_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    retention = shelf_of(tmp_path)
    make(tmp_path, 10)
    (new,) = make(tmp_path, 20)
    retention.clean_up(20, new)
    assert retention.withdraw(10, "the gradient of step 21 is not finite")
    assert left(tmp_path) == ["10"] and not retention.withdraw(10, "again")
    assert "step-0000020 is renamed to not-finite-step-0000020: the gradient of step 21" in caplog.text
    retention.confirm(21)
    retention.finish_deleting()
    assert left(tmp_path) == ["20"]
    # A process that ended meanwhile leaves it where the next start names it.
    assert retention.withdraw(10, "confirmed already") is False
    new.rename(tmp_path / "not-finite-step-0000020")
    caplog.clear()
    retention = shelf_of(tmp_path)
    retention.clean_up(10)
    assert [path.name for path in retention.withdrawn()] == ["not-finite-step-0000020"]
    # It is in nobody's way: the first to go for want of room, and once the run has got past it.
    make(tmp_path, 10)
    with disk_for(tmp_path, 1):
        retention.free_space(30, ROOM_OF_ONE)
    assert retention.withdrawn() == [] and left(tmp_path) == ["10"]


def test_what_was_confirmed_once_is_never_withdrawn(tmp_path: Path) -> None:
    """Each start meets nothing finite at its first step, as on a broken device."""
    for path in make(tmp_path, 80, 90, 100):
        publish(shelf_of(tmp_path, keep_last=3), path)
    for _ in range(3):
        retention = shelf_of(tmp_path, keep_last=3)
        newest = retention.visible()[-1]
        retention.clean_up(step_of(newest), newest)
        retention.withdraw(-1, "the gradient of the first step is not finite")
        assert left(tmp_path) == ["80", "90", "100"]
    # Of an unconfirmed one, only the newest.
    (tmp_path / "confirmed.json").unlink()
    for _ in range(3):
        retention = shelf_of(tmp_path, keep_last=3)
        newest = retention.visible()[-1]
        retention.clean_up(step_of(newest), newest)
        retention.withdraw(-1, "the gradient of the first step is not finite")
        assert left(tmp_path) == ["80", "90"]
    # Going back takes the word back that later steps of that branch were good.
    shelf_of(tmp_path).clean_up(80, tmp_path / "step-0000080")
    (new,) = make(tmp_path, 90)
    retention = shelf_of(tmp_path)
    retention.clean_up(90, new)
    assert retention.withdraw(-1, "the gradient of step 91 is not finite")


def test_a_link_is_removed_and_not_what_lies_behind_it(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (behind,) = make(elsewhere, 10)
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-0000010").symlink_to(behind)
    (good,) = make(folder, 20)
    retention = shelf_of(folder)
    publish(retention, good)
    assert left(folder) == ["20"] and not list(folder.glob(".*"))
    (folder / ".step-0000010.deleted").symlink_to(behind)  # where a process was killed meanwhile
    (folder / ".step-0000011.partial").write_text("no folder")
    shelf_of(folder).clean_up(20, good)
    assert not list(folder.glob(".*")) and (behind / "shard").exists()
