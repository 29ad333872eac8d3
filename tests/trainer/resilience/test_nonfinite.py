"""The evidence of a step whose numbers were not finite: all of it is kept or nothing, by all ranks alike."""

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from pipelines.loader import ClipBatch
from tests.trainer.checkpoint.training import Form, checkpoints, make_engine, progress_at
from tests.trainer.ranks import Ranks
from trainer.checkpoint.retention import MARGIN
from trainer.errors import RunError
from trainer.resilience import nonfinite
from trainer.resilience.nonfinite import NonfiniteDiagnosis, NonfiniteReport, SkippedSteps


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    with Ranks(2) as ranks:
        yield ranks


def diagnose(folder: Path, form: Form = "temporal") -> tuple[NonfiniteReport, int]:
    """What is found of a clip of rank 1 that holds a NaN, and the bytes of a checkpoint."""
    engine = make_engine(1, form=form)
    looked = NonfiniteDiagnosis(engine, folder, {"model": {}}, lambda sample: Path(f"{sample}.mp4"))
    clips = torch.zeros(2, 3, 4, 16, 16)
    clips[0, 0, 0, 0, 0] = float("nan") if dist.get_rank() == 1 else 0.0
    labels, ids, keys = (torch.arange(2) for _ in range(3))
    batch = ClipBatch(clips, labels, ids, torch.ones(2, dtype=torch.bool), keys)
    looked.hold(4, 0, batch, torch.tensor(float("nan")))
    checkpointer = checkpoints(folder / "checkpoints")
    checkpointer.begin(engine, progress_at(1))
    checkpointer.withdraw("only its size was asked for")
    return looked.diagnose(4), checkpointer._total_bytes


def test_clips_and_weights_are_kept_for_all_to_read(two: Ranks, tmp_path: Path) -> None:
    for finding, _ in two.run(diagnose, tmp_path):
        assert finding.file == tmp_path / "not-finite" / "step-0000005" / "rank-00001.safetensors"
        assert "not kept" not in finding.reason
    (tmp_path / "ordinary").write_text("")
    files = [path for path in (tmp_path / "not-finite").rglob("*") if path.is_file()]
    assert len(files) == 2
    assert {path.stat().st_mode for path in files} == {(tmp_path / "ordinary").stat().st_mode}


def look_without_memory(folder: Path) -> NonfiniteReport:
    error = torch.OutOfMemoryError("no room")
    traced = mock.Mock(side_effect=error) if dist.get_rank() == 1 else nonfinite.trace_nonfinite
    with mock.patch.object(nonfinite, "trace_nonfinite", traced):
        return diagnose(folder, "scene")[
            0
        ]  # in the other form, batch norms wait for all ranks within a forward


def test_a_rank_without_memory_to_look_leaves_no_other_waiting(two: Ranks, tmp_path: Path) -> None:
    for finding in two.run(look_without_memory, tmp_path):
        assert "not enough memory" in finding.reason and finding.file is None


def look_failing(folder: Path, failing: str) -> NonfiniteReport:
    error = RunError("no room") if failing == "save_weights" else OSError(errno.ENOSPC, "no room")
    with mock.patch.object(nonfinite, failing, mock.Mock(side_effect=error)):
        return diagnose(folder)[0]


@pytest.mark.parametrize("failing", ["save_weights", "write_replay_file"])
def test_what_cannot_be_kept_whole_is_not_kept_and_ends_no_rank(
    two: Ranks, tmp_path: Path, failing: str
) -> None:
    for finding in two.run(look_failing, tmp_path, failing):
        assert finding.file is None
        assert finding.reason.endswith("samples 0, 1; not kept for a replay)")
    assert not list((tmp_path / "not-finite").glob("*"))


def look_with(folder: Path, free: int) -> tuple[NonfiniteReport, int]:
    def usage(path: Path) -> mock.Mock:
        return mock.Mock(free=free if path == folder else 2**40)

    with mock.patch.object(shutil, "disk_usage", usage):
        return diagnose(folder)


def test_no_evidence_takes_the_next_checkpoints_room(two: Ranks, tmp_path: Path) -> None:
    size = two.run(diagnose, tmp_path / "as it is")[0][1]
    evidence = sum(
        os.path.getsize(path) for path in (tmp_path / "as it is" / "not-finite").rglob("*.safetensors")
    )
    short, _ = two.run(look_with, tmp_path / "short", size + MARGIN)[0]
    assert short.file is None and "not kept for a replay" in short.reason
    enough, _ = two.run(look_with, tmp_path / "enough", size + MARGIN + evidence)[0]
    assert enough.file is not None


def test_skipped_steps_up_to_the_limit_return_a_line_and_one_more_raises() -> None:
    skipped = SkippedSteps(limit=2)
    assert skipped.add(7, "the loss is nan") == (
        "step 7 changed nothing, because the loss is nan; 1 of at most 2 such steps in this run"
    )
    assert "2 of at most 2" in skipped.add(9, "the gradient's norm is inf")
    with pytest.raises(
        RunError, match=r"step 12 changed nothing.* makes 3, and at most 2 such steps are allowed .*replay"
    ):
        skipped.add(12, "the loss is nan")


def test_without_allowed_steps_the_first_raises() -> None:
    with pytest.raises(RunError, match="makes 1, and no such step is allowed "):
        SkippedSteps(limit=0).add(1, "the loss is nan")


def test_the_count_continues_from_earlier_attempts_and_is_written() -> None:
    kept: list[int] = []
    skipped = SkippedSteps(limit=5, count=4, keep=kept.append)
    assert "5 of at most 5" in skipped.add(7, "the loss is nan")
    with pytest.raises(RunError):
        skipped.add(8, "the loss is nan")
    assert kept == [5, 6]
