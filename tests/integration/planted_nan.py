"""launch/train.py with a NaN in the clips of rank 1. PLANTED: indices of the batches with the NaN.

LEFT_OUT: indices of steps that are skipped although their clips are good.
"""

import os
from typing import Any

import launch.train
from pipelines import loader
from trainer.engine.deepspeed_engine import Engine
from trainer.system.process_exit import exit_with


def numbers(variable: str) -> set[int]:
    return {int(number) for number in os.environ.get(variable, "").split(",") if number}


PLANTED, LEFT_OUT = numbers("PLANTED"), numbers("LEFT_OUT")


def main() -> int:
    make_batch = loader.ClipLoader._batch
    seen = 0

    def planted(self: loader.ClipLoader, *arguments: Any) -> loader.ClipBatch:
        nonlocal seen
        batch = make_batch(self, *arguments)
        if self.batches == 0:  # training
            if seen in PLANTED:
                batch.clips[0, 0, 0, 0, 0] = float("nan")
            seen += 1
        return batch

    step, is_finite, steps = Engine.step, Engine._gradient_is_finite, 0
    left_out = False

    def counted(self: Engine, learning_rate: float) -> None:
        nonlocal steps, left_out
        left_out = steps in LEFT_OUT
        steps += learning_rate > 0  # a rehearsal is none
        step(self, learning_rate)

    if LEFT_OUT:
        Engine.step = counted  # type: ignore[method-assign]
        Engine._gradient_is_finite = lambda self: is_finite(self) & (not left_out)  # type: ignore[method-assign]
    if os.environ["RANK"] == "1":
        loader.ClipLoader._batch = planted  # type: ignore[method-assign]
    return launch.train.main()


if __name__ == "__main__":
    exit_with(main, interrupted="interrupted before the run began")
