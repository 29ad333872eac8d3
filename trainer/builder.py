"""Builds the parts of a run from its recipe."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from models import UniFormerV2
from models.cost import train_step_flops
from pipelines.loader import ClipLoader
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.retention import Retention
from trainer.config.schema import Recipe
from trainer.distributed.collectives import broadcast_from_main, run_on_all_ranks
from trainer.distributed.environment import Environment, cores_per_rank
from trainer.distributed.slurm_step import find_job_end
from trainer.distributed.step_sync import StepSync
from trainer.engine.deepspeed_engine import Engine
from trainer.errors import RunError
from trainer.evaluation.final_scores import FinalScoreWriter
from trainer.evaluation.finished_run import changed_settings
from trainer.evaluation.scores import ScoreGatherer, ScoreMetadata
from trainer.inference.view_scores import views_at_once
from trainer.lr_schedule import Schedule, describe_rate
from trainer.monitoring.console import open_display
from trainer.monitoring.data_bottleneck import DataBottleneckMonitor
from trainer.monitoring.run_dir import RunDir
from trainer.monitoring.throughput import RunTotals, ThroughputMeter
from trainer.resilience.nonfinite import NonfiniteDiagnosis, SkippedSteps
from trainer.resilience.signals import StopRequest
from trainer.resilience.watchdog import Watchdog
from trainer.resume import Start
from trainer.run_logger import RunLogger
from trainer.setup.bad_video_limit import BadClipLimit
from trainer.setup.loaders import open_loaders
from trainer.setup.preparation import Preparation, preprocessing
from trainer.setup.tracking_start import monitor_node, record_datasets, run_description
from trainer.tracking.mlflow_tracker import MlflowTracker
from trainer.trainer import Trainer
from trainer.validation import Validator

MLFLOW_SECONDS = 60.0  # seconds that the end of a run waits for MLflow
EXIT_SECONDS = MLFLOW_SECONDS + 15.0  # seconds from the last step to the end, without saving


@dataclass(frozen=True)
class Builder:
    """Builds the parts of an attempt. The methods are collective."""

    recipe: Recipe
    folder: RunDir
    environment: Environment
    prepared: Preparation
    start: Start

    def meter(self) -> ThroughputMeter:
        """The throughput meter, with the totals of earlier attempts."""
        meter = ThroughputMeter(
            device=self.environment.device,
            world_size=self.environment.world_size,
            # MFU counts useful work: not what is computed twice to save memory.
            flops_per_clip=train_step_flops(self.prepared.config, recomputed_blocks=0),
        )
        state = self.start.state
        if state is not None:
            spent, on_devices = self.folder.read_last_spent()
            before = state.spent.get("device_seconds")
            meter.restore(
                state.spent,
                done_again=spent - RunTotals.of(state.spent).seconds,
                device_done_again=None if on_devices is None or before is None else on_devices - before,
                restarts=self.start.reevaluation is None,
            )
        return meter

    def checkpointer(self, retention: Retention, longest_save: float) -> Checkpointer:
        """longest_save: seconds of the slowest save of earlier attempts; only rank 0 needs it."""
        best = broadcast_from_main(retention.best() if self.environment.is_main else None)
        return Checkpointer(
            retention,
            every_minutes=self.recipe.run.checkpoint_every_minutes,
            settings=self.start.settings,
            description=self.description(),
            attachments=self.folder.checkpointed_files,
            saved_step=-1 if self.start.checkpoint is None else self.start.step,
            best=None if best is None else best[1],
            longest_save=longest_save,
        )

    def stop_request(
        self, meter: ThroughputMeter, checkpointer: Checkpointer, launcher_is_gone: Callable[[], bool]
    ) -> StopRequest:
        is_main = self.environment.is_main
        return StopRequest(
            announce=is_main,
            stop_file=self.folder.stop if is_main else None,
            time_limit=self.recipe.run.time_limit_minutes,
            job_end=find_job_end(),
            margin=lambda: exit_seconds(meter, checkpointer),
            launcher_is_gone=launcher_is_gone,
        )

    def watchdog(self) -> Watchdog:
        minutes = self.recipe.run.hang_minutes
        return Watchdog(
            self.folder.path,
            rank=self.environment.rank,
            world_size=self.environment.world_size,
            limit=None if minutes is None else 60 * minutes,
        )

    def trainer(
        self,
        meter: ThroughputMeter,
        checkpointer: Checkpointer,
        stop: StopRequest,
        watchdog: Watchdog,
        notes: Sequence[str],
        stack: ExitStack,
    ) -> Trainer:
        """The trainer, with random weights or the starting weights.

        notes: logged at the start. stack: closes the loaders and the console.
        """
        recipe, environment, prepared, state = self.recipe, self.environment, self.prepared, self.start.state
        torch.manual_seed(recipe.seed)
        engine = Engine(run_on_all_ranks(self._model), recipe, environment, prepared.layout)
        schedule = Schedule.of(recipe, prepared.sampler.steps_per_epoch)
        train, val, loader_notes = open_loaders(
            recipe,
            environment,
            prepared,
            self.folder,
            first_step=self.start.step,
            evaluates=schedule.evaluates,
            stack=stack,
        )
        run_logger = self._run_logger(schedule, meter.spent.starts, checkpointer.retention, stack)
        for note in (*notes, *prepared.notes, *loader_notes):
            run_logger.log_warning(note)
        run_logger.log_note(train.resources.summary)
        weights = self.start.starting_weights
        if weights is not None:
            run_logger.log_starting_weights(str(recipe.model.weights), weights.report, weights.names)
        validator = Validator(
            engine=engine,
            loader=val,
            classes=prepared.config.num_classes,
            at_once=views_at_once(prepared.config, environment.device, engine.precision),
            final_scores=self._final_scores(val),
            run_logger=run_logger,
            meter=meter,
            stop=stop,
            watchdog=watchdog,
            bad_share=recipe.data.bad_share,
        )
        return Trainer(
            engine=engine,
            sampler=prepared.sampler,
            schedule=schedule,
            train_loader=train,
            step_sync=StepSync(environment.device),
            bad_clips=BadClipLimit(
                recipe.data.bad_share,
                prepared.sampler.samples,
                clips=0 if state is None else state.clips,
                bad=0 if state is None else state.bad,
            ),
            diagnosis=NonfiniteDiagnosis(
                engine,
                self.folder.path,
                self.description(),
                prepared.train.path,
                recipe.optimisation.label_smoothing,
            ),
            skipped=self._skipped_steps(),
            checkpointer=checkpointer,
            validator=validator,
            run_logger=run_logger,
            meter=meter,
            data_monitor=DataBottleneckMonitor(train, cores_per_rank(environment)),
            stop=stop,
            watchdog=watchdog,
            label_smoothing=recipe.optimisation.label_smoothing,
            step=self.start.step,
            misses_evaluation=self.start.misses_evaluation,
        )

    def description(self) -> dict[str, Any]:
        """The metadata that using the weights needs, see `TrainState`."""
        if self.start.state is not None and self.start.is_trained:
            return self.start.state.description
        return {
            "model": dataclasses.asdict(self.prepared.config),
            "class_names": list(self.prepared.train.class_names),
            "preprocessing": preprocessing(self.recipe, self.prepared.config),
            "recipe": json.loads(self.recipe.model_dump_json()),
        }

    def random_clips(self) -> Tensor:
        """Normalised clips of one micro-batch, (B, 3, T, H, W)."""
        config = self.prepared.config
        shape = (self.prepared.layout.micro_batch, 3, config.frames, config.resolution, config.resolution)
        generator = torch.Generator().manual_seed(self.recipe.seed)
        return torch.randn(shape, generator=generator).to(self.environment.device)

    def _model(self) -> UniFormerV2:
        model = UniFormerV2(self.prepared.config)
        if self.start.starting_weights is not None:
            self.start.starting_weights.load(model)
        return model

    def _skipped_steps(self) -> SkippedSteps:
        # A change of precision is a remedy, after which the count starts at 0.
        settings = {**self.start.settings, "engine.precision": self.recipe.engine.precision}
        if self.recipe.engine.fp8:
            settings["engine.fp8"] = True
        is_main = self.environment.is_main
        return SkippedSteps(
            self.recipe.optimisation.skipped_steps,
            broadcast_from_main(self.folder.read_skipped_steps(settings) if is_main else 0),
            keep=(lambda count: self.folder.write_skipped_steps(count, settings)) if is_main else None,
        )

    def _final_scores(self, loader: ClipLoader) -> FinalScoreWriter:
        val, evaluation = self.prepared.val, self.recipe.evaluation
        return FinalScoreWriter(
            self.folder.scores,
            self.folder.best_effort,
            loader,
            ScoreGatherer(val, evaluation.batch, self.prepared.config.num_classes),
            ScoreMetadata(
                manifest=self.recipe.data.val.name,
                fingerprint=val.fingerprint,
                class_names=val.class_names,
                clips=evaluation.clips,
                crops=evaluation.crops,
                step=None,
                source=str(self.folder.path),
            ),
        )

    def _run_logger(
        self, schedule: Schedule, starts: int, retention: Retention, stack: ExitStack
    ) -> RunLogger:
        recipe, environment, prepared, start = self.recipe, self.environment, self.prepared, self.start
        display = stack.enter_context(
            open_display(
                is_main=environment.is_main,
                total_steps=schedule.total_steps,
                first_step=start.step,
                every=recipe.run.log_every_steps,
            )
        )
        trains = start.reevaluation is None
        tracker = MlflowTracker(
            self.folder.path,
            uri=recipe.tracking.uri,
            experiment=recipe.tracking.experiment,
            run_name=self.folder.path.name,
            parent=recipe.tracking.parent_run,
            step=start.step,
            trains=trains,
            enabled=environment.is_main and recipe.tracking.enabled,
        )
        if start.checkpoint is None:  # MLflow parameters cannot change; the artifact recipe.yaml can
            # Without the name: MLflow's comparison plots the first three parameters that differ.
            tracker.record_params(
                {name: value for name, value in recipe.flattened().items() if name != "name"}
            )
        fingerprints = {
            "train_fingerprint": prepared.train.fingerprint,
            "val_fingerprint": prepared.val.fingerprint,
        }
        if trains and recipe.tracking.enabled:
            if environment.is_main:
                if start.checkpoint is None:
                    record_datasets(tracker, prepared)
                described = run_description(recipe, prepared, environment, self.folder.path, starts)
                tracker.set_tags({**fingerprints, **described.tags(), "total_steps": schedule.total_steps})
            if environment.local_rank == 0:
                stack.enter_context(monitor_node(environment, self.folder.path, tracker))
            tracker.upload_artifact(self.folder.recipe)
            tracker.upload_artifact(self.folder.environment)
        run_logger = RunLogger(
            self.folder,
            tracker,
            display,
            total_steps=schedule.total_steps,
            every_steps=recipe.tracking.every_steps,
            class_names=prepared.train.class_names,
            best=retention.highest() if environment.is_main else None,
            again=start.reevaluation,
        )
        run_logger.log_start(
            self._first_line(schedule),
            step=start.step,
            total_steps=schedule.total_steps,
            world_size=environment.world_size,
            device=environment.device.type,
            train_manifests=[
                [str(part.manifest), manifest.fingerprint]
                for part, manifest in zip(recipe.data.train_manifests, prepared.train.manifests, strict=True)
            ],
            **fingerprints,
            changed={} if start.state is None else changed_settings(recipe, start.state),
        )
        return run_logger

    def _first_line(self, schedule: Schedule) -> str:
        recipe, prepared, start = self.recipe, self.prepared, self.start
        layout, world_size = prepared.layout, self.environment.world_size
        if start.reevaluation is not None:
            activity = (
                f"the run finished with step {start.step}: it is only evaluated, and its training records "
                "stay. For a new run choose another --run-dir"
            )
        elif start.checkpoint is None:
            activity = "starting"
        else:
            activity = f"resuming after step {start.step} ({start.checkpoint})"
        return (
            f"{recipe.name}: {activity}; {schedule.total_steps} steps of {prepared.sampler.global_batch} "
            f"clips ({world_size} rank{'s' * (world_size > 1)} on {self.environment.device.type} x "
            f"{layout.micro_batch} clips x {layout.accumulation} accumulated); {len(prepared.train):,} "
            f"training and {len(prepared.val):,} validation videos; {describe_rate(recipe.optimisation)}"
        )


def exit_seconds(meter: ThroughputMeter, checkpointer: Checkpointer) -> float:
    """Seconds before a time limit at which to request the stop. The ranks agree on the stop one or two steps
    later, and finish a save in progress before the last save.
    """
    return EXIT_SECONDS + 3 * meter.rates().seconds_per_step + 3 * checkpointer.longest_save


def dry_run_batch(engine: Engine, clips: Tensor, classes: int) -> None:
    """Run one batch through forward, backward and optimiser without changing the state. A wrong shape or too
    little memory fails here, before any data is read.

    clips: (B, 3, T, H, W), one micro-batch. Raises RunError where the loss is not finite or memory runs out.
    """
    engine.train()
    # Keys as in a training step: without them torch.compile compiles again at the first step.
    keys = torch.arange(len(clips), device=clips.device)
    labels = keys % classes
    try:
        with engine.preserved_state():
            for _ in range(engine.accumulation):
                loss = F.cross_entropy(engine.forward(clips, keys), labels)
                if not torch.isfinite(loss):
                    raise RunError(f"the loss of random clips is {float(loss)} before the first step")
                engine.backward(loss * 0.0)
                engine.step(0.0)
    except torch.OutOfMemoryError as error:
        raise RunError(
            f"out of memory with {len(clips)} clips per rank: {str(error).splitlines()[0]} Lower "
            "engine.micro_batch, or raise engine.recomputed_blocks or engine.zero_stage"
        ) from error
