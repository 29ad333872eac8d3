"""The configuration of a UniFormerV2, and the presets of the paper."""

import contextlib
import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = ("quick_gelu", "gelu")
FUSIONS = ("sequential", "parallel", "hierarchical_kv", "hierarchical_q")
FORMS = ("scene", "temporal")
FRAME_FEATURES = ("class_token", "patch_mean")
TEMPORAL_MODULES = (
    "none",
    "temporal_mhsa",
    "temporal_convolution",
    "st_adapter",
    "temporal_shift",
    "joint_mhsa",
    "temporal_transformer",
)
"""What the paper compares with the local MHRA, tables 9b and 15; see `models.temporal_modules`."""
OUTPUTS = ("auto", "balanced", "video_token")

_MAX = {
    "resolution": 4096,
    "patch_size": 1024,
    "width": 16_384,
    "depth": 256,
    "heads": 1024,
    "global_heads": 1024,
    "frames": 4096,
    "num_classes": 1_000_000,
    "recomputed_blocks": 256,
    "local_mhra": 2,
    "global_queries": 256,
}
"""Largest values of whole numbers: far above any published model, and too small to exhaust a node's
memory."""
_BOOLEANS = (
    "ln_pre",
    "patch_bias",
    "qkv_bias",
    "absolute_positions",
    "relative_positions",
    "temporal_downsample",
    "local_dpe",
    "global_dpe",
    "frozen_backbone",
)
_LAYERS = ("local_layers", "global_layers")
_CHOICES = {
    "activation": ACTIVATIONS,
    "frame_feature": FRAME_FEATURES,
    "fusion": FUSIONS,
    "temporal_module": TEMPORAL_MODULES,
    "output": OUTPUTS,
}
OUTSIDE_BLOCKS = ("joint_mhsa", "temporal_transformer")
"""Temporal modules of the whole model, not of its blocks."""
_RATES = ("global_mlp_dropout", "head_dropout", "drop_path", "global_drop_path")
_ALLOWED = ", allowed is: "
_MAX_GRID = 256  # patches along one side
_MAX_MLP_RATIO = 64
_MIN_EPS = 1e-12
_MAX_PARAMETERS = 30_000_000_000


class ModelError(ValueError):
    """A model cannot be built, weights do not fit it, or a clip has a wrong shape."""


