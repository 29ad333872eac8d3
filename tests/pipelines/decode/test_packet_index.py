"""Packet indexes: the same frames from the packets that they need alone, and damaged records."""

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipelines.decode.packet_index import PacketIndex, make_packet_index, merge
from pipelines.decode.pyav import decode_frames
from pipelines.decode.video_file import FileRange, VideoFile
from pipelines.errors import VideoError
from tests.pipelines.videos import KINDS, Kind, decode_all, make_video, moving_picture

NOT_INDEXED = {
    # an edit list hides frames
    "h264 trimmed by an edit list",
    "vp9 trimmed by an edit list",
    # no presentation times
    "h264 in avi",
    "h264 in avi without index",
    "mpeg4 with packed B-frames",
    # a packet is spread over several packets of the stream
    "h264 in a transport stream",
    "h264 with open groups in a transport stream",
    "h264 from inside a group",
    "h264 with open groups from inside a group",
    "hevc from inside a group",
    "mpeg2 from inside a group",
    "mpeg2 program stream",
    "mpeg2 transport stream",
}


@dataclass
class Watched:
    """A part of a file that records what is requested and what is read."""

    path: Path
    offset: int
    length: int
    loaded: list[tuple[int, int]] = field(default_factory=list)
    read: list[tuple[int, int]] = field(default_factory=list)

    @contextmanager
    def open(self) -> Iterator["WatchedFile"]:
        with VideoFile(self.path, self.offset, self.length) as file:
            yield WatchedFile(file, self)


class WatchedFile:
    def __init__(self, file: VideoFile, watched: Watched) -> None:
        self._file, self._watched = file, watched
        self.seek, self.tell = file.seek, file.tell

    def load(self, ranges: Sequence[tuple[int, int]]) -> None:
        self._watched.loaded += ranges

    def read(self, most: int = -1) -> bytes:
        begin = self._file.tell()
        data = self._file.read(most)
        self._watched.read.append((begin, begin + len(data)))
        return data


@pytest.mark.parametrize("name", [name for name in KINDS if name not in NOT_INDEXED])
def test_frames_by_their_packets_equal_a_full_decode(name: str, tmp_path: Path) -> None:
    video = make_video(tmp_path, KINDS[name])
    expected = decode_all(video)
    made = make_packet_index(video)
    assert made is not None
    index = PacketIndex.from_bytes(made.to_bytes())
    assert (index.size, index.crc) == (video.stat().st_size, zlib.crc32(video.read_bytes()))
    last = len(expected) - 1
    shard = tmp_path / "shard"
    shard.write_bytes(b"before" + video.read_bytes() + b"behind")
    for indices in ([0], [last], [last - 1, 2, 2, 20, 0], [11, 12, 13]):
        part = Watched(shard, 6, index.size)
        decoded = decode_frames(part, np.array(indices), packets=index)
        np.testing.assert_array_equal(decoded, expected[indices], err_msg=str(indices))
        if name != "h264 refreshed piece by piece":  # decoded as a whole: its keyframes are none
            outside = [
                (begin, end)
                for begin, end in merge(part.read, 0)
                if not any(low <= begin and end <= high for low, high in part.loaded)
            ]
            assert not outside


@pytest.mark.parametrize("name", sorted(NOT_INDEXED))
def test_videos_that_are_read_as_a_whole(name: str, tmp_path: Path) -> None:
    assert make_packet_index(make_video(tmp_path, KINDS[name])) is None


def test_times_that_a_record_cannot_hold(tmp_path: Path) -> None:
    fragmented = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    video = make_video(tmp_path, replace(KINDS["h264"], muxer=fragmented))
    content = bytearray(video.read_bytes())
    place = content.index(b"tfdt") + 4
    assert content[place] == 1  # the version with a time of 64 bits
    for time in (2**46, 2**48):  # the second would make a record that is refused
        content[place + 4 : place + 12] = time.to_bytes(8, "big")
        index = make_packet_index(bytes(content))
        assert (index is None) == (time == 2**48)
        if index is not None:
            assert PacketIndex.from_bytes(index.to_bytes()).times[0] >= time
    assert len(decode_frames(bytes(content), np.array([0, 1]))) == 2


def test_a_clip_reads_a_fraction_of_a_long_video(tmp_path: Path) -> None:
    options = {"g": "12", "crf": "4", "preset": "ultrafast"}
    noise = np.random.default_rng(0).integers(0, 255, (96, 160, 240, 3)).astype(np.uint8)
    video = make_video(tmp_path, Kind("libx264", "mp4", options), noise)
    index = make_packet_index(video)
    assert index is not None
    part = Watched(video, 0, 0)
    decode_frames(part, np.array([50]), packets=index)
    assert sum(end - begin for begin, end in part.loaded) < index.size / 4
    whole = decode_frames(FileRange(video), np.array([50, 95]), packets=index)
    np.testing.assert_array_equal(whole, decode_frames(video, np.array([50, 95])))


def test_a_changed_video_is_refused(tmp_path: Path) -> None:
    video = make_video(tmp_path, KINDS["h264"])
    index = make_packet_index(video)
    video.write_bytes(video.read_bytes() + b"more")
    with pytest.raises(VideoError, match="changed"):
        decode_frames(video, np.array([0]), packets=index)


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    """The numbers of a record."""
    pictures = moving_picture(8, 64, 64)
    index = make_packet_index(make_video(tmp_path_factory.mktemp("video"), KINDS["h264"], pictures))
    assert index is not None
    content = zlib.decompress(index.to_bytes())
    return np.frombuffer(content, np.uint8).reshape(8, -1).T.copy().view("<i8").reshape(-1)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    place=st.integers(0, 1000),
    value=st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(-40, 40_000)),
    cut=st.integers(-3, 3),
)
def test_a_damaged_record_is_refused_or_possible(
    numbers: np.ndarray, place: int, value: int, cut: int
) -> None:
    """Whatever is accepted lies inside the video."""
    changed = numbers.copy()
    changed[place % len(changed)] = value
    changed = np.append(changed, np.zeros(max(0, cut), "<i8"))[: len(changed) + cut]
    record = zlib.compress(changed.astype("<i8").view(np.uint8).reshape(-1, 8).T.tobytes())
    try:
        index = PacketIndex.from_bytes(record)
    except VideoError:
        return
    assert (index.begins >= 0).all() and (index.sizes > 0).all()
    assert (index.begins + index.sizes <= index.size).all()
    assert index.display_order.max() < len(index.times)
    assert index.video_index.keyframes


@pytest.mark.parametrize("record", [b"", b"x", zlib.compress(b""), zlib.compress(bytes(7)), bytes(100)])
def test_a_record_that_is_none(record: bytes) -> None:
    with pytest.raises(VideoError, match="packet index"):
        PacketIndex.from_bytes(record)
