"""Where an attempt starts: from the first step, after a checkpoint, or at the end of a finished run."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.checkpoint.metadata import WEIGHTS, TrainState, check_allowed_names
from trainer.checkpoint.restore import find_newest, read_for_resume
from trainer.checkpoint.retention import Retention
from trainer.checkpoint.weights_origin import recorded, weights_origin_of
from trainer.config.schema import Recipe
from trainer.distributed.collectives import broadcast_from_main, run_on_all_ranks
from trainer.evaluation.finished_run import Reevaluation, choose_reevaluation, is_finished
from trainer.lr_schedule import Schedule
from trainer.monitoring.run_dir import RunDir
from trainer.setup.plan_notes import plan_change_notes
from trainer.setup.preparation import Preparation, preprocessing, resume_settings
from trainer.setup.starting_weights import StartingWeights, plan_starting_weights


@dataclass(frozen=True)
class Start:
    """Where an attempt starts."""

    recipe: Recipe
    """Names the weights that the training started from, whatever this attempt was given."""
    settings: dict[str, Any]
    """What may not change in later attempts, see `TrainState`."""
    checkpoint: Path | None = None
    """Its folder; None for a new training."""
    state: TrainState | None = None
    """The checkpoint's metadata; None for a new training."""
    is_trained: bool = False
    """Whether no step is left."""
    reevaluation: Reevaluation | None = None
    """Set for a finished run, which is only evaluated."""
    misses_evaluation: bool = False
    """Whether an earlier attempt stopped before or in the evaluation that is due after this step."""
    starting_weights: StartingWeights | None = None
    """What a new training starts from; None for random weights."""
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return 0 if self.state is None else self.state.step


def find_start(
    recipe: Recipe,
    prepared: Preparation,
    folder: RunDir,
    retention: Retention,
    resume: str,
    allowed: Sequence[str],
) -> Start:
    """Find out where an attempt starts; writes nothing. Collective.

    resume, allowed: see `trainer.run.train`. Raises RunError for a checkpoint that is damaged or of another
    training, and for starting weights that do not fit.
    """
    settings = resume_settings(recipe, prepared)
    found = None
    if resume != "never":
        found = find_newest(retention) if resume == "auto" else Path(resume)
    if found is None:
        run_on_all_ranks(lambda: check_allowed_names(allowed, settings))
        return _new_training(recipe, prepared, settings)
    state = read_for_resume(found, settings=settings, allowed=allowed, verify=resume != "auto")
    notes = plan_change_notes(recipe, prepared.layout, state, dist.get_world_size())
    start = _with_recorded_weights(Start(recipe, settings, found, state, notes=notes))
    schedule = Schedule.of(recipe, prepared.sampler.steps_per_epoch)
    steps, is_main = schedule.total_steps, dist.get_rank() == 0
    has_ended = broadcast_from_main(is_main and is_finished(folder, found, state, steps))
    own = found.absolute().parent == retention.folder.absolute()
    due = own and schedule.evaluates_after(state.step)
    return dataclasses.replace(
        start,
        is_trained=state.step >= steps,
        reevaluation=choose_reevaluation(start.recipe, state) if has_ended else None,
        misses_evaluation=broadcast_from_main(is_main and due and state.step not in retention.accuracies()),
    )


def _new_training(recipe: Recipe, prepared: Preparation, settings: dict[str, Any]) -> Start:
    weights, starting_weights = recipe.model.weights, None
    if weights is not None:
        clips = preprocessing(recipe, prepared.config)
        starting_weights = run_on_all_ranks(
            lambda: plan_starting_weights(
                weights, prepared.config, prepared.train.class_names, clips, recipe.model.inflation
            )
        )
    is_main = dist.get_rank() == 0  # which alone records them: the file may be large
    origin = run_on_all_ranks(lambda: weights_origin_of(weights) if is_main else None)
    return Start(recipe, {**settings, WEIGHTS: origin}, starting_weights=starting_weights)


def _with_recorded_weights(start: Start) -> Start:
    """A resumed training keeps the record of the weights that it started from."""
    assert start.state is not None
    origin = recorded(start.state)
    file = None if origin is None else Path(origin["file"])
    weights = start.recipe.model.weights
    notes = start.notes
    if weights != file:
        notes += (
            f"model.weights is recorded as {file}, which the training started from, and not as {weights}: a "
            "resumed run reads neither",
        )
    model = start.recipe.model.model_copy(update={"weights": file})
    return dataclasses.replace(
        start,
        recipe=start.recipe.model_copy(update={"model": model}),
        settings={**start.settings, WEIGHTS: origin},
        notes=notes,
    )
