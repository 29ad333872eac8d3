"""One attempt of a run: set up, resume, train, write the results, exit."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from models import ModelError
from pipelines.dataset.split_overlap import overlap_notes
from pipelines.errors import DataError
from pipelines.worker_pool import usable_cores
from trainer.builder import MLFLOW_SECONDS, Builder, dry_run_batch
from trainer.checkpoint.restore import restore
from trainer.checkpoint.retention import Retention
from trainer.config.schema import Recipe
from trainer.distributed.collectives import (
    broadcast_from_main,
    check_same_on_all_ranks,
    gather_distinct,
    run_on_all_ranks,
)
from trainer.distributed.environment import (
    Environment,
    cores_per_rank,
    describe_environment,
    find_environment,
)
from trainer.distributed.manifest_cache import prefetch_manifests
from trainer.engine.memory_estimate import find_available_memory
from trainer.engine.process_group import COLLECTIVE_MINUTES, connect, disconnect
from trainer.errors import AgreedError, RunError, UserError
from trainer.monitoring.run_dir import RunDir
from trainer.resilience.crash_report import write_crash_report
from trainer.resilience.launcher_watch import LauncherWatch
from trainer.resilience.run_lock import RunLock, acquire
from trainer.resilience.signals import StopRequest, exit_code
from trainer.resilience.stale_semaphores import mark_semaphores, remove_left_semaphores
from trainer.results import write_results
from trainer.resume import Start, find_start
from trainer.setup.embedded_data import render_missing
from trainer.setup.plan_notes import fp8_notes
from trainer.setup.preparation import Preparation, check_decoder, prepare
from trainer.setup.start_checks import (
    check_resume,
    check_run_dir,
    check_tracking,
    check_videos,
    resumed_state,
)
from trainer.system.device import check_fp8, set_device, set_numerics
from trainer.tracking.mlflow_tracker import Status
from trainer.tracking.run_reference import archive_tracking
from trainer.trainer import Trainer


def train(recipe: Recipe, run_dir: Path, resume: str = "auto", allowed: Sequence[str] = ()) -> int:
    """Train a recipe, or resume its training. Returns the exit code of the process.

    resume: `auto` resumes from the newest undamaged checkpoint of the run folder; `never` requires a folder
    without checkpoints; anything else is the path of a checkpoint. allowed: names of settings that may differ
    from the checkpoint's, as the error message spells them.

    Raises UserError, DataError or ModelError for mistakes that the user can correct. After any error but an
    AgreedError this rank stays in the process group, because other ranks may be in a collective; then
    `trainer.system.process_exit` must end the process.
    """
    environment = find_environment(recipe.engine.device)
    mark_semaphores(run_dir)
    set_device(environment.device)
    set_numerics(deterministic=recipe.engine.deterministic)
    torch.set_num_threads(cores_per_rank(environment))
    connect(
        environment,
        patience=max(COLLECTIVE_MINUTES, 2 * (recipe.run.hang_minutes or 0)),
        rendezvous=recipe.run.rendezvous_minutes,
    )
    try:
        code = Run(recipe, RunDir(run_dir), environment).train(resume, allowed)
    except AgreedError:
        disconnect()
        raise
    except (UserError, DataError, ModelError):
        raise
    except Exception as error:
        write_crash_report(run_dir, environment, error)
        raise
    disconnect()
    return code


@dataclass
class Run:
    """One rank's part in an attempt."""

    recipe: Recipe
    folder: RunDir
    environment: Environment

    def __post_init__(self) -> None:
        self.is_main = self.environment.is_main
        kept = self.recipe.run.keep_last, self.recipe.run.keep_best
        self.retention = Retention(self.folder.checkpoints, *kept)
        self._notes = self.environment.notes
        self._launcher = LauncherWatch(self.environment.launcher)
        self._lock: RunLock | None = None  # of the folder, on rank 0
        self._is_training = False

    def train(self, resume: str, allowed: Sequence[str]) -> int:
        """Returns the exit code."""
        check_same_on_all_ranks("the recipe", self.recipe.to_yaml())
        prepared = self._prepare(resume)
        with ExitStack() as stack:
            stack.push(self._release_folder)
            run_on_all_ranks(self._acquire_folder)
            self._notes += run_on_all_ranks(lambda: self._clean_up_node(prepared))
            run_on_all_ranks(lambda: check_resume(self.folder, resume))
            start = find_start(self.recipe, prepared, self.folder, self.retention, resume, allowed)
            longest_save = run_on_all_ranks(lambda: self._create_folder(start))
            build = Builder(start.recipe, self.folder, self.environment, prepared, start)
            meter, checkpointer = build.meter(), build.checkpointer(self.retention, longest_save)
            stop = stack.enter_context(
                run_on_all_ranks(lambda: build.stop_request(meter, checkpointer, self._launcher.is_gone))
            )
            watchdog = stack.enter_context(build.watchdog())
            self._is_training = True
            notes = (*self._notes, *start.notes)
            trainer = build.trainer(meter, checkpointer, stop, watchdog, notes, stack)
            status: Status = "FAILED"
            try:
                # Resumed runs too: with autocast, ZeRO 3 rounds differently in the first pass of a process,
                # and this attempt may have less memory than the one before.
                dry_run_batch(trainer.engine, build.random_clips(), prepared.config.num_classes)
                if start.checkpoint is not None and start.state is not None:
                    restore(trainer.engine, start.checkpoint, start.state)
                if start.reevaluation is None:
                    finished = trainer.fit()
                    if finished:
                        write_results(trainer, start.recipe, prepared, self.folder, is_main=self.is_main)
                else:
                    finished = not start.recipe.evaluation.at_end or trainer.reevaluate()
                status = "FINISHED" if finished else "KILLED"
            except UserError as error:
                trainer.run_logger.log_failure(trainer.step, str(error))
                raise
            finally:
                checkpointer.close()
                trainer.run_logger.close(status, MLFLOW_SECONDS)
            if finished and start.reevaluation is None:
                trainer.run_logger.print_summary()
            code = 0 if finished else self._stop(trainer, stop)
            # Rank 0 may still be writing, and a launcher ends all ranks when one exits.
            dist.barrier()
            return code

    def _prepare(self, resume: str) -> Preparation:
        """Run the checks that need no model, and open the manifests. Collective."""
        recipe = self.recipe
        run_on_all_ranks(self._check_place)
        if recipe.engine.fp8:
            run_on_all_ranks(lambda: check_fp8(self.environment.device))
        memory = find_available_memory(self.environment)
        node_copy = recipe.data.node_copy
        paths = [path for _, path in recipe.data.manifest_fields]
        run_on_all_ranks(lambda: prefetch_manifests(paths, self.environment, node_copy))
        resumed = broadcast_from_main(
            run_on_all_ranks(lambda: resumed_state(self.folder, resume) if self.is_main else None)
        )
        prepared = run_on_all_ranks(
            lambda: prepare(recipe, self.environment.world_size, memory, node_copy, resumed)
        )
        gpu = self.environment.device.type == "cuda"
        run_on_all_ranks(lambda: check_decoder(recipe, prepared.train, gpu=gpu))
        opened = [*prepared.train.manifests, *prepared.val.manifests]
        self._notes += run_on_all_ranks(lambda: check_videos(recipe, opened) if self.is_main else ())
        if self.is_main:
            self._notes += fp8_notes(
                recipe,
                prepared.config,
                prepared.layout,
                self.environment.world_size,
                self.environment.device.type,
            )
        return prepared

    def _check_place(self) -> None:
        """Rank 0 checks MLflow and the run folder, and renders the embedded data set."""
        if self.is_main:
            check_tracking(self.recipe, self.folder.path)
            check_run_dir(self.folder)
            render_missing(self.recipe, workers=usable_cores())

    def _acquire_folder(self) -> None:
        """Rank 0 locks the run folder. Raises RunError where another run has locked it."""
        if self.is_main:
            self._lock = acquire(self.folder.path)

    def _release_folder(self, _: type[BaseException] | None, error: BaseException | None, __: object) -> None:
        """Rank 0 unlocks the run folder when no rank writes into it. Collective after an AgreedError.

        If rank 0 alone failed during the training, it keeps the lock until its process ends: the other ranks
        may still be writing, and another start would delete or overwrite their files.
        """
        if isinstance(error, AgreedError):
            try:
                dist.barrier()  # each rank arrives when its writer thread has ended
            except RuntimeError:
                return
        elif error is not None and self._is_training and self.environment.world_size > 1:
            return
        if self._lock is not None:
            self._lock.release()

    def _clean_up_node(self, prepared: Preparation) -> tuple[str, ...]:
        """The first rank of each node removes semaphores that killed processes of this run left behind. Rank
        0 searches for videos that are in both training and validation. Returns notes.
        """
        left = remove_left_semaphores(self.folder.path) if self.environment.local_rank == 0 else 0
        if not self.is_main:
            return ()
        shared = overlap_notes(prepared.train, prepared.val)
        if not left:
            return shared
        return (
            f"{left} semaphores were removed from /dev/shm; killed processes of this run had left them",
            *shared,
        )

    def _create_folder(self, start: Start) -> float:
        """Rank 0 creates the run folder and records the recipe and the environment. Returns the seconds of
        the slowest save of earlier attempts. Raises RunError where the folder cannot be prepared.
        """
        if not self.is_main:
            return 0.0
        try:
            longest_save = self.folder.find_longest_save()
            if start.checkpoint is None:
                self._set_earlier_start_aside()
            if start.reevaluation is None:
                keeps_recipe = start.is_trained and self.folder.recipe.exists()
                self.folder.create(
                    recipe=None if keeps_recipe else start.recipe.to_yaml(),
                    environment=describe_environment(),
                )
            if start.checkpoint is not None:
                self.folder.copy_missing_from(start.checkpoint)
            if start.reevaluation is None:
                self.retention.clean_up(start.step, start.checkpoint)
            return longest_save
        except OSError as error:
            raise RunError(
                f"the run folder {self.folder.path} cannot be prepared: {error}; correct that, or choose "
                "another with --run-dir"
            ) from error

    def _set_earlier_start_aside(self) -> None:
        """Start a new MLflow run if there is no checkpoint and the recipe differs from the last start's.

        Raises OSError.
        """
        if not self.folder.recipe.exists():
            return
        before = self.folder.recipe.read_text(encoding="utf-8", errors="replace")
        if before == self.recipe.to_yaml():
            return
        aside = archive_tracking(self.folder.path)
        if aside is not None:
            self._notes += (
                "the recipe differs from that of the last start, which left no checkpoint: this start is a "
                f"new MLflow run; the records of the last one are in {aside}",
            )

    def _stop(self, trainer: Trainer, stop: StopRequest) -> int:
        """Log how to resume. Returns the exit code, the same on all ranks. Collective."""
        reasons = gather_distinct(stop.poll())
        trainer.run_logger.log_stop(
            trainer.step,
            " and ".join(reasons),
            trainer.meter.spent.seconds,
            unsaved=None if trainer.is_finite else trainer.checkpointer.describe_newest(),
        )
        return exit_code(reasons)
