"""From a recipe to a run: find out who we are, check everything, build the parts, train, leave."""

import dataclasses
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from models import ModelError, UniFormerV2
from models.cost import multiply_accumulates, parameter_count, train_step_flops
from pipelines.dataset.split_overlap import overlap_notes
from pipelines.errors import DataError
from pipelines.loader import ClipLoader
from pipelines.worker_pool import usable_cores
from trainer.checkpoint.best_weights import BestWeights, write_best
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.metadata import WEIGHTS, TrainState, check_allowed_names
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.weights import check_finite, save_weights
from trainer.checkpoint.weights_origin import WeightsOrigin, recorded, weights_origin_of
from trainer.config.schema import Recipe
from trainer.distributed.collectives import broadcast_from_main, check_same_on_all_ranks, run_on_all_ranks
from trainer.distributed.environment import (
    Environment,
    cores_per_rank,
    describe_environment,
    find_environment,
)
from trainer.distributed.manifest_cache import prefetch_manifests
from trainer.distributed.slurm_step import find_job_end
from trainer.distributed.step_sync import StepSync
from trainer.engine.deepspeed_engine import Engine
from trainer.engine.memory_estimate import find_available_memory
from trainer.engine.process_group import COLLECTIVE_MINUTES, connect, disconnect
from trainer.errors import AgreedError, RunError, UserError
from trainer.evaluation.final_scores import FinalScoreWriter
from trainer.evaluation.finished_run import Reevaluation, changed_settings, choose_reevaluation, is_finished
from trainer.evaluation.scores import ScoreMetadata
from trainer.lr_schedule import Schedule
from trainer.monitoring.console import open_display
from trainer.monitoring.data_bottleneck import DataBottleneckMonitor
from trainer.monitoring.run_dir import RunDir
from trainer.monitoring.throughput import RunTotals, ThroughputMeter
from trainer.resilience.crash_report import write_crash_report
from trainer.resilience.launcher_watch import LauncherWatch
from trainer.resilience.nonfinite import NonfiniteDiagnosis
from trainer.resilience.run_lock import RunLock, acquire
from trainer.resilience.signals import StopRequest, exit_code
from trainer.resilience.skipped_steps import SkippedSteps
from trainer.resilience.stale_semaphores import mark_semaphores, remove_left_semaphores
from trainer.resilience.watchdog import Watchdog
from trainer.run_logger import RunLogger
from trainer.setup.embedded_data import render_missing
from trainer.setup.loaders import open_loaders
from trainer.setup.preparation import (
    Preparation,
    check_decoder,
    manifests,
    prepare,
    preprocessing,
    resume_settings,
)
from trainer.setup.start_checks import check_resume, check_run_dir, check_tracking, check_videos
from trainer.setup.starting_weights import StartingWeights, plan_starting_weights
from trainer.setup.tracking_start import monitor_node, record_datasets, run_description
from trainer.system.device import set_device, set_numerics
from trainer.tracking.mlflow_tracker import MlflowTracker, Status
from trainer.tracking.run_reference import archive_tracking
from trainer.trainer import Trainer

MLFLOW_SECONDS = 60.0  # seconds that the end of a run waits for MLflow
EXIT_SECONDS = MLFLOW_SECONDS + 15.0  # seconds from the last step to the end, without saving


