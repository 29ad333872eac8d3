"""launch/train.py that records the clips of each training batch, in a file per rank in BATCHES."""

import json
import os
from pathlib import Path

import launch.train
from pipelines import loader
from trainer.system.process_exit import exit_with


def main() -> int:
    next_batch = loader.ClipLoader._next  # not `_batch`: one more is made ahead than is trained
    file = Path(os.environ["BATCHES"]) / f"rank-{os.environ['RANK']}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)

    def recorded(self: loader.ClipLoader) -> loader.ClipBatch:
        batch = next_batch(self)
        if self.batches == 0:  # training
            with file.open("a") as lines:
                lines.write(json.dumps([batch.ids.tolist(), batch.keys.tolist()]) + "\n")
        return batch

    loader.ClipLoader._next = recorded  # type: ignore[method-assign]
    return launch.train.main()


if __name__ == "__main__":
    exit_with(main, interrupted="interrupted before the run began")
