"""launch/train.py, counting where torch waits for the GPU in each training step; writes the file WAITS names.

The file holds a list for each step, of `file:line` for each wait. Events that are waited for are not counted:
the numbers of the step before are read that way.
"""

import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import launch.train
from trainer.system.process_exit import exit_with


def waits(work: Callable[[], Any], found: list[str]) -> Any:
    """Do the work; `file:line` of each wait for the GPU is added to what was found."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            return work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
            # The first time in a process, torch says beside it that this mode is a prototype.
            of_waits = [each for each in caught if "called a synchronizing" in str(each.message)]
            found.extend(f"{each.filename}:{each.lineno}" for each in of_waits)


def main() -> int:
    from trainer.trainer import Trainer

    steps: list[list[str]] = []
    take, exchange = Trainer.train_step, Trainer.exchange

    def train_step(self: Trainer, *arguments: Any) -> Any:
        steps.append([])
        return waits(lambda: take(self, *arguments), steps[-1])

    def exchanged(self: Trainer, *arguments: Any) -> Any:
        return waits(lambda: exchange(self, *arguments), steps[-1])

    Trainer.train_step, Trainer.exchange = train_step, exchanged  # type: ignore[method-assign]
    try:
        return launch.train.main()
    finally:
        Path(os.environ["WAITS"]).write_text(json.dumps(steps))


if __name__ == "__main__":
    exit_with(main, interrupted="interrupted before the run began")
