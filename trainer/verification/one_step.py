"""One step of a verification, as a process: `python -m trainer.verification.one_step NAME DEVICE FOLDER`."""

import faulthandler
import sys
from pathlib import Path

import torch

from trainer.verification.report import Report
from trainer.verification.steps import Task, find_step


def main() -> int:
    name, device, folder = sys.argv[1:]
    faulthandler.enable()
    own = Path(folder) / name
    own.mkdir(parents=True, exist_ok=True)
    report = Report(own / "findings.json")
    find_step(name).run(Task(torch.device(device), own, Path(folder), report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
