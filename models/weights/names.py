"""Tensor names of published image ViTs, and their names in this program's model."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

Names = tuple[tuple[str, str], ...]
"""Pattern of a whole name in the file → name in the model."""

CLIP: Names = (  # CLIP's visual tower as OpenAI and open_clip name it
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
HUGGING_FACE: Names = (  # the same tower in transformers' CLIPModel and CLIPVisionModel
    (r"embeddings\.patch_embedding\.(\w+)", r"patch_embedding.\1"),
    (r"embeddings\.class_embedding", r"class_token"),
    (r"embeddings\.position_embedding\.weight", r"position_embedding"),
    (r"pre_laye?rnorm\.(\w+)", r"ln_pre.\1"),  # all files have the misspelling pre_layrnorm
    (r"encoder\.layers\.(\d+)\.layer_norm([12])\.(\w+)", r"blocks.\1.norm_\2.\3"),
    (r"encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.(\w+)", r"blocks.\1.attention.qkv.\2"),
    (r"encoder\.layers\.(\d+)\.self_attn\.out_proj\.(\w+)", r"blocks.\1.attention.out.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc1\.(\w+)", r"blocks.\1.mlp.expand.\2"),
    (r"encoder\.layers\.(\d+)\.mlp\.fc2\.(\w+)", r"blocks.\1.mlp.contract.\2"),
)
HUGGING_FACE_VIT: Names = (  # transformers' ViT, DINO, MAE and BEiT models
    (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embedding.\1"),
    (r"embeddings\.cls_token", r"class_token"),
    (r"embeddings\.position_embeddings", r"position_embedding"),
    (r"encoder\.layer\.(\d+)\.layernorm_before\.(\w+)", r"blocks.\1.norm_1.\2"),
    (r"encoder\.layer\.(\d+)\.layernorm_after\.(\w+)", r"blocks.\1.norm_2.\2"),
    (
        r"encoder\.layer\.(\d+)\.attention\.attention\.(?:query|key|value)\.(\w+)",
        r"blocks.\1.attention.qkv.\2",
    ),
    (
        r"encoder\.layer\.(\d+)\.attention\.attention\.relative_position_bias\.relative_position_bias_table",
        r"blocks.\1.attention.positions.table",
    ),
    (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)", r"blocks.\1.attention.out.\2"),
    (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)", r"blocks.\1.mlp.expand.\2"),
    (r"encoder\.layer\.(\d+)\.output\.dense\.(\w+)", r"blocks.\1.mlp.contract.\2"),
    (r"encoder\.layer\.(\d+)\.lambda_1", r"blocks.\1.attention.layer_scale.factor"),
    (r"encoder\.layer\.(\d+)\.lambda_2", r"blocks.\1.mlp.layer_scale.factor"),
)
TIMM: Names = (  # timm's ViTs: supervised, DeiT III, DINO, MAE, CLIP and BEiT; the authors of the last five
    (r"patch_embed\.proj\.(\w+)", r"patch_embedding.\1"),
    (r"cls_token", r"class_token"),
    (r"pos_embed", r"position_embedding"),
    (r"norm_pre\.(\w+)", r"ln_pre.\1"),
    (r"blocks\.(\d+)\.norm([12])\.(\w+)", r"blocks.\1.norm_\2.\3"),
    (r"blocks\.(\d+)\.attn\.qkv\.(\w+)", r"blocks.\1.attention.qkv.\2"),
    (r"blocks\.(\d+)\.attn\.[qv]_bias", r"blocks.\1.attention.qkv.bias"),
    (r"blocks\.(\d+)\.attn\.relative_position_bias_table", r"blocks.\1.attention.positions.table"),
    (r"blocks\.(\d+)\.attn\.proj\.(\w+)", r"blocks.\1.attention.out.\2"),
    (r"blocks\.(\d+)\.mlp\.fc1\.(\w+)", r"blocks.\1.mlp.expand.\2"),
    (r"blocks\.(\d+)\.mlp\.fc2\.(\w+)", r"blocks.\1.mlp.contract.\2"),
    (r"blocks\.(\d+)\.(?:ls1\.gamma|gamma_1)", r"blocks.\1.attention.layer_scale.factor"),
    (r"blocks\.(\d+)\.(?:ls2\.gamma|gamma_2)", r"blocks.\1.mlp.layer_scale.factor"),
)
_SHARED_TABLES = ("rel_pos_bias.", "encoder.relative_position_bias.")
"""Prefixes of BEiT's pretrained weights before fine-tuning, whose blocks share one table of positions."""
_TABLE = "relative_position_bias_table"
_FAMILIES = (  # family; name of the patch embedding, by which a tower is found; prefix of its blocks; names
    ("CLIP as Hugging Face names it", "embeddings.patch_embedding.weight", "encoder.layers.", HUGGING_FACE),
    (
        "a ViT as Hugging Face names it",
        "embeddings.patch_embeddings.projection.weight",
        "encoder.layer.",
        HUGGING_FACE_VIT,
    ),
    ("a ViT as timm names it", "patch_embed.proj.weight", "blocks.", TIMM),
    ("CLIP as OpenAI and open_clip name it", "conv1.weight", "transformer.resblocks.", CLIP),
)
_NOT_USED = re.compile(
    r"ln_post\..*|proj|post_layernorm\..*|embeddings\.position_ids"
    r"|visual_projection\.weight|text_model\..*|text_projection(\.weight)?|logit_scale"
    r"|norm\..*|fc_norm\..*|head\..*|lm_head\..*|decoder_.*|mask_token"
    r"|layernorm\..*|pooler\..*|embeddings\.mask_token|(.*\.)?relative_position_index"
)
_MAX_TOWERS = 50  # candidates that are checked, shortest names first
_QKV = re.compile(
    r".*(?:\.self_attn\.([qkv])_proj\.\w+|\.attn\.([qv])_bias|\.attention\.(q)uery\.\w+"
    r"|\.attention\.(k)ey\.\w+|\.attention\.(v)alue\.\w+)"
)
"""The names of separate queries, keys and values."""