@dataclass(frozen=True, kw_only=True)
class UniFormerV2Config:
    """The complete description of a UniFormerV2. Construction raises `ModelError` that names a wrong
    field."""

    resolution: int
    """Height and width of a frame, in pixels; a multiple of `patch_size`."""
    patch_size: int
    """Height and width of a patch, in pixels."""
    width: int
    """Channels C of every token; a multiple of `heads` and of `global_heads`."""
    depth: int
    """Number of ViT blocks (Local UniBlocks, section 3.1)."""
    heads: int
    """Heads of the spatial attention."""
    mlp_ratio: float = 4.0
    """Hidden channels of the ViT's MLPs, in units of `width`."""
    activation: str = "quick_gelu"
    """Non-linearity of the ViT's MLPs: `quick_gelu` (CLIP) or `gelu`; global blocks always use QuickGELU."""
    norm_eps: float = 1e-5
    """Epsilon of the ViT's layer norms: 1e-5 for CLIP, 1e-6 for ViTs from timm."""
    ln_pre: bool = True
    """Whether a layer norm follows the position embedding, as in CLIP."""
    patch_bias: bool = False
    """Whether the patch embedding has a bias; CLIP's has none."""
    qkv_bias: bool = True
    """Whether the ViT's packed QKV projections have a bias."""
    layer_scale: float | None = None
    """Initial value of a learnt factor per channel at the end of each attention and MLP of the ViT, as in
    DeiT III and BEiT; null has none."""
    absolute_positions: bool = True
    """Whether the tokens have a position embedding; BEiT's have none."""
    relative_positions: bool = False
    """Whether each attention of the ViT has a learnt bias per head and relative position, as in BEiT."""
    frame_feature: str = "class_token"
    """What represents a frame in the head: its last `class_token`, or `patch_mean`, the mean of its last
    patch tokens, with which BEiT was fine-tuned on images."""

    frames: int
    """Frames T of a clip; even with `temporal_downsample`, which halves them."""
    num_classes: int
    """Number of logits."""

    temporal_downsample: bool = False
    """Whether the patch embedding spans 3 frames with stride 2, which halves the frames inside the model:
    T-Down of table 9a."""
    local_mhra: int = 0
    """Local temporal MHRAs per block, equations (1) and (6), table 9b: 0, 1 (before the attention) or 2
    (before and after it)."""
    local_reduction: float = 1.5
    """A local MHRA, and an ST-Adapter, works on `int(width / local_reduction)` channels, table 9b."""
    local_layers: tuple[int, ...] | None = None
    """Ascending numbers, from 0, of the blocks with local MHRA or with the temporal module, table 9b; null
    is all blocks."""
    local_dpe: bool = False
    """Whether a dynamic position embedding, as in equation (8), precedes the local MHRA: Local MHRA + DPE of
    table 9b."""
    temporal_module: str = "none"
    """What replaces the local MHRA, tables 9b and 15. Before the attention of a block: `temporal_mhsa`
    (with the spatial attention: divided space-time MHSA), `temporal_convolution`, `st_adapter` or
    `temporal_shift`. Instead of it: `joint_mhsa`. After the last block: `temporal_transformer`. `none`
    without local MHRA and global blocks is mean pooling."""

    global_layers: tuple[int, ...] = ()
    """Ascending numbers, from 0, of the blocks after which there is a Global UniBlock, section 3.2, table
    9c; if empty, the head receives the class tokens only."""
    global_dpe: bool = True
    """Whether a Global UniBlock has a dynamic position embedding, equation (8), table 9c."""
    global_queries: int = 1
    """Learnable queries of a Global UniBlock, equation (9), table 14; the video token is the mean of
    theirs."""
    global_heads: int = 1
    """Heads of the cross attention in a Global UniBlock."""
    global_mlp_ratio: float | None = None
    """Hidden channels of the MLPs of Global UniBlocks, in units of `width`; null takes `mlp_ratio`, and 0 has
    no MLP: an attentive probe is one such block on a frozen backbone."""
    global_mlp_dropout: float = 0.5
    """Dropout inside the MLP of a Global UniBlock."""
    fusion: str = "sequential"
    """Fusion of the global blocks' video tokens, section 3.3, table 9d: `sequential`, `parallel`,
    `hierarchical_kv` or `hierarchical_q`."""
    output: str = "auto"
    """What the head receives from a model with global blocks, section 3.3, table 12: `balanced` (video token
    and mean class token, weighted by a learnt sigmoid), `video_token` (Only Global), or `auto`: `video_token`
    with `frozen_backbone`, else `balanced`."""

    head_dropout: float = 0.5
    """Dropout before the classifier."""
    drop_path: float = 0.0
    """Drop-path rate of the last ViT block; the rate grows linearly from 0 over the depth."""
    global_drop_path: float = 0.0
    """Drop-path rate of the last Global UniBlock; the rate grows linearly from 0."""

    frozen_backbone: bool = False
    """Whether the image ViT has no gradient."""
    recomputed_blocks: int = 0
    """Activation checkpointing: number of ViT blocks, from the first, that the backward computes again."""

    def __post_init__(self) -> None:
        for name in _LAYERS:
            layers = getattr(self, name)
            if not isinstance(layers, str):  # a text would be a tuple of its letters
                with contextlib.suppress(TypeError):  # `check_field` refuses what is no list
                    object.__setattr__(self, name, layers if layers is None else tuple(layers))
        for field in dataclasses.fields(self):
            check_field(field.name, getattr(self, field.name))
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Raises ModelError for values that contradict those of other fields."""
        width, layers, is_frozen = self.width, self.global_layers, self.frozen_backbone
        local, module = self.local_layers, self.temporal_module
        fills_grid = self.resolution % self.patch_size == 0
        is_even = self.frames % 2 == 0 or not self.temporal_downsample
        reduces = 1 <= self.local_reduction <= width
        recomputes = self.recomputed_blocks <= self.depth
        layers_text = f"ascending, different block numbers from 0 to {self.depth - 1}"
        for holds, name, allowed in (
            (fills_grid, "resolution", f"a multiple of patch_size {self.patch_size}"),
            (self.grid <= _MAX_GRID, "resolution", f"at most {_MAX_GRID} times patch_size {self.patch_size}"),
            (self.mlp_width >= 1, "mlp_ratio", f"at least 1 / width {width}"),
            (
                self.global_mlp_width >= 1 or self.global_mlp_ratio == 0,
                "global_mlp_ratio",
                f"0, or at least 1 / width {width}",
            ),
            (width % self.heads == 0, "heads", f"a divisor of width {width}"),
            (width % self.global_heads == 0, "global_heads", f"a divisor of width {width}"),
            (is_even, "frames", "even with temporal_downsample"),
            (reduces, "local_reduction", f"between 1 and width {width}"),
            (recomputes, "recomputed_blocks", f"between 0 and depth {self.depth}"),
            (self._is_ascending(layers), "global_layers", layers_text),
            (self._is_ascending(local or ()), "local_layers", layers_text),
            (not (is_frozen and self.local_mhra), "local_mhra", "0 with frozen_backbone"),
            (bool(layers) or not is_frozen, "global_layers", "not empty with frozen_backbone"),
            (module == "none" or not is_frozen, "temporal_module", "none with frozen_backbone"),
            (module == "none" or not self.local_mhra, "temporal_module", "none unless local_mhra is 0"),
            (not self.local_dpe or self.local_mhra > 0, "local_dpe", "false unless local_mhra is 1 or 2"),
            (local != (), "local_layers", "null or not empty; without local MHRA, local_mhra is 0"),
            (
                local is None or self.local_mhra > 0 or module not in ("none", *OUTSIDE_BLOCKS),
                "local_layers",
                "null unless there is local_mhra, or a temporal_module inside the blocks",
            ),
            (
                not layers or module != "joint_mhsa",
                "global_layers",
                "empty with temporal_module joint_mhsa, which has one class token per clip, not per frame",
            ),
            (
                not self.relative_positions or module != "joint_mhsa",
                "relative_positions",
                "false with temporal_module joint_mhsa, whose attention spans all frames",
            ),
            (bool(layers) or self.output == "auto", "output", "auto unless there are global_layers"),
            (
                module != "temporal_transformer" or self.output != "video_token",
                "output",
                "balanced with temporal_module temporal_transformer, which reads the frames' features",
            ),
        ):
            _require(holds, name, getattr(self, name), allowed)
        blocks = self.depth + len(layers)
        weights = blocks * self.width * (4 * self.width + 2 * max(self.mlp_width, self.global_mlp_width))
        if self.relative_positions:
            weights += self.depth * 4 * self.grid**2 * self.heads
        weights += self.width * (self.grid**2 + 9 * self.patch_size**2 + self.num_classes)
        if weights > _MAX_PARAMETERS:
            raise ModelError(
                f"width {self.width}, depth {self.depth} and the rest make about {weights:,} parameters; "
                f"allowed are at most {_MAX_PARAMETERS:,}"
            )

    def _is_ascending(self, layers: tuple[int, ...]) -> bool:
        """Whether these are different block numbers in ascending order."""
        in_range = all(_is_int(layer) and 0 <= layer < self.depth for layer in layers)
        return in_range and list(layers) == sorted(set(layers))

    @property
    def inner_frames(self) -> int:
        """Frames T' after the patch embedding."""
        return self.frames // 2 if self.temporal_downsample else self.frames

    @property
    def grid(self) -> int:
        """Patches along one side of a frame."""
        return self.resolution // self.patch_size

    @property
    def patch_kernel(self) -> tuple[int, int, int]:
        """Frames, rows and columns that one patch spans."""
        return (3 if self.temporal_downsample else 1, self.patch_size, self.patch_size)

    @property
    def local_width(self) -> int:
        """Channels inside a local MHRA: 512 of 768 and 682 of 1024."""
        return int(self.width / self.local_reduction)

    def has_local(self, layer: int) -> bool:
        """Whether this block has local MHRA, or the temporal module if that is one inside the blocks."""
        if not self.local_mhra and self.temporal_module in ("none", *OUTSIDE_BLOCKS):
            return False
        return self.local_layers is None or layer in self.local_layers

    @property
    def has_batch_norm(self) -> bool:
        """Whether a part of the model normalises over the batch."""
        return self.local_mhra > 0 or self.temporal_module == "temporal_convolution"

    @property
    def attention_shape(self) -> tuple[int, int]:
        """How the ViT groups a clip's tokens: groups, and tokens in a group with its class token. A group is
        a frame, or the whole clip with joint space-time MHSA."""
        if self.temporal_module == "joint_mhsa":
            return 1, 1 + self.inner_frames * self.grid**2
        return self.inner_frames, 1 + self.grid**2

    @property
    def is_balanced(self) -> bool:
        """Whether the head receives the balanced sum Z of section 3.3."""
        return bool(self.global_layers) and (
            self.output == "balanced" or (self.output == "auto" and not self.frozen_backbone)
        )

    @property
    def mlp_width(self) -> int:
        """Hidden channels of an MLP of the ViT."""
        return int(self.width * self.mlp_ratio)

    @property
    def global_mlp_width(self) -> int:
        """Hidden channels of an MLP of a Global UniBlock; 0 where it has none."""
        ratio = self.mlp_ratio if self.global_mlp_ratio is None else self.global_mlp_ratio
        return int(self.width * ratio)


