"""Released checkpoints in and out.

The released files and mmaction2's port of them hold the same tensors under other names; depth, width, patch,
local MHRA and the rest are read off names and shapes.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models.config import ModelError, UniFormerV2Config
from models.position import grid_of, resize_position_embedding
from models.uniformerv2 import UniFormerV2
from models.weights.files import StoredWeights, WeightSource, open_weights
from models.weights.safetensors_header import shorten

logger = logging.getLogger(__name__)

_HEAD_WIDTH = 64
_PAPER_REDUCTION = 1.5
_MOST_PROBLEMS = 10
_MOST_BLOCKS = 256

_OFFICIAL_NAMES = (  # first pattern that fits the whole name of ours → name in the released implementation
    (r"class_token", r"class_embedding"),
    (r"position_embedding", r"positional_embedding"),
    (r"patch_embedding\.weight", r"conv1.weight"),
    (r"ln_pre\.(\w+)", r"ln_pre.\1"),
    (r"fusion\.query", r"transformer.temporal_cls_token"),
    (r"balance", r"transformer.balance"),
    (r"head_norm\.(\w+)", r"transformer.proj.0.\1"),
    (r"head\.(\w+)", r"transformer.proj.2.\1"),
    (r"blocks\.(\d+)\.local_([12])\.norm\.(\w+)", r"transformer.resblocks.\1.lmhra\2.pos_embed.0.\3"),
    (r"blocks\.(\d+)\.local_([12])\.reduce\.(\w+)", r"transformer.resblocks.\1.lmhra\2.pos_embed.1.\3"),
    (r"blocks\.(\d+)\.local_([12])\.temporal\.(\w+)", r"transformer.resblocks.\1.lmhra\2.pos_embed.2.\3"),
    (r"blocks\.(\d+)\.local_([12])\.expand\.(\w+)", r"transformer.resblocks.\1.lmhra\2.pos_embed.3.\3"),
    (r"blocks\.(\d+)\.attention\.qkv\.(\w+)", r"transformer.resblocks.\1.attn.in_proj_\2"),
    (r"blocks\.(\d+)\.attention\.out\.(\w+)", r"transformer.resblocks.\1.attn.out_proj.\2"),
    (r"blocks\.(\d+)\.norm_([12])\.(\w+)", r"transformer.resblocks.\1.ln_\2.\3"),
    (r"blocks\.(\d+)\.mlp\.expand\.(\w+)", r"transformer.resblocks.\1.mlp.c_fc.\2"),
    (r"blocks\.(\d+)\.mlp\.contract\.(\w+)", r"transformer.resblocks.\1.mlp.c_proj.\2"),
    (r"fusion\.blocks\.(\d+)\.dpe\.(\w+)", r"transformer.dpe.\1.\2"),
    (r"fusion\.blocks\.(\d+)\.attention\.(in_proj_\w+)", r"transformer.dec.\1.attn.\2"),
    (r"fusion\.blocks\.(\d+)\.attention\.out\.(\w+)", r"transformer.dec.\1.attn.out_proj.\2"),
    (r"fusion\.blocks\.(\d+)\.norm_query\.(\w+)", r"transformer.dec.\1.ln_1.\2"),
    (r"fusion\.blocks\.(\d+)\.norm_mlp\.(\w+)", r"transformer.dec.\1.ln_2.\2"),
    (r"fusion\.blocks\.(\d+)\.norm_tokens\.(\w+)", r"transformer.dec.\1.ln_3.\2"),
    (r"fusion\.blocks\.(\d+)\.mlp\.expand\.(\w+)", r"transformer.dec.\1.mlp.c_fc.\2"),
    (r"fusion\.blocks\.(\d+)\.mlp\.contract\.(\w+)", r"transformer.dec.\1.mlp.c_proj.\2"),
)


@dataclass(frozen=True)
class ReleasedWeights:
    """A released checkpoint, of which no tensor has been read.

    stored: its tensors. config: of the model that it describes. names: the file's by the released ones.
    shapes: by the released names. is_port: whether the names are those of mmaction2's port.
    """

    stored: StoredWeights
    config: UniFormerV2Config
    names: dict[str, str]
    shapes: dict[str, Tensor]
    is_port: bool


def is_released(names: Iterable[str]) -> bool:
    """Whether a file with these names is a released UniFormerV2, or mmaction2's port of one."""
    released = {_released_name(name) for name in names}
    return {"transformer.proj.2.weight", "transformer.resblocks.0.ln_1.weight"} <= released


