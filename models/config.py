"""What a UniFormerV2 is made of, and the presets of the paper."""

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

ACTIVATIONS = ("quick_gelu", "gelu")
FUSIONS = ("sequential", "parallel", "hierarchical_kv", "hierarchical_q")
FORMS = ("scene", "temporal")

_MOST = {
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
}
"""Whole numbers: far above any model that was published, and below what would exhaust a node's memory."""
_SWITCHES = ("ln_pre", "patch_bias", "qkv_bias", "temporal_downsample", "frozen_backbone")
_RATES = ("global_mlp_dropout", "head_dropout", "drop_path", "global_drop_path")
_MAX_GRID = 256  # patches along one side
_MAX_MLP_RATIO = 64
_MIN_EPS = 1e-12
_MAX_PARAMETERS = 30_000_000_000


class ModelError(ValueError):
    """A model that cannot be built, weights that do not fit it, or a clip it was not built for."""


@dataclass(frozen=True, kw_only=True)
class UniFormerV2Config:
    """One UniFormerV2, completely described. Construction raises `ModelError` naming the wrong field."""

    resolution: int
    """Height and width of a frame, in pixels; a multiple of `patch_size`."""
    patch_size: int
    """Height and width of a patch, in pixels."""
    width: int
    """Channels C of every token; a multiple of `heads` and of `global_heads`."""
    depth: int
    """Number of ViT blocks (Local UniBlocks)."""
    heads: int
    """Heads of the spatial attention."""
    mlp_ratio: float = 4.0
    """Hidden channels of every MLP, in units of `width`."""
    activation: str = "quick_gelu"
    """Non-linearity of the ViT's MLPs: `quick_gelu` (CLIP) or `gelu`; global blocks always use QuickGELU."""
    norm_eps: float = 1e-5
    """Epsilon of the ViT's layer norms: 1e-5 for CLIP, 1e-6 for ViTs from timm."""
    ln_pre: bool = True
    """Whether a layer norm follows the position embedding, as in CLIP."""
    patch_bias: bool = False
    """Whether the patch embedding has a bias: not in CLIP."""
    qkv_bias: bool = True
    """Whether the ViT's packed QKV projections have a bias."""

    frames: int
    """Frames T of a clip; even where `temporal_downsample` halves them."""
    num_classes: int
    """Number of logits."""

    temporal_downsample: bool = False
    """Whether the patch embedding spans 3 frames with stride 2, halving the frames inside."""
    local_mhra: int = 0
    """Local temporal MHRAs per block: 0, 1 (before the attention) or 2 (before and after it)."""
    local_reduction: float = 1.5
    """A local MHRA works on `int(width / local_reduction)` channels."""

    global_layers: tuple[int, ...] = ()
    """Ascending numbers, from 0, of the blocks that a Global UniBlock follows; empty for none, and then the
    head sees the class tokens only."""
    global_heads: int = 1
    """Heads of the cross attention in a Global UniBlock."""
    global_mlp_dropout: float = 0.5
    """Dropout inside the MLP of a Global UniBlock."""
    fusion: str = "sequential"
    """How the video tokens of the global blocks become one, section 3.3 of the paper."""

    head_dropout: float = 0.5
    """Dropout before the classifier."""
    drop_path: float = 0.0
    """Drop-path rate of the last ViT block; the rate grows linearly from 0 over the depth."""
    global_drop_path: float = 0.0
    """Drop-path rate of the last Global UniBlock; the rate grows linearly from 0."""

    frozen_backbone: bool = False
    """Whether the image ViT takes no gradient; the head then sees the video token only."""
    recomputed_blocks: int = 0
    """How many ViT blocks, from the first, keep no activations and are computed again in the backward."""

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "global_layers", tuple(self.global_layers))
        except TypeError:
            raise _wrong("global_layers", self.global_layers, "a list of block numbers") from None
        for field in dataclasses.fields(self):
            check_field(field.name, getattr(self, field.name))
        self._check_shapes()
        self._check_blocks()

    def _check_shapes(self) -> None:
        _require(
            self.resolution % self.patch_size == 0,
            "resolution",
            self.resolution,
            f"a multiple of patch_size {self.patch_size}",
        )
        _require(
            self.grid <= _MAX_GRID,
            "resolution",
            self.resolution,
            f"at most {_MAX_GRID} times patch_size {self.patch_size}",
        )
        _require(self.mlp_width >= 1, "mlp_ratio", self.mlp_ratio, f"at least 1 / width {self.width}")
        for name in ("heads", "global_heads"):
            value = getattr(self, name)
            _require(self.width % value == 0, name, value, f"a divisor of width {self.width}")
        _require(
            self.frames % 2 == 0 or not self.temporal_downsample,
            "frames",
            self.frames,
            "even with temporal_downsample",
        )
        _require(
            1 <= self.local_reduction <= self.width,
            "local_reduction",
            self.local_reduction,
            f"between 1 and width {self.width}",
        )

    def _check_blocks(self) -> None:
        _require(
            self.recomputed_blocks <= self.depth,
            "recomputed_blocks",
            self.recomputed_blocks,
            f"between 0 and depth {self.depth}",
        )
        layers = self.global_layers
        _require(
            all(_is_int(layer) and 0 <= layer < self.depth for layer in layers)
            and list(layers) == sorted(set(layers)),
            "global_layers",
            layers,
            f"ascending, different block numbers from 0 to {self.depth - 1}",
        )
        if self.frozen_backbone:
            _require(self.local_mhra == 0, "local_mhra", self.local_mhra, "0 with frozen_backbone")
            _require(bool(layers), "global_layers", layers, "not empty with frozen_backbone")
        blocks = self.depth + len(layers)
        weights = blocks * self.width * (4 * self.width + 2 * self.mlp_width)
        weights += self.width * (self.grid**2 + 9 * self.patch_size**2 + self.num_classes)
        if weights > _MAX_PARAMETERS:
            raise ModelError(
                f"width {self.width}, depth {self.depth} and the rest make about {weights:,} parameters; "
                f"allowed are at most {_MAX_PARAMETERS:,}"
            )

    @property
    def inner_frames(self) -> int:
        """Frames after the patch embedding."""
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

    @property
    def mlp_width(self) -> int:
        """Hidden channels of an MLP."""
        return int(self.width * self.mlp_ratio)


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
    "l14": {"resolution": 224, "patch_size": 14, "width": 1024, "depth": 24, "heads": 16},
    "l14_336": {"resolution": 336, "patch_size": 14, "width": 1024, "depth": 24, "heads": 16},
}
"""What does not depend on the form. `tiny` is for tests: it trains from scratch on a CPU in minutes."""

