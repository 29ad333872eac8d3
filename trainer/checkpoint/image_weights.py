"""Image ViT checkpoints of any supported naming to the safetensors file that recipes name."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models import PRESETS, ModelError, build_config
from models.config import ACTIVATIONS, BACKBONES
from models.weights.files import StoredWeights, format_list, open_weights
from models.weights.image_backbones import check_image_weights, image_tower, tower_size
from models.weights.names import ImageTower
from models.weights.safetensors_header import shorten
from pipelines.atomic_file import atomic_file
from trainer.checkpoint.tensor_file import write_tensors
from trainer.errors import RunError
from trainer.monitoring.run_dir import check_not_of_run

_IN_A_FOLDER = (
    "model.safetensors",
    "open_clip_model.safetensors",
    "pytorch_model.bin",
    "open_clip_pytorch_model.bin",
)
"""What Hugging Face, timm and open_clip name the file of weights in a model's folder."""
_UNKNOWN_OF_CLIP = (
    "its activation is not in the file: OpenAI's CLIP has QuickGELU, the default; one trained with GELU, as "
    "most of open_clip's, needs model.overrides.activation: gelu"
)
_SIZE = ("width", "depth", "patch_size")


def prepare_image_weights(source: Path, out: Path) -> list[str]:
    """Write the image tower in `source` to `out`, and return what was done, in words.

    source: a file of weights, or a model's folder of Hugging Face, timm or open_clip. The tensors keep
    their names, without the tower's prefix, and their dtypes; `load_image_weights` reads the file. Text
    towers, heads and the last norm are left out.

    Raises RunError for a source without an image ViT that the model can be built on, for one whose
    `config.json` names an activation that the model does not have, and for a file that cannot be written.
    """
    check_not_of_run(out)
    file = _file_in(source)
    if out.exists() and file.exists() and os.path.samefile(file, out):
        raise RunError(f"{out} is the file to read; name another --out")
    try:
        weights = open_weights(file)
        tower = image_tower(weights)
        size = tower_size(weights, tower)
        config = build_config(
            "b16", backbone=tower.backbone, form="scene", frames=1, num_classes=1, global_layers=(), **size
        )
        check_image_weights(config, weights)
        read = weights.read(tower.names())
    except ModelError as error:
        raise RunError(str(error)) from error
    activation = _activation(source)
    tensors = {
        name.removeprefix(tower.prefix): tensor.to(weights.shapes[name].dtype).contiguous()
        for name, tensor in read.items()
    }
    described = {"backbone": tower.backbone, "naming": tower.family, "source": file.name}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out, sync=True) as partial:
            write_tensors(partial, tensors, described)
    except OSError as error:
        raise RunError(f"{out} cannot be written: {error.strerror or error}") from error
    left = len(weights.shapes) - len(read)
    prefix = f" under {shorten(tower.prefix)}" if tower.prefix else ""
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return [
        f"{file}: {tower.family}{prefix}; no code in it was executed",
        f"image tower: width {size['width']}, {size['depth']} blocks of {size['heads']} heads, patches of "
        f"{size['patch_size']}, {size['resolution']} x {size['resolution']} pixels",
        f"left out: {left} of {len(weights.shapes)} tensors" + _named(tower, weights),
        f"wrote {out}: {len(tensors)} tensors in {' and '.join(types)}",
        *_for_recipes(tower, size, out, activation),
    ]


def _file_in(source: Path) -> Path:
    if not source.is_dir():
        return source
    for name in _IN_A_FOLDER:
        if (source / name).is_file():
            return source / name
    parts = sorted(path.name for path in source.glob("*.index.json"))
    hint = f"; weights in several parts ({parts[0]}) are not read: save them as one file" if parts else ""
    raise RunError(f"{source} is a folder without {' or '.join(_IN_A_FOLDER)}{hint}")


def _activation(source: Path) -> str | None:
    """The activation that a folder's `config.json` names; None where there is none. Raises RunError for one
    that the model does not have."""
    try:
        found: Any = json.loads((source / "config.json").read_text(encoding="utf-8"))
        found = found.get("vision_config", found)
        activation = found.get("hidden_act")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    if activation is not None and activation not in ACTIVATIONS:
        raise RunError(
            f"{source / 'config.json'}: the activation is {shorten(activation)}, which this program's models "
            f"do not have: {' or '.join(ACTIVATIONS)}"
        )
    return activation


def _named(tower: ImageTower, weights: StoredWeights) -> str:
    own = [shorten(name) for name in tower.left_out if "relative_position_index" not in name]
    named = f", of the image tower {format_list(own)}" if own else ""
    others = sum(not name.startswith(tower.prefix) for name in weights.shapes)
    return named + (f"; {others} of other parts, such as a text tower" if others else "")


def _for_recipes(tower: ImageTower, size: Mapping[str, int], out: Path, activation: str | None) -> list[str]:
    fitting = [name for name, fields in PRESETS.items() if all(fields[key] == size[key] for key in _SIZE)]
    exact = [name for name in fitting if PRESETS[name]["resolution"] == size["resolution"]]
    lines = []
    if not fitting:
        fields = ", ".join(f"{name}: {value}" for name, value in size.items())
        lines.append(f"no preset has this size: set model.overrides: {{{fields}}}")
    else:
        preset = (exact or fitting)[0]
        lines.append(
            f"in a recipe: model.preset: {preset}, model.backbone: {tower.backbone}, model.weights: {out}"
        )
        if not exact:
            lines.append(
                f"the preset has {PRESETS[preset]['resolution']} pixels: positions will be interpolated, "
                f"unless model.overrides.resolution is {size['resolution']}"
            )
    lines += _about_activation(tower.backbone, activation)
    if tower.backbone == "supervised":
        lines.append("supervised, DINO's and MAE's ViTs are the same network: any of the three names fits")
    return lines


def _about_activation(backbone: str, activation: str | None) -> list[str]:
    default = BACKBONES[backbone].get("activation", "quick_gelu")
    if activation is None:
        return [_UNKNOWN_OF_CLIP] if backbone == "clip" else []
    needed = "the default" if activation == default else f"set model.overrides.activation: {activation}"
    return [f"its activation is {activation}: {needed}"]