def describe_released(
    source: WeightSource | StoredWeights,
    *,
    frames: int,
    heads: int | None = None,
    global_heads: int | None = None,
    global_layers: Iterable[int] | None = None,
    resolution: int | None = None,
) -> ReleasedWeights:
    """What a released state dict describes; the arguments are those of `load_released`.

    Raises `ModelError` for missing, unexpected and mis-shaped tensors, of which it lists ten.
    """
    weights = source if isinstance(source, StoredWeights) else open_weights(source)
    names = _released_names(weights.shapes)
    shapes = {official: weights.shapes[name] for official, name in names.items()}
    config = _infer_config(
        shapes,
        frames=frames,
        heads=heads,
        global_heads=global_heads,
        global_layers=global_layers,
        resolution=resolution,
    )
    with torch.device("meta"):
        model = UniFormerV2(config)
    _check_fit(model, {**shapes, "positional_embedding": _resized(shapes["positional_embedding"], config)})
    is_port = any(name.startswith("cls_head.") for name in weights.shapes)
    return ReleasedWeights(weights, config, names, shapes, is_port)


def model_shapes(released: ReleasedWeights) -> dict[str, Tensor]:
    """Its tensors' shapes by the names of this program, on the meta device."""
    with torch.device("meta"):
        return dict(UniFormerV2(released.config).state_dict())


def read_released(released: ReleasedWeights, wanted: Iterable[str]) -> dict[str, Tensor]:
    """Tensors by the names, and in the shapes, of this program. Raises ModelError for what is not finite.

    Those of Something-Something take RGB: the released ones were trained on BGR frames.
    """
    shapes = model_shapes(released)
    files = {own: released.names[_official_name(own)] for own in wanted}
    read = released.stored.read(files.values())
    found = {own: read[name].reshape(shapes[own].shape) for own, name in files.items()}
    if released.config.temporal_downsample and "patch_embedding.weight" in found:
        found["patch_embedding.weight"] = found["patch_embedding.weight"].flip(1)
    return found


def load_released(
    path_or_state: WeightSource,
    *,
    frames: int,
    heads: int | None = None,
    global_heads: int | None = None,
    global_layers: Iterable[int] | None = None,
    resolution: int | None = None,
    bgr_to_rgb: bool = False,
) -> UniFormerV2:
    """The model that a released state dict describes, with its weights.

    `frames` is the clip length; it leaves no trace in the weights, nor do the numbers of heads and the layers
    that the global blocks follow. By default `heads` is width / 64, `global_heads` is `heads`, and the N
    global blocks follow the last N layers: true of every released file. `resolution` other than the weights'
    own interpolates the position embedding. `bgr_to_rgb` reverses the input channels: the released
    Something-Something models were trained on BGR frames.

    A frozen model is known by its missing `balance`. Raises `ModelError` for a file that cannot be read, for
    missing, unexpected and mis-shaped tensors, of which it lists ten, and for weights that are not finite.
    """
    released = describe_released(
        path_or_state,
        frames=frames,
        heads=heads,
        global_heads=global_heads,
        global_layers=global_layers,
        resolution=resolution,
    )
    config = released.config
    with torch.device("meta"):
        model = UniFormerV2(config)
    read = released.stored.read(released.names.values())
    state = {official: read[name] for official, name in released.names.items()}
    state["positional_embedding"] = resize_position_embedding(state["positional_embedding"], config.grid)
    if bgr_to_rgb:
        state["conv1.weight"] = state["conv1.weight"].flip(1)
    elif config.temporal_downsample:
        logger.warning(
            "the released Something-Something models expect BGR frames; bgr_to_rgb=True makes them take RGB"
        )
    model.to_empty(device="cpu")
    _copy_into(model, state)
    return model


def to_released(model: UniFormerV2) -> dict[str, Tensor]:
    """The model's tensors under the released names and shapes, without the `backbone.` prefix.

    Raises `ModelError` for a model that the released implementation cannot express.
    """
    config = model.config
    fields = {"fusion": "sequential", "activation": "quick_gelu", "ln_pre": True, "patch_bias": False}
    for name, needed in fields.items():
        if getattr(config, name) != needed:
            raise ModelError(f"{name} is {getattr(config, name)!r}, the released layout has only {needed!r}")
    state = {}
    for name, tensor in model.state_dict().items():
        official = _official_name(name)
        state[official] = _with_convolution_shape(official, tensor.detach()).clone()
    return state


def _released_names(names: Iterable[str]) -> dict[str, str]:
    """The names in the file by the released ones."""
    released: dict[str, str] = {}
    for name in names:
        official = _released_name(name)
        if official in released:
            raise ModelError(f"{shorten(official)} stands in the file twice, also as {shorten(name)}")
        released[official] = name
    return released


def _released_name(name: str) -> str:
    """Without `backbone.`, and mmaction2's names of the last norm and the classifier turned back."""
    official = name.removeprefix("backbone.")
    official = re.sub(r"^transformer\.norm\.", "transformer.proj.0.", official)
    return re.sub(r"^cls_head\.fc_cls\.", "transformer.proj.2.", official)


