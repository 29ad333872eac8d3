"""The names that published image ViTs use for their tensors, and how they become ours."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

Names = tuple[tuple[str, str], ...]

CLIP: Names = (  # pattern for a whole name in CLIP's visual tower, by OpenAI and open_clip → name here
    (r"conv1\.(\w+)", r"patch_embedding.\1"),
    (r"class_embedding", r"class_token"),
    (r"positional_embedding", r"position_embedding"),
    (r"ln_pre\.(\w+)", r"ln_pre.\1"),
    (r"transformer\.resblocks\.(\d+)\.ln_([12])\.(\w+)", r"blocks.\1.norm_\2.\3"),
    (r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(\w+)", r"blocks.\1.attention.qkv.\2"),
    (r"transformer\.resblocks\.(\d+)\.attn\.out_proj\.(\w+)", r"blocks.\1.attention.out.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_fc\.(\w+)", r"blocks.\1.mlp.expand.\2"),
    (r"transformer\.resblocks\.(\d+)\.mlp\.c_proj\.(\w+)", r"blocks.\1.mlp.contract.\2"),
)
HUGGING_FACE: Names = (  # the same tower as transformers' CLIPModel and CLIPVisionModel write it
    (r"embeddings\.patch_embedding\.(\w+)", r"patch_embedding.\1"),
    (r"embeddings\.class_embedding", r"class_token"),
    (r"embeddings\.position_embedding\.weight", r"position_embedding"),
    (r"pre_laye?rnorm\.(\w+)", r"ln_pre.\1"),  # pre_layrnorm, as it was once misspelt, in all files
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.(\w+)", r"blocks.\1.norm_\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.(\w+)", r"blocks.\1.attention.qkv.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)", r"blocks.\1.attention.out.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.(\w+)", r"blocks.\1.mlp.expand.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.(\w+)", r"blocks.\1.mlp.contract.\2"),
)
TIMM: Names = (  # timm's plain ViTs: supervised, DINO, MAE
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
_FAMILIES = (  # whose; the patch embedding's name, by which the tower is found; a name beside it; all names
    ("CLIP as Hugging Face names it", "embeddings.patch_embedding.weight", "encoder.layers.", HUGGING_FACE),
    ("a ViT as timm names it", "patch_embed.proj.weight", "blocks.", TIMM),
    ("CLIP as OpenAI and open_clip name it", "conv1.weight", "transformer.resblocks.", CLIP),
)
_NOT_USED = re.compile(
    r"ln_post\..*|proj|post_layernorm\..*|embeddings\.position_ids"
    r"|visual_projection\.weight|text_model\..*|text_projection(\.weight)?|logit_scale"
    r"|norm\..*|fc_norm\..*|head\..*|decoder_.*|mask_token"
)
_MOST_TOWERS = 50  # looked into, the shortest names first, in a file with many
_QKV = re.compile(r".*\.self_attn\.([qkv])_proj\.\w+")

_OTHERS = (  # a part of a name → whose it is, from the most telling on
    (r"lora_|\.base_layer\.", "LoRA: merge it into the weights that it changes, then give those"),
    (
        r"attn_pool|vision_model\.head\.probe|logit_bias",
        "SigLIP: it has no class token, with which this model begins",
    ),
    (r"lmhra|transformer\.dec\.\d", "a released UniFormerV2: `models.weights.released` reads those"),
    (r"^fusion\.|^head_norm\.", "a model of this program, of video and not of images"),
    (
        r"\.ls[12]\.gamma|register_tokens|layer_scale|\.gamma_[12]|relative_position",
        "DINOv2, BEiT or DeiT III: there is no place for its layer scale or relative positions",
    ),
    (r"decoder_(embed|blocks|pred)", "MAE"),
    (r"embeddings\.patch_embeddings\.projection", "a ViT (supervised, DINO or MAE) as Hugging Face names it"),
    (r"layer\d\.\d+\.(conv|bn)\d", "a ResNet, also of CLIP: only ViTs can be loaded"),
    (r"text_model\.|token_embedding", "CLIP's text tower alone"),
    (r"^(student|teacher)\.", "DINO with its teacher: give the teacher's backbone alone"),
    (r"exp_avg", "an optimiser's state"),
)


@dataclass(frozen=True)
class ImageTower:
    """An image tower that was found among tensors, without regard to shapes.

    whose: in words. prefix: what its names begin with in the file. parts: for each of our names the names in
    the file, three where query, key and value are apart. left_out: what the model has no place for.
    unexpected: what nobody knows.
    """

    family: str
    prefix: str
    parts: dict[str, tuple[str, ...]]
    left_out: tuple[str, ...]
    unexpected: tuple[str, ...]


def find_tower(shapes: Mapping[str, Tensor]) -> ImageTower | None:
    """The image tower, with whatever its names begin with: nothing, `visual.`, `vision_model.`, `module.`

    What stands under another beginning, as a text tower does, is passed over.
    """
    for family, patch, beside, names in _FAMILIES:
        found = sorted((name for name in shapes if name == patch or name.endswith("." + patch)), key=len)
        for name in found[:_MOST_TOWERS]:
            prefix = name.removesuffix(patch)
            if any(other.startswith(prefix + beside) for other in shapes):
                return _tower(family, prefix, names, shapes)
    return None


def _tower(family: str, prefix: str, names: Names, shapes: Iterable[str]) -> ImageTower:
    parts: dict[str, dict[str, str]] = {}
    left_out: list[str] = []
    unexpected: list[str] = []
    for name in shapes:
        if not name.startswith(prefix):
            if name.endswith("visual_projection.weight"):
                left_out.append(name)
            continue
        inner = name.removeprefix(prefix)
        own = _own_name(inner, names)
        if own is None:
            (left_out if _NOT_USED.fullmatch(inner) else unexpected).append(inner)
            continue
        qkv = _QKV.fullmatch(inner)
        found = parts.setdefault(own, {})
        if found.setdefault(qkv[1] if qkv else "", name) != name:
            unexpected.append(inner)  # a second name of the same tensor
    ordered = {
        own: tuple(found[key] for key in ("", "q", "k", "v") if key in found) for own, found in parts.items()
    }
    return ImageTower(family, prefix, ordered, tuple(left_out), tuple(unexpected))


def _own_name(name: str, names: Names) -> str | None:
    for pattern, own in names:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, own, name)
    return None


def guess_origin(names: Iterable[str]) -> str | None:
    """Whose the weights seem to be, of those that cannot be loaded, in words; None for unknown ones."""
    found = list(names)
    for pattern, words in _OTHERS:
        if any(re.search(pattern, name) for name in found):
            return words
    return None