PRESETS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {
        "resolution": 64,
        "patch_size": 8,
        "width": 96,
        "depth": 4,
        "heads": 4,
        "mlp_ratio": 3.0,
        "global_mlp_dropout": 0.0,
        "head_dropout": 0.0,
    },
    "b16": {"resolution": 224, "patch_size": 16, "width": 768, "depth": 12, "heads": 12},
    "l16": {"resolution": 224, "patch_size": 16, "width": 1024, "depth": 24, "heads": 16},
    "l14": {"resolution": 224, "patch_size": 14, "width": 1024, "depth": 24, "heads": 16},
    "l14_336": {"resolution": 336, "patch_size": 14, "width": 1024, "depth": 24, "heads": 16},
}
"""Fields that depend neither on the form nor on the backbone. `tiny` is for tests: it trains from scratch on
a CPU in minutes."""

_PLAIN_VIT: Mapping[str, Any] = {
    "activation": "gelu",
    "norm_eps": 1e-6,
    "ln_pre": False,
    "patch_bias": True,
}
BACKBONES: Mapping[str, Mapping[str, Any]] = {
    "clip": {},
    "supervised": _PLAIN_VIT,
    "deit3": {**_PLAIN_VIT, "layer_scale": 1e-6},
    "dino": _PLAIN_VIT,
    "mae": _PLAIN_VIT,
    "beit": {
        **_PLAIN_VIT,
        "layer_scale": 0.1,
        "absolute_positions": False,
        "relative_positions": True,
        "frame_feature": "patch_mean",
    },
}
"""The pretrained image ViTs of table 8, as fields that differ from CLIP's; every preset has each of them."""

