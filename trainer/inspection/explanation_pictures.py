"""An explanation as a contact sheet and as a video with overlaid maps."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipelines.formatting import printable
from pipelines.synthetic.video_writer import H264, encode_video
from trainer.errors import RunError
from trainer.inspection.contact_sheet import SheetRow, draw_sheet, written_atomically
from trainer.inspection.explanation import Explanation, HeatMap
from trainer.inspection.heat_map import draw_overlay, legend

_COLUMNS = 8  # frames of a sheet
_LEGEND = 128, 12  # pixels
_LEAST_RATE, _MOST_RATE = 1, 30  # frames per second of a video


def check_output_paths(video: Path, sheet: Path, overlay: Path | None) -> None:
    """Raises RunError if an output has the wrong suffix or would overwrite the video."""
    for option, path, suffix in (("--out", sheet, ".png"), ("--video", overlay, ".mp4")):
        if path is not None and path.suffix.lower() != suffix:
            raise RunError(f"{option} {printable(path)}: the name must end with {suffix}")
        if path is not None and path.exists() and video.exists() and path.samefile(video):
            raise RunError(f"{option} {printable(path)} is the input video: name another file")


def explanation_sheet(found: Explanation, *, names_video: bool = True) -> Image.Image:
    """A sheet with rows for the frames, class activation, the attention of each global block, and a legend.

    names_video: print the video's path beside its frames.
    """
    count = len(found.frames)
    chosen = np.linspace(0, count - 1, min(_COLUMNS, count)).round().astype(int)
    text = ["frames", printable(found.path)] if names_video else ["frames"]
    rows = [SheetRow(text, [found.frames[number] for number in chosen])]
    for each in found.maps:
        pictures = [draw_overlay(found.frames[number], each.values[number]) for number in chosen]
        rows.append(SheetRow(_text(each, found.name), pictures))
    rows.append(SheetRow(["colours: from 0 to the highest value of the row"], [legend(*_LEGEND)]))
    title = f"{found.name}, probability {found.probability:.3f}"
    return draw_sheet(title, rows, [f"{found.seconds[number]:.2f} s" for number in chosen])


def write_overlay(path: Path, found: Explanation) -> None:
    """Frames, class activation and the last global block's attention side by side, as H.264 in MP4.

    The clip has the duration that its frames span in the video. Raises RunError if it cannot be written.
    """
    shown = [found.maps[0], *found.maps[1:][-1:]]
    frames = np.stack(
        [
            np.concatenate([frame, *(draw_overlay(frame, each.values[number]) for each in shown)], axis=1)
            for number, frame in enumerate(found.frames)
        ]
    )
    height, width = (frames.shape[axis] // 2 * 2 for axis in (1, 2))
    with written_atomically(path, "--video") as partial:
        encode_video(partial, frames[:, :height, :width], H264, _rate(found), keyframe_interval=12)


def as_json(found: Explanation, sheet: Path, video: Path | None) -> dict[str, Any]:
    """The explanation as JSON values, without the maps."""
    return {
        "video": str(found.path),
        "class": found.name,
        "probability": found.probability,
        "seconds": list(found.seconds),
        "maps": [
            {"about": each.about, "peak": each.peak, "on_patches": each.on_shown} for each in found.maps
        ],
        "sheet": str(sheet),
        "overlay": None if video is None else str(video),
    }


def _rate(found: Explanation) -> Fraction:
    """Frame rate at which the clip lasts as long as the part of the video that it spans."""
    span = found.seconds[-1] - found.seconds[0]
    rate = (len(found.seconds) - 1) / span if span > 0 else _MOST_RATE
    return Fraction(min(max(rate, _LEAST_RATE), _MOST_RATE)).limit_denominator(1000)


def _text(each: HeatMap, name: str) -> list[str]:
    if each.on_shown is None:
        return [f"{each.about}: {name}", each.strength]
    return [
        each.about,
        f"{each.strength}; {100 * each.on_shown:.0f} % of the attention is on patches, which are shown",
    ]
