"""When things happen in a run, in optimiser steps."""

from dataclasses import dataclass

from trainer.config.schema import Recipe
from trainer.engine.parameter_groups import learning_rate


@dataclass(frozen=True)
class Schedule:
    """total_steps: of the run. evaluation_interval, checkpoint_interval: steps; None is not in between."""

    total_steps: int
    warmup_steps: int
    evaluation_interval: int | None
    checkpoint_interval: int | None
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
        return learning_rate(
            step,
            total_steps=self.total_steps,
            warmup_steps=self.warmup_steps,
            peak=optimisation.learning_rate,
            start=optimisation.warmup_start,
            end=optimisation.end_learning_rate,
        )

    @property
    def evaluates(self) -> bool:
        """Whether the run evaluates at all, in between or at its end."""
        interval = self.evaluation_interval
        return self.recipe.evaluation.at_end or (interval is not None and interval < self.total_steps)

    def evaluates_after(self, done: int) -> bool:
        """Whether an evaluation is due when `done` steps are done; the one at the end is asked for apart."""
        interval = self.evaluation_interval
        return interval is not None and done % interval == 0 and done < self.total_steps

    def saves_after(self, done: int) -> bool:
        """Whether the steps done alone make a checkpoint due; the clock may do so too."""
        interval = self.checkpoint_interval
        return interval is not None and done % interval == 0 and done < self.total_steps
