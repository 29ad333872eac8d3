"""Loads the weights of an image ViT into the backbone of a video model."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.config import ModelError, UniFormerV2Config
from models.position import (
    grid_of,
    interpolate_position_embedding,
    interpolate_position_table,
    lacks_class_row,
    table_grid_of,
    with_class_row,
)
from models.uniformerv2 import UniFormerV2
from models.weights.files import StoredWeights, WeightSource, format_list, format_problems, open_weights
from models.weights.names import ImageTower, find_tower, guess_origin
from models.weights.safetensors_header import shorten

logger = logging.getLogger(__name__)

_QKV_PARTS = 3
_HEAD_WIDTH = 64
_TABLE = ".positions.table"

Inflation = Literal["centre", "mean"]
"""Which frames of an inflated patch embedding get the image weight: the centre, or all an equal share."""


@dataclass(frozen=True)
class ImageWeightsReport:
    """How image weights were loaded."""

    family: str
    """The naming scheme of the source, as text."""
    loaded: tuple[str, ...]
    """The model's tensors with image weights."""
    adapted: tuple[str, ...]
    """Those of `loaded` whose size was changed."""
    adaptations: tuple[str, ...]
    """The changes of size, in words."""
    left_out: tuple[str, ...]
    """Names in the source without a tensor in the model: last norm and projection or head."""
    kept: tuple[str, ...]
    """The model's tensors that keep their initialisation: those of the video parts."""


def load_image_weights(
    model: UniFormerV2, source: WeightSource | StoredWeights, inflation: Inflation = "centre"
) -> ImageWeightsReport:
    """Load an image ViT's weights into the backbone of `model`.

    source: a `.safetensors` or `torch.save` file or a state dict of a ViT of table 8: CLIP, supervised,
    DeiT III, DINO, MAE or BEiT, as OpenAI, open_clip, timm or Hugging Face names it, under any prefix. A text
    tower and `logit_scale` are ignored.

    The tensors are changed as follows, so that a repeated image gives the image model's tokens:

    - A 2-D patch weight is inflated over the frames of a patch, see `Inflation`.
    - Separate queries, keys and values are concatenated. BEiT has no bias of the keys: it becomes zero, which
      is exact, as the softmax cancels a bias of the keys.
    - A position embedding without the class token, as DeiT III's, gets a zero row for it.
    - Position embedding and tables of relative positions are interpolated bicubically to the model's grid.

    Each change is logged.

    The model changes only if everything fits. Otherwise raises `ModelError` with the probable origin of the
    weights and at most ten missing, unexpected and mis-shaped tensors, before a tensor is read, or for
    weights that are not finite.
    """
    targets = model.state_dict()
    weights, tower, report = _match(targets, model.config, source)
    tensors = weights.read(tower.names())
    weights.read(tower.prefix + name for name in tower.left_out if tower.prefix + name in weights.shapes)
    loaded = {
        own: _fit(own, _joined(tensors, names), targets[own], model.config.grid, inflation)
        for own, names in tower.parts.items()
    }
    model.load_state_dict(loaded, strict=False)
    for line in report.adaptations:
        logger.warning("image weights: %s", line)
    logger.info("image weights: %d tensors loaded, %d left out", len(loaded), len(tower.left_out))
    return report


def check_image_weights(
    config: UniFormerV2Config, source: WeightSource | StoredWeights
) -> ImageWeightsReport:
    """The report of `load_image_weights` for these weights, without reading a tensor of a safetensors file.

    Raises ModelError for weights that it would refuse for their names, shapes or dtypes.
    """
    with torch.device("meta"):
        targets = UniFormerV2(config).state_dict()
    return _match(targets, config, source)[2]


def image_tower(weights: StoredWeights) -> ImageTower:
    """The image tower in a file; raises ModelError with the probable origin where there is none."""
    tower = find_tower(weights.shapes)
    if tower is None:
        guess = guess_origin(weights.shapes)
        origin = f"it looks like {guess}" if guess else "its names are unknown"
        raise ModelError(
            f"{weights.origin} holds no image weights that can be loaded; {origin}. Supported: CLIP or its "
            "visual tower, and a supervised, DeiT III, DINO, MAE or BEiT ViT, as OpenAI, open_clip, timm or "
            f"Hugging Face names it. The file has {format_list([shorten(name) for name in weights.shapes])}"
        )
    return tower


