"""launch/train.py in 2 GiB of the GPU: what a run needs beyond, it cannot have."""

import torch

import launch.train
from trainer.system.process_exit import exit_with

ALLOWED = 2 * 2**30


def main() -> int:
    torch.cuda.set_per_process_memory_fraction(ALLOWED / torch.cuda.get_device_properties(0).total_memory, 0)
    return launch.train.main()


if __name__ == "__main__":
    exit_with(main, interrupted="interrupted before the run began")
