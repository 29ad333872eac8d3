"""The interface by which rows of every source are read, and the batches made of them."""

import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.dali.encoded_input import GraphDecoder
from pipelines.dali.sample_reader import Decoding, SampleReader, SampleRequest
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import ManifestRow, SourceKind, encode_path, write_manifest
from pipelines.dataset.probe import probe_frames, probe_video
from pipelines.dataset.source import _checksum, open_source
from pipelines.dataset.spot_check import spot_check
from pipelines.decode.jpeg_frames import JpegFrames
from pipelines.decode.packet_index import make_packet_index
from pipelines.decode.pyav import decode_frames
from pipelines.errors import VideoError
from tests.pipelines.jpegs import write_frames
from tests.pipelines.videos import Kind, make_video, moving_picture

H264 = Kind("libx264", "mp4", {"g": "8", "bf": "2"})
SIZE = (80, 112)


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_video(tmp_path_factory.mktemp("video"), H264)


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_frames(tmp_path_factory.mktemp("frames"), moving_picture(40, *SIZE))


def row_of(path: Path) -> ManifestRow:
    if path.is_dir():
        info, source = probe_frames(path), SourceKind.FRAMES
    else:
        info, source = probe_video(path), SourceKind.FILE
    return ManifestRow(
        encode_path(path), 0, 0, 0, info.frames, 12.0, info.width, info.height, info.codec, source=source
    )


def all_frames(path: Path) -> np.ndarray:
    every = np.arange(40, dtype=np.int32)
    if path.is_dir():
        return JpegFrames.read(path, every, 40).decode(every, size=SIZE)
    return decode_frames(path, every)


@pytest.mark.parametrize("name", ["video", "frames"])
def test_a_segment_has_exactly_its_frames_of_the_whole_video(
    name: str, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(name)
    whole = row_of(path)
    expected = all_frames(path)
    segment = replace(whole, first_frame=13, frames=20, video_frames=40)
    for row, first in ((whole, 0), (segment, 13)):
        wanted = np.array([0, 19, 7, 7], np.int32)
        read = open_source(path, row).read(wanted)
        np.testing.assert_array_equal(read.indices, first + wanted)
        np.testing.assert_array_equal(read.decode(None, SIZE), expected[first + wanted])
        np.testing.assert_array_equal(read.decode((4, 8, 40, 99), SIZE), expected[first + wanted, 4:40, 8:99])
    source = open_source(path, segment)
    source.check_opens()
    assert source.probe(deep=True).frames == 40  # of the whole video
    assert source.content_key() == open_source(path, whole).content_key() != 0


def test_a_video_replaced_by_one_of_the_same_size_names_the_cause(tmp_path: Path) -> None:
    """Its packets are elsewhere. Damage that the index was made with is what it is."""
    contents = [
        make_video(tmp_path, Kind("libx264", "mp4", {"g": "8", "bf": "2", "crf": crf})).read_bytes()
        for crf in ("20", "30")
    ]
    size = max(map(len, contents))
    first, other = (content + bytes(size - len(content)) for content in contents)
    path = tmp_path / "video.mp4"
    path.write_bytes(first)
    row, packets = row_of(path), make_packet_index(path)
    assert packets is not None
    whole = np.arange(40, dtype=np.int32)

    def error() -> str:
        with pytest.raises(VideoError) as caught:
            open_source(path, row, packets).read(whole).decode(None, SIZE)
        return str(caught.value)

    path.write_bytes(other)
    assert "`uniformerv2 prepare index` for the manifest again" in error()
    begin = int(packets.begins[9])
    path.write_bytes(damaged := first[: begin + 6] + bytes(40) + first[begin + 46 :])
    packets = replace(packets, crc=zlib.crc32(damaged))
    _checksum.cache_clear()
    assert "prepare index" not in error()


def test_a_source_that_does_not_exist_has_a_reason_everywhere(tmp_path: Path, frames: Path) -> None:
    for source in SourceKind:
        gone = open_source(tmp_path / "gone", replace(row_of(frames), source=source))
        calls: list[Callable[[], object]] = [
            lambda source=gone: source.read(np.zeros(1, np.int32)), gone.probe, gone.check_opens,
        ]  # fmt: skip
        for call in calls:
            with pytest.raises(VideoError, match="cannot be read: No such file"):
                call()
        assert gone.content_key() == 0


@pytest.fixture
def dataset(tmp_path: Path, video: Path, frames: Path) -> Dataset:
    """A folder of frames, the frames 10 to 29 of a video, and the whole video."""
    whole = row_of(video)
    rows = [row_of(frames), replace(whole, first_frame=10, frames=20, video_frames=40), whole]
    return Dataset([write_manifest(tmp_path / "m.arrow", rows, ["a"], sources=True)])


def load(dataset: Dataset, sample: int, decoding: Decoding, *indices: int) -> tuple[dict, str]:
    row = dataset.row(sample)
    wanted = np.array(indices, np.int32)
    loaded = SampleReader(dataset, decoding).load(SampleRequest(sample, row, wanted, None, True, ""))
    return loaded.arrays, loaded.reason


def test_the_graph_gets_no_folder_of_frames_and_a_segment_by_its_frames_in_the_video(
    dataset: Dataset, video: Path, frames: Path
) -> None:
    hybrid, dali = (Decoding(name, GraphDecoder.NVDEC) for name in ("hybrid", "dali"))
    arrays, reason = load(dataset, 0, hybrid, 3, 5)
    assert not reason and not arrays["in_graph"]
    np.testing.assert_array_equal(arrays["frames"], all_frames(frames)[[3, 5]])
    assert "is a folder of frames" in load(dataset, 0, dali, 3, 5)[1]
    arrays, reason = load(dataset, 1, dali, 0, 19)
    assert not reason
    np.testing.assert_array_equal(arrays["indices"], [10, 29])
    assert arrays["video"].tobytes() == video.read_bytes()


def test_a_spot_check_opens_every_kind(dataset: Dataset, frames: Path) -> None:
    manifest = dataset.manifests[0]
    assert not spot_check(manifest).message
    moved = frames.rename(frames.with_name("moved"))
    try:
        assert str(frames) in spot_check(manifest).message
    finally:
        moved.rename(frames)
