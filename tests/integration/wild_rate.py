"""launch/train.py with a learning rate that no recipe may have: a step with it makes weights of about 1e30.

WILD_FROM: the first step with it, counted from 0. WILD_LEAVES_AFTER: number of nonfinite steps after which
the process is sent SIGTERM, as in a preempted job.
"""

import os
import signal

import launch.train
from trainer.lr_schedule import Schedule
from trainer.resilience.nonfinite import SkippedSteps
from trainer.system.process_exit import exit_with

FACTOR = 1e30
FROM = int(os.environ.get("WILD_FROM", "0"))
LEAVES_AFTER = int(os.environ.get("WILD_LEAVES_AFTER", "0"))


def main() -> int:
    learning_rate, add = Schedule.learning_rate, SkippedSteps.add
    left_out = []

    def wild(self: Schedule, step: int) -> float:
        return learning_rate(self, step) * (FACTOR if step >= FROM else 1.0)

    def leaving(self: SkippedSteps, step: int, reason: str) -> str:
        left_out.append(step)
        if len(left_out) == LEAVES_AFTER:
            os.kill(os.getpid(), signal.SIGTERM)
        return add(self, step, reason)

    Schedule.learning_rate = wild  # type: ignore[method-assign]
    SkippedSteps.add = leaving  # type: ignore[method-assign]
    return launch.train.main()


if __name__ == "__main__":
    exit_with(main, interrupted="interrupted before the run began")
