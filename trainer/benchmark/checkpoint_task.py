"""Saves and loads checkpoints of a model: `measure_checkpoints`, in a process of its own."""

import time
from pathlib import Path
from typing import Any

import torch

from trainer.benchmark.limits import drop_from_cache, measure_disk
from trainer.benchmark.timing import OtherPrograms
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.metadata import Progress, read_state
from trainer.checkpoint.restore import restore
from trainer.checkpoint.retention import Retention
from trainer.engine.process_group import disconnect
from trainer.verification.model_speed import Case, TrainingCase
from trainer.verification.report import StepReport
from trainer.verification.steps import VerificationTask


def measure_checkpoints(preset: str, device: str, threads: int, repeats: int, folder: str) -> dict[str, Any]:
    """Rounds of: the disk alone, a save, a load. One training step before makes the optimiser's state.

    Returns the bytes of a checkpoint, and for each round the seconds that training pauses for the copy, those
    until the checkpoint is visible, those of a load from the disk, and the disk's rates for as many bytes.

    folder: a new one, in which the checkpoints are left.
    """
    torch.set_num_threads(threads)
    out = Path(folder)
    task = VerificationTask(torch.device(device), out, out, StepReport(out / "findings.json"))
    trained = TrainingCase(task, Case(preset, frames=2, batch=1))
    trained.step()
    trained.losses()
    trained.engine.finish_step()
    engine = trained.engine
    checkpoints = out / "checkpoints"
    checkpoints.mkdir()
    saver = Checkpointer(Retention(checkpoints, keep_best=False), every_minutes=None)
    rounds: list[dict[str, float]] = []
    size = 0
    # The first round allocates the copy, and gives the size for the disk's; it does not count.
    for repeat in range(repeats + 1):
        others = OtherPrograms()
        written, read = measure_disk(out, size) if size else (0.0, 0.0)
        begun = time.perf_counter()
        if not saver.begin(engine, Progress(repeat, 0, 0, {})):
            raise OSError(f"{out} has too little space for a checkpoint")
        paused = time.perf_counter() - begun
        saved = saver.wait()
        if saved is None:
            raise OSError(f"no checkpoint could be written to {out}")
        until_visible = time.perf_counter() - begun
        saver.confirm(repeat)
        files = [path for path in saved.path.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        for path in files:
            drop_from_cache(path)
        begun = time.perf_counter()
        restore(engine, saved.path, read_state(saved.path))
        loaded = time.perf_counter() - begun
        if repeat:
            rounds.append(
                {
                    "paused": paused,
                    "saved": until_visible,
                    "loaded": loaded,
                    "disk_write": written,
                    "disk_read": read,
                    "others": others.cores(),
                }
            )
    saver.close()
    disconnect()
    return {"bytes": size, "rounds": rounds}
