"""Checkpoints of two real ranks: saved during training, visible only when complete, also after faults."""

import dataclasses
import errno
import logging
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.trainer.checkpoint.training import (
    GLOBAL_BATCH,
    checkpoints,
    copied,
    differences,
    make_engine,
    progress_at,
    save,
    train,
)
from tests.trainer.ranks import RankError, Ranks
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.metadata import read_state, shard_name, shards
from trainer.checkpoint.restore import find_newest, read_for_resume, restore
from trainer.checkpoint.retention import MARGIN
from trainer.checkpoint.shards import ShardReader, Snapshot, find_damage, read_index
from trainer.distributed.step_sync import StepTotals
from trainer.engine.deepspeed_engine import Engine
from trainer.errors import RunError


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def visible(folder: Path) -> list[str]:
    """Names of the checkpoints that all ranks see at this moment."""
    dist.barrier()
    names = sorted(path.name for path in folder.glob("*") if path.is_dir() and path.name[0] != ".")
    dist.barrier()
    return names


def hidden(folder: Path) -> list[str]:
    dist.barrier()
    names = sorted(path.name for path in folder.glob(".*"))
    dist.barrier()
    return names


def totals_after(checkpointer: Checkpointer, step: int) -> StepTotals:
    """The totals that the ranks exchange after step `step`, counted from 0."""
    writing = torch.tensor(int(checkpointer.is_writing))
    dist.all_reduce(writing)
    return StepTotals(step, 0.0, "0" * 16, GLOBAL_BATCH, 0, 0, 0, False, int(writing))


def end_writing(checkpointer: Checkpointer) -> None:
    """Wait for the writer thread of this rank."""
    assert checkpointer._save is not None
    checkpointer._save.thread.join()


def assert_holds(path: Path, held: dict[str, torch.Tensor], engine: Engine) -> None:
    reader = ShardReader(read_index(shards(path, read_state(path))))
    for piece in engine.state_shards():
        part = reader.whole(piece.key).view(-1)[piece.start : piece.start + piece.count]
        assert torch.equal(part, held[piece.key]), piece.key


class Held:
    """Delays writing on one rank until it is released."""

    def __init__(self, rank: int) -> None:
        self._may_write = threading.Event()
        write = Snapshot.write

        def late(snapshot: Snapshot, path: Path) -> None:
            if dist.get_rank() == rank:
                assert self._may_write.wait(120)
            write(snapshot, path)

        self._patch = mock.patch.object(Snapshot, "write", late)

    def __enter__(self) -> Callable[[], None]:
        self._patch.start()
        return self._may_write.set

    def __exit__(self, *_: object) -> None:
        self._may_write.set()
        self._patch.stop()


def write_while_training(folder: Path, stage: int, late: int) -> None:
    engine, checkpointer = make_engine(stage), checkpoints(folder)
    train(engine, 0, 1)
    with Held(rank=late) as release:
        then = copied(engine)
        assert checkpointer.begin(engine, progress_at(1))
        assert checkpointer.has(1) and checkpointer.saved_step == -1
        before = totals_after(checkpointer, 0)  # of the step before the save
        train(engine, 1, 2)
        assert differences(then, copied(engine))
        dist.barrier()
        if dist.get_rank() != late:
            end_writing(checkpointer)
        totals = totals_after(checkpointer, 1)
        assert totals.writing == 1 and checkpointer.poll(totals) is None
        assert checkpointer.poll(dataclasses.replace(before, writing=0)) is None
        assert visible(folder) == [] and hidden(folder) == [".step-0000001.partial"]
        release()
    end_writing(checkpointer)
    saved = checkpointer.poll(totals_after(checkpointer, 2))
    assert saved is not None and (saved.step, saved.path) == (1, folder / "step-0000001")
    assert checkpointer.saved_step == 1 and checkpointer.poll(totals_after(checkpointer, 3)) is None
    assert visible(folder) == ["step-0000001"] and hidden(folder) == []
    assert_holds(saved.path, then, engine)
    assert_holds(save(engine, checkpointer, 3), copied(engine), engine)
    assert find_newest(checkpointer.retention) == folder / "step-0000003"
    checkpointer.close()


