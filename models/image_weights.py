"""Weights of an image ViT into the backbone of a video model."""

import logging
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from models.config import ModelError
from models.position import resize_position_embedding
from models.uniformerv2 import UniFormerV2
from models.weight_files import WeightSource, read_state

logger = logging.getLogger(__name__)

_CLIP_NAMES = (  # pattern for a whole name in CLIP's visual tower → name here
    (r"conv1\.weight", r"patch_embedding.weight"),
    (r"class_embedding", r"class_token"),
    (r"positional_embedding", r"position_embedding"),
    (r"ln_pre\.(\w+)", r"ln_pre.\1"),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.(\w+)", r"blocks.\1.norm_\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)", r"blocks.\1.attention.qkv.\2"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)", r"blocks.\1.attention.out.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)", r"blocks.\1.mlp.expand.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)", r"blocks.\1.mlp.contract.\2"),
)
_TIMM_NAMES = (  # the same for timm's plain ViTs: supervised, DINO, MAE
    (r"patch_embed\.proj\.(\w+)", r"patch_embedding.\1"),
    (r"cls_token", r"class_token"),
    (r"pos_embed", r"position_embedding"),
    (r"norm_pre\.(\w+)", r"ln_pre.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(\w+)", r"blocks.\1.norm_\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"blocks.\1.attention.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"blocks.\1.attention.out.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"blocks.\1.mlp.expand.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"blocks.\1.mlp.contract.\2"),
)
_NOT_USED = re.compile(r"ln_post\..*|proj|norm\..*|fc_norm\..*|head\..*")


@dataclass(frozen=True)
class ImageWeightsReport:
    """What became of the image weights."""

    loaded: tuple[str, ...]
    """Names of the model's tensors that now hold image weights."""
    adapted: tuple[str, ...]
    """Those of `loaded` that changed shape on the way: inflated or interpolated."""
    left_out: tuple[str, ...]
    """Names in the source that the model has no place for: last norm and projection or head."""
    kept: tuple[str, ...]
    """Names of the model's tensors that keep their initialisation: what video adds."""


def load_image_weights(model: UniFormerV2, source: WeightSource) -> ImageWeightsReport:
    """Fills the backbone of `model` with an image ViT's weights, and says what it did.

    `source` is a `.safetensors` or `torch.save` file or a state dict: a CLIP model as open_clip names it
    (`visual.conv1.weight`; text tower and `logit_scale` are passed over), its visual tower alone, or a plain
    ViT as timm names it (not DeiT III or BEiT, whose layer scale has no place here). A 2-D patch weight is
    inflated at the centre tap, the other taps zero, so that one image repeated gives the image model's
    tokens. The position embedding is interpolated to the model's grid, which the log says.

    The model is changed only if everything fits; otherwise `ModelError` lists missing, unexpected and
    mis-shaped tensors.
    """
    visual = _visual_part(read_state(source))
    names = _TIMM_NAMES if "patch_embed.proj.weight" in visual else _CLIP_NAMES
    targets = model.state_dict()
    loaded: dict[str, Tensor] = {}
    adapted: list[str] = []
    left_out: list[str] = []
    unexpected: list[str] = []
    for name, tensor in visual.items():
        own = _own_name(name, names)
        if own is None or own not in targets:
            (left_out if _NOT_USED.fullmatch(name) else unexpected).append(name)
            continue
        loaded[own] = _fit(own, tensor, targets[own], model.config.grid)
        if loaded[own].numel() != tensor.numel():
            adapted.append(own)
    problems = [f"unexpected {name}" for name in unexpected]
    problems += [
        f"{name} has shape {tuple(tensor.shape)}, expected is {tuple(targets[name].shape)}"
        for name, tensor in loaded.items()
        if tensor.shape != targets[name].shape
    ]
    kept = tuple(name for name in targets if name not in loaded)
    problems += [f"missing {name}" for name in kept if _comes_from_image(name)]
    if problems:
        raise ModelError("the image weights do not fit the model:\n  " + "\n  ".join(problems))
    model.load_state_dict(loaded, strict=False)
    logger.info("image weights: %d tensors loaded, %d left out", len(loaded), len(left_out))
    return ImageWeightsReport(tuple(loaded), tuple(adapted), tuple(left_out), kept)


def _visual_part(state: dict[str, Tensor]) -> dict[str, Tensor]:
    visual = {name.removeprefix("visual."): t for name, t in state.items() if name.startswith("visual.")}
    return visual or state


def _own_name(name: str, names: tuple[tuple[str, str], ...]) -> str | None:
    for pattern, own in names:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, own, name)
    return None


def _comes_from_image(own: str) -> bool:
    is_backbone = own.startswith(
        ("patch_embedding.", "class_token", "position_embedding", "ln_pre.", "blocks.")
    )
    return is_backbone and ".local_" not in own


def _fit(own: str, tensor: Tensor, target: Tensor, grid: int) -> Tensor:
    """The tensor in the shape of its target where there is a way to get there, else as it is."""
    if own == "patch_embedding.weight" and tensor.dim() == 4:
        return _inflate(tensor, target.shape[2])
    if own == "class_token":
        return tensor.flatten()
    if own == "position_embedding":
        return resize_position_embedding(tensor.flatten(0, -2), grid)
    return tensor


def _inflate(weight: Tensor, taps: int) -> Tensor:  # C 3 p p -> C 3 taps p p
    inflated = torch.zeros(*weight.shape[:2], taps, *weight.shape[2:], dtype=weight.dtype)
    inflated[:, :, taps // 2] = weight
    return inflated