def tower_size(weights: StoredWeights, tower: ImageTower) -> dict[str, int]:
    """`width`, `depth`, `heads`, `patch_size` and `resolution` of a tower, as fields of a config.

    Heads are in the shapes of BEiT only; else they are 64 channels wide, as in all published models. Raises
    ModelError for a tower without a patch embedding of four or five dimensions or without positions.
    """
    patch = weights.shapes[tower.parts["patch_embedding.weight"][""]]
    if patch.dim() not in (4, 5) or 0 in patch.shape:
        raise ModelError(f"{weights.origin}: the patch embedding has shape {shorten(tuple(patch.shape))}")
    width = patch.shape[0]
    heads = max(1, width // _HEAD_WIDTH)
    tables = [names[""] for own, names in tower.parts.items() if own.endswith(_TABLE)]
    if tables and weights.shapes[tables[0]].dim() == 2:
        grid, heads = table_grid_of(weights.shapes[tables[0]]), weights.shapes[tables[0]].shape[1]
    elif "position_embedding" in tower.parts:
        (positions,) = tower.parts["position_embedding"].values()
        embedding = weights.shapes[positions]
        if embedding.dim() == 0:
            raise ModelError(f"{weights.origin}: the position embedding is a single number")
        grid = grid_of(with_class_row(embedding.flatten(0, -2) if embedding.dim() > 2 else embedding))
    else:
        raise ModelError(f"{weights.origin} has no position embedding and no relative positions")
    side = patch.shape[-1]
    size = {"width": width, "depth": _depth(tower.parts), "heads": heads}
    return {**size, "patch_size": side, "resolution": grid * side}


def _match(
    targets: Mapping[str, Tensor], config: UniFormerV2Config, source: WeightSource | StoredWeights
) -> tuple[StoredWeights, ImageTower, ImageWeightsReport]:
    """The opened weights, their image tower and the report of loading them. targets: the model's tensors."""
    weights = source if isinstance(source, StoredWeights) else open_weights(source)
    tower = image_tower(weights)
    _check_fit(weights, tower, targets, config)
    adapted = tuple(
        own
        for own, names in tower.parts.items()
        if sum(weights.shapes[name].numel() for name in names.values()) != targets[own].numel()
    )
    kept = tuple(name for name in targets if name not in tower.parts)
    report = ImageWeightsReport(
        tower.family,
        tuple(tower.parts),
        adapted,
        tuple(_adaptations(weights, tower, targets, config.grid)),
        tower.left_out,
        kept,
    )
    return weights, tower, report


def _adaptations(
    weights: StoredWeights, tower: ImageTower, targets: Mapping[str, Tensor], grid: int
) -> list[str]:
    """What `_fit` and `_joined` change beside names, in words."""
    lines = []
    (patch,) = tower.parts["patch_embedding.weight"].values()
    frames = targets["patch_embedding.weight"].shape[2]
    if weights.shapes[patch].dim() == 4 and frames > 1:
        lines.append(f"patch embedding: inflated to {frames} frames")
    positions = tower.parts.get("position_embedding")
    if positions is not None:
        embedding = weights.shapes[positions[""]].flatten(0, -2)
        if lacks_class_row(embedding):
            lines.append("position embedding: without one of the class token, which becomes zero")
        old = grid_of(with_class_row(embedding))
        if old != grid:
            lines.append(
                f"position embedding: interpolated from {old}x{old} to {grid}x{grid} patches, bicubically"
            )
    tables = [names[""] for own, names in tower.parts.items() if own.endswith(_TABLE)]
    if tables:
        old = table_grid_of(weights.shapes[tables[0]])
        if old != grid:
            lines.append(
                f"relative positions: interpolated from {old}x{old} to {grid}x{grid} patches, bicubically"
            )
        if len(set(tables)) < len(tables):
            lines.append("relative positions: each block gets a copy of the table that all share")
    if any(own.endswith("qkv.bias") and names.keys() == {"q", "v"} for own, names in tower.parts.items()):
        lines.append("keys: without a bias, which becomes zero")
    return lines


def _check_fit(
    weights: StoredWeights, tower: ImageTower, targets: Mapping[str, Tensor], config: UniFormerV2Config
) -> None:
    """Raises ModelError for missing and unexpected tensors and for wrong shapes and dtypes."""
    unexpected = [f"unexpected {shorten(name)}" for name in tower.unexpected]
    wrong, missing = [], []
    for own, names in tower.parts.items():
        if own not in targets:
            unexpected += [
                f"unexpected {shorten(name.removeprefix(tower.prefix))}" for name in names.values()
            ]
            continue
        sources = {role: weights.shapes[name] for role, name in names.items()}
        wrong += _wrong_types(names, sources)
        wrong += _wrong_shapes(own, names, sources, targets[own])
    for own in targets:
        if own not in tower.parts and _comes_from_image(own):
            missing.append(f"missing {own}")
    if not (unexpected or wrong or missing):
        return
    guess = guess_origin(weights.shapes)
    seems = f"; it looks like {guess}" if guess and unexpected else ""
    if tower.backbone != backbone_of(config):
        seems += f"; its tensors are those of `model.backbone: {tower.backbone}`"
    raise ModelError(
        f"the image weights do not fit the model: {weights.origin}, read as {tower.family}{seems}\n"
        f"  {_dimensions(weights, tower, targets)}{format_problems(wrong, missing, unexpected)}"
    )


def backbone_of(config: UniFormerV2Config) -> str:
    """As `ImageTower.backbone`, of a model with this config."""
    if config.ln_pre:
        return "clip"
    if config.relative_positions:
        return "beit"
    return "supervised" if config.layer_scale is None else "deit3"


def _wrong_types(names: Mapping[str, str], sources: Mapping[str, Tensor]) -> list[str]:
    return [
        f"{shorten(names[role])} holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point numbers"
        for role, tensor in sources.items()
        if not tensor.is_floating_point()
    ]


def _wrong_shapes(
    own: str,
    names: Mapping[str, str],
    sources: Mapping[str, Tensor],
    target: Tensor,
) -> list[str]:
    """Messages for wrong shapes. names, sources: by query, key and value, the names of the tensors for the
    model's tensor `own`, and these on the meta device."""
    expected = tuple(target.shape)
    if "" not in sources:
        expected = (expected[0] // _QKV_PARTS, *expected[1:])
        absent = {"q", "k", "v"} - sources.keys() - ({"k"} if own.endswith(".bias") else set())
        if absent:
            return [
                f"{own} needs query, key and value; there is only {', '.join(map(shorten, names.values()))}"
            ]
    if own == "patch_embedding.weight" and all(tensor.dim() == 4 for tensor in sources.values()):
        expected = (*expected[:2], *expected[3:])
    return [
        f"{shorten(names[role])} has shape {shorten(tuple(tensor.shape))}, expected is {expected}"
        for role, tensor in sources.items()
        if not _fits(own, tensor, expected)
    ]


def _fits(own: str, tensor: Tensor, expected: tuple[int, ...]) -> bool:
    """Whether `_fit` can convert the tensor to the expected shape."""
    shape = tuple(tensor.shape)
    if own == "class_token":
        return tensor.numel() == expected[0] and len(shape) >= 1
    if own == "position_embedding":
        if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1) or shape[-1] != expected[-1]:
            return False
        grid_of(with_class_row(tensor.flatten(0, -2)))
        return True
    if own.endswith(_TABLE):
        if len(shape) != 2 or shape[1] != expected[1]:
            return False
        table_grid_of(tensor)
        return True
    return shape == expected


def _dimensions(weights: StoredWeights, tower: ImageTower, targets: Mapping[str, Tensor]) -> str:
    """The dimensions of the file and of the model, as text."""
    patch = weights.shapes[tower.parts["patch_embedding.weight"][""]]
    in_file = f"width {patch.shape[0]}, patches of {patch.shape[-1]}, " if patch.dim() else ""
    target = targets["patch_embedding.weight"]
    in_model = f"width {target.shape[0]}, patches of {target.shape[-1]}, {_depth(targets)} blocks"
    return f"in the file: {in_file}{_depth(tower.parts)} blocks; in the model: {in_model}"


def _depth(names: Iterable[str]) -> int:
    return len({name.split(".")[1] for name in names if name.startswith("blocks.")})


def _comes_from_image(own: str) -> bool:
    is_backbone = own.startswith(
        ("patch_embedding.", "class_token", "position_embedding", "ln_pre.", "blocks.")
    )
    return is_backbone and ".local_" not in own and ".temporal." not in own


def _joined(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> Tensor:
    """One tensor of a part: queries, keys and values concatenated, and zeros for an absent bias of keys."""
    if "" in names:
        return tensors[names[""]]
    query = tensors[names["q"]]
    return torch.cat([tensors[names[role]] if role in names else torch.zeros_like(query) for role in "qkv"])


def _fit(own: str, tensor: Tensor, target: Tensor, grid: int, inflation: Inflation) -> Tensor:
    """The tensor inflated, flattened or interpolated to the shape of its target."""
    if own == "patch_embedding.weight" and tensor.dim() == 4:
        return inflate(tensor, target.shape[2], inflation)
    if own == "class_token":
        return tensor.flatten()
    if own == "position_embedding":
        return interpolate_position_embedding(with_class_row(tensor.flatten(0, -2)), grid)
    if own.endswith(_TABLE):
        return interpolate_position_table(tensor, grid)
    return tensor


def inflate(weight: Tensor, taps: int, inflation: Inflation) -> Tensor:  # C 3 p p -> C 3 taps p p
    """A patch embedding over `taps` frames, with the same tokens for a clip of equal frames."""
    if inflation == "mean":
        return (weight / taps).unsqueeze(2).expand(-1, -1, taps, -1, -1).clone()
    inflated = torch.zeros(*weight.shape[:2], taps, *weight.shape[2:], dtype=weight.dtype)
    inflated[:, :, taps // 2] = weight
    return inflated
