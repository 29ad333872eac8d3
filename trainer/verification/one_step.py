"""The process of one step: `python -m trainer.verification.one_step NAME DEVICE FOLDER`."""

import faulthandler
import sys
from pathlib import Path

import torch

from trainer.verification.report import StepReport
from trainer.verification.steps import VerificationTask, step_named


def main() -> int:
    name, device, folder = sys.argv[1:]
    faulthandler.enable()
    own = Path(folder) / name
    own.mkdir(parents=True, exist_ok=True)
    report = StepReport(own / "findings.json")
    step_named(name).run(VerificationTask(torch.device(device), own, Path(folder), report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
