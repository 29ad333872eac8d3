"""Runs launch/train.py as a user does: the quickstart, a resumed run, and one out of memory."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from trainer.system.files import parse_records, read_json
from trainer.verification.steps import ROOT, VerificationTask

STEPS = 30
TOP_1 = 0.85
"""Least top-1 of the quickstart in bf16; in fp32 on a CPU it is 0.94 to 0.97."""


def quickstart(task: VerificationTask) -> None:
    """Run the whole quickstart; on a CPU a few steps of it."""
    settings = ["data.decoder=auto", "engine.precision=bf16"]
    if not task.gpu:
        settings = ["optimisation.epochs=1", *_small()]
    output = checked_run(task, "quickstart", task.folder / "quickstart", settings)
    summary = read_json(task.folder / "quickstart" / "summary.json")
    task.report.measure("its results", json.dumps(summary)[:600])
    top_1 = float(summary.get("top1") or 0)
    if task.gpu:
        task.report.check("its accuracy", top_1 >= TOP_1, f"top-1 {top_1:.3f}", f"at least {TOP_1}")
    for word in ("decoding by", "MFU"):
        for line in [line.strip() for line in output.splitlines() if word in line][-1:]:
            task.report.measure("its output", line[:300])


def resume(task: VerificationTask) -> None:
    """Train `STEPS` steps deterministically: twice, and once stopped and resumed. The losses must be the
    same."""
    settings = ["optimisation.epochs=null", f"optimisation.steps={STEPS}", "evaluation.at_end=false"]
    settings += ["evaluation.every_epochs=null"]
    settings += ["optimisation.warmup_epochs=null", "optimisation.warmup_steps=5"]
    settings += ["engine.deterministic=true", "data.decoder=pyav", "run.checkpoint_every_minutes=null"]
    settings += ["engine.precision=bf16", "augmentation.rand_augment=rand-m7-n4-mstd0.5-inc1"]
    if not task.gpu:
        settings = [s for s in settings if "bf16" not in s] + _small()
    losses = {}
    for name in ("first", "second"):
        checked_run(task, f"run {name}", task.folder / name, settings)
        losses[name] = read_losses(task.folder / name)
    whole = len(losses["first"]) == STEPS
    same = whole and losses["first"] == losses["second"]
    task.report.check(
        "the same bits twice", same, _compared(losses["first"], losses["second"]), "equal losses"
    )
    stopped = task.folder / "stopped"
    checked_run(task, "stopped by SIGTERM", stopped, settings, expected=85, stop_after=10)
    before = len(read_losses(stopped))
    task.report.measure("steps before the stop", str(before))
    checked_run(task, "resumed", stopped, settings)
    after = read_losses(stopped)
    same = whole and after == losses["first"]
    task.report.check("bit for bit", same, _compared(losses["first"], after), "losses as without a stop")


def out_of_memory(task: VerificationTask) -> None:
    """Train L/14 at 336 pixels and 64 frames with a micro-batch of 64, which exceeds the memory of any
    GPU."""
    settings = ["model.preset=l14_336", "model.frames=64", "model.overrides={}", "model.form=scene"]
    settings += ["optimisation.global_batch=64", "engine.micro_batch=64", "engine.precision=bf16"]
    settings += ["data.prefetch=1", "data.workers=2", "data.decoder=pyav", "evaluation.batch=1"]
    code, output = train(task, task.folder / "memory", settings)
    end = " ".join(output.split())[-500:]
    explained = "memory" in end and "Traceback" not in output
    task.report.check(
        "a batch that does not fit", code == 2 and explained, f"exit code {code}: {end}", "2, with a message"
    )


def checked_run(
    task: VerificationTask,
    name: str,
    run_dir: Path,
    settings: list[str],
    *,
    expected: int = 0,
    stop_after: int | None = None,
) -> str:
    """`train`, with a check of the exit code; returns the output."""
    began = time.monotonic()
    code, output = train(task, run_dir, settings, stop_after)
    value = f"exit code {code}, {time.monotonic() - began:.0f} s"
    end = "" if code == expected else f" ({' '.join(output.split())[-400:]})"
    task.report.check(name, code == expected, value + end, f"exit code {expected}")
    return output


def train(
    task: VerificationTask, run_dir: Path, settings: list[str], stop_after: int | None = None
) -> tuple[int, str]:
    """Run launch/train.py; returns exit code and output. stop_after: steps until SIGTERM."""
    command = [sys.executable, "launch/train.py", "--recipe", "recipes/quickstart.yaml"]
    command += ["--run-dir", str(run_dir)]
    data = task.shared / ("motion" if task.gpu else "motion-small")
    settings = [f"data.train={data}/train.arrow", f"data.val={data}/val.arrow", *settings]
    for setting in [*settings, f"engine.device={task.device.type}", "tracking.enabled=false"]:
        command += ["--set", setting]
    log = run_dir.with_suffix(".log")
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        if stop_after is not None:
            while process.poll() is None and len(read_losses(run_dir)) < stop_after:
                time.sleep(0.02)
            if process.poll() is None:
                os.kill(process.pid, signal.SIGTERM)
        code = process.wait()
    return code, log.read_text(encoding="utf-8", errors="replace")


def read_losses(run_dir: Path) -> list[float]:
    """The recorded loss of each step of a run, by step."""
    events = run_dir / "events.jsonl"
    if not events.exists():
        return []
    records = parse_records(events.read_text(encoding="utf-8"))
    losses = {event["step"]: event["loss"] for event in records if event.get("event") == "step"}
    return [losses[step] for step in sorted(losses)]


def _small() -> list[str]:
    """Settings for a CPU: few small clips, a small model."""
    return [
        "data.embedded={train_clips: 64, val_clips: 16}",
        "model.frames=4",
        "model.overrides={resolution: 32, patch_size: 16, depth: 2, width: 32, heads: 2}",
        "optimisation.global_batch=8",
        "evaluation.batch=8",
        "data.workers=1",
        "data.prefetch=2",  # chosen automatically, it would be measured in another process
        "engine.precision=fp32",
    ]


def _compared(first: list[float], second: list[float]) -> str:
    for step, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return f"step {step + 1}: {one!r} and {other!r}"
    return f"{len(first)} and {len(second)} steps, equal as far as both go"