_GLOBAL_BLOCKS = {
    "scene": {"tiny": 2, "b16": 4, "l16": 4, "l14": 4, "l14_336": 4},
    "temporal": {"tiny": 2, "b16": 8, "l16": 16, "l14": 16, "l14_336": 16},
}
_FORM_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "scene": {},
    "temporal": {"temporal_downsample": True, "local_mhra": 2},
}
_TEMPORAL_DROP_PATH = {"drop_path": 0.2, "global_drop_path": 0.4}


def build_config(
    preset: str, *, form: str, frames: int, num_classes: int, backbone: str = "clip", **overrides: Any
) -> UniFormerV2Config:
    """The config of a preset; builds no tensors.

    Args:
        preset: a key of `PRESETS`.
        form: `scene` (Kinetics, MiT, ActivityNet, HACS): global blocks after the last 4 blocks. `temporal`
            (Something-Something): two local MHRAs per block, temporal downsampling, global blocks after the
            last 8 blocks of B and 16 of L (section 4, implementation details).
        backbone: a key of `BACKBONES`: whose image weights the ViT is built for.
        overrides: fields of `UniFormerV2Config`. A changed `depth` moves the default global layers, and
            changed `heads` change the default `global_heads`.

    Raises:
        ModelError: an unknown name, or a value that is not allowed.
    """
    _require_known(preset, PRESETS, "preset")
    _require_known(form, FORMS, "form")
    _require_known(backbone, BACKBONES, "backbone")
    for name in overrides:
        check_field_name(name)
    fields: dict[str, Any] = {**PRESETS[preset], **BACKBONES[backbone], **_FORM_FIELDS[form]}
    if form == "temporal" and preset != "tiny":
        fields |= _TEMPORAL_DROP_PATH
    fields |= {"frames": frames, "num_classes": num_classes, **overrides}
    fields.setdefault("global_heads", fields["heads"])
    if "global_layers" not in overrides and _is_int(fields["depth"]):
        depth = fields["depth"]
        fields["global_layers"] = range(max(0, depth - _GLOBAL_BLOCKS[form][preset]), depth)
    return UniFormerV2Config(**fields)


