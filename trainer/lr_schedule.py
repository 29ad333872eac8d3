"""When a run evaluates and saves, and its learning rate, per optimiser step."""

import math
from dataclasses import dataclass

from trainer.config.schema import OptimisationSection, Recipe


def warmup_cosine(
    step: int, *, total_steps: int, warmup_steps: int, peak: float, start: float, end: float
) -> float:
    """Learning rate of one optimiser step: linear warm-up, then half a cosine.

    With w warm-up steps of n in all, for step s counted from 0:

        s < w:  start + (peak - start) * s / w
        s >= w: end + (peak - end) * (1 + cos(pi * (s - w) / (n - w))) / 2

    Step w has the peak. Step n, which a run does not take, and those after it have `end`.

    Args:
        step: from 0.
        total_steps: n, at least 1.
        warmup_steps: w, from 0 to n.
        peak, start, end: learning rates at step w, at step 0 of the warm-up, and at step n.
    """
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    if step >= total_steps:
        return end
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return end + (peak - end) * (1 + math.cos(math.pi * progress)) / 2


@dataclass(frozen=True)
class Schedule:
    """The steps of a run."""

    total_steps: int
    warmup_steps: int
    evaluation_interval: int | None
    """Steps between two evaluations; None for none before the end."""
    checkpoint_interval: int | None
    """Steps between two checkpoints; None does not count steps."""
    recipe: Recipe

    @classmethod
    def of(cls, recipe: Recipe, steps_per_epoch: float) -> "Schedule":
        return cls(
            total_steps=recipe.optimisation.total_steps(steps_per_epoch),
            warmup_steps=recipe.optimisation.total_warmup_steps(steps_per_epoch),
            evaluation_interval=recipe.evaluation.interval(steps_per_epoch),
            checkpoint_interval=recipe.run.checkpoint_every_steps,
            recipe=recipe,
        )

    def learning_rate(self, step: int) -> float:
        """The rate of `step`, counted from 0."""
        optimisation = self.recipe.optimisation
        scale = optimisation.rate_scale
        return warmup_cosine(
            step,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            peak=scale * optimisation.learning_rate,
            start=scale * optimisation.warmup_start,
            end=scale * optimisation.end_learning_rate,
        )

    @property
    def evaluates_at_end(self) -> bool:
        """Whether the run evaluates after its last step."""
        return self.recipe.evaluation.at_end

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates at all, before its end or then."""
        interval = self.evaluation_interval
        return self.evaluates_at_end or (interval is not None and interval < self.total_steps)

    def evaluates_after(self, done: int) -> bool:
        """Whether an evaluation is due after `done` steps; never after the last, which `at_end` is about."""
        return self._is_due(self.evaluation_interval, done)

    def saves_after(self, done: int) -> bool:
        """Whether a checkpoint is due after `done` steps, by their count; the clock may make one due too."""
        return self._is_due(self.checkpoint_interval, done)

    def _is_due(self, interval: int | None, done: int) -> bool:
        return interval is not None and done % interval == 0 and done < self.total_steps


def describe_rate(optimisation: OptimisationSection) -> str:
    """The peak learning rate, and whether it was scaled to the batch, for the log."""
    batch, reference = optimisation.global_batch, optimisation.reference_batch
    rate = f"learning rate {optimisation.rate_scale * optimisation.learning_rate:g}"
    if reference is None:
        return f"{rate}, not scaled by the batch"
    if reference == batch:
        return f"{rate}, given for this batch"
    return f"{rate}: {optimisation.learning_rate:g} for {reference} clips, scaled to {batch}"
