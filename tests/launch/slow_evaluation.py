"""launch/evaluate.py that writes each batch as a part of its own, slowly."""

import time
from typing import Any

import launch.evaluate
from trainer.evaluation import evaluator
from trainer.system.process_exit import exit_with


def main() -> int:
    evaluator.SECONDS_PER_PART = 0.0
    write = evaluator.Evaluator._write

    def slowly(self: evaluator.Evaluator, *arguments: Any) -> None:
        write(self, *arguments)
        time.sleep(0.5)

    evaluator.Evaluator._write = slowly  # type: ignore[method-assign]
    return launch.evaluate.main()


if __name__ == "__main__":
    exit_with(main, interrupted="interrupted")