def train(recipe: Recipe, run_dir: Path, resume: str = "auto", allowed: Sequence[str] = ()) -> int:
    """Train, or go on training, as the recipe says. Returns the process's exit code.

    run_dir: the run's own folder. resume: `auto` goes on from the newest good checkpoint in it, `never` wants
    none to be there, anything else is the path of the checkpoint to go on from. allowed: settings that may
    differ from the checkpoint's, by the names that a refusal gives them.

    Raises UserError for what its maker can mend. After any error but an AgreedError the rank stays in the
    process group, in which others may be at work; `trainer.system.process_exit` has to end its process.
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
        raise  # told in words
    except Exception as error:
        write_crash_report(run_dir, environment, error)
        raise
    disconnect()
    return code


class Run:
    """One rank's part in a run."""

    def __init__(self, recipe: Recipe, folder: RunDir, environment: Environment) -> None:
        self.recipe = recipe
        self.folder = folder
        self.environment = environment
        self.is_main = environment.is_main
        self._meter: ThroughputMeter | None = None
        self._notes = environment.notes
        self._launcher = LauncherWatch(environment.launcher)
        self._lock: RunLock | None = None  # of the folder, on rank 0
        self._trains = False
        self._trained: TrainState | None = None  # the last, where no step is left to do
        self._again: Reevaluation | None = None  # where all results of that are written, too
        self._starting: StartingWeights | None = None  # that a new training begins from
        self.checkpoints = Checkpointer(
            Retention(folder.checkpoints, keep_last=recipe.run.keep_last, keep_best=recipe.run.keep_best),
            every_minutes=recipe.run.checkpoint_every_minutes,
            attachments=folder.checkpointed_files,
        )

    def train(self, resume: str, allowed: Sequence[str]) -> int:
        check_same_on_all_ranks("the recipe", self.recipe.to_yaml())
        run_on_all_ranks(self._check_place)
        run_on_all_ranks(self._render)
        room = find_available_memory(self.environment)
        node_copy = self.recipe.data.node_copy
        run_on_all_ranks(lambda: prefetch_manifests(manifests(self.recipe), self.environment, node_copy))
        prepared = run_on_all_ranks(
            lambda: prepare(self.recipe, self.environment.world_size, room, node_copy)
        )
        gpu = self.environment.device.type == "cuda"
        run_on_all_ranks(lambda: check_decoder(self.recipe, prepared.train, gpu=gpu))
        self._notes += run_on_all_ranks(lambda: self._check_videos(prepared))
        with ExitStack() as stack:
            stack.push(self._release_folder)
            run_on_all_ranks(self._acquire_folder)
            self._notes += run_on_all_ranks(lambda: self._first_notes(prepared))
            run_on_all_ranks(lambda: check_resume(self.folder, resume))
            found, state = self._find_checkpoint(prepared, resume, allowed)
            began = self._began_from(prepared, state)
            self._again = self._evaluates_again(prepared, found, state)
            run_on_all_ranks(lambda: self._create_folder(found, 0 if state is None else state.step))
            stop = stack.enter_context(run_on_all_ranks(self._stop_request))
            watchdog = stack.enter_context(self._watchdog())
            self._trains = True
            trainer = self._build(prepared, found, state, began, stop, watchdog, stack)
            status: Status = "FAILED"
            try:
                # A run that goes on, too: what ZeRO 3 gathers in a process's first pass it rounds otherwise
                # with autocast, and memory may be less here than where the run began.
                trainer.dry_run_batch(self._random_clips(prepared))
                if found is not None and state is not None:
                    self.checkpoints.load(trainer.engine, found, state)
                finished = trainer.fit()
                if finished and self._again is None:
                    self._write_results(prepared, trainer)
                status = "FINISHED" if finished else "KILLED"
            except UserError as error:
                trainer.run_logger.log_failure(trainer.step, str(error))
                raise
            finally:
                self.checkpoints.finish()
                trainer.run_logger.close(status, MLFLOW_SECONDS)
            if finished and self._again is None:
                trainer.run_logger.print_summary()
            code = 0 if finished else self._leave(trainer, stop)
            # A launcher that sees one rank gone soon ends the others: rank 0 may still be at work.
            dist.barrier()
            return code

    def _stop_request(self) -> StopRequest:
        return StopRequest(
            announce=self.is_main,
            stop_file=self.folder.stop if self.is_main else None,
            time_limit=self.recipe.run.time_limit_minutes,
            job_end=find_job_end(),
            margin=self._time_to_leave,
            launcher_is_gone=self._launcher.is_gone,
        )

    def _time_to_leave(self) -> float:
        """Seconds from the time limit's word to the end; the ranks agree on it a step or two later."""
        step = 0.0 if self._meter is None else self._meter.rates().seconds_per_step
        return EXIT_SECONDS + 3 * step + 3 * self.checkpoints.longest

    def _watchdog(self) -> Watchdog:
        minutes = self.recipe.run.hang_minutes
        return Watchdog(
            self.folder.path,
            rank=self.environment.rank,
            world_size=self.environment.world_size,
            limit=None if minutes is None else 60 * minutes,
        )

    def _check_place(self) -> None:
        """Rank 0 alone speaks to MLflow and writes into the folder."""
        if self.is_main:
            check_tracking(self.recipe, self.folder.path)
            check_run_dir(self.folder)

    def _render(self) -> None:
        if self.is_main:
            render_missing(self.recipe, workers=usable_cores())

    def _check_videos(self, prepared: Preparation) -> tuple[str, ...]:
        if not self.is_main:
            return ()
        return check_videos(self.recipe, [*prepared.train.manifests, *prepared.val.manifests])

    def _acquire_folder(self) -> None:
        """Rank 0 acquires the run folder. Raises RunError where another run has it."""
        if self.is_main:
            self._lock = acquire(self.folder.path)

    def _release_folder(self, _: type[BaseException] | None, error: BaseException | None, __: object) -> None:
        """Rank 0 releases the run folder once no rank writes into it. Collective after an AgreedError.

        Where rank 0 failed alone in the training, it keeps the lock until its process ends: the other ranks
        may still be writing, and another start would remove or share what they write.
        """
        if isinstance(error, AgreedError):
            try:
                dist.barrier()  # the other ranks have waited for their writers, as this one has
            except RuntimeError:
                return
        elif error is not None and self._trains and self.environment.world_size > 1:
            return
        if self._lock is not None:
            self._lock.release()

    def _first_notes(self, prepared: Preparation) -> tuple[str, ...]:
        """Each node's first rank removes what killed processes of this run left there; rank 0 looks for
        videos that are in training and validation. Both in words.
        """
        left = remove_left_semaphores(self.folder.path) if self.environment.local_rank == 0 else 0
        if not self.is_main:
            return ()
        shared = overlap_notes(prepared.train, prepared.val)
        if not left:
            return shared
        return (
            f"{left} semaphores were removed from /dev/shm, which killed processes of this run left",
            *shared,
        )

    def _find_checkpoint(
        self, prepared: Preparation, resume: str, allowed: Sequence[str]
    ) -> tuple[Path, TrainState] | tuple[None, None]:
        """What to go on from, checked before anything is written; nothing for a new run."""
        now = resume_settings(self.recipe, prepared)
        found = None
        if resume != "never":
            found = self.checkpoints.newest() if resume == "auto" else Path(resume)
        if found is None:
            run_on_all_ranks(lambda: check_allowed_names(allowed, now))
            return None, None
        return found, self.checkpoints.read(found, settings=now, allowed=allowed, verify=resume != "auto")

    def _began_from(self, prepared: Preparation, state: TrainState | None) -> WeightsOrigin:
        """The weights that the training begins, or began, from, as its checkpoints say it.

        A start that goes on records the ones that it began from, whatever it is given.
        """
        weights = self.recipe.model.weights
        if state is None:
            if weights is not None:
                clips = preprocessing(self.recipe, prepared.config)
                self._starting = run_on_all_ranks(
                    lambda: plan_starting_weights(weights, prepared.config, prepared.train.class_names, clips)
                )
            return run_on_all_ranks(lambda: weights_origin_of(weights) if self.is_main else None)
        began = recorded(state)
        file = None if began is None else Path(began["file"])
        if weights != file:
            self._notes += (
                f"model.weights is recorded as {file}, which the training began from, and not as {weights}: "
                "going on reads neither",
            )
        model = self.recipe.model.model_copy(update={"weights": file})
        self.recipe = self.recipe.model_copy(update={"model": model})
        return began

    def _create_folder(self, found: Path | None, step: int) -> None:
        """Rank 0 makes the folder for a run that goes on after `step`, and writes down what is run where."""
        if not self.is_main:
            return
        try:
            # What saves took before: the first of this start is to leave in time, too.
            self.checkpoints.longest = self.folder.find_longest_save()
            if self._again is not None and found is not None:
                self.folder.copy_missing_from(found)
                return
            if found is None:
                self._part_from_earlier_start()
            trained = self._trained if self.folder.recipe.exists() else None
            self.folder.create(
                recipe=None if trained else self.recipe.to_yaml(), environment=describe_environment()
            )
            if found is not None:
                self.folder.copy_missing_from(found)
            self.checkpoints.retention.clean_up(step, found)
        except OSError as error:
            raise RunError(
                f"the run folder {self.folder.path} cannot be prepared: {error}; mend that, or choose "
                "another with --run-dir"
            ) from error

    def _part_from_earlier_start(self) -> None:
        """A start without a checkpoint begins anew: with other settings than the last start in the folder, as
        another MLflow run. Raises OSError.
        """
        if not self.folder.recipe.exists():
            return
        before = self.folder.recipe.read_text(encoding="utf-8", errors="replace")
        if before == self.recipe.to_yaml():
            return
        aside = archive_tracking(self.folder.path)
        if aside is not None:
            self._notes += (
                "the run begins anew with other settings than its last start, which left no checkpoint: as "
                f"a new MLflow run; what it told the last one lies in {aside}",
            )

    def _evaluates_again(
        self, prepared: Preparation, found: Path | None, state: TrainState | None
    ) -> Reevaluation | None:
        """How a run that has ended is evaluated again; None for a training. Collective."""
        if found is None or state is None:
            return None
        steps = Schedule.of(self.recipe, prepared.sampler.steps_per_epoch).total_steps
        self._trained = state if state.step >= steps else None
        ended = broadcast_from_main(self.is_main and is_finished(self.folder, found, state, steps))
        return choose_reevaluation(self.recipe, state) if ended else None

    def _build(
        self,
        prepared: Preparation,
        found: Path | None,
        state: TrainState | None,
        began: WeightsOrigin,
        stop: StopRequest,
        watchdog: Watchdog,
        stack: ExitStack,
    ) -> Trainer:
        recipe, environment = self.recipe, self.environment
        torch.manual_seed(recipe.seed)
        engine = Engine(
            run_on_all_ranks(lambda: self._model(prepared)),
            recipe,
            environment,
            prepared.layout,
        )
        fixed = {**resume_settings(recipe, prepared), WEIGHTS: began}
        schedule = Schedule.of(recipe, prepared.sampler.steps_per_epoch)
        self._meter = meter = ThroughputMeter(
            device=environment.device,
            world_size=environment.world_size,
            # Utilisation is of useful work: what is computed twice to save memory does not count.
            flops_per_clip=train_step_flops(prepared.config, recomputed_blocks=0),
        )
        step = 0
        if state is not None:
            step = state.step
            spent, on_devices = self.folder.read_last_spent()
            before = state.spent.get("device_seconds")
            meter.restore(
                state.spent,
                done_again=spent - RunTotals.of(state.spent).seconds,
                device_done_again=None if on_devices is None or before is None else on_devices - before,
                restarts=self._again is None,
            )
        train, val, notes = open_loaders(
            recipe, environment, prepared, self.folder, first_step=step, stack=stack
        )
        run_logger = self._open_run_logger(prepared, schedule, step, found, state, stack)
        for line in (*self._notes, *prepared.notes, *notes):
            run_logger.log_warning(line)
        run_logger.log_note(train.resources.summary)
        for line in self._starting.report if self._starting is not None else ():
            run_logger.log_note(line)
        return Trainer(
            engine=engine,
            sampler=prepared.sampler,
            schedule=schedule,
            train_loader=train,
            val_loader=val,
            classes=prepared.config.num_classes,
            checkpoints=self.checkpoints,
            run_logger=run_logger,
            meter=meter,
            stop=stop,
            watchdog=watchdog,
            diagnosis=NonfiniteDiagnosis(
                engine, self.folder.path, self._description(prepared), prepared.train.path
            ),
            skipped=self._skipped_steps(fixed),
            settings=fixed,
            description=self._description(prepared),
            tally=StepSync(environment.device),
            data_monitor=DataBottleneckMonitor(train, cores_per_rank(environment)),
            bad_share=recipe.data.bad_share,
            evaluates_at_end=recipe.evaluation.at_end,
            keeps_best=recipe.run.keep_best,
            final_scores=self._final_scores(prepared, val),
            evaluates_only=self._again is not None,
            step=step,
            clips=0 if state is None else state.clips,
            bad=0 if state is None else state.bad,
            clips_before=0 if state is None else state.clips,
            bad_before=0 if state is None else state.bad,
            saved_step=-1 if found is None else step,
            best=self.checkpoints.best_accuracy(),
        )

    def _final_scores(self, prepared: Preparation, loader: ClipLoader) -> FinalScoreWriter:
        val, evaluation = prepared.val, self.recipe.evaluation
        return FinalScoreWriter(
            self.folder.scores,
            self.folder.best_effort,
            loader,
            val,
            ScoreMetadata(
                manifest=self.recipe.data.val.name,
                fingerprint=val.fingerprint,
                class_names=val.class_names,
                clips=evaluation.clips,
                crops=evaluation.crops,
                step=None,
                source=str(self.folder.path),
            ),
            batch=evaluation.batch,
            classes=prepared.config.num_classes,
        )

    def _skipped_steps(self, fixed: dict[str, Any]) -> SkippedSteps:
        """Of this run, by rank 0's account. Collective."""
        # A change of precision is a remedy: what it was before does not count.
        settings = {**fixed, "engine.precision": self.recipe.engine.precision}
        found = [self.folder.read_skipped_steps(settings) if self.is_main else 0]
        dist.broadcast_object_list(found)
        return SkippedSteps(
            self.recipe.optimisation.skipped_steps,
            found[0],
            keep=(lambda count: self.folder.write_skipped_steps(count, settings)) if self.is_main else None,
        )

    def _description(self, prepared: Preparation) -> dict[str, Any]:
        """What is needed to use the weights, as it stands in checkpoints and in `weights.safetensors`."""
        if self._trained is not None:
            return self._trained.description
        return {
            "model": dataclasses.asdict(prepared.config),
            "class_names": list(prepared.train.class_names),
            "preprocessing": preprocessing(self.recipe, prepared.config),
            "recipe": json.loads(self.recipe.model_dump_json()),
        }

    def _model(self, prepared: Preparation) -> UniFormerV2:
        model = UniFormerV2(prepared.config)
        if self._starting is not None:
            self._starting.load(model)
        return model

    def _open_run_logger(
        self,
        prepared: Preparation,
        schedule: Schedule,
        step: int,
        found: Path | None,
        state: TrainState | None,
        stack: ExitStack,
    ) -> RunLogger:
        recipe, environment = self.recipe, self.environment
        display = stack.enter_context(
            open_display(
                is_main=self.is_main,
                total_steps=schedule.total_steps,
                first_step=step,
                every=recipe.run.log_every_steps,
            )
        )
        tracker = MlflowTracker(
            self.folder.path,
            uri=recipe.tracking.uri,
            experiment=recipe.tracking.experiment,
            run_name=self.folder.path.name,
            parent=recipe.tracking.parent_run,
            step=step,
            trains=self._again is None,
            enabled=self.is_main and recipe.tracking.enabled,
        )
        if found is None:  # MLflow never changes a parameter; what is run now stands in the recipe below
            # Not the name, which the MLflow run has: MLflow's comparison plots the first three that differ.
            tracker.record_params(
                {name: value for name, value in recipe.flattened().items() if name != "name"}
            )
        fingerprints = {
            "train_fingerprint": prepared.train.fingerprint,
            "val_fingerprint": prepared.val.fingerprint,
        }
        starts = 1 if self._meter is None else self._meter.spent.starts
        trains = self._again is None and recipe.tracking.enabled
        if self.is_main and trains:
            if found is None:
                record_datasets(tracker, prepared)
            # After the first start, parameters may be out of date: the artifact recipe.yaml is not.
            described = run_description(recipe, prepared, environment, self.folder.path, starts)
            tracker.set_tags({**fingerprints, **described.tags(), "total_steps": schedule.total_steps})
        if trains and environment.local_rank == 0:
            stack.enter_context(monitor_node(environment, self.folder.path, tracker))
        if trains:
            tracker.upload_artifact(self.folder.recipe)
            tracker.upload_artifact(self.folder.environment)
        run_logger = RunLogger(
            self.folder,
            tracker,
            display,
            total_steps=schedule.total_steps,
            every_steps=recipe.tracking.every_steps,
            class_names=prepared.train.class_names,
            best=self.checkpoints.retention.highest() if self.is_main else None,
            again=self._again,
        )
        layout = prepared.layout
        ranks = f"{environment.world_size} rank{'s' if environment.world_size > 1 else ''}"
        begins = "starting" if found is None else f"going on after step {step} ({found})"
        if self._again is not None:
            begins = (
                f"the run has ended after step {step}: it is evaluated again, and what is recorded of its "
                "training stays. For a new run name another --run-dir"
            )
        run_logger.log_start(
            f"{recipe.name}: {begins}; {schedule.total_steps} steps of {prepared.sampler.global_batch} clips "
            f"({ranks} on {environment.device.type} x {layout.micro_batch} clips x {layout.accumulation} "
            f"accumulated); {len(prepared.train):,} training and {len(prepared.val):,} validation videos",
            step=step,
            total_steps=schedule.total_steps,
            world_size=environment.world_size,
            device=environment.device.type,
            train_manifests=[
                [str(part.manifest), manifest.fingerprint]
                for part, manifest in zip(recipe.data.train_manifests, prepared.train.manifests, strict=True)
            ],
            **fingerprints,
            changed={} if state is None else changed_settings(self.recipe, state),
        )
        return run_logger

    def _random_clips(self, prepared: Preparation) -> torch.Tensor:
        config = prepared.config
        shape = (prepared.layout.micro_batch, 3, config.frames, config.resolution, config.resolution)
        generator = torch.Generator().manual_seed(self.recipe.seed)
        return torch.randn(shape, generator=generator).to(self.environment.device)

    def _write_results(self, prepared: Preparation, trainer: Trainer) -> None:
        with trainer.engine.ema_weights():
            weights = trainer.engine.gather_weights()
        run_on_all_ranks(lambda: self._save_weights(weights, trainer.description))
        best = run_on_all_ranks(lambda: self._save_best(trainer.step))
        final, totals = trainer.final, trainer.meter.spent
        summary = {
            "top1": None if final is None else final.top1,
            "top5": None if final is None else final.top5,
            "loss": None if final is None else final.loss,
            "ece": None if final is None else final.ece,
            "videos": None if final is None else final.videos,
            "bad_videos": None if final is None else final.bad,
            "best_top1": None if best is None else best.top1,
            "best_step": None if best is None else best.step,
            "best_weights": None if best is None else best.file,
            "steps": trainer.step,
            "clips_per_second": totals.clips_per_second,
            "data_wait_share": totals.data_wait_share,
            "seconds": totals.seconds,
            "lost_seconds": totals.lost,
            "starts": totals.starts,
            "spent": totals.time_breakdown,
            "gpu_hours": trainer.meter.device_seconds / 3600,
            "mfu": trainer.meter.mfu(totals.clips_per_second),
            "quarantined": trainer.run_logger.quarantined,
            "parameters": parameter_count(prepared.config),
            "gmacs": multiply_accumulates(prepared.config) / 1e9,
        }
        run_on_all_ranks(lambda: trainer.run_logger.write_summary(summary))
        if self.is_main and final is not None and self.folder.scores.exists():
            trainer.run_logger.log_examples(prepared.val)
        if self.recipe.tracking.register_as is not None:
            trainer.run_logger.register_weights(self.recipe.tracking.register_as)

    def _save_weights(self, weights: dict[str, torch.Tensor], description: dict[str, Any]) -> None:
        if self.is_main:
            check_finite(weights, "the trained weights are not written: the model")
            save_weights(self.folder.weights, weights, description)

    def _save_best(self, step: int) -> BestWeights | None:
        """Rank 0 writes the weights of the best evaluation, where an earlier one than the last step's was."""
        return write_best(self.folder, self.checkpoints.retention, step) if self.is_main else None

    def _leave(self, trainer: Trainer, stop: StopRequest) -> int:
        """Say how to go on; all ranks leave with the same code, whichever of them was asked."""
        heard: list[str | None] = [None] * self.environment.world_size
        dist.all_gather_object(heard, stop.requested)
        reasons = sorted({reason for reason in heard if reason is not None})
        trainer.run_logger.log_stop(
            trainer.step,
            " and ".join(reasons),
            trainer.meter.spent.seconds,
            unsaved=None if trainer.is_finite else trainer.last_saved(),
        )
        return exit_code(reasons)
