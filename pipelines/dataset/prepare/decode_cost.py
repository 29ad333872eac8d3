"""What it costs to read clips from videos, by their size and the distance of their keyframes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pipelines.dataset.probe import VideoInfo
from pipelines.formatting import printable, wrap

CLIP_FRAMES = 8
"""Frames of the clip that costs are given for, spread over the whole video."""

# Measured on one core with H.264 of 1920x1080: 1.0 (5 minutes of footage) to 2.5 (dense synthetic frames,
# 16 Mbit/s) ns to decode a pixel, 14 to 31 ns more for one that is handed on: converted to RGB, copied.
_DECODE_SECONDS = 1.5e-9
_CONVERT_SECONDS = 15e-9

EXPENSIVE = 0.5
"""Seconds of CPU time a clip from which on a video is counted."""

CHEAP_SCALE = "\"scale='if(gt(iw,ih),-2,320)':'if(gt(iw,ih),320,-2)'\""
CHEAP_CODING = "-c:v libx264 -g 12 -an"
"""Arguments of ffmpeg that make a video cheap to read: a short side of 320, a keyframe every 12 frames."""


def clip_seconds(info: VideoInfo) -> float:
    """Estimated CPU seconds to decode a clip of `CLIP_FRAMES` frames, spread over the video.

    Each wanted frame costs the frames from the keyframe before it, half the distance of keyframes on average;
    in all no more than the frames of the video.
    """
    decoded = min(info.frames, CLIP_FRAMES * (info.keyframe_distance + 1) / 2)
    return info.width * info.height * (decoded * _DECODE_SECONDS + CLIP_FRAMES * _CONVERT_SECONDS)


@dataclass(slots=True)
class CostSummary:
    """Counts the videos from which clips are expensive, and keeps the worst."""

    expensive: int = 0
    worst_seconds: float = 0.0
    worst: str = ""

    def add(self, path: Path, info: VideoInfo) -> None:
        seconds = clip_seconds(info)
        if seconds < EXPENSIVE:
            return
        self.expensive += 1
        if seconds > self.worst_seconds:
            self.worst_seconds = seconds
            self.worst = (
                f"{printable(path)}\n    {info.width}x{info.height}, {info.frames} frames, "
                f"up to {info.keyframe_distance} from keyframe to keyframe"
            )

    def lines(self) -> list[str]:
        """What to print; nothing where no video is expensive."""
        if not self.expensive:
            return []
        videos = "video costs" if self.expensive == 1 else "videos cost"
        return [
            *wrap(
                f"{self.expensive} {videos} more than {EXPENSIVE:g} s of CPU time a clip of {CLIP_FRAMES} "
                f"frames, by a rough estimate; the most, about {self.worst_seconds:.1f} s:"
            ),
            f"    {self.worst}",
            *wrap("Smaller frames and a keyframe every 12 frames make them cheap:", "  "),
            f"    ffmpeg -i IN -vf {CHEAP_SCALE} \\",
            f"      {CHEAP_CODING} OUT.mp4",
        ]