@pytest.mark.parametrize(("stage", "late"), [(0, 0), (1, 1), (2, 0), (3, 1)])
def test_the_state_at_begin_is_saved_and_is_invisible_until_all_ranks_have_written(
    two: Ranks, tmp_path: Path, stage: int, late: int
) -> None:
    two.run(write_while_training, tmp_path, stage, late)


def fail_to_write(folder: Path, failing: int) -> list[str]:
    logged: list[str] = []
    engine, checkpointer = make_engine(2), checkpoints(folder)
    train(engine, 0, 1)
    write = Snapshot.write

    def into_a_folder(snapshot: Snapshot, path: Path) -> None:
        if dist.get_rank() == failing:
            path.mkdir()
        write(snapshot, path)

    with CollectedLog(logged):
        for step in (1, 2):
            with mock.patch.object(Snapshot, "write", into_a_folder):
                assert checkpointer.begin(engine, progress_at(step))
                assert checkpointer.wait() is None
            assert visible(folder) == [] and hidden(folder) == []
            assert find_newest(checkpointer.retention) is None
            train(engine, step, 1)
    path = save(engine, checkpointer, 3)
    assert find_newest(checkpointer.retention) == path
    assert_holds(path, copied(engine), engine)
    checkpointer.close()
    return logged


def time_saves(folder: Path) -> None:
    engine, checkpointer = make_engine(1), checkpoints(folder, every_minutes=1e-3)
    train(engine, 0, 1)
    for step, seconds in ((1, 0.5), (2, 0.0)):
        with Held(rank=1) as release:
            checkpointer.begin(engine, progress_at(step))
            time.sleep(seconds)
            release()
            saved = checkpointer.wait()
        assert saved is not None
        assert (0.5 <= saved.seconds < 30) if seconds else (0 < saved.seconds < checkpointer.longest_save)
    assert checkpointer.longest_save >= 0.5
    checkpointer.close()


def test_the_seconds_of_a_save_are_from_the_copy_to_the_rename(two: Ranks, tmp_path: Path) -> None:
    two.run(time_saves, tmp_path)


class CollectedLog:
    """Collects the log messages of trainer.checkpoint."""

    def __init__(self, logged: list[str]) -> None:
        self._handler = logging.Handler()
        self._handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]

    def __enter__(self) -> None:
        logging.getLogger("trainer.checkpoint").addHandler(self._handler)

    def __exit__(self, *_: object) -> None:
        logging.getLogger("trainer.checkpoint").removeHandler(self._handler)


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_write_loses_only_this_checkpoint(
    two: Ranks, tmp_path: Path, failing: int
) -> None:
    logged = two.run(fail_to_write, tmp_path, failing)
    for step, text in enumerate((text for text in logged[0] if "no checkpoint after step" in text), start=1):
        assert text.startswith(f"no checkpoint after step {step}: 1 of 2 ranks failed; rank {failing}: ")
        assert shard_name(failing) in text
    assert step == 2


def withdraw_and_continue(folder: Path) -> None:
    engine, checkpointer = make_engine(1), checkpoints(folder, every_minutes=60)
    train(engine, 0, 1)
    checkpointer.withdraw("nothing is being written")
    assert not checkpointer.is_due
    with Held(rank=1) as release:
        checkpointer.begin(engine, progress_at(1))
        threading.Timer(0.05, release).start()
        checkpointer.withdraw("a step of it was bad")
    assert visible(folder) == [] and hidden(folder) == []
    assert not checkpointer.has(1) and checkpointer.wait() is None
    assert checkpointer.is_due == (dist.get_rank() == 0)
    path = save(engine, checkpointer, 2)
    assert not checkpointer.is_due
    assert find_newest(checkpointer.retention) == path
    checkpointer.close()


def test_a_withdrawn_save_is_never_visible_and_the_next_is_due(two: Ranks, tmp_path: Path) -> None:
    two.run(withdraw_and_continue, tmp_path)


