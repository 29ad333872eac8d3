"""The model to export and the facts of its run."""

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
    """A model to export. All fields except `weights` need a run.

    weights: the model and its metadata.
    run: the run directory.
    ranks: world size when the weights were saved.
    as_evaluated: whether the run evaluated these weights; False for the last step's weights beside an EMA.
    settings: what may not change during the run, such as the fingerprint of the training data.
    """

    weights: SavedWeights
    run: Path | None = None
    ranks: int | None = None
    as_evaluated: bool = True
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def step(self) -> int | None:
        """The training step of the weights."""
        return self.weights.step

    @property
    def name(self) -> str:
        """The recipe's name, or `uniformerv2` for weights without a recipe."""
        return str(self.weights.recipe.get("name") or "uniformerv2")


def read_source(
    source: Path, *, best: bool = False, average: bool = True, frames: int | None = None
) -> ExportSource:
    """Read the model to export from a run directory, a checkpoint or a file of weights.

    best, average: as for `read_checkpoint`; not for a file, which has one set of weights. frames: frames per
    clip of a released checkpoint. Raises RunError if the source cannot be read or offers no such choice.
    """
    if not source.is_dir() or (source / HUB_WEIGHTS).is_file():
        if best or not average:
            raise RunError(f"--best and --last choose among the weights of a run; {source} has one set")
        return ExportSource(open_model(source, frames=frames))
    state, tensors = read_checkpoint(source, best=best, average=average)
    run = source.absolute().parents[1] if (source / STATE).exists() else source
    weights = build_model(state, tensors)
    keeps_average = bool(weights.recipe.get("optimisation", {}).get("ema_decay"))
    return ExportSource(weights, run, state.world_size, average or not keeps_average, state.settings)
