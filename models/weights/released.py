"""Reads and writes released checkpoints of UniFormerV2 and mmaction2's ports of them.

Both have the same tensors under different names. Depth, width, patch size and local MHRA are inferred from
names and shapes.
"""

import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from models.config import ModelError, UniFormerV2Config
from models.position import grid_of, resize_position_embedding
from models.uniformerv2 import UniFormerV2
from models.weights.files import StoredWeights, WeightSource, format_problems, open_weights
from models.weights.safetensors_header import shorten

logger = logging.getLogger(__name__)

_HEAD_WIDTH = 64
_PAPER_REDUCTION = 1.5
_MAX_BLOCKS = 256

_RELEASED_NAMES = (  # pattern of a whole name in the model → name in the released implementation
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
    """A released checkpoint whose tensors have not been read."""

    stored: StoredWeights
    """Its tensors."""
    config: UniFormerV2Config
    """The inferred config."""
    names: dict[str, str]
    """Released name → name in the file."""
    is_port: bool
    """Whether the file has the names of mmaction2's port."""


class Structure(TypedDict, total=False):
    """What names and shapes do not contain; the defaults hold for all released files."""

    heads: int | None
    """Default: width / 64."""
    global_heads: int | None
    """Default: `heads`."""
    global_layers: Iterable[int] | None
    """Default: the last N layers, for N global blocks."""
    resolution: int | None
    """Pixels; another one than the checkpoint's interpolates the position embedding. Default: the
    checkpoint's."""


def is_released(names: Iterable[str]) -> bool:
    """Whether a file with these names is a released UniFormerV2, or mmaction2's port of one."""
    released = {_released_name(name) for name in names}
    return {"transformer.proj.2.weight", "transformer.resblocks.0.ln_1.weight"} <= released


def describe_released(
    source: WeightSource | StoredWeights, *, frames: int, **structure: Unpack[Structure]
) -> ReleasedWeights:
    """The model that a released state dict describes; the arguments are those of `load_released`.

    Raises `ModelError` that lists at most ten missing, unexpected and mis-shaped tensors.
    """
    weights = source if isinstance(source, StoredWeights) else open_weights(source)
    names = _released_names(weights.shapes)
    shapes = {released_name: weights.shapes[name] for released_name, name in names.items()}
    config = _infer_config(shapes, frames, structure)
    with torch.device("meta"):
        model = UniFormerV2(config)
    embedding = shapes["positional_embedding"]
    resized = torch.empty(1 + config.grid**2, embedding.shape[1], dtype=embedding.dtype, device="meta")
    _check_fit(model, {**shapes, "positional_embedding": resized})
    is_port = any(name.startswith("cls_head.") for name in weights.shapes)
    return ReleasedWeights(weights, config, names, is_port)


def model_shapes(released: ReleasedWeights) -> dict[str, Tensor]:
    """Its tensors' shapes under the model's names, on the meta device."""
    with torch.device("meta"):
        return dict(UniFormerV2(released.config).state_dict())


def read_released(released: ReleasedWeights, wanted: Iterable[str]) -> dict[str, Tensor]:
    """The `wanted` tensors under the model's names and in its shapes. Raises ModelError if they are not
    finite.

    Patch embeddings of Something-Something models are converted to RGB, as they were trained on BGR frames.
    """
    shapes = model_shapes(released)
    files = {own: released.names[_released_name_of(own)] for own in wanted}
    read = released.stored.read(files.values())
    found = {own: read[name].reshape(shapes[own].shape) for own, name in files.items()}
    if released.config.temporal_downsample and "patch_embedding.weight" in found:
        found["patch_embedding.weight"] = found["patch_embedding.weight"].flip(1)
    return found


def load_released(
    path_or_state: WeightSource, *, frames: int, bgr_to_rgb: bool = False, **structure: Unpack[Structure]
) -> UniFormerV2:
    """The model that a released state dict describes, with its weights.

    frames: frames of a clip, which the weights do not contain. bgr_to_rgb: reverse the input channels, as
    the released Something-Something models were trained on BGR frames. structure: see `Structure`.

    A model without `balance` has a frozen backbone. Raises `ModelError` for a file that cannot be read,
    with at most ten missing, unexpected and mis-shaped tensors, and for weights that are not finite.
    """
    released = describe_released(path_or_state, frames=frames, **structure)
    config = released.config
    with torch.device("meta"):
        model = UniFormerV2(config)
    read = released.stored.read(released.names.values())
    state = {released_name: read[name] for released_name, name in released.names.items()}
    state["positional_embedding"] = resize_position_embedding(state["positional_embedding"], config.grid)
    if bgr_to_rgb:
        state["conv1.weight"] = state["conv1.weight"].flip(1)
    elif config.temporal_downsample:
        logger.warning(
            "the released Something-Something models expect BGR frames; bgr_to_rgb=True converts them to RGB"
        )
    model.to_empty(device="cpu")
    targets = model.state_dict().items()
    model.load_state_dict({own: state[_released_name_of(own)].reshape(to.shape) for own, to in targets})
    return model


def to_released(model: UniFormerV2) -> dict[str, Tensor]:
    """The model's tensors under the released names and shapes, without the `backbone.` prefix.

    Raises `ModelError` for a model that the released implementation cannot represent.
    """
    config = model.config
    fields = {
        "fusion": "sequential",
        "activation": "quick_gelu",
        "ln_pre": True,
        "patch_bias": False,
        "qkv_bias": True,
        "layer_scale": None,
        "absolute_positions": True,
        "relative_positions": False,
        "frame_feature": "class_token",
        "local_layers": None,
        "local_dpe": False,
        "temporal_module": "none",
        "global_dpe": True,
        "global_queries": 1,
        "output": "auto",
    }
    for name, needed in fields.items():
        if getattr(config, name) != needed:
            raise ModelError(
                f"{name} is {getattr(config, name)!r}; the released implementation has only {needed!r}"
            )
    if config.global_layers and not config.global_mlp_width:
        raise ModelError("global_mlp_ratio is 0; the released implementation has an MLP in each global block")
    state = {}
    for name, tensor in model.state_dict().items():
        released_name = _released_name_of(name)
        state[released_name] = _with_convolution_shape(released_name, tensor.detach()).clone()
    return state


def to_file(model: UniFormerV2, *, port: bool) -> dict[str, Tensor]:
    """The model's tensors as in a released file or, if `port`, in mmaction2's port of one.

    The input channels of a Something-Something model (`temporal_downsample`) are reversed, as both read its
    frames as BGR. Raises as `to_released`.
    """
    state = to_released(model)
    if model.config.temporal_downsample:
        state["conv1.weight"] = state["conv1.weight"].flip(1)
    return {_file_name(name, port): tensor.contiguous() for name, tensor in state.items()}


def _file_name(released_name: str, port: bool) -> str:
    """The inverse of `_released_name`."""
    if port and released_name.startswith("transformer.proj.2."):
        return released_name.replace("transformer.proj.2.", "cls_head.fc_cls.")
    if port:
        released_name = released_name.replace("transformer.proj.0.", "transformer.norm.")
    return f"backbone.{released_name}"


def _released_names(names: Iterable[str]) -> dict[str, str]:
    """Released name → name in the file; raises ModelError for duplicates."""
    released: dict[str, str] = {}
    for name in names:
        released_name = _released_name(name)
        if released_name in released:
            raise ModelError(f"{shorten(released_name)} is in the file twice, also as {shorten(name)}")
        released[released_name] = name
    return released


def _released_name(name: str) -> str:
    """The released name: without `backbone.`, and with mmaction2's last norm and classifier renamed."""
    released_name = name.removeprefix("backbone.")
    released_name = re.sub(r"^transformer\.norm\.", "transformer.proj.0.", released_name)
    return re.sub(r"^cls_head\.fc_cls\.", "transformer.proj.2.", released_name)


def _infer_config(state: Mapping[str, Tensor], frames: int, structure: Structure) -> UniFormerV2Config:
    patch_weight = _tensor(state, "conv1.weight", dims=5)  # C 3 kt p p
    width, _, taps, patch_size, _ = patch_weight.shape
    grid = grid_of(_tensor(state, "positional_embedding", dims=2))
    depth = _count(state, r"transformer\.resblocks\.(\d+)\.")
    global_blocks = _count(state, r"transformer\.dec\.(\d+)\.")
    reduce_name = "transformer.resblocks.0.lmhra1.pos_embed.1.weight"
    fields: dict[str, Any] = {}
    if reduce_name in state:
        fields["local_mhra"] = 2 if "transformer.resblocks.0.lmhra2.pos_embed.1.weight" in state else 1
        reduced = _tensor(state, reduce_name, dims=5).shape[0]
        # Of several reductions that give as many channels, such as 682 of 1024, the paper's.
        is_papers = int(width / _PAPER_REDUCTION) == reduced
        fields["local_reduction"] = _PAPER_REDUCTION if is_papers else width / reduced
    mlp_ratio = _tensor(state, "transformer.resblocks.0.mlp.c_fc.weight", dims=2).shape[0] / width
    if global_blocks:
        global_ratio = _tensor(state, "transformer.dec.0.mlp.c_fc.weight", dims=2).shape[0] / width
        if global_ratio != mlp_ratio:
            fields["global_mlp_ratio"] = global_ratio
    resolution, global_heads = structure.get("resolution"), structure.get("global_heads")
    heads, global_layers = structure.get("heads"), structure.get("global_layers")
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
        mlp_ratio=mlp_ratio,
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
        raise ModelError(f"these are not UniFormerV2 weights: tensor {name} is missing")
    tensor = state[name]
    if tensor.dim() != dims or not tensor.numel():
        raise ModelError(
            f"{name} has shape {shorten(tuple(tensor.shape))}, expected are {dims} dimensions, none of them 0"
        )
    return tensor


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    numbers = (re.match(pattern, name) for name in state)
    count = max((int(number.group(1)[:9]) + 1 for number in numbers if number), default=0)
    if count > _MAX_BLOCKS:
        raise ModelError(f"the tensor names have {count:,} blocks; allowed are at most {_MAX_BLOCKS}")
    return count


def _check_fit(model: UniFormerV2, shapes: Mapping[str, Tensor]) -> None:
    """Raises ModelError for missing and unexpected tensors and for wrong shapes and dtypes."""
    problems = []
    own = model.state_dict()
    for name, target in own.items():
        released_name = _released_name_of(name)
        if released_name not in shapes:
            problems.append(f"missing {released_name}")
            continue
        found, wanted = shapes[released_name], tuple(_with_convolution_shape(released_name, target).shape)
        if tuple(found.shape) != wanted:
            problems.append(f"{released_name} has shape {shorten(tuple(found.shape))}, expected is {wanted}")
        elif found.is_floating_point() != target.is_floating_point():
            problems.append(f"{released_name} holds {str(found.dtype).removeprefix('torch.')}")
    known = {_released_name_of(name) for name in own}
    problems += [f"unexpected {shorten(name)}" for name in shapes if name not in known]
    if problems:
        raise ModelError(f"the weights do not fit the model they describe:{format_problems(problems)}")


def _released_name_of(name: str) -> str:
    for pattern, released_name in _RELEASED_NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, released_name, name)
    raise ModelError(f"{name} has no counterpart in the released implementation")


def _with_convolution_shape(released_name: str, tensor: Tensor) -> Tensor:
    """Adds the dimensions of 3-D convolutions to the local MHRA, which here has linear layers and a 2-D
    one."""
    if re.search(r"lmhra[12]\.pos_embed\.[123]\.weight$", released_name):
        return tensor.reshape(*tensor.shape, *[1] * (5 - tensor.dim()))
    return tensor
