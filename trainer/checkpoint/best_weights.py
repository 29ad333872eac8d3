"""`weights-best.safetensors`: the weights of a run's best evaluation, where that is not its last step's."""

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
    """step: steps done before the best evaluation. top1: what it came to, 0..1. file: the name of the file in
    the run's folder that has its weights; None where they were not kept.
    """

    step: int
    top1: float
    file: str | None


def write_best(folder: RunDir, retention: Retention, last_step: int) -> BestWeights | None:
    """At a run's end: find its best evaluation, and write its weights where they are not the last step's.

    Of several equally accurate ones the last step's are taken, or else the first. Returns None where nothing
    was evaluated. Weights that cannot be had are a warning.
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
