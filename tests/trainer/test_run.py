"""How the parts of a run are wired."""

import errno
import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest import mock

import pytest
import torch.distributed as dist

from tests.trainer.ranks import Ranks
from trainer.config.load import load_recipe
from trainer.distributed.collectives import run_on_all_ranks
from trainer.distributed.environment import find_environment
from trainer.errors import AgreedError, RunError
from trainer.monitoring.run_dir import RunDir
from trainer.resilience.run_lock import find_holder
from trainer.run import EXIT_SECONDS, Run

SMALL = Path(__file__).parents[1] / "integration" / "small.yaml"


def longest_and_margin(run_dir: Path) -> tuple[float, float]:
    """Of a run that goes on: seconds that a save may take, and those at which it asks to leave."""
    recipe = load_recipe(SMALL)
    run = Run(recipe, RunDir(run_dir), find_environment("cpu"))
    run._create_folder(None, 0)
    return run.checkpoints.longest, run._stop_request()._margin()


def test_a_new_start_leaves_time_for_what_saves_took_before(tmp_path: Path) -> None:
    RunDir(tmp_path).append_event("checkpoint", step=3, path="x", seconds=100.0)
    with Ranks(1) as ranks:
        ((longest, margin),) = ranks.run(longest_and_margin, tmp_path)
    assert longest == 100
    assert margin == EXIT_SECONDS + 300


def refused_folder(run_dir: Path) -> str:
    run = Run(load_recipe(SMALL), RunDir(run_dir), find_environment("cpu"))

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    with mock.patch("trainer.checkpoint.retention._remove", busy), pytest.raises(RunError) as refusal:
        run._create_folder(None, 0)
    return str(refusal.value)


def test_a_folder_that_cannot_be_tidied_is_refused_in_words(tmp_path: Path) -> None:
    in_the_way = tmp_path / "checkpoints" / ".step-0000003.partial"
    in_the_way.parent.mkdir()
    in_the_way.touch()
    with Ranks(1) as ranks:
        (said,) = ranks.run(refused_folder, tmp_path)
    assert str(tmp_path) in said and in_the_way.name in said and "resource busy" in said


def leave_with(error: Exception, run_dir: Path) -> tuple[bool, bool]:
    """End the training by an error: whether rank 1 had written, and whether the folder is free.

    Rank 1 ends later, as a rank does that waits until its shard is written.
    """
    run = Run(load_recipe(SMALL), RunDir(run_dir), find_environment("cpu"))
    with suppress(type(error)), ExitStack() as stack:
        stack.push(run._release_folder)
        run_on_all_ranks(run._acquire_folder)
        run._trains = True
        if not run.is_main:
            time.sleep(0.5)
            (run_dir / "shard").touch()
        raise error
    found = (run_dir / "shard").exists(), find_holder(run_dir) is None
    dist.barrier()
    return found


def test_the_run_folder_is_held_while_other_ranks_may_write(tmp_path: Path) -> None:
    agreed, alone = tmp_path / "agreed", tmp_path / "alone"
    for run_dir in (agreed, alone):
        run_dir.mkdir()
        (run_dir / "recipe.yaml").touch()
    with Ranks(2) as ranks:
        assert ranks.run(leave_with, AgreedError("all"), agreed)[0] == (True, True)
        assert ranks.run(leave_with, ValueError("rank 0"), alone)[0] == (False, False)
        assert find_holder(alone) is not None
    assert find_holder(alone) is None


def test_a_run_of_one_rank_leaves_its_folder_free_after_any_error(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    with Ranks(1) as ranks:
        assert ranks.run(leave_with, ValueError("rank 0"), tmp_path) == [(False, True)]