_OTHERS = (  # pattern in a name → its origin, the most specific first
    (r"lora_|\.base_layer\.", "LoRA: merge it into the weights that it changes, then give those"),
    (
        r"attn_pool|vision_model\.head\.probe|logit_bias",
        "SigLIP: it lacks the class token that this model needs",
    ),
    (r"lmhra|transformer\.dec\.\d", "a released UniFormerV2: `models.weights.released` reads those"),
    (r"^fusion\.|^head_norm\.", "a video model of this program, not an image model"),
    (r"register_tokens|reg_token", "a DINOv2 with registers, which this model does not have"),
    (r"layer_scale[12]\.lambda1", "DINOv2 as Hugging Face names it: give it as timm names it"),
    (r"dist_token|distillation", "a distilled DeiT, whose second token this model does not have"),
    (r"decoder_(embed|blocks|pred)", "MAE"),
    (r"layer\d\.\d+\.(conv|bn)\d", "a ResNet, also of CLIP: only ViTs can be loaded"),
    (r"text_model\.|token_embedding", "CLIP's text tower alone"),
    (r"^(student|teacher)\.", "DINO with its teacher: give the teacher's backbone alone"),
    (r"exp_avg", "an optimiser's state"),
)


@dataclass(frozen=True)
class ImageTower:
    """An image tower in a file, identified by names alone."""

    family: str
    """The naming scheme, as text."""
    prefix: str
    """The prefix of its names in the file."""
    parts: dict[str, dict[str, str]]
    """Name in the model → names in the file, by `q`, `k` and `v` where these are separate, else by ``."""
    left_out: tuple[str, ...]
    """Known names for which the model has no tensor."""
    unexpected: tuple[str, ...]
    """Unknown names."""

    @property
    def backbone(self) -> str:
        """The name in `models.config.BACKBONES` of the ViT with these tensors.

        `supervised` is also that of DINO and MAE, which have the same tensors.
        """
        if "ln_pre.weight" in self.parts:
            return "clip"
        if any(name.endswith("positions.table") for name in self.parts):
            return "beit"
        return "deit3" if any("layer_scale" in name for name in self.parts) else "supervised"

    def names(self) -> list[str]:
        """The names in the file of all its parts, each once."""
        return list(dict.fromkeys(name for found in self.parts.values() for name in found.values()))


def find_tower(shapes: Mapping[str, Tensor]) -> ImageTower | None:
    """The image tower under any prefix, such as none, `visual.`, `vision_model.` or `module.`; None if
    there is none.

    Names with another prefix, such as those of a text tower, are ignored.
    """
    for family, patch, blocks, names in _FAMILIES:
        found = sorted((name for name in shapes if name == patch or name.endswith("." + patch)), key=len)
        for name in found[:_MAX_TOWERS]:
            prefix = name.removesuffix(patch)
            if any(other.startswith(prefix + blocks) for other in shapes):
                return _tower(family, prefix, names, shapes)
    return None


def _tower(family: str, prefix: str, names: Names, shapes: Iterable[str]) -> ImageTower:
    parts: dict[str, dict[str, str]] = {}
    left_out: list[str] = []
    unexpected: list[str] = []
    shared: list[str] = []
    for name in shapes:
        if not name.startswith(prefix):
            if name.endswith("visual_projection.weight"):
                left_out.append(name)
            continue
        inner = name.removeprefix(prefix)
        own = _own_name(inner, names)
        if own is None:
            if inner in [table + _TABLE for table in _SHARED_TABLES]:
                shared.append(name)
            else:
                (left_out if _NOT_USED.fullmatch(inner) else unexpected).append(inner)
            continue
        qkv = _QKV.fullmatch(inner)
        found = parts.setdefault(own, {})
        role = next(filter(None, qkv.groups())) if qkv else ""
        if found.setdefault(role, name) != name:
            unexpected.append(inner)  # a second name of the same tensor
    for table in shared:
        for block in {own.split(".")[1] for own in parts if own.startswith("blocks.")}:
            parts.setdefault(f"blocks.{block}.attention.positions.table", {"": table})
    roles = ["", "q", "k", "v"]
    ordered = {own: {role: found[role] for role in roles if role in found} for own, found in parts.items()}
    return ImageTower(family, prefix, ordered, tuple(left_out), tuple(unexpected))


def _own_name(name: str, names: Names) -> str | None:
    for pattern, own in names:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, own, name)
    return None


def guess_origin(names: Iterable[str]) -> str | None:
    """The probable origin of weights that cannot be loaded, as text; None if unknown."""
    found = list(names)
    for pattern, origin in _OTHERS:
        if any(re.search(pattern, name) for name in found):
            return origin
    return None
