"""`weights-best.safetensors`: the weights of the best evaluation, unless it is that of the last step."""

import logging
import math
from dataclasses import dataclass

from trainer.checkpoint.export import export
from trainer.checkpoint.retention import Retention
from trainer.errors import RunError
from trainer.monitoring.run_dir import RunDir

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BestWeights:
    """The best evaluation of a run."""

    step: int
    """Steps done before it."""
    top1: float
    """Its top-1 accuracy, 0..1."""
    file: str | None
    """Name of the file with its weights in the run folder; None where they were not kept."""


def write_best(folder: RunDir, retention: Retention, last_step: int) -> BestWeights | None:
    """At the end of a run, find its best evaluation, and write its weights unless they are those of the last
    step.

    Of equally accurate ones the last step counts as the best, or else the first. Returns None where nothing
    was evaluated. Weights that cannot be exported are a warning.
    """
    known = {step: top1 for step, top1 in retention.accuracies().items() if math.isfinite(top1)}
    file = folder.best_weights
    if not known:
        file.unlink(missing_ok=True)
        return None
    top1 = max(known.values())
    if known.get(last_step) == top1:
        file.unlink(missing_ok=True)  # of an earlier end of this run
        return BestWeights(last_step, top1, folder.weights.name)
    step = min(step for step, each in known.items() if each == top1)
    checkpoint = retention.path_of(step)
    if checkpoint in retention.visible():
        try:
            export(checkpoint, file)
            return BestWeights(step, top1, file.name)
        except RunError as error:
            _log.warning(
                "the weights of the best evaluation, after step %d, are not written: %s", step, error
            )
    file.unlink(missing_ok=True)
    return BestWeights(step, top1, None)
