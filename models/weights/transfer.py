"""Transfers the weights of a video model to a model with a slightly different config, for fine-tuning.

The transfer is planned from names, shapes and configs before a tensor is read.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from models.config import ModelError, UniFormerV2Config
from models.position import interpolate_position_embedding, interpolate_position_table
from models.uniformerv2 import UniFormerV2
from models.weights.files import format_problems
from models.weights.image_backbones import Inflation, inflate

_POSITION = "position_embedding"
_PATCHES = "patch_embedding.weight"
_TABLE = re.compile(r"blocks\.\d+\.attention\.positions\.table")
_FRAMES = "temporal_position"
_OPTIONAL = re.compile(
    r"blocks\.\d+\.(local_|temporal\.).*|fusion\..*|balance|head\..*"
    r"|temporal_position|temporal_transformer\..*"
)
"""Tensors that may be missing on either side: all except the image ViT."""
_RESHAPED_FUSION = ("fusion.query", "fusion.project.weight")  # shapes depend on the number of global blocks
_SHAPELESS = ("heads", "activation", "norm_eps", "frame_feature")
"""Fields that change the computation but no shape."""


@dataclass(frozen=True)
class VideoWeights:
    """The weights of a video model, with this program's names and shapes."""

    origin: str
    """Their name in messages."""
    config: UniFormerV2Config
    """The config of their model."""
    shapes: Mapping[str, Tensor]
    """Their tensors on the meta device."""
    read: Callable[[Iterable[str]], Mapping[str, Tensor]]
    """Returns the named tensors in float32; raises ModelError."""


@dataclass(frozen=True)
class TransferPlan:
    """Which tensors of a file are loaded into which tensors of a model."""

    sources: Mapping[str, str]
    """Tensor of the model → its name in the file."""
    adapted: tuple[str, ...]
    """Those of `sources` that change shape, except the head's."""
    new: tuple[str, ...]
    """The model's tensors that keep their initialisation."""
    left_out: tuple[str, ...]
    """The file's tensors that are not loaded."""
    rows: tuple[int | None, ...]
    """Row of the model's head → row of the file's, None for a new row."""


def plan_transfer(
    source: VideoWeights, config: UniFormerV2Config, rows: Sequence[int | None]
) -> TransferPlan:
    """Plan the transfer to a model of this config without reading a tensor.

    rows: row of the model's head → row of the file's, None for one that keeps its initialisation.

    Raises ModelError, with the dimensions of both sides and at most ten tensors, if the image ViTs differ
    in more than the resolution and the frames of a patch.
    """
    with torch.device("meta"):
        targets = UniFormerV2(config).state_dict()
    keeps_head = any(row is not None for row in rows)
    sources: dict[str, str] = {}
    adapted: list[str] = []
    new: list[str] = []
    wrong: list[str] = []
    missing: list[str] = []
    for name, target in targets.items():
        other = _name_there(name, source.config, config)
        found = None if other is None else source.shapes.get(other)
        if other is None or found is None:
            (new if _OPTIONAL.fullmatch(name) else missing).append(name)
        elif name.startswith("head.") and not keeps_head:
            new.append(name)
        elif name.startswith("head.") or found.shape == target.shape:
            sources[name] = other
        elif _can_adapt(name, found, target):
            sources[name] = other
            adapted.append(name)
        elif name in _RESHAPED_FUSION:
            new.append(name)
        else:
            wrong.append(
                f"{name} has shape {tuple(found.shape)} in the file, {tuple(target.shape)} in the model"
            )
    used = set(sources.values())
    unused = [name for name in source.shapes if name not in used]
    unexpected = [name for name in unused if not _OPTIONAL.fullmatch(name) and name not in targets]
    _check(source, config, wrong, missing, unexpected)
    left_out = tuple(name for name in unused if not name.startswith("head."))
    return TransferPlan(sources, tuple(adapted), tuple(new), left_out, tuple(rows))


def load_transfer(
    model: UniFormerV2, source: VideoWeights, plan: TransferPlan, inflation: Inflation = "centre"
) -> None:
    """Copy the weights into the model as planned. Raises ModelError if they are not finite."""
    read = source.read(plan.sources.values())
    own = model.state_dict()
    loaded = {}
    for name, other in plan.sources.items():
        tensor, target = read[other], own[name]
        if name.startswith("head."):
            tensor = _rows(tensor, target, plan.rows)
        elif name == _POSITION:
            tensor = interpolate_position_embedding(tensor, model.config.grid)
        elif name == _PATCHES:
            taps = target.shape[2]  # the same tokens for a clip of equal frames
            tensor = tensor if tensor.shape[2] == taps else inflate(tensor.sum(dim=2), taps, inflation)
        elif _TABLE.fullmatch(name):
            tensor = interpolate_position_table(tensor, model.config.grid)
        elif name == _FRAMES:
            tensor = _with_frames(tensor, len(target))
        loaded[name] = tensor
    model.load_state_dict(loaded, strict=False)


def _name_there(name: str, there: UniFormerV2Config, here: UniFormerV2Config) -> str | None:
    """The file's name of a model's tensor, or None. Global blocks correspond by the layer that they
    follow."""
    block = re.fullmatch(r"fusion\.blocks\.(\d+)\.(.*)", name)
    if block is None:
        return name
    layer = here.global_layers[int(block[1])]
    if layer not in there.global_layers:
        return None
    return f"fusion.blocks.{there.global_layers.index(layer)}.{block[2]}"


def _can_adapt(name: str, found: Tensor, target: Tensor) -> bool:
    if name in (_POSITION, _FRAMES) or _TABLE.fullmatch(name):
        return found.shape[1] == target.shape[1]
    if name == _PATCHES:
        others = [shape[:2] + shape[3:] for shape in (found.shape, target.shape)]
        return others[0] == others[1] and 1 in (found.shape[2], target.shape[2])
    return False


def _with_frames(positions: Tensor, frames: int) -> Tensor:  # T C -> frames C
    """Temporal positions, linearly interpolated to another number of frames."""
    resized = F.interpolate(positions.T.unsqueeze(0), size=frames, mode="linear", align_corners=False)
    return resized.squeeze(0).T


def _rows(tensor: Tensor, initial: Tensor, rows: Sequence[int | None]) -> Tensor:
    mapped = initial.clone()
    for own, other in enumerate(rows):
        if other is not None:
            mapped[own] = tensor[other]
    return mapped


def _check(
    source: VideoWeights,
    config: UniFormerV2Config,
    wrong: Sequence[str],
    missing: Sequence[str],
    unexpected: Sequence[str],
) -> None:
    there = source.config
    fields = [name for name in _SHAPELESS if getattr(there, name) != getattr(config, name)]
    if there.global_layers and config.global_layers and there.global_heads != config.global_heads:
        fields.append("global_heads")
    meaning = [
        f"{name} is {getattr(there, name)} in the file, {getattr(config, name)} in the model"
        for name in fields
    ]
    columns = (
        meaning,
        wrong,
        [f"missing in the file: {name}" for name in missing],
        [f"not in the model: {name}" for name in unexpected],
    )
    if not any(columns):
        return
    raise ModelError(
        f"{source.origin} does not fit the model\n"
        f"  in the file: {_dimensions(there)}; in the model: {_dimensions(config)}{format_problems(*columns)}"
    )


def _dimensions(config: UniFormerV2Config) -> str:
    return (
        f"width {config.width}, {config.depth} blocks, {config.heads} heads, patches of {config.patch_size}"
    )