def skip_damaged(folder: Path) -> list[str]:
    logged: list[str] = []
    engine, checkpointer = make_engine(2), checkpoints(folder, keep_last=5)
    train(engine, 0, 1)
    paths = [save(engine, checkpointer, step) for step in (1, 2, 3, 4)]
    if dist.get_rank() == 0:
        damaged = paths[3] / shard_name(1)
        content = bytearray(damaged.read_bytes())
        content[len(content) // 2] ^= 4
        damaged.write_bytes(content)
        (paths[2] / shard_name(0)).unlink()
        (paths[1] / "state.json").write_text("{}")
    dist.barrier()
    with CollectedLog(logged):
        assert find_newest(checkpointer.retention) == paths[0]
    with pytest.raises(RunError, match=f"{paths[3]} cannot be used: {shard_name(1)} is damaged"):
        read_for_resume(paths[3], settings={}, allowed=(), verify=True)
    # A save of the same step replaces the damaged checkpoint.
    assert save(engine, checkpointer, 4) == paths[3] == find_newest(checkpointer.retention)
    checkpointer.close()
    return logged


def test_damaged_checkpoints_are_skipped_and_named(two: Ranks, tmp_path: Path) -> None:
    logged, silent = two.run(skip_damaged, tmp_path)
    assert silent == []
    assert logged == [
        f"checkpoint {tmp_path}/step-0000004 is passed over: "
        "shard-00001.safetensors is damaged: its checksum does not fit",
        f"checkpoint {tmp_path}/step-0000003 is passed over: shard-00000.safetensors is missing",
        f"checkpoint {tmp_path}/step-0000002 is passed over: "
        "state.json is damaged: its checksum does not fit",
    ]


def all_damaged(folder: Path) -> str:
    engine, checkpointer = make_engine(2), checkpoints(folder)
    assert find_newest(checkpointer.retention) is None
    train(engine, 0, 1)
    paths = [save(engine, checkpointer, step) for step in (1, 2)]
    checkpointer.close()
    if dist.get_rank() == 0:
        (paths[0] / "state.json").unlink()
        (paths[1] / shard_name(1)).unlink()
    dist.barrier()
    with pytest.raises(RunError) as refusal:
        find_newest(checkpointer.retention)
    return str(refusal.value)


def only_withdrawn(folder: Path) -> str:
    engine, checkpointer = make_engine(2), checkpoints(folder)
    train(engine, 0, 1)
    assert checkpointer.begin(engine, progress_at(1))
    saved = checkpointer.wait()
    checkpointer.withdraw("the gradient of step 2 is not finite")
    dist.barrier()
    assert saved is not None and not saved.path.exists()
    path = saved.path
    with pytest.raises(RunError) as refusal:
        find_newest(checkpointer.retention)
    checkpointer.confirm(1)
    assert find_newest(checkpointer.retention) == path
    checkpointer.withdraw("a clip of step 3 holds a NaN")
    assert find_newest(checkpointer.retention) == path
    checkpointer.close()
    return str(refusal.value)


def test_a_run_with_only_a_withdrawn_checkpoint_does_not_start_from_scratch(
    two: Ranks, tmp_path: Path
) -> None:
    one, other = two.run(only_withdrawn, tmp_path)
    assert one == other and f"{tmp_path}/not-finite-step-0000001" in one and "--resume" in one


def test_a_run_with_only_damaged_checkpoints_does_not_start_from_scratch(two: Ranks, tmp_path: Path) -> None:
    one, other = two.run(all_damaged, tmp_path)
    assert one == other
    assert f"none of the checkpoints in {tmp_path} can be used" in one
    assert "step-0000001: state.json is missing" in one
    assert "step-0000002: shard-00001.safetensors is missing" in one
    assert "--resume PATH" in one and "--resume never" in one and "--run-dir" in one


def write_over_quota(folder: Path, failing: int, number: int) -> list[list[str]]:
    """Save step 4 three times over quota. Returns the visible checkpoints after each attempt."""
    engine, checkpointer = make_engine(1), checkpoints(folder, keep_last=9, every_minutes=60)
    train(engine, 0, 1)
    checkpointer.record_accuracy(1, 0.9)
    for step in (1, 2, 3):
        save(engine, checkpointer, step)
    write = Snapshot.write

    def over_quota(snapshot: Snapshot, path: Path) -> None:
        write(snapshot, path)
        if dist.get_rank() == failing:
            raise OSError(number, os.strerror(number), str(path))

    seen = []
    for _ in range(3):
        with mock.patch.object(Snapshot, "write", over_quota):
            assert checkpointer.begin(engine, progress_at(4))
            assert checkpointer.wait() is None
        seen.append(visible(folder))
        can_help = number in (errno.ENOSPC, errno.EDQUOT) and len(seen) < 3
        assert checkpointer.can_retry == can_help
        assert checkpointer.is_due == (can_help and dist.get_rank() == 0), "at once"
    assert save(engine, checkpointer, 4) and not checkpointer.can_retry
    checkpointer.close()
    return seen


@pytest.mark.parametrize("failing", [0, 1])
def test_a_full_quota_deletes_the_oldest_then_the_best_never_the_newest(
    two: Ranks, tmp_path: Path, failing: int
) -> None:
    seen, _ = two.run(write_over_quota, tmp_path / "quota", failing, errno.EDQUOT)
    assert [[name[-1] for name in names] for names in seen] == [["1", "3"], ["3"], ["3"]]
    seen, _ = two.run(write_over_quota, tmp_path / "broken", failing, errno.EIO)
    assert [[name[-1] for name in names] for names in seen] == [["1", "2", "3"]] * 3


def withdraw_failed(folder: Path) -> list[str]:
    logged: list[str] = []
    engine, checkpointer = make_engine(1), checkpoints(folder)
    train(engine, 0, 1)
    with mock.patch.object(Snapshot, "write", mock.Mock(side_effect=OSError("a failed save"))):
        checkpointer.begin(engine, progress_at(1))
        checkpointer.withdraw("a step of it was bad")
    with CollectedLog(logged):
        save(engine, checkpointer, 2)
    checkpointer.close()
    return logged


def test_the_error_of_a_withdrawn_save_is_not_logged_for_the_next(two: Ranks, tmp_path: Path) -> None:
    assert two.run(withdraw_failed, tmp_path) == [[], []]


def load_without(path: Path) -> str:
    """Damage a shard between the check and the loading. Returns the error message."""
    engine = make_engine(0)
    state = read_for_resume(path, settings={}, allowed=())
    if dist.get_rank() == 0:
        (path / shard_name(1)).write_bytes(b"damaged")
    dist.barrier()
    with pytest.raises(RunError) as refusal:
        restore(engine, path, state)
    return str(refusal.value)


def test_a_shard_that_cannot_be_read_is_named(two: Ranks, tmp_path: Path) -> None:
    path = two.run(save_one, tmp_path, {})[0]
    for logged in two.run(load_without, path):
        assert f"checkpoint {path} cannot be used: {shard_name(1)} cannot be read" in logged


def files_opened_for_headers(path: Path) -> list[str]:
    engine = make_engine(2, seed=1)
    opened: list[str] = []

    def watched(files: list[Path]) -> Any:
        opened.extend(file.name for file in files)
        return read_index(files)

    with mock.patch("trainer.checkpoint.restore.read_index", watched):
        restore(engine, path, read_state(path))
    return opened


def test_each_shards_header_is_read_by_one_rank(two: Ranks, tmp_path: Path) -> None:
    path = two.run(save_one, tmp_path, {})[0]
    assert two.run(files_opened_for_headers, path) == [[shard_name(0)], [shard_name(1)]]


def keep_some(folder: Path) -> list[list[str]]:
    engine, checkpointer = make_engine(0), checkpoints(folder, keep_last=2)
    train(engine, 0, 1)
    seen = []
    for step, top1 in enumerate([0.1, 0.9, 0.2, None, 0.9, 0.3], start=1):
        if top1 is not None:
            checkpointer.record_accuracy(step, top1)
        save(engine, checkpointer, step)
        checkpointer.close()
        seen.append([name[-1] for name in visible(folder)])
    best = checkpointer.retention.best()
    assert best is not None and best[1] == 0.9
    return seen


def test_the_newest_and_the_best_are_kept(two: Ranks, tmp_path: Path) -> None:
    (tmp_path / "step-0000001-copy").mkdir()
    seen, _ = two.run(keep_some, tmp_path)
    stay = [[name for name in names if name != "y"] for names in seen]
    assert stay == [["1"], ["1", "2"], ["2", "3"], ["2", "3", "4"], ["2", "4", "5"], ["2", "5", "6"]]
    assert all("y" in names for names in seen), "a copy under another name is the user's"


def fill_disk(folder: Path) -> tuple[list[list[str]], list[str]]:
    logged: list[str] = []
    engine, checkpointer = make_engine(0), checkpoints(folder, keep_last=9)
    train(engine, 0, 1)
    checkpointer.record_accuracy(1, 0.9)
    for step in (1, 2, 3):
        save(engine, checkpointer, step)
    size = checkpointer._total_bytes
    per_checkpoint = 10 * size
    seen = []

    def usage(_: object) -> Any:
        """A disk with space for three checkpoints and the margin."""
        number = len([path for path in folder.glob("step-*") if path.is_dir()])
        return mock.Mock(free=space + MARGIN - number * per_checkpoint)

    with CollectedLog(logged), mock.patch.object(shutil, "disk_usage", usage):
        space = 2 * per_checkpoint + size
        save(engine, checkpointer, 4)
        seen.append(visible(folder))
        space = per_checkpoint + size - 1  # one byte short, even beside the newest alone
        assert not checkpointer.begin(engine, progress_at(5))
        assert not checkpointer.has(5)
        seen.append(visible(folder))
        assert hidden(folder) == [], "no partial checkpoint is left"
    save(engine, checkpointer, 6)
    seen.append(visible(folder))
    checkpointer.close()
    return seen, logged


def test_old_checkpoints_are_deleted_for_space_but_never_the_newest(two: Ranks, tmp_path: Path) -> None:
    (seen, logged), _ = two.run(fill_disk, tmp_path)
    names = [[name[-1] for name in names] for names in seen]
    assert names == [["1", "3", "4"], ["4"], ["4", "6"]], "the best is deleted last"
    deleted = [text for text in logged if "is deleted: the disk" in text]
    assert [Path(text.split()[0]).name[-1] for text in deleted] == ["2", "3", "1"]
    assert re.search(
        r"no checkpoint after step 5: it needs 0\.\d\d GiB in \S+, where 0\.\d\d GiB are free", logged[-1]
    )


def read_with(path: Path, settings: dict[str, Any], allowed: list[str]) -> str | None:
    try:
        read_for_resume(path, settings=settings, allowed=allowed)
    except RunError as error:
        return str(error)
    return None


def save_one(folder: Path, settings: dict[str, Any]) -> Path:
    engine, checkpointer = make_engine(2), checkpoints(folder, settings=settings)
    return save(engine, checkpointer, 1)


def test_a_changed_setting_is_refused_by_name_unless_allowed(two: Ranks, tmp_path: Path) -> None:
    settings = {"optimisation.steps": 9, "sampling.seed": 3, "data.train": "x" * 100}
    path = two.run(save_one, tmp_path, settings)[0]
    assert two.run(read_with, path, settings, []) == [None, None]
    changed = {**settings, "optimisation.steps": 10, "sampling.views": 2}
    for logged in two.run(read_with, path, changed, []):
        assert f"checkpoint {path} is of another training" in logged
        assert "optimisation.steps: 9 then, 10 now" in logged
        assert "sampling.views: null then, 2 now" in logged
        assert "sampling.seed" not in logged
        assert "--allow-change 'optimisation.steps' --allow-change 'sampling.views'" in logged
    for logged in two.run(read_with, path, changed, ["optimisation.steps"]):
        assert "sampling.views" in logged and "optimisation.steps" not in logged
    assert two.run(read_with, path, changed, ["optimisation.steps", "sampling.views"]) == [None, None]


def load_into_another(path: Path, stage: int) -> str:
    engine = make_engine(stage, num_classes=5)
    with pytest.raises(RunError) as refusal:
        restore(engine, path, read_for_resume(path, settings={}, allowed=()))
    return str(refusal.value)


@pytest.mark.parametrize("stage", [0, 3])
def test_another_model_is_refused_by_tensor(two: Ranks, tmp_path: Path, stage: int) -> None:
    path = two.run(save_one, tmp_path, {})[0]
    for logged in two.run(load_into_another, path, stage):
        assert str(path) in logged and "is of another model" in logged
        assert re.search(r"\S*head\S* has the shape \[4\S*.*\], the model's \[5", logged), logged


KILLING = ("os.fsync", "os.rename", "os.unlink", "shutil.rmtree")


def die_at(folder: Path, call: int | None) -> int:
    """Save five times and keep two. Rank 0 is killed at call number `call` of those that change the disk.

    Returns the number of such calls.
    """
    made = 0
    lock = threading.Lock()

    def counting(function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            nonlocal made
            with lock:
                made += 1
                if made == call:
                    os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return counted

    engine, checkpointer = make_engine(1), checkpoints(folder, keep_last=2)
    for name in KILLING:
        module, _, function = name.partition(".")
        place = {"os": os, "shutil": shutil}[module]
        setattr(place, function, counting(getattr(place, function)))
    for step in range(1, 6):
        train(engine, step, 1)
        save(engine, checkpointer, step)
        checkpointer.close()
    return made


def resume_and_save(folder: Path) -> None:
    """Resume and save in a folder where a rank was killed."""
    engine, checkpointer = make_engine(1), checkpoints(folder, keep_last=2)
    newest = find_newest(checkpointer.retention)
    step = 0
    if newest is not None:
        state = read_for_resume(newest, settings={}, allowed=())
        restore(engine, newest, state)
        step = state.step
    if dist.get_rank() == 0:
        folder.mkdir(exist_ok=True)
        checkpointer.retention.clean_up(step)
    dist.barrier()
    assert hidden(folder) == []
    for later in range(step + 1, step + 4):
        save(engine, checkpointer, later)
    checkpointer.close()
    assert len(visible(folder)) == 2


def assert_visible_is_whole(folder: Path) -> int:
    paths = sorted(folder.glob("step-*"))
    for path in paths:
        assert [find_damage(file) for file in shards(path, read_state(path))] == [None] * read_state(
            path
        ).world_size
    return len(paths)


SOME_CALLS = [2, 5, 6, 24]  # in the first, before and after the rename, and while an old one is deleted


@pytest.fixture(scope="module")
def survivor() -> Iterator[Ranks]:
    """A rank that resumes where others were killed."""
    with Ranks(1) as ranks:
        yield ranks


@pytest.mark.parametrize("call", [*SOME_CALLS, pytest.param(None, marks=pytest.mark.soak)])
def test_visible_checkpoints_are_complete_whenever_a_rank_is_killed(
    survivor: Ranks, tmp_path: Path, call: int | None
) -> None:
    if call is not None:
        calls = [call]
    else:
        with Ranks(1) as ranks:
            number = ranks.run(die_at, tmp_path / "all", None)[0]
        assert number > 40 and assert_visible_is_whole(tmp_path / "all") == 2
        calls = list(range(1, number + 1))
    most = 0
    for call in calls:
        folder = tmp_path / str(call)
        with Ranks(1) as ranks, pytest.raises(RankError, match="it died"):
            ranks.run(die_at, folder, call)
        most = max(most, assert_visible_is_whole(folder))
        survivor.run(resume_and_save, folder)
        assert_visible_is_whole(folder)
    assert most <= 3
