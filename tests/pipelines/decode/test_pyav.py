"""Frame-exact decoding against a full decode."""

import os
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.dataset.probe import probe_video
from pipelines.decode import pyav
from pipelines.decode.demux import open_video, read_index, stored_packets
from pipelines.decode.pyav import decode_frames
from pipelines.decode.stream_decoder import StreamDecoder
from pipelines.errors import VideoError
from tests.pipelines.videos import KINDS, Kind, decode_all, make_video, moving_picture

TRIMMED = 7  # frames that the edit list of a fixture removes
B_FRAMES = KINDS["h264 with B-frames"]


@pytest.fixture(scope="module", params=KINDS, ids=lambda name: name.replace(" ", "-"))
def video(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("videos"), KINDS[request.param])


def test_frames_equal_a_full_decode(video: Path) -> None:
    expected = decode_all(video)
    last = len(expected) - 1
    groups = [
        [0],
        [last],
        [0, 5, 10, 15, 20, last],
        [11, 12, 13],
        [last - 1, 2, 2, 20, 0],
        *([index] for index in range(1, last, 4)),
    ]
    for indices in groups:
        for source in (video, video.read_bytes()):
            decoded = decode_frames(source, np.array(indices))
            np.testing.assert_array_equal(decoded, expected[indices], err_msg=str(indices))


def test_a_probe_counts_the_displayed_frames(video: Path) -> None:
    expected = decode_all(video)
    info = probe_video(video, deep=True)
    assert (info.frames, info.height, info.width) == expected.shape[:3]


def test_the_kinds_are_what_their_names_say(tmp_path: Path) -> None:
    def index_of(name: str) -> tuple[list[int | None], list[int], list[int], bool]:
        with open_video(make_video(tmp_path, KINDS[name])) as (container, stream):
            index = read_index(container, stream)
        return index.times, index.keyframes, index.display_order, index.ordered

    times, _, shown, ordered = index_of("h264 with B-frames")
    assert times != sorted(times) and ordered and len(shown) == len(times) == 40
    times, keyframes, _, _ = index_of("h264 with open groups")
    assert any(times[later] < times[key] for key in keyframes for later in range(key, len(times)))
    times, _, shown, _ = index_of("h264 trimmed by an edit list")
    assert (len(times), len(shown)) == (40, 40 - TRIMMED)
    assert not index_of("h264 in avi")[3]  # its packets have no times
    assert not index_of("mpeg4 with packed B-frames")[3]
    assert index_of("h264 from inside a group")[1][0] > 0


@pytest.mark.parametrize(
    "name", ["h264 with open groups", "h264 with open groups in a transport stream", "hevc"]
)
def test_decoding_starts_at_the_last_keyframe_that_a_frame_depends_on(tmp_path: Path, name: str) -> None:
    with open_video(make_video(tmp_path, KINDS[name])) as (container, stream):
        index = read_index(container, stream)
    for packet in index.display_order:
        ((first, last),) = pyav._runs(index, [packet])
        usable = [key for key in index.keyframes if key <= packet and index.times[key] <= index.times[packet]]
        assert (first, last) == (usable[-1], packet)
    for begin in range(35):
        packets = sorted(index.display_order[begin : begin + 5])
        alone = [run for packet in packets for run in pyav._runs(index, [packet])]
        runs = pyav._runs(index, packets)
        assert all(any(first <= begin and end <= last for first, last in runs) for begin, end in alone)
        assert all(before[1] < after[0] for before, after in pairwise(runs))


def test_an_edit_list_moves_the_first_frame(tmp_path: Path) -> None:
    whole = decode_all(make_video(tmp_path, B_FRAMES))
    trimmed = make_video(tmp_path, KINDS["h264 trimmed by an edit list"])
    np.testing.assert_array_equal(decode_frames(trimmed, np.array([0, 9])), whole[[TRIMMED, TRIMMED + 9]])


def test_an_roi_of_the_frames_is_returned(video: Path) -> None:
    expected = decode_all(video)[[3, 20, 3], 7:70, 11:79]
    decoded = decode_frames(video, np.array([3, 20, 3]), (7, 11, 70, 79))
    np.testing.assert_array_equal(decoded, expected)
    with pytest.raises(ValueError, match="ROI"):
        decode_frames(video, np.array([3]), (0, 0, 500, 10))


def test_large_videos_are_demuxed_again_instead_of_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = make_video(tmp_path, B_FRAMES)
    indices = np.array([30, 5, 18])
    expected = decode_frames(video, indices)
    monkeypatch.setattr(pyav, "KEPT_BYTES", 2000)
    np.testing.assert_array_equal(decode_frames(video, indices), expected)
    np.testing.assert_array_equal(decode_frames(video.read_bytes(), indices), expected)


