"""How much damage inside a stream is noticed, by codec; the table of docs/guide.md.

python -m tests.pipelines.hidden_damage 100

Each clip is damaged once, behind its first packet: a bit, a byte, 16 random bytes, or 64 zero bytes. Counted
are those that decode to other pixels than the sound clip, or are refused.
"""

import io
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from pipelines.dataset.probe import probe_video
from pipelines.decode.pyav import decode_frames
from pipelines.errors import VideoError
from tests.pipelines.videos import BF, HEVC, VP9, Kind, make_video

FRAMES = 24
CODECS = {
    "H.264": Kind("libx264", "mp4", BF, frames=FRAMES),
    "HEVC": Kind("libx265", "mp4", {"g": "12", "x265-params": HEVC}, frames=FRAMES),
    "HEVC with checksums": Kind(
        "libx265", "mp4", {"g": "12", "x265-params": HEVC + ":hash=1"}, frames=FRAMES
    ),
    "AV1": Kind("libsvtav1", "mp4", {"preset": "12", "g": "16"}, frames=FRAMES),
    "VP9": Kind("libvpx-vp9", "webm", VP9, frames=FRAMES),
    "VP8": Kind("libvpx", "webm", {"g": "15", "cpu-used": "8", "crf": "30", "b": "1M"}, frames=FRAMES),
    "MPEG-4 part 2": Kind("mpeg4", "mp4", {"g": "9"}, frames=FRAMES),
    "Motion JPEG": Kind("mjpeg", "avi", pixels="yuvj420p", frames=FRAMES),
}


@dataclass
class Noticed:
    """Of the clips that damage changed: how many, and how many of them were refused.

    deep: by `prepare.py --deep`. whole: by a run that reads all frames. drawn: by a run that reads 4 of them.
    """

    changed: int = 0
    deep: int = 0
    whole: int = 0
    drawn: int = 0


def damage(content: bytes, seed: int) -> bytes:
    """The clip with one place changed."""
    with av.open(io.BytesIO(content)) as container:
        packets = [bytes(packet) for packet in container.demux(video=0) if packet.size]
    rng, damaged = np.random.default_rng(seed), bytearray(content)
    packet = packets[int(rng.integers(1, len(packets)))]
    inside = int(rng.integers(len(packet)))
    length = min((1, 1, 16, 64)[seed % 4], len(packet) - inside)
    place = slice(content.find(packet) + inside, content.find(packet) + inside + length)
    if seed % 4 == 0:
        damaged[place] = bytes([damaged[place.start] ^ 1 << int(rng.integers(8))])
    else:
        damaged[place] = bytes(length) if seed % 4 == 3 else rng.bytes(length)
    return bytes(damaged)


def refused(read: object, *arguments: object, **options: object) -> bool:
    assert callable(read)
    try:
        read(*arguments, **options)
    except VideoError:
        return True
    return False


def notice(kind: Kind, seeds: range) -> Noticed:
    every = np.arange(FRAMES)
    found = Noticed()
    with tempfile.TemporaryDirectory() as folder:
        content = make_video(Path(folder), kind).read_bytes()
    sound = decode_frames(content, every)
    for seed in seeds:
        damaged = damage(content, seed)
        deep, whole = refused(probe_video, damaged, deep=True), refused(decode_frames, damaged, every)
        if deep or whole or not np.array_equal(decode_frames(damaged, every), sound):
            found.changed += 1
            found.deep += deep
            found.whole += whole
            found.drawn += refused(decode_frames, damaged, every[3::6])
    return found


if __name__ == "__main__":
    print("| codec | clips changed | `--deep` | a run, all frames | a run, 4 of 24 |\n|---|---|---|---|---|")
    for name, kind in CODECS.items():
        found = notice(kind, range(int(sys.argv[1])))
        print(f"| {name} | {found.changed} | {found.deep} | {found.whole} | {found.drawn} |", flush=True)
