"""What can be read, tried on real files: `python -m tests.pipelines.readable` prints the guide's tables.

Each video is encoded with PyAV; then every frame, by its number, is held against a full decode, and what
`prepare.py --deep` says against what a run reads.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import numpy as np

from pipelines.dataset.probe import probe_video
from pipelines.decode.pyav import decode_frames
from pipelines.errors import VideoError
from tests.pipelines.field_pictures import field_pictures
from tests.pipelines.videos import (
    BF,
    KINDS,
    Kind,
    decode_all,
    drop_avi_index,
    make_video,
    moving_picture,
    ordinary_priority,
)

FRAMES = 24
SIZE = (64, 96)
RGB = "rgb24"


def kind(
    codec: str, extension: str, pixels: str = "yuv420p", size: tuple[int, int] = SIZE, **options: str
) -> Kind:
    return Kind(codec, extension, options, pixels, size, FRAMES)


X265 = {"x265-params": "log-level=error:pools=none:frame-threads=1"}
VPX = {"cpu-used": "8", "deadline": "realtime"}
CODECS: dict[str, list[Kind]] = {
    "H.264": [
        *(
            kind("libx264", extension, bf="2", g="12")
            for extension in ("mp4", "mov", "mkv", "avi", "flv", "ts")
        ),
        *(kind("libx264", extension, bf="2", g="12") for extension in ("3gp", "nut", "mxf", "asf", "h264")),
        *(kind("libx264", "mp4", pixels) for pixels in ("yuv422p", "yuv444p", "yuv420p10le", "gray")),
        kind("libx264rgb", "mkv", "rgb24"),
    ],
    "HEVC": [
        *(kind("libx265", extension, **X265) for extension in ("mp4", "mkv", "ts", "hevc")),
        *(kind("libx265", "mp4", pixels, **X265) for pixels in ("yuv420p10le", "yuv422p10le", "yuv444p")),
    ],
    "AV1": [kind("libsvtav1", extension, preset="12") for extension in ("mp4", "mkv", "webm", "ivf")],
    "VP9": [
        *(kind("libvpx-vp9", extension, **VPX) for extension in ("webm", "mkv", "mp4", "ivf")),
        kind("libvpx-vp9", "webm", "yuv444p", **VPX),
    ],
    "VP8": [kind("libvpx", extension, **VPX) for extension in ("webm", "mkv", "ivf", "ogv")],
    "MPEG-4 part 2": [kind("mpeg4", extension, bf="2", g="12") for extension in ("mp4", "avi", "mkv", "m4v")],
    "MPEG-2": [
        kind("mpeg2video", extension, bf="2", g="12") for extension in ("mpg", "ts", "vob", "mkv", "mxf")
    ],
    "MPEG-1": [kind("mpeg1video", extension, bf="2", g="12") for extension in ("mpg", "m1v")],
    "Motion JPEG": [
        *(kind("mjpeg", extension, "yuvj420p") for extension in ("avi", "mov", "mkv", "mjpeg")),
        *(kind("mjpeg", "avi", pixels) for pixels in ("yuvj422p", "yuvj444p")),
    ],
    "Windows Media 7 and 8": [kind("wmv1", "wmv"), kind("wmv2", "wmv"), kind("msmpeg4", "avi")],
    "H.263, Sorenson": [
        kind("h263", "3gp", size=(144, 176)),
        kind("flv", "flv"),
        kind("svq1", "mov", "yuv410p"),
    ],
    "RealVideo": [kind("rv10", "rm"), kind("rv20", "rm")],
    "ProRes, DNxHR, CineForm": [
        kind("prores_ks", "mov", "yuv422p10le"),
        kind("dnxhd", "mov", "yuv422p", (240, 320), profile="dnxhr_sq"),
        kind("cfhd", "mov", "yuv422p10le", (240, 320)),
    ],
    "DV": [kind("dvvideo", "dv", size=(576, 720)), kind("dvvideo", "avi", size=(576, 720))],
    "lossless": [
        kind("ffv1", "mkv"),
        kind("huffyuv", "avi", "yuv422p"),
        kind("utvideo", "avi"),
        kind("qtrle", "mov", RGB),
        kind("png", "mov", RGB),
        kind("rawvideo", "avi"),
        kind("rawvideo", "y4m"),
    ],
    "GIF, animated PNG": [kind("gif", "gif", "rgb8"), kind("apng", "apng", RGB)],
}


def encoded(folder: Path, each: Kind) -> Path:
    """A video of this kind, at 25 frames per second, of moving pictures that tell its frames apart."""
    path = folder / f"clip.{each.extension}"
    with ordinary_priority(), av.open(str(path), "w") as container:
        stream = container.add_stream(each.codec, rate=25, options=dict(each.options))
        (stream.height, stream.width), stream.pix_fmt = each.size, each.pixels
        for picture in moving_picture(each.frames, *each.size):
            frame = av.VideoFrame.from_ndarray(picture, format=RGB)
            container.mux(stream.encode(frame.reformat(format=each.pixels)))
        container.mux(stream.encode(None))
    return path


def exact(path: Path) -> bool:
    """Whether every frame comes by its number as a full decode shows it, and `--deep` counts them so."""
    expected = decode_all(path)
    info = probe_video(path, deep=True)
    if info.frames != len(expected) or (info.height, info.width) != expected.shape[1:3]:
        return False
    alone = [decode_frames(path, np.array([number]))[0] for number in range(0, len(expected), 5)]
    together = decode_frames(path.read_bytes(), np.arange(len(expected)))
    return np.array_equal(together, expected) and np.array_equal(np.stack(alone), expected[::5])


def codec_rows(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    """(codec, containers, pixel formats, result) of each codec."""
    for number, (codec, kinds) in enumerate(CODECS.items()):
        good, bad = [], []
        for place, each in enumerate(kinds):
            home = folder / f"{number}-{place}"
            home.mkdir()
            (good if exact(encoded(home, each)) else bad).append(each)
        containers = ", ".join(dict.fromkeys(each.extension for each in good))
        pixels = ", ".join(dict.fromkeys(each.pixels for each in good))
        failed = ", ".join(f"{each.codec} in {each.extension}" for each in bad)
        yield codec, containers, pixels, failed or "exact"


def several_sizes(path: Path) -> None:
    recordings = []
    for size in ((64, 96), (80, 112)):
        home = path.parent / str(size[0])
        home.mkdir()
        recordings.append(
            make_video(home, Kind("libx264", "ts", {"bf": "0", "g": "5"}, size=size, frames=10))
        )
    path.write_bytes(b"".join(recording.read_bytes() for recording in recordings))


def cover_only(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=44100)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width = cover.height = 64
        cover.pix_fmt = "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        picture = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 99, np.uint8), format="rgb24")
        container.mux(cover.encode(picture))
        container.mux(cover.encode(None))
        silence = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        silence.rate = 44100
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))


def text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content) and None


def of_kind(each: Kind) -> Callable[[Path], None]:
    return lambda path: make_video(path.parent, each).rename(path) and None


def hdr(transfer: str) -> Kind:
    return Kind("libx265", "mkv", {"x265-params": f"{X265['x265-params']}:transfer={transfer}"})


SPECIAL: dict[str, tuple[str, Callable[[Path], None]]] = {
    "rotated by a quarter turn (phones)": ("v.mp4", of_kind(Kind("libx264", "mp4", BF, degrees=90))),
    "rotated by half a turn": ("v.mp4", of_kind(Kind("libx264", "mp4", BF, degrees=180))),
    "times of decoding in place of those of showing": (
        "v.avi",
        lambda path: path.write_bytes((Path(__file__).parent / "data/ffmpeg_h264.avi").read_bytes()) and None,
    ),
    "variable frame rate": ("v.mp4", of_kind(KINDS["h264 of variable rate"])),
    "cut by an edit list": ("v.mp4", of_kind(KINDS["h264 trimmed by an edit list"])),
    "cut inside a group of pictures": ("v.ts", of_kind(KINDS["h264 with open groups from inside a group"])),
    "AVI without its index": ("v.avi", of_kind(Kind("mjpeg", "avi", {}, "yuvj420p", remake=drop_avi_index))),
    "interlaced": ("v.mp4", of_kind(KINDS["h264 interlaced"])),
    "frames stored as pairs of fields": (
        "v.h264",
        lambda path: path.write_bytes(field_pictures(12)) and None,
    ),
    "HDR (PQ)": ("v.mkv", of_kind(hdr("16"))),
    "HDR (HLG)": ("v.mkv", of_kind(hdr("18"))),
    "another size from some frame on": ("v.ts", several_sizes),
    "colours in YCgCo": ("v.mp4", of_kind(Kind("libx264", "mp4", {"x264-params": "colormatrix=YCgCo"}))),
    "sound with cover art": ("v.m4a", cover_only),
    "a playlist": ("v.mp4", text("ffconcat version 1.0\nfile other.mp4\n")),
    "a web page": ("v.mp4", text("<!DOCTYPE html><html>not found</html>")),
    "a Git LFS pointer": ("v.mp4", text("version https://git-lfs.github.com/spec/v1\nsize 9\n")),
}


def special_rows(folder: Path) -> Iterator[tuple[str, str]]:
    """(what, what is done with it) of each special case."""
    for number, (what, (name, make)) in enumerate(SPECIAL.items()):
        path = folder / f"special-{number}" / name
        path.parent.mkdir()
        make(path)
        try:
            info = probe_video(path, deep=True)
            frames = decode_frames(path, np.arange(info.frames), size=(info.height, info.width))
            result = "read" if len(frames) == info.frames else "frames missing"
            yield what, "; ".join([result, *info.notes])
        except VideoError as defect:
            yield what, f'refused: "{defect}"'


def tables() -> str:
    """Both tables, as Markdown."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        lines = ["| codec | containers tried | pixel formats tried | frames |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in codec_rows(folder)]
        lines += ["", "| a video that is, or has | what is done |", "|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in special_rows(folder)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(tables(), end="")
