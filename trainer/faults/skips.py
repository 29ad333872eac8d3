"""Steps left out because their numbers were not finite: a few are bad luck, many are a wrong recipe."""

from dataclasses import dataclass

from trainer import RunError


@dataclass
class SkippedSteps:
    """Counts the steps left out since the run was last started.

    limit: how many may be, of the recipe's `optimisation.skipped_steps`. count: so far.
    """

    limit: int
    count: int = 0

    def add(self, step: int, reason: str) -> str:
        """Count a step; returns a line that says so.

        step: as shown, counted from 1. reason: what was not finite, in words that follow "because", such as
        "the loss is nan". Every rank is to call it alike. Raises RunError when there are more than the limit.
        """
        self.count += 1
        left_out = f"step {step} changed nothing, because {reason}"
        if self.count <= self.limit:
            return f"{left_out}; {self.count} of at most {self.limit} such steps since this start"
        raise RunError(
            f"{left_out}, and {_steps(self.limit)} since this start, as optimisation.skipped_steps says. The "
            "run stops; its last checkpoint is from before. not-finite/ of the run folder holds what those "
            "steps saw: launch/train.py --replay FILE shows where it goes wrong. Lower "
            "optimisation.learning_rate, set optimisation.clip_norm, or set engine.precision to fp32"
        )


def _steps(limit: int) -> str:
    return "no such step is allowed" if limit == 0 else f"at most {limit} such steps are allowed"
