"""Steps left out because their numbers were not finite: a few are bad luck, many are a wrong recipe."""

from collections.abc import Callable
from dataclasses import dataclass

from trainer.errors import RunError


@dataclass
class SkippedSteps:
    """Counts the steps left out in all starts of a run.

    limit: how many may be, of the recipe's `optimisation.skipped_steps`. count: so far. keep: writes the
    count down for the next start. A step that a later start does again, and leaves out again, counts again:
    else a job that is preempted often would do the same steps for ever.
    """

    limit: int
    count: int = 0
    keep: Callable[[int], None] | None = None

    def add(self, step: int, reason: str) -> str:
        """Count a step; returns a line that says so.

        step: as shown, counted from 1. reason: what was not finite, in words that follow "because", such as
        "the loss is nan". Every rank is to call it alike. Raises RunError when there are more than the limit.
        """
        self.count += 1
        if self.keep is not None:
            self.keep(self.count)
        left_out = f"step {step} changed nothing, because {reason}"
        if self.count <= self.limit:
            return f"{left_out}; {self.count} of at most {self.limit} such steps in this run"
        raise RunError(
            f"{left_out}; in all starts of this run that makes {self.count}, and {_steps(self.limit)} "
            "(optimisation.skipped_steps). The run stops. Lower optimisation.learning_rate, set "
            "optimisation.clip_norm, or, where it is lower, raise engine.precision to fp32; or allow more "
            "such steps. not-finite/ of the run folder holds what those steps saw: uniformerv2 train "
            "--replay FILE shows where it goes wrong"
        )


def _steps(limit: int) -> str:
    return "no such step is allowed" if limit == 0 else f"at most {limit} such steps are allowed"
