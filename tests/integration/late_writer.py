"""launch/train.py whose rank 1 writes no checkpoint until the file HELD_FOR exists."""

import os
import time
from pathlib import Path

import launch.train
from trainer.checkpoint.shards import Snapshot
from trainer.system.process_exit import exit_with


def main() -> int:
    write, signal = Snapshot.write, Path(os.environ["HELD_FOR"])

    def late(snapshot: Snapshot, path: Path) -> None:
        while not signal.exists():
            time.sleep(0.05)
        write(snapshot, path)

    if os.environ["RANK"] == "1":
        Snapshot.write = late  # type: ignore[method-assign]
    return launch.train.main()


if __name__ == "__main__":
    exit_with(main, interrupted="interrupted before the run began")