def test_only_needed_packets_are_decoded(tmp_path: Path) -> None:
    # Damage in a group of pictures that is not needed is not detected, as it is not decoded.
    video = make_video(tmp_path, B_FRAMES)
    expected = decode_all(video)
    damage(video, packet=12)
    np.testing.assert_array_equal(decode_frames(video, np.array([5, 30])), expected[[5, 30]])
    with pytest.raises(VideoError, match=r"is damaged at or before frame 1\d of 40"):
        decode_frames(video, np.array([5, 20]))


def damage(video: Path, *, packet: int) -> None:
    """Overwrite most of one packet, which leaves the container as it was."""
    with av.open(str(video)) as container:
        found = [found for found in container.demux(video=0) if found.size][packet]
        start, size = found.pos, found.size
    content = bytearray(video.read_bytes())
    content[start + size // 4 : start + size] = np.random.default_rng(1).bytes(size - size // 4)
    video.write_bytes(content)


@pytest.mark.parametrize("name", ["h264", "av1", "mpeg4", "mpeg2 program stream", "mjpeg"])
def test_damage_that_the_codec_detects_is_refused(tmp_path: Path, name: str) -> None:
    video = make_video(tmp_path, KINDS[name])
    damage(video, packet=0)
    with pytest.raises(VideoError, match=r"damaged"):
        decode_frames(video, np.array([0, 2]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("h264", r"ends before its index \(moov\)"),  # which is at the end
        ("vp9", r"1\d frames.*frame 39"),
        ("mpeg2 program stream", r"1\d frames.*frame 39"),
    ],
)
def test_truncated_files_are_reported_as_such(tmp_path: Path, name: str, reason: str) -> None:
    video = make_video(tmp_path, KINDS[name])
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    with pytest.raises(VideoError, match=reason):
        decode_frames(video, np.array([1, 39]))


def test_another_frame_size_is_refused_before_an_roi_is_cropped(tmp_path: Path) -> None:
    video = make_video(tmp_path, B_FRAMES)
    decode_frames(video, np.array([1]), size=(80, 112))
    reason = r"112x80.*640x480.*changed.*manifest"
    with pytest.raises(VideoError, match=reason):
        decode_frames(video, np.array([1]), (0, 0, 400, 400), size=(480, 640))


def test_a_change_of_the_frame_size_is_refused(tmp_path: Path) -> None:
    small = make_video(tmp_path, Kind("libx264", "ts", {"bf": "0", "g": "5"}, size=(80, 112), frames=10))
    content = small.read_bytes()
    large = make_video(tmp_path, Kind("libx264", "ts", {"bf": "0", "g": "5"}, size=(96, 128), frames=10))
    joined = tmp_path / "joined.ts"
    joined.write_bytes(content + large.read_bytes())
    with pytest.raises(VideoError, match="from frames of 112x80 to 128x96 at or before frame 1"):
        decode_frames(joined, np.array([2, 15]))


def test_messages_name_the_problem(tmp_path: Path) -> None:
    path = make_video(tmp_path, B_FRAMES)
    with pytest.raises(VideoError, match=r"40 frames.*frame 40"):
        decode_frames(path, np.array([40]))
    empty, text = tmp_path / "empty.mp4", tmp_path / "text.mp4"
    empty.touch()
    text.write_text("this is no video\n" * 100)
    with pytest.raises(VideoError, match="is empty"):
        decode_frames(empty, np.array([0]))
    with pytest.raises(VideoError, match="is not a video"):
        decode_frames(text, np.array([0]))
    with pytest.raises(VideoError, match="cannot be read: No such file"):
        decode_frames(tmp_path / "gone.mp4", np.array([0]))


def test_the_frames_of_the_moving_picture_differ() -> None:
    pictures = moving_picture(40, 80, 112).astype(int)
    assert np.abs(np.diff(pictures, axis=0)).mean(axis=(1, 2, 3)).min() > 5


def test_making_videos_leaves_the_scheduling_as_it_was(tmp_path: Path) -> None:
    make_video(tmp_path, KINDS["av1"])
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.mark.parametrize("name", ["vp9", "h264 with B-frames", "hevc"])
def test_a_clip_is_decoded_on_the_calling_thread(name: str, tmp_path: Path) -> None:
    with open_video(make_video(tmp_path, KINDS[name])) as (container, stream):
        codec, before = StreamDecoder(stream), len(os.listdir("/proc/self/task"))
        frames = [frame for packet in stored_packets(container, stream) for frame in codec.decode(packet)]
        assert frames and len(os.listdir("/proc/self/task")) == before