def check_field_name(name: str) -> None:
    """Raises ModelError, with the nearest name, for one that `UniFormerV2Config` does not have."""
    _require_known(name, [field.name for field in dataclasses.fields(UniFormerV2Config)], "model field")


def is_field(name: str) -> bool:
    """Whether `UniFormerV2Config` has a field of this name."""
    return any(field.name == name for field in dataclasses.fields(UniFormerV2Config))


def check_field(name: str, value: object) -> None:
    """Raises ModelError that names the field for a value that no config allows; ignores unknown names."""
    if name == "local_mhra":
        _require(_is_int(value) and value in (0, 1, 2), name, value, "0, 1 or 2")
    elif name in _MAX:
        least = 0 if name == "recomputed_blocks" else 1
        allowed = f"a whole number of at least {least} and at most {_MAX[name]}"
        _require(_between(value, least, _MAX[name]) and _is_int(value), name, value, allowed)
    elif name in _BOOLEANS:
        _require(isinstance(value, bool), name, value, "true or false")
    elif name in _RATES:
        _require(_between(value, 0, 1) and value != 1, name, value, "at least 0 and below 1")
    elif name == "norm_eps":
        _require(_between(value, _MIN_EPS, 1), name, value, f"at least {_MIN_EPS:g} and at most 1")
    elif name in ("layer_scale", "global_mlp_ratio") and value is None:
        return
    elif name == "layer_scale":
        _require(_between(value, 0, 1), name, value, "at least 0 and at most 1, or null")
    elif name == "global_mlp_ratio":
        allowed = f"at least 0 and at most {_MAX_MLP_RATIO}, or null"
        _require(_between(value, 0, _MAX_MLP_RATIO), name, value, allowed)
    elif name == "mlp_ratio":
        allowed = f"above 0 and at most {_MAX_MLP_RATIO}"
        _require(_between(value, 0, _MAX_MLP_RATIO) and value != 0, name, value, allowed)
    elif name == "local_reduction":
        _require(_between(value, 1, _MAX["width"]), name, value, "at least 1 and at most width")
    elif name in _CHOICES:
        _require(value in _CHOICES[name], name, value, _one_of(_CHOICES[name]))
    elif name in _LAYERS and not (name == "local_layers" and value is None):
        holds = isinstance(value, list | tuple) and all(_between(layer, 0, _MAX["depth"]) for layer in value)
        null = ", or null" if name == "local_layers" else ""
        _require(holds, name, value, f"a list of block numbers, counted from 0{null}")


def allowed_values(name: str) -> str:
    """What a field may hold, as text."""
    try:
        check_field(name, object())
    except ModelError as error:
        return str(error).partition(_ALLOWED)[2]
    raise ModelError(f"{name} is no field of the model")


def _between(value: object, least: float, most: float) -> bool:
    """Whether `value` is a number from `least` to `most`; NaN is not."""
    return isinstance(value, int | float) and _is_number(value) and least <= value <= most


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise _wrong(name, value, allowed)


def _wrong(name: str, value: object, allowed: str) -> ModelError:
    return ModelError(f"{name} is {_quoted(value)}{_ALLOWED}{allowed}")


def _quoted(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _require_known(name: str, known: Any, kind: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(str(name)[:100], list(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}"
    raise ModelError(f"unknown {kind} {_quoted(name)}, {hint}")


def _one_of(choices: tuple[str, ...]) -> str:
    return "one of " + ", ".join(choices)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
