"""Damage inside a stream is detected, by a run as well as by `prepare.py --deep`."""

from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

from pipelines.dali.sample_reader import Decoding, SampleReader, SampleRequest
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import ManifestRow, write_manifest
from pipelines.dataset.probe import probe_video
from pipelines.decode import stream_decoder
from pipelines.decode.demux import open_video, stored_packets
from pipelines.decode.pyav import decode_frames
from pipelines.errors import VideoError
from tests.pipelines.hidden_damage import CODECS, notice
from tests.pipelines.videos import Kind, make_video, moving_picture

SEEDS = range(12)


@pytest.mark.parametrize(
    ("name", "least"), [("VP9", 11), ("HEVC with checksums", 11), ("AV1", 8), ("H.264", 4)]
)
def test_damage_is_detected(name: str, least: int) -> None:
    """Without the options, of 100 each: VP9 1, HEVC with checksums 18."""
    found = notice(CODECS[name], SEEDS)
    assert found.changed >= 10
    assert found.deep == found.whole >= least


@pytest.mark.parametrize("name", ["HEVC", "VP8", "MPEG-4 part 2", "Motion JPEG"])
def test_a_run_reads_what_a_deep_check_accepts(name: str) -> None:
    found = notice(CODECS[name], SEEDS)
    assert found.deep == found.whole


def test_vp9_without_googles_decoder_is_decoded_by_ffmpegs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, every = make_video(tmp_path, CODECS["VP9"]), np.arange(24)
    usual = decode_frames(path, every)
    monkeypatch.setattr(stream_decoder, "_has_libvpx", lambda: False)
    assert np.array_equal(decode_frames(path, every), usual)


def late_stream(folder: Path) -> bytes:
    """A transport stream in which sound begins in the middle."""
    folder.mkdir()
    silent = make_video(folder, Kind("libx264", "ts", {"bf": "0", "g": "5"}, frames=10)).read_bytes()
    with av.open(str(folder / "with_sound.ts"), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"bf": "0", "g": "5"})
        video.height, video.width, video.pix_fmt = 80, 112, "yuv420p"
        sound = container.add_stream("mp2", rate=44100)
        for number, picture in enumerate(moving_picture(10, 80, 112)):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 2304), np.int16), format="s16", layout="stereo")
            silence.rate, silence.pts = 44100, 1152 * number
            container.mux(sound.encode(silence))
        container.mux(video.encode(None))
    return silent * 300 + (folder / "with_sound.ts").read_bytes()  # beyond the packets that FFmpeg probes


def test_a_stream_that_begins_late_is_ignored(tmp_path: Path) -> None:
    content = late_stream(tmp_path / "late")
    info = probe_video(content)
    assert (info.frames, "a transport stream with gaps, or several in one" in info.notes) == (3010, True)
    assert decode_frames(content, np.array([0, 3009])).shape == (2, 80, 112, 3)

    def demux(_: object):
        """Raises after the last packet, as PyAV may."""
        with open_video(content[:18800]) as (container, stream):
            yield from container.demux(stream)
        raise IndexError("tuple index out of range")

    assert len(list(stored_packets(SimpleNamespace(demux=demux), None))) > 5  # type: ignore[arg-type]


def test_no_error_of_a_library_ends_a_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It becomes a VideoError with the same message as in a run, the only type that `prepare.py` handles."""
    path = make_video(tmp_path, Kind("mpeg4", "mp4", frames=3))

    def broken(*_: object, **__: object) -> None:
        raise IndexError("tuple index out of range")

    monkeypatch.setattr(av, "open", broken)
    words = "cannot be read: IndexError: tuple index out of range"
    with pytest.raises(VideoError, match=words):
        probe_video(path)
    row = ManifestRow(path.name, 0, 0, 0, 3, 25.0, 112, 80, "mpeg4")
    reader = SampleReader(Dataset([write_manifest(tmp_path / "m.arrow", [row], ["a"])]), Decoding("pyav"))
    assert reader.load(SampleRequest(0, row, np.zeros(1, np.int32), None, False)).reason == words