_GLOBAL_BLOCKS = {
    "scene": {"tiny": 2, "b16": 4, "l14": 4, "l14_336": 4},
    "temporal": {"tiny": 2, "b16": 8, "l14": 16, "l14_336": 16},
}
_FORM_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "scene": {},
    "temporal": {"temporal_downsample": True, "local_mhra": 2},
}
_TEMPORAL_DROP_PATH = {"drop_path": 0.2, "global_drop_path": 0.4}


def build_config(
    preset: str, *, form: str, frames: int, num_classes: int, **overrides: Any
) -> UniFormerV2Config:
    """The config of a preset, without building tensors.

    `preset` is a key of `PRESETS`. `form` is `scene` (Kinetics, MiT, ActivityNet, HACS: global blocks after
    the last 4 blocks and nothing else) or `temporal` (Something-Something: doubled local MHRA, temporal
    downsampling, global blocks after the last 8 blocks of B and 16 of L). `overrides` are fields of
    `UniFormerV2Config`; a changed `depth` moves the global layers with it, and changed `heads` change
    `global_heads`, unless these are given too.

    Raises `ModelError` for an unknown name or a value that is not allowed.
    """
    _require_known(preset, PRESETS, "preset")
    _require_known(form, FORMS, "form")
    names = [field.name for field in dataclasses.fields(UniFormerV2Config)]
    for name in overrides:
        _require_known(name, names, "model field")
    fields: dict[str, Any] = {**PRESETS[preset], **_FORM_FIELDS[form]}
    if form == "temporal" and preset != "tiny":
        fields |= _TEMPORAL_DROP_PATH
    fields |= {"frames": frames, "num_classes": num_classes, **overrides}
    fields.setdefault("global_heads", fields["heads"])
    if "global_layers" not in overrides and _is_int(fields["depth"]):
        depth = fields["depth"]
        fields["global_layers"] = range(max(0, depth - _GLOBAL_BLOCKS[form][preset]), depth)
    return UniFormerV2Config(**fields)


def is_field(name: str) -> bool:
    """Whether `UniFormerV2Config` has a field of this name."""
    return any(field.name == name for field in dataclasses.fields(UniFormerV2Config))


def check_field(name: str, value: object) -> None:
    """Raises ModelError, naming the field, for a value that is not allowed whatever the other fields are.

    A name that is no field of `UniFormerV2Config` is not looked into.
    """
    if name == "local_mhra":
        _require(_is_int(value) and value in (0, 1, 2), name, value, "0, 1 or 2")
    elif name in _MOST:
        least = 0 if name == "recomputed_blocks" else 1
        words = f"a whole number of at least {least} and at most {_MOST[name]}"
        _require(_between(value, least, _MOST[name]) and _is_int(value), name, value, words)
    elif name in _SWITCHES:
        _require(isinstance(value, bool), name, value, "true or false")
    elif name in _RATES:
        _require(_between(value, 0, 1) and value != 1, name, value, "at least 0 and below 1")
    elif name == "norm_eps":
        _require(_between(value, _MIN_EPS, 1), name, value, f"at least {_MIN_EPS:g} and at most 1")
    elif name == "mlp_ratio":
        words = f"above 0 and at most {_MAX_MLP_RATIO}"
        _require(_between(value, 0, _MAX_MLP_RATIO) and value != 0, name, value, words)
    elif name == "local_reduction":
        _require(_between(value, 1, _MOST["width"]), name, value, "at least 1 and at most width")
    elif name == "activation":
        _require(value in ACTIVATIONS, name, value, _one_of(ACTIVATIONS))
    elif name == "fusion":
        _require(value in FUSIONS, name, value, _one_of(FUSIONS))
    elif name == "global_layers":
        holds = isinstance(value, list | tuple) and all(_between(layer, 0, _MOST["depth"]) for layer in value)
        _require(holds, name, value, "a list of block numbers, counted from 0")


def _between(value: object, least: float, most: float) -> bool:
    """Whether it is a number within the two, which NaN is not."""
    return isinstance(value, int | float) and _is_number(value) and least <= value <= most


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise _wrong(name, value, allowed)


def _wrong(name: str, value: object, allowed: str) -> ModelError:
    return ModelError(f"{name} is {_shown(value)}, allowed is: {allowed}")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _require_known(name: str, known: Any, kind: str) -> None:
    if name in known:
        return
    near = difflib.get_close_matches(str(name)[:100], list(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(known)}"
    raise ModelError(f"unknown {kind} {_shown(name)}, {hint}")


def _one_of(choices: tuple[str, ...]) -> str:
    return "one of " + ", ".join(choices)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
