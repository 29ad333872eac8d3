"""Estimated CPU time to read a clip from a video, from its frame size and keyframe distance."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.dataset.probe import VideoInfo
from pipelines.formatting import printable, wrap

CLIP_FRAMES = 8
"""Frames of the clip whose cost is estimated, evenly spaced over the whole video."""

# Measured on one core with H.264 of 1920x1080: 1.0 (5 minutes of footage) to 2.5 (dense synthetic frames,
# 16 Mbit/s) ns to decode a pixel, and 14 to 31 ns to convert a pixel of a used frame to RGB and copy it.
_DECODE_SECONDS = 1.5e-9
_CONVERT_SECONDS = 15e-9

EXPENSIVE = 0.5
"""CPU seconds per clip from which a video counts as expensive."""

CHEAP_SCALE = "\"scale='if(gt(iw,ih),-2,320)':'if(gt(iw,ih),320,-2)'\""
CHEAP_CODING = "-c:v libx264 -g 12 -an"
"""Arguments of ffmpeg for videos that are cheap to read: short side of 320, a keyframe every 12 frames."""


def clip_seconds(info: VideoInfo) -> float:
    """Estimated CPU seconds to decode a clip of `CLIP_FRAMES` frames, evenly spaced over the video.

    For each frame, the decoder starts at the keyframe before it: half the keyframe distance on average. In
    total at most all frames of the video are decoded.
    """
    decoded = min(info.frames, CLIP_FRAMES * (info.keyframe_distance + 1) / 2)
    return info.width * info.height * (decoded * _DECODE_SECONDS + CLIP_FRAMES * _CONVERT_SECONDS)


@dataclass(slots=True)
class CostSummary:
    """Counts the videos that are expensive to read, and keeps the most expensive one."""

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
        """Lines for the summary; none if no video is expensive."""
        if not self.expensive:
            return []
        videos = "video costs" if self.expensive == 1 else "videos cost"
        return [
            *wrap(
                f"{self.expensive} {videos} more than {EXPENSIVE:g} s of CPU time per clip of {CLIP_FRAMES} "
                f"frames (rough estimate); the most expensive, about {self.worst_seconds:.1f} s:"
            ),
            f"    {self.worst}",
            *wrap("To make them cheap, encode smaller frames and a keyframe every 12 frames:", "  "),
            f"    ffmpeg -i IN -vf {CHEAP_SCALE} \\",
            f"      {CHEAP_CODING} OUT.mp4",
        ]
