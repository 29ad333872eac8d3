"""How the parts of a run are wired."""

import errno
import os
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from tests.conftest import MotionSet
from tests.trainer.lock_holder import find_holder
from tests.trainer.ranks import Ranks
from trainer.builder import EXIT_SECONDS, MLFLOW_SECONDS, Builder, exit_seconds
from trainer.checkpoint.metadata import TrainState, write_state
from trainer.config.load import load_recipe
from trainer.distributed.collectives import run_on_all_ranks
from trainer.distributed.environment import find_environment
from trainer.errors import AgreedError, RunError
from trainer.monitoring.run_dir import RunDir
from trainer.monitoring.throughput import ThroughputMeter
from trainer.resilience.signals import TIME_LIMIT
from trainer.resume import Start
from trainer.run import Run

SMALL = Path(__file__).parents[1] / "integration" / "small.yaml"
AGE = 1e6  # seconds since the process started, of which the margin is less than half


def request_with_margin(longest_save: float, seconds_left: float) -> str | None:
    """Of a run whose slowest save took so long, so many seconds before its time limit."""
    recipe = load_recipe(SMALL, [f"run.time_limit_minutes={(AGE + seconds_left) / 60}"])
    environment = find_environment("cpu")
    build = Builder(recipe, RunDir(Path("unused")), environment, mock.Mock(), mock.Mock())
    meter = ThroughputMeter(device=environment.device)
    checkpointer = mock.Mock(longest_save=longest_save)
    return build.stop_request(meter, checkpointer, lambda: False).poll()


def test_a_run_stops_early_enough_for_its_slowest_save(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the last save, one in progress may have to end."""
    monkeypatch.setattr("trainer.resilience.signals.process_age", lambda: AGE)
    for longest_save in (0.0, 100.0, 1000.0):
        needed = 2 * longest_save + MLFLOW_SECONDS
        assert request_with_margin(longest_save, needed) == TIME_LIMIT
        assert request_with_margin(longest_save, 2 * needed + 60) is None


def created_folder(run_dir: Path) -> float:
    run = Run(load_recipe(SMALL), RunDir(run_dir), find_environment("cpu"))
    with mock.patch("trainer.run.describe_environment", dict):  # seconds
        return run._create_folder(Start(run.recipe, {}))


def test_an_attempt_leaves_time_for_the_slowest_save_of_earlier_ones(tmp_path: Path) -> None:
    RunDir(tmp_path).append_event("checkpoint", step=3, path="x", seconds=100.0)
    with Ranks(1) as ranks:
        (longest_save,) = ranks.run(created_folder, tmp_path)
    assert longest_save == 100
    meter = ThroughputMeter(device=torch.device("cpu"))
    assert exit_seconds(meter, mock.Mock(longest_save=longest_save)) == EXIT_SECONDS + 300


def refused_folder(run_dir: Path) -> str:
    run = Run(load_recipe(SMALL), RunDir(run_dir), find_environment("cpu"))

    def busy(path: Path) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    with mock.patch("trainer.checkpoint.retention._remove", busy), pytest.raises(RunError) as refusal:
        run._create_folder(Start(run.recipe, {}))
    return str(refusal.value)


def test_a_folder_that_cannot_be_tidied_is_refused_in_words(tmp_path: Path) -> None:
    in_the_way = tmp_path / "checkpoints" / ".step-0000003.partial"
    in_the_way.parent.mkdir()
    in_the_way.touch()
    with Ranks(1) as ranks:
        (said,) = ranks.run(refused_folder, tmp_path)
    assert str(tmp_path) in said and in_the_way.name in said and "resource busy" in said


def batch_of_a_resumed_run(manifests: Path, run_dir: Path) -> int:
    """Clips per rank and forward pass of two ranks, where memory is free for all eight clips of a step."""
    changes = (f"data.{part}={manifests / part}.arrow" for part in ("train", "val"))
    recipe = load_recipe(SMALL, [*changes, "engine.micro_batch=auto"])
    return Run(recipe, RunDir(run_dir), find_environment("cpu"))._prepare("auto").layout.micro_batch


def test_a_resumed_run_keeps_the_micro_batch_of_its_checkpoint(motion_set: MotionSet, tmp_path: Path) -> None:
    with Ranks(2) as ranks:
        assert ranks.run(batch_of_a_resumed_run, motion_set.root, tmp_path) == [4, 4]
        checkpoint = tmp_path / "checkpoints" / "step-0000003"
        checkpoint.mkdir(parents=True)
        write_state(checkpoint, TrainState(3, 0, 0, {}, 3, 2, 1, {}, 0.0, {}, micro_batch=2))
        assert ranks.run(batch_of_a_resumed_run, motion_set.root, tmp_path) == [2, 2]


def leave_with(error: Exception, run_dir: Path) -> tuple[bool, bool]:
    """End the training by an error: whether rank 1 had written, and whether the folder is free.

    Rank 1 ends later, as a rank does that waits until its shard is written.
    """
    run = Run(load_recipe(SMALL), RunDir(run_dir), find_environment("cpu"))
    with suppress(type(error)), ExitStack() as stack:
        stack.push(run._release_folder)
        run_on_all_ranks(run._acquire_folder)
        run._is_training = True
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
