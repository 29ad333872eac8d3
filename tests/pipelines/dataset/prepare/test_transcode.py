"""Transcoding: what comes out, what is refused, and what an interrupted call leaves."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.dataset.manifest import Manifest, ManifestRow, SourceKind, write_manifest
from pipelines.dataset.prepare import transcode
from pipelines.dataset.prepare.build import build_manifest
from pipelines.dataset.prepare.folder import read_folder
from pipelines.dataset.prepare.transcode import (
    SETTINGS,
    TranscodeOptions,
    transcode_manifest,
    transcode_video,
)
from pipelines.dataset.probe import probe_video
from pipelines.decode.frame_stream import FrameStream
from pipelines.errors import DataError, VideoError
from tests.pipelines.jpegs import write_frames

ROOT = Path(__file__).parents[4]
SMALL = TranscodeOptions(short_side=64, keyframe_interval=4)


def make_video(
    path: Path,
    frames: int,
    height: int = 96,
    width: int = 160,
    times: list[int] | None = None,
    codec: str = "mpeg4",
) -> Path:
    """A video whose frame n has the brightness 8 n; `times` in hundredths of a second, or 25 a second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=25, options={"qmin": "1", "qmax": "2"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 100)
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(
                np.full((height, width, 3), 8 * number, np.uint8), format="rgb24"
            )
            frame.time_base, frame.pts = Fraction(1, 100), times[number] if times else 4 * number
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def brightness(path: Path) -> list[float]:
    return [float(picture.mean()) / 8 for _, picture in FrameStream(path).pictures()]


def manifest_of(folder: Path, videos: int) -> Manifest:
    for number in range(videos):
        make_video(folder / "videos" / "ab"[number % 2] / f"{number}.mp4", 12 + number)
    build_manifest(folder / "train.arrow", read_folder(folder / "videos"), workers=1)
    return Manifest.open(folder / "train.arrow")


def test_the_result_has_the_frames_the_size_and_the_keyframes(tmp_path: Path) -> None:
    source = make_video(tmp_path / "in.mp4", 24)
    transcode_video(FrameStream(source), out := tmp_path / "out.mp4", SMALL)
    info = probe_video(out)
    assert (info.codec, info.frames, info.height, info.width) == ("h264", 24, 64, 112)
    with av.open(str(out)) as file:
        keys = [packet.is_keyframe for packet in file.demux(video=0) if packet.size]
        context = file.streams.video[0].codec_context
        assert keys == [number % 4 == 0 for number in range(24)]
        assert (context.pix_fmt, context.colorspace) == ("yuv420p", 6)  # BT.601, as tagged
    assert np.allclose(brightness(out), range(24), atol=0.4)  # 0.5 would be another frame


def test_a_variable_frame_rate_becomes_constant(tmp_path: Path) -> None:
    # Frame 1 is shown five times as long as the others.
    source = make_video(tmp_path / "in.mkv", 6, times=[0, 4, 24, 28, 32, 36])
    stream = FrameStream(source)
    transcode_video(FrameStream(source), out := tmp_path / "out.mp4", SMALL)
    assert probe_video(out).frames == round(stream.duration * float(stream.rate))
    times = np.arange(probe_video(out).frames) / float(stream.rate)
    expected = [max(n for n, start in enumerate(stream.seconds) if start <= t + 1e-6) for t in times]
    assert np.allclose(brightness(out), expected, atol=0.4)


def test_segments_and_folders_of_frames_become_video_files(tmp_path: Path) -> None:
    """Frame n of each source has the brightness 8 n."""
    make_video(tmp_path / "in.mp4", 24)
    pictures = np.zeros((12, 96, 160, 3), np.uint8) + 8 * np.arange(12, dtype=np.uint8)[:, None, None, None]
    write_frames(tmp_path / "frames", pictures)
    file = ManifestRow("in.mp4", 0, 0, 0, 9, 25.0, 160, 96, "mpeg4", first_frame=10, video_frames=24)
    rows = [
        file,
        replace(file, label=1, frames=4, first_frame=20),
        ManifestRow("frames", 0, 0, 1, 12, 12.0, 160, 96, "jpeg", source=SourceKind.FRAMES),
        replace(file, first_frame=20, video_frames=29),  # the file has 24
    ]
    manifest = write_manifest(tmp_path / "m.arrow", rows, ["a", "b"], sources=True)
    listing = transcode_manifest(manifest, tmp_path / "small", SMALL, workers=1)
    assert list(listing.labels) == [0, 1, 1]
    for path, expected in zip(listing.paths, (range(10, 19), range(20, 24), range(12)), strict=True):
        assert np.allclose(brightness(Path(path)), expected, atol=0.4)
    assert FrameStream(Path(listing.paths[2])).rate == 12
    assert listing.findings.total == 1
    report = build_manifest(tmp_path / "small.arrow", listing, workers=1)
    assert [report.manifest.row(number).frames for number in range(3)] == [9, 4, 12]


