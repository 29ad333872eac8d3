"""Entry points of `torch.hub`, from a clone of the project:

    model = torch.hub.load("PATH/OF/THE/CLONE", "uniformerv2", weights="best.safetensors", source="local")
    model = torch.hub.load(REPO, "uniformerv2_b16", source="local", form="scene", frames=8, num_classes=400)

A program with its own package `models` installs the wheel and calls `uniformerv2.load` instead.
"""

from collections.abc import Callable
from pathlib import Path

from models import PRESETS, UniFormerV2, create_model

dependencies = ["torch", "numpy", "safetensors"]


def uniformerv2(weights: str, frames: int | None = None) -> UniFormerV2:
    """A trained model in evaluation mode on the CPU: clips B 3 T H W to logits.

    weights: a run directory, a checkpoint, a file of weights, or an exported folder. frames: frames of a
    clip, required for a released checkpoint, which does not contain it.
    """
    from trainer.inference.model_source import open_model

    return open_model(Path(weights), frames=frames).model


def _entry(preset: str) -> Callable[..., UniFormerV2]:
    def entry(form: str = "scene", frames: int = 8, num_classes: int = 400, **fields: object) -> UniFormerV2:
        return create_model(preset, form=form, frames=frames, num_classes=num_classes, **fields)

    entry.__doc__ = (
        f"An untrained UniFormerV2 of the preset {preset}; fields: other fields of UniFormerV2Config."
    )
    return entry


for _preset in PRESETS:
    globals()[f"uniformerv2_{_preset}"] = _entry(_preset)
