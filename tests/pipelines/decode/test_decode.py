"""The graph's decoder against PyAV frame by frame, and the videos that it refuses."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali import fn, pipeline_def

from pipelines.dali.encoded_input import (
    GraphDecodeInput,
    GraphDecoder,
    UnsupportedByGraph,
    check_encoded,
    placeholder_video,
)
from pipelines.dataset.manifest import ManifestRow
from pipelines.dataset.probe import probe_video
from pipelines.decode.dali_nodes import choose_decoder, correct_color, decode_in_graph
from pipelines.decode.pyav import decode_frames
from pipelines.errors import VideoError
from tests.pipelines.videos import KINDS, Kind, decode_all, make_video, start_at_the_second_keyframe

NEAR = 8  # levels on average: decoders bring chroma to full size differently; another frame is 27 away
VP9 = KINDS["vp9"]
GRAPH_KINDS = {
    name: kind
    for name, kind in KINDS.items()
    if kind.codec in ("libvpx", "libvpx-vp9", "mjpeg") and "inside" not in name
}


def row_of(video: Path) -> ManifestRow:
    info = probe_video(video)
    return ManifestRow(
        path=str(video),
        offset=0,
        length=0,
        label=0,
        frames=info.frames,
        fps=info.fps,
        width=info.width,
        height=info.height,
        codec=info.codec,
    )


def check(video: Path, indices: Sequence[int], decoder: GraphDecoder = GraphDecoder.CPU) -> GraphDecodeInput:
    return check_encoded(video.read_bytes(), row_of(video), np.array(indices), decoder)


def decode_by_dali(videos: Sequence[Path], indices: Sequence[int], device: torch.device) -> list[np.ndarray]:
    """The frames at `indices` of each video, by the graph of the loaders."""
    gpu = device.type == "cuda"
    checked = [check(video, indices, GraphDecoder.for_device(gpu=gpu)) for video in videos]

    @pipeline_def(batch_size=len(videos), num_threads=1, device_id=device.index, enable_conditionals=True)
    def pipeline() -> object:
        contents = [np.frombuffer(video.read_bytes(), np.uint8) for video in videos]
        encoded = fn.external_source(source=lambda: contents)
        numbers = fn.external_source(source=lambda: [sample.indices for sample in checked])
        color = fn.external_source(source=lambda: [sample.color for sample in checked])
        turns = fn.external_source(source=lambda: [sample.orientation for sample in checked])
        return decode_in_graph(encoded, numbers, color, turns, gpu=gpu)

    built = pipeline()
    built.build()
    (frames,) = built.run()
    assert frames.layout() == "FHWC"
    return [np.array(sample) for sample in frames.as_cpu()]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "numbered" in metafunc.fixturenames:
        kinds = USUAL if metafunc.config.getoption("--device") == "cuda" else GRAPH_KINDS
        metafunc.parametrize("numbered", kinds.values(), ids=[name.replace(" ", "-") for name in kinds])


def test_the_graph_numbers_frames_as_pyav(tmp_path: Path, numbered: Kind, device: torch.device) -> None:
    video = make_video(tmp_path, numbered)
    expected = decode_all(video).astype(int)
    last = len(expected) - 1
    for indices in ([0, 5, 10, 15, 20, last], [last - 1, 2, 2, 20, 0, 11, 12, 13], list(range(last + 1))):
        (decoded,) = decode_by_dali([video], indices, device)
        distance = np.abs(decoded[:, None, ::4, ::4].astype(int) - expected[None, :, ::4, ::4])
        assert distance.mean(axis=(2, 3, 4)).argmin(axis=1).tolist() == indices
        assert distance.mean(axis=(2, 3, 4)).min(axis=1).max() < NEAR


def test_check_encoded_returns_the_frame_numbers(tmp_path: Path) -> None:
    checked = check(make_video(tmp_path, VP9), [3, 1, 3])
    assert checked.indices.dtype == np.int32 and checked.indices.tolist() == [3, 1, 3]
    assert checked.color.dtype == np.float32 and checked.color.tolist() == np.eye(3, 4).tolist()


def test_unusable_videos_are_refused_before_the_graph(tmp_path: Path) -> None:
    video = make_video(tmp_path, VP9)
    with pytest.raises(VideoError, match=r"40 frames.*frame 40") as caught:
        check(video, [0, 40])
    assert not isinstance(caught.value, UnsupportedByGraph)
    small = make_video(tmp_path, Kind("libvpx-vp9", "mkv", VP9.options, size=(64, 64), frames=3))
    with pytest.raises(VideoError, match=r"64x64.*112x80") as caught:
        check_encoded(small.read_bytes(), row_of(video), np.array([0]), GraphDecoder.CPU)
    assert not isinstance(caught.value, UnsupportedByGraph)
    with pytest.raises(VideoError, match="is not a video"):
        check_encoded(b"no video" * 100, row_of(video), np.array([0]), GraphDecoder.CPU)


H264 = KINDS["h264"].options
CLOSED = "log-level=error:pools=none:frame-threads=1:bframes=3:b-adapt=0:keyint=10:min-keyint=10:open-gop=0"
OPEN = CLOSED.replace("open-gop=0", "open-gop=1")
REFRESHED = KINDS["h264 refreshed piece by piece"].options
NOT_FOR_NVDEC = {
    "h264 4:2:2": (Kind("libx264", "mp4", H264, "yuv422p"), "has pixels of yuv422p"),
    "h264 4:4:4": (Kind("libx264", "mp4", H264, "yuv444p"), "has pixels of yuv444p"),
    "h264 10 bits": (Kind("libx264", "mp4", H264, "yuv420p10le"), "has pixels of yuv420p10le"),
    **{name: (KINDS[name], f"is {name}") for name in ("vp8", "vp9", "av1", "mjpeg", "mpeg4")},
    "mpeg2": (KINDS["mpeg2 program stream"], "is mpeg2video"),
    "small hevc": (KINDS["hevc"], "has frames of 112x80"),
    "hevc with open groups": (
        Kind("libx265", "mp4", {"x265-params": OPEN}, size=(144, 176)),
        "has open groups of pictures",
    ),
    "the same in a transport stream": (
        Kind("libx265", "ts", {"x265-params": OPEN}, size=(144, 176)),
        "has open groups of pictures",
    ),
    "from before time 0": (
        Kind("libx264", "ts", H264, times=lambda i: 40 * i - 2000, muxer={"avoid_negative_ts": "disabled"}),
        "shows frames before time 0",
    ),
    "interlaced": (KINDS["h264 interlaced"], "is interlaced"),
    "no times": (KINDS["h264 in avi"], "does not say when its frames are shown"),
    "edit list": (KINDS["h264 trimmed by an edit list"], "holds frames that are not shown"),
    "cut": (KINDS["h264 from inside a group"], "begins before its first keyframe"),
}


@pytest.mark.parametrize("name", NOT_FOR_NVDEC)
def test_valid_videos_unsupported_by_the_graph_are_left_to_pyav(tmp_path: Path, name: str) -> None:
    kind, reason = NOT_FOR_NVDEC[name]
    video = make_video(tmp_path, kind)
    with pytest.raises(
        UnsupportedByGraph, match=f"{reason}, which the graph's decoder does not support .* to pyav"
    ):
        check(video, [0, 7], GraphDecoder.NVDEC)
    assert decode_frames(video, np.array([0, 7])).shape == (2, *kind.size, 3)


@pytest.mark.parametrize("container", ["mp4", "ts"])
def test_nvdec_refuses_a_video_that_begins_with_a_recovery_point(tmp_path: Path, container: str) -> None:
    """NVDEC would drop the first pictures, and DALI would number the others wrongly."""
    whole = make_video(tmp_path, Kind("libx264", container, REFRESHED))
    assert check(whole, [0], GraphDecoder.NVDEC).indices.tolist() == [0]
    cut = make_video(tmp_path, Kind("libx264", container, REFRESHED, remake=start_at_the_second_keyframe))
    with pytest.raises(UnsupportedByGraph, match="begins with no IDR picture"):
        check(cut, [0], GraphDecoder.NVDEC)


# A clip of one group, groups of 12, references of every kind, containers, and a size that is coded padded.
TAKEN_AS_THEY_ARE = (
    *(
        "h264",
        "h264 with B-frames",
        "h264 without B-frames",
        "h264 with open groups",
        "h264 of several slices",
    ),
    *("h264 of variable rate", "h264 turned", "h264 in fragments", "h264 in a transport stream"),
)
USUAL = {
    **{name: KINDS[name] for name in TAKEN_AS_THEY_ARE},
    "h264 of a size that is no multiple of 16": replace(KINDS["h264 with B-frames"], size=(90, 122)),
    "h264 cut at a keyframe": replace(KINDS["h264 with B-frames"], remake=start_at_the_second_keyframe),
    "hevc of closed groups": Kind("libx265", "mp4", {"x265-params": CLOSED}, size=(144, 176)),
}


@pytest.mark.parametrize("name", USUAL)
def test_common_videos_are_for_nvdec_and_not_for_the_cpu_graph(tmp_path: Path, name: str) -> None:
    video = make_video(tmp_path, USUAL[name])
    last = row_of(video).frames - 1
    assert check(video, [0, last], GraphDecoder.NVDEC).indices.tolist() == [0, last]
    with pytest.raises(UnsupportedByGraph, match=r"is \w+, which .* \(it supports mjpeg, vp8, vp9\)"):
        check(video, [0, last])


@pytest.mark.parametrize("decoder", GraphDecoder)
def test_the_graph_decodes_the_placeholder_video(tmp_path: Path, decoder: GraphDecoder) -> None:
    video = tmp_path / "placeholder.mkv"
    video.write_bytes(placeholder_video(decoder))
    assert check(video, [0], decoder).indices.tolist() == [0]


def test_auto_chooses_the_decoder_by_device() -> None:
    assert choose_decoder("auto", gpu=False) == "pyav"
    assert choose_decoder("auto", gpu=True) == "hybrid"
    assert choose_decoder("dali", gpu=False) == "dali"


def test_only_samples_that_need_it_are_corrected(device: torch.device) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3)).astype(np.uint8)
    matrix = np.array([[1.1, -0.1, 0, 4], [0, 0.9, 0.1, -3], [0.2, 0, 0.8, 0]], np.float32)

    @pipeline_def(batch_size=2, num_threads=1, device_id=device.index, enable_conditionals=True)
    def pipeline() -> object:
        pictures = fn.external_source(source=lambda: [frames, frames], layout="FHWC")
        return correct_color(
            pictures.gpu() if device.type == "cuda" else pictures,
            fn.external_source(source=lambda: [matrix, np.eye(3, 4, dtype=np.float32)]),
        )

    built = pipeline()
    built.build()
    corrected = built.run()[0].as_cpu()
    assert corrected.layout() == "FHWC"
    np.testing.assert_array_equal(np.array(corrected[1]), frames)
    expected = np.clip(frames @ matrix[:, :3].T + matrix[:, 3], 0, 255)
    assert np.abs(np.array(corrected[0]) - expected).max() < 0.51