def test_a_small_video_is_not_enlarged_and_sides_are_multiples_of_16() -> None:
    options = TranscodeOptions(short_side=320)
    assert options.size(240, 320) == (240, 320)
    assert options.size(1080, 1920) == (320, 576)  # 568.9
    assert options.size(340, 256) == (336, 256)
    assert options.size(5, 9) == (16, 16)


@pytest.mark.parametrize(
    "field", [{"short_side": 100}, {"short_side": 0}, {"keyframe_interval": 0}, {"crf": 60}]
)
def test_options_out_of_range_are_refused_by_name(field: dict[str, int]) -> None:
    with pytest.raises(DataError, match=next(iter(field)).replace("_", "-")):
        TranscodeOptions(**field)


def test_a_damaged_video_leaves_no_file(tmp_path: Path) -> None:
    source = make_video(tmp_path / "in.mp4", 24)
    source.write_bytes(source.read_bytes()[:900])
    with pytest.raises(VideoError):
        transcode_video(FrameStream(source), tmp_path / "out.mp4", SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_a_manifest_is_transcoded_in_parts_and_found_as_a_whole(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, 5)
    (tmp_path / "videos/a/2.mp4").write_bytes(b"no video")  # bad since the manifest was made
    folder = tmp_path / "small"
    parts = [transcode_manifest(manifest, folder, SMALL, workers=1, part=(part, 2)) for part in (0, 1)]
    assert [len(listing) for listing in parts] == [3, 1]
    made = {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}
    whole = transcode_manifest(manifest, folder, SMALL, workers=1)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")} == made  # none was made again
    assert [(path.name, label) for path, label in whole] == [
        ("000000000_0.mp4", 0), ("000000002_4.mp4", 0), ("000000003_1.mp4", 1), ("000000004_3.mp4", 1),
    ]  # fmt: skip
    assert whole.findings.counted("videos that could not be transcoded, left out") == 1
    assert whole.class_names == manifest.class_names
    with pytest.raises(DataError, match="short_side 64"):
        transcode_manifest(manifest, folder, TranscodeOptions(short_side=32, keyframe_interval=4), workers=1)
    (folder / SETTINGS).write_text("{")
    with pytest.raises(DataError, match=SETTINGS):
        transcode_manifest(manifest, folder, SMALL, workers=1)


def test_a_row_with_impossible_values_is_left_out(tmp_path: Path) -> None:
    plain = manifest_of(tmp_path, 2)
    rows = [plain.row(0), replace(plain.row(1), fps=-1.0)]
    wrong = write_manifest(tmp_path / "wrong.arrow", rows, plain.class_names)
    listing = transcode_manifest(wrong, tmp_path / "small", SMALL, workers=1)
    assert len(listing) == 1
    assert "frames per second" in listing.findings.write_list(tmp_path / "bad.txt").read_text()


def test_weights_are_kept(tmp_path: Path) -> None:
    plain = manifest_of(tmp_path, 2)
    rows = [replace(plain.row(index), weight=weight) for index, weight in enumerate((0.5, 3))]
    weighted = write_manifest(tmp_path / "weighted.arrow", rows, plain.class_names, weighted=True)
    assert transcode_manifest(plain, tmp_path / "small", SMALL, workers=1).weights is None
    listing = transcode_manifest(weighted, tmp_path / "small2", SMALL, workers=1)
    assert listing.weights is not None and list(listing.weights) == [0.5, 3]


def test_a_full_disk_ends_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise each remaining video would be decoded and left out."""

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(transcode, "transcode_video", no_space)
    source = make_video(tmp_path / "in.mp4", 2)
    row = ManifestRow("in.mp4", 0, 0, 0, 2, 25.0, 160, 96, "mpeg4")
    with pytest.raises(DataError, match=f"{tmp_path}/000.*No space"):
        transcode._transcode_row((source, row, tmp_path / "000" / "out.mp4"), SMALL)


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*.mp4")
    }


def test_killed_and_continued_it_gives_the_same_bytes(tmp_path: Path) -> None:
    manifest = manifest_of(tmp_path, 6)
    code = (
        "import sys; from pathlib import Path\n"
        "from pipelines.dataset.manifest import Manifest\n"
        "from pipelines.dataset.prepare.transcode import TranscodeOptions, transcode_manifest\n"
        "if __name__ == '__main__':\n"
        "    options = TranscodeOptions(short_side=64, keyframe_interval=4)\n"
        "    manifest = Manifest.open(Path(sys.argv[1]))\n"
        "    transcode_manifest(manifest, Path(sys.argv[2]), options, workers=1)\n"
    )
    (script := tmp_path / "program.py").write_text(code)
    transcode_manifest(manifest, tmp_path / "whole", SMALL, workers=1)
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, str(script), str(manifest.path), str(killed)],
        env={"PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    end = time.monotonic() + 60
    while len(list(killed.rglob("[!.]*.mp4"))) < 2 and time.monotonic() < end and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = digests(killed)
    assert 0 < len(before) < 6, "killed too early or too late to show anything"
    transcode_manifest(manifest, killed, SMALL, workers=1)
    made = {name: digest for name, digest in digests(killed).items() if not Path(name).name.startswith(".")}
    assert made == digests(tmp_path / "whole")
