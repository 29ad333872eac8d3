"""`weights-best.safetensors`: the weights of the best evaluation, if it is not the last one."""

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
    """Steps done before the evaluation."""
    top1: float
    """Its top-1 accuracy, 0..1."""
    file: str | None
    """Name of the file in the run folder with its weights; None where no checkpoint has them."""


def write_best(folder: RunDir, retention: Retention, last_step: int) -> BestWeights | None:
    """Find the best evaluation of a finished run, and export its weights unless it is that of the last step.

    Among equally accurate evaluations the last step is preferred, then the earliest. Returns None where the
    run was not evaluated. Logs a warning where the weights cannot be exported.
    """
    known = {step: top1 for step, top1 in retention.accuracies().items() if math.isfinite(top1)}
    file = folder.best_weights
    file.unlink(missing_ok=True)  # of an earlier end of this run
    if not known:
        return None
    top1 = max(known.values())
    if known.get(last_step) == top1:
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
    return BestWeights(step, top1, None)