def _resized(embedding: Tensor, config: UniFormerV2Config) -> Tensor:
    """A position embedding's shape, on the meta device, once it is interpolated."""
    return torch.empty(1 + config.grid**2, embedding.shape[1], dtype=embedding.dtype, device="meta")


def _infer_config(
    state: Mapping[str, Tensor],
    *,
    frames: int,
    heads: int | None,
    global_heads: int | None,
    global_layers: Iterable[int] | None,
    resolution: int | None,
) -> UniFormerV2Config:
    patch_weight = _tensor(state, "conv1.weight", dims=5)  # C 3 kt p p
    width, _, taps, patch_size, _ = patch_weight.shape
    grid = grid_of(_tensor(state, "positional_embedding", dims=2))
    depth = _count(state, r"transformer\.resblocks\.(\d+)\.")
    global_blocks = _count(state, r"transformer\.dec\.(\d+)\.")
    reduce_name = "transformer.resblocks.0.lmhra1.pos_embed.1.weight"
    fields: dict[str, Any] = {}
    if reduce_name in state:
        fields["local_mhra"] = 2 if "transformer.resblocks.0.lmhra2.pos_embed.1.weight" in state else 1
        fields["local_reduction"] = _reduction(width, _tensor(state, reduce_name, dims=5).shape[0])
    if heads is None:
        heads = max(1, width // _HEAD_WIDTH)
    if global_layers is None:
        global_layers = range(depth - global_blocks, depth)
    return UniFormerV2Config(
        resolution=grid * patch_size if resolution is None else resolution,
        patch_size=patch_size,
        width=width,
        depth=depth,
        heads=heads,
        mlp_ratio=_tensor(state, "transformer.resblocks.0.mlp.c_fc.weight", dims=2).shape[0] / width,
        frames=frames,
        num_classes=_tensor(state, "transformer.proj.2.weight", dims=2).shape[0],
        temporal_downsample=taps == 3,
        global_layers=tuple(global_layers),
        global_heads=heads if global_heads is None else global_heads,
        frozen_backbone=global_blocks > 0 and "transformer.balance" not in state,
        **fields,
    )


def _tensor(state: Mapping[str, Tensor], name: str, dims: int) -> Tensor:
    if name not in state:
        raise ModelError(f"these are not UniFormerV2 weights: there is no tensor {name}")
    tensor = state[name]
    if tensor.dim() != dims or not tensor.numel():
        raise ModelError(
            f"{name} has shape {shorten(tuple(tensor.shape))}, expected are {dims} dimensions above 0"
        )
    return tensor


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    numbers = (re.match(pattern, name) for name in state)
    count = max((int(number.group(1)[:9]) + 1 for number in numbers if number), default=0)
    if count > _MOST_BLOCKS:
        raise ModelError(f"the names count {count:,} blocks; allowed are at most {_MOST_BLOCKS}")
    return count


def _reduction(width: int, reduced: int) -> float:
    """The reduction that gives `reduced` channels: 1.5 where it fits, since 682 of 1024 has many."""
    return _PAPER_REDUCTION if int(width / _PAPER_REDUCTION) == reduced else width / reduced


def _check_fit(model: UniFormerV2, shapes: Mapping[str, Tensor]) -> None:
    """Raises ModelError for missing, unexpected and mis-shaped tensors, and those that hold no fractions."""
    problems = []
    own = model.state_dict()
    for name, target in own.items():
        official = _official_name(name)
        if official not in shapes:
            problems.append(f"missing {official}")
            continue
        found, wanted = shapes[official], tuple(_with_convolution_shape(official, target).shape)
        if tuple(found.shape) != wanted:
            problems.append(f"{official} has shape {shorten(tuple(found.shape))}, expected is {wanted}")
        elif found.is_floating_point() != target.is_floating_point():
            problems.append(f"{official} holds {str(found.dtype).removeprefix('torch.')}")
    known = {_official_name(name) for name in own}
    problems += [f"unexpected {shorten(name)}" for name in shapes if name not in known]
    more = len(problems) - _MOST_PROBLEMS
    if problems:
        lines = problems[:_MOST_PROBLEMS] + ([f"... and {more:,} more"] if more > 0 else [])
        raise ModelError("the weights do not fit the model they describe:\n  " + "\n  ".join(lines))


def _copy_into(model: UniFormerV2, state: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    model.load_state_dict(
        {name: state[_official_name(name)].reshape(target.shape) for name, target in own.items()}
    )


def _official_name(name: str) -> str:
    for pattern, official in _OFFICIAL_NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, official, name)
    raise ModelError(f"{name} has no counterpart in the released implementation")


def _with_convolution_shape(official: str, tensor: Tensor) -> Tensor:
    """The released local MHRA is made of 3-D convolutions; here they are linear layers and a 2-D one."""
    if re.search(r"lmhra[12]\.pos_embed\.[123]\.weight$", official):
        return tensor.reshape(*tensor.shape, *[1] * (5 - tensor.dim()))
    return tensor
