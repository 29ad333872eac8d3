"""launch/train.py with a learning rate that no recipe may have: every step makes weights of about 1e30."""

import launch.train
from trainer.engine.engine import Engine
from trainer.leaving import end_with

FACTOR = 1e30


def main() -> int:
    step = Engine.step

    def wild(self: Engine, learning_rate: float) -> bool:
        return step(self, learning_rate * FACTOR)

    Engine.step = wild  # type: ignore[method-assign]
    return launch.train.main()


if __name__ == "__main__":
    end_with(main, interrupted="interrupted before the run began")
