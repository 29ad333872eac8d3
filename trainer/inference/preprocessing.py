"""The preprocessing of a video, as stored with the weights.

The metadata describe all of it, so that other programs can reproduce it, including what is the same for every
model of this program. When weights are read, the metadata are compared with what this version does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from models.weights.safetensors_header import shorten
from trainer.errors import RunError

SAMPLING = "sparse"

FIXED: dict[str, Any] = {
    "sampling": SAMPLING,
    "frame_indices": (
        "clip c of C, frame i of T, of a video of n frames, counted and numbered from 0 as ffmpeg gives them "
        "out, s = (n - 1) / T: min(round_half_to_even(s * i) + floor(s / (C + 1) * (c + 1)), n - 1)"
    ),
    "orientation": "turned and mirrored as the container's display matrix says, by quarter turns",
    "resize": {
        "short_side": "resolution",
        "long_side": "floor(long side * resolution / short side)",
        "interpolation": "bilinear",
        "antialias": False,
    },
    "crop": {
        "height": "resolution",
        "width": "resolution",
        "position": "centre; of more than one crop, evenly along the long side from its begin to its end",
    },
    "color": {"order": "RGB", "range": "full", "scale": "1 / 255", "normalise": "(x - mean) / std"},
    "axes": "B 3 T H W",
    "dtype": "float32",
    "scores": "softmax of each view, then their mean",
}
"""Metadata that are the same for every model of this program."""

_COLOURS = ("mean", "std")
_VIEWS = "evaluation_views"
_SHORT_SIDE = "max_short_side"


@dataclass(frozen=True)
class Preprocessing:
    """How clips are made from a video.

    frames: T, frames per clip.
    resolution: side of the square crops in pixels; the short side of a frame is resized to it.
    mean, std: of red, green and blue in 0..1.
    clips, crops: views per video in the run's evaluation.
    max_short_side: to which frames with a longer short side are scaled down before the resize, by averaging
        areas; None does not scale them.
    """

    frames: int
    resolution: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    clips: int = 1
    crops: int = 1
    max_short_side: int | None = None

    def as_metadata(self) -> dict[str, Any]:
        """The metadata for a file of weights."""
        scaled = {} if self.max_short_side is None else {_SHORT_SIDE: self.max_short_side}
        return {
            "frames": self.frames,
            "resolution": self.resolution,
            "mean": list(self.mean),
            "std": list(self.std),
            **FIXED,
            _VIEWS: {"clips": self.clips, "crops": self.crops},
            **scaled,
        }


def read_preprocessing(values: dict[str, Any], frames: int, resolution: int) -> Preprocessing:
    """Parse a file's metadata. Fields that older files lack have the present values.

    frames, resolution: of the model.

    Raises RunError for a value that is invalid, contradicts the model, or is not supported.
    """
    known = {"frames", "resolution", *_COLOURS, *FIXED, _VIEWS, _SHORT_SIDE}
    for name in values.keys() - known:
        raise RunError(
            f"the weights' preprocessing has the field {shorten(name)}, which this version does not support"
        )
    for name, needed in {"frames": frames, "resolution": resolution, **FIXED}.items():
        found = values.get(name, FIXED.get(name))
        if type(found) is not type(needed) or found != needed:
            raise RunError(
                f"the weights' preprocessing has {name} {shorten(found)}; the model and this version need "
                f"{needed!r}"
            )
    mean, std = (_colours(name, values.get(name)) for name in _COLOURS)
    if min(std) <= 0:
        raise RunError(f"the weights' preprocessing has std {shorten(list(std))}; each must be above 0")
    clips, crops = _views(values.get(_VIEWS, {"clips": 1, "crops": 1}))
    short_side = values.get(_SHORT_SIDE)
    if short_side is not None and not (type(short_side) is int and short_side >= resolution):
        raise RunError(
            f"the weights' preprocessing has {_SHORT_SIDE} {shorten(short_side)}; it must be null, or at "
            f"least the resolution, {resolution}"
        )
    return Preprocessing(frames, resolution, mean, std, clips, crops, short_side)


def _colours(name: str, value: object) -> tuple[float, ...]:
    if isinstance(value, list) and len(value) == 3 and all(map(_is_colour, value)):
        return tuple(float(each) for each in value)
    raise RunError(
        f"the weights' preprocessing has {name} {shorten(value)}; it must be three numbers, for red, "
        "green and blue in 0..1"
    )


def _is_colour(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 255


def _views(value: object) -> Sequence[int]:
    if isinstance(value, dict) and value.keys() == {"clips", "crops"}:
        counts = (value["clips"], value["crops"])
        if all(type(count) is int and 1 <= count <= 1000 for count in counts):
            return counts
    raise RunError(
        f"the weights' preprocessing has {_VIEWS} {shorten(value)}; it must be clips and crops of at least 1"
    )
