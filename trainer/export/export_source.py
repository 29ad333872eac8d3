"""What is exported: a model, and what its run knows of it."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.checkpoint.export import read_checkpoint
from trainer.checkpoint.metadata import STATE
from trainer.checkpoint.weights import SavedWeights
from trainer.errors import RunError
from trainer.inference.model_source import HUB_WEIGHTS, build_model, open_model


@dataclass(frozen=True)
class ExportSource:
    """A model to export. The rest is known only of one out of a run."""

    weights: SavedWeights
    run: Path | None = None
    """The run's folder."""
    ranks: int | None = None
    """By how many processes the run was trained when the weights were saved."""
    as_evaluated: bool = True
    """Whether the run evaluated these weights: not those of a last step beside a moving average."""
    settings: dict[str, Any] = field(default_factory=dict)
    """What may not change during the run, the training data's fingerprint among it."""

    @property
    def step(self) -> int | None:
        """Optimiser steps after which the weights were saved."""
        return self.weights.step

    @property
    def name(self) -> str:
        """The recipe's, or `uniformerv2` for weights without a recipe."""
        return str(self.weights.recipe.get("name") or "uniformerv2")


def read_source(
    source: Path, *, best: bool = False, average: bool = True, frames: int | None = None
) -> ExportSource:
    """Read the model to export from a run's folder, a checkpoint or a file of weights.

    best, average: as of `read_checkpoint`; a file holds one set of weights. frames: of a clip, for a released
    checkpoint. Raises RunError where the source cannot be read, or has no such choice.
    """
    if not source.is_dir() or (source / HUB_WEIGHTS).is_file():
        if best or not average:
            raise RunError(f"--best and --last choose among the weights of a run; {source} holds one set")
        return ExportSource(open_model(source, frames=frames))
    state, tensors = read_checkpoint(source, best=best, average=average)
    run = source.absolute().parents[1] if (source / STATE).exists() else source
    weights = build_model(state, tensors, source)
    keeps_average = bool(weights.recipe.get("optimisation", {}).get("ema_decay"))
    return ExportSource(weights, run, state.world_size, average or not keeps_average, state.settings)
