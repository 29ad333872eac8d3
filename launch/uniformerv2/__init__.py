"""The API of the installed package: `uniformerv2.load(SOURCE)`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.checkpoint.weights import SavedWeights

__version__ = "0.1.0"


def load(source: str | Path, *, last: bool = False, frames: int | None = None) -> SavedWeights:
    """A trained model in evaluation mode on the CPU, with class names and preprocessing.

    source: a run directory, a checkpoint, a file of weights, or a folder of `uniformerv2 export --format
    huggingface`. last, frames and exceptions: as for `trainer.inference.model_source.open_model`.

        found = uniformerv2.load("best.safetensors")
        logits = found.model(clips)  # B 3 T H W, normalised as found.preprocessing says; B classes
    """
    from trainer.inference.model_source import open_model  # importing PyTorch takes seconds

    return open_model(Path(source), last=last, frames=frames)
