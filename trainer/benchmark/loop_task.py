"""Trains a recipe for some steps and times the parts of the loop: `measure_loop`, in a process of its own."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipelines.loader import ClipBatch, ClipLoader
from trainer import trainer as loop
from trainer.benchmark.timing import OtherPrograms
from trainer.config.load import load_recipe
from trainer.config.recipe_names import find_recipe
from trainer.engine.deepspeed_engine import Engine
from trainer.run import train
from trainer.trainer import Trainer

PHASES = {
    "forward": (Engine, "forward"),
    "loss": (loop, "masked_cross_entropy"),
    "backward": (Engine, "backward"),
    "optimiser": (Engine, "step"),
    "data wait": (ClipLoader, "_next"),
    "hash of the clips": (ClipBatch, "hash"),
    "totals of the step before": (Trainer, "exchange"),
    "log": (Trainer, "record"),
}
"""What is timed, by the place of the function that does it. The rest is the loop's own lines."""
ON_DEVICE = ("forward", "loss", "backward", "optimiser")
"""Phases that a GPU works on while the host goes on: timed on the GPU."""


class LoopTimer:
    """Wall seconds of each phase and CPU seconds of the loop's thread in it, by step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, dict[str, float]]] = []
        self._step: dict[str, dict[str, float]] = {}
        self._begun = 0.0, 0.0
        self._events: list[tuple[dict[str, float], Any]] = []

    def wrap(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        on_gpu = torch.cuda.is_available() and phase in ON_DEVICE

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
            for event in events[:1]:
                event.record()
            begun, cpu = time.perf_counter(), time.thread_time()
            result = function(*args, **kwargs)
            spent = self._step.setdefault(phase, {"seconds": 0.0, "cpu": 0.0})
            spent["seconds"] += 0.0 if on_gpu else time.perf_counter() - begun
            spent["cpu"] += time.thread_time() - cpu
            if events:
                events[1].record()
                self._events.append((spent, events))
            return result

        return timed

    def begin_step(self) -> None:
        """Close the step before, and begin the next."""
        now = time.perf_counter(), time.thread_time()
        if self._begun != (0.0, 0.0):
            seconds, cpu = (new - old for new, old in zip(now, self._begun, strict=True))
            self.steps.append({**self._step, "step": {"seconds": seconds, "cpu": cpu}})
        self._begun, self._step = now, {}

    def finish(self) -> None:
        """Read the GPU's clock."""
        for spent, (begin, end) in self._events:
            end.synchronize()
            spent["seconds"] += begin.elapsed_time(end) / 1000


def measure_loop(
    recipe: str, settings: list[str], steps: int, warm: int, loader_seconds: float, folder: str
) -> dict[str, Any]:
    """Train so many steps of a recipe into `folder`, with tracking there, without evaluation and checkpoints.

    The data loader is measured alone first. The first `warm` steps do not count.

    Returns each step's phases, the loader's clips per second alone, and its costs.
    """
    out = Path(folder)
    overrides = [
        f"optimisation.steps={steps}",
        "optimisation.warmup_steps=0",
        "evaluation.at_end=false",
        f"evaluation.every_steps={steps + 1}",
        "run.checkpoint_every_minutes=null",
        "run.checkpoint_every_steps=null",
        f"tracking.uri=sqlite:///{out}/mlflow.db",
    ]
    loaded = load_recipe(find_recipe(Path(recipe)), [*overrides, *settings])
    timer = LoopTimer()
    result: dict[str, Any] = {}
    for phase, (place, name) in PHASES.items():
        setattr(place, name, timer.wrap(phase, getattr(place, name)))
    train_step, fit = Trainer.train_step, Trainer.fit

    def timed_step(self: Trainer, batches: Any) -> Any:
        timer.begin_step()
        return train_step(self, batches)

    def timed_fit(self: Trainer) -> bool:
        result["alone"] = _loader_rate(self.train_loader, loader_seconds)
        timer.begin_step()
        timer.steps.clear()
        before = self.train_loader.costs
        others = OtherPrograms()
        done = fit(self)
        result["others"] = others.cores()
        costs = self.train_loader.costs
        clips = max(1, costs.clips - before.clips)
        result["loader"] = {
            name: (getattr(costs, name) - getattr(before, name)) / clips
            for name in ("read", "decode", "transfer", "augment")
        }
        result["global_batch"] = self.sampler.global_batch
        result["micro_batch"] = self.engine.micro_batch
        result["device"] = self.engine.device.type
        return done

    Trainer.train_step, Trainer.fit = timed_step, timed_fit  # type: ignore[method-assign]
    train(loaded, out / "run", "never")
    timer.finish()
    # The first entry is what lies before the first step; the last step has no next one that closes it.
    return {**result, "steps": timer.steps[1 + warm :]}


def _loader_rate(loader: ClipLoader, seconds: float) -> float:
    """Clips per second of the loader without a training beside it."""
    batches = iter(loader)
    clips, warm_until = 0, time.perf_counter() + seconds / 3
    while time.perf_counter() < warm_until:
        next(batches)
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds:
        clips += len(next(batches).clips)
    return clips / (time.perf_counter() - begun)
