"""One rank of a training with synthetic clips: `measure_rank`, in a process of its own."""

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from trainer.benchmark.timing import OtherPrograms
from trainer.engine.process_group import disconnect
from trainer.verification.model_speed import Case, TrainingCase
from trainer.verification.report import StepReport
from trainer.verification.steps import VerificationTask

WARM = 2


def measure_rank(
    preset: str, frames: int, batch: int, device: str, core: int | None, steps: int, folder: str
) -> dict[str, Any]:
    """Seconds and CPU seconds of `steps` training steps of this rank.

    core: the one core to run on; None for all.
    """
    if core is not None:
        os.sched_setaffinity(0, {core})
        torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    place = torch.device(f"cuda:{rank}" if device == "cuda" else "cpu")
    out = Path(folder) / str(rank)
    out.mkdir(parents=True, exist_ok=True)
    task = VerificationTask(place, out, out, StepReport(out / "findings.json"))
    trained = TrainingCase(task, Case(preset, frames=frames, batch=batch))
    for _ in range(WARM):
        trained.step()
    trained.losses()
    dist.barrier()
    others, cpu, begun = OtherPrograms(), time.process_time(), time.perf_counter()
    for _ in range(steps):
        trained.step()
    trained.losses()  # waits for the device
    dist.barrier()
    seconds, used = time.perf_counter() - begun, time.process_time() - cpu
    # "others" includes the ranks that share the cores of this one.
    result = {"seconds": seconds, "cpu": used, "clips": steps * batch, "others": others.cores(), "core": core}
    disconnect()
    return result
