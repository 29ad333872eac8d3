"""Frames that are scaled down while they are decoded, from every source, and the clips made of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.augment.params import TrainClipSpec
from pipelines.dali.external_source import TrainSource
from pipelines.dali.sample_layout import Arrays
from pipelines.dali.sample_reader import Decoding, SampleReader
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import ManifestRow, write_manifest
from pipelines.dataset.source import open_source
from pipelines.decode.frame_stream import FrameStream
from pipelines.decode.pyav import decode_frames
from pipelines.decode.scaling import scaled_size
from pipelines.sampling.sampler import TrainSampler
from tests.pipelines.dataset.test_source import SIZE, row_of
from tests.pipelines.jpegs import write_frames
from tests.pipelines.videos import BF, Kind, make_video, moving_picture

HALF = 40
"""Half of the short side: the mean of 2 x 2 pixels."""
WANTED = np.array([0, 19, 7, 7], np.int32)
FULL_COLOUR = Kind("libx264", "mp4", BF, pixels="yuv444p")


def halved(pictures: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) → (T, H / 2, W / 2, 3), float: the mean of each 2 x 2 pixels."""
    count, height, width, _ = pictures.shape
    return pictures.reshape(count, height // 2, 2, width // 2, 2, 3).mean(axis=(2, 4))


@pytest.mark.parametrize(
    ("size", "limit", "expected"),
    [
        ((1080, 1920), 320, (320, 569)),
        ((1920, 1080), 321, (571, 321)),
        ((240, 320), 240, (240, 320)),
        ((240, 320), None, (240, 320)),
        ((400, 400), 100, (100, 100)),
    ],
)
def test_the_short_side_is_limited(size: tuple, limit: int | None, expected: tuple) -> None:
    assert scaled_size(*size, limit) == expected


@pytest.mark.parametrize("source", ["video", "turned video", "folder"])
def test_frames_are_means_of_areas(source: str, tmp_path: Path) -> None:
    if source == "folder":
        path = write_frames(tmp_path / "frames", moving_picture(40, *SIZE))
    else:
        kind = replace(FULL_COLOUR, degrees=90 if source == "turned video" else 0)
        faint = moving_picture(40, *SIZE) // 2 + 50  # so that no colour is clipped before the mean
        path = make_video(tmp_path, kind, faint)
    row = row_of(path)
    read = open_source(path, row).read(WANTED)
    size = row.height, row.width
    expected = halved(read.decode(None, size))
    scaled = read.decode(None, size, HALF)
    # The means of Y, U and V are rounded before they become R, G and B.
    assert scaled.shape == expected.shape and np.abs(scaled - expected).max() <= 3
    np.testing.assert_array_equal(read.decode((3, 4, 20, 37), size, HALF), scaled[:, 3:20, 4:37])
    np.testing.assert_array_equal(read.decode(None, size, min(size)), read.decode(None, size))


def test_a_stream_and_a_clip_have_the_same_pixels(tmp_path: Path) -> None:
    video = make_video(tmp_path, Kind("libx264", "mp4", BF))
    pictures = [picture for _, picture in FrameStream(video).pictures(max_short_side=33)]
    np.testing.assert_array_equal(np.stack(pictures), decode_frames(video, np.arange(40), max_short_side=33))


def sample_of(dataset: Dataset, decoding: Decoding, limit: int | None) -> tuple[Arrays, ManifestRow]:
    reader = SampleReader(dataset, decoding, max_short_side=limit)
    clip = TrainClipSpec(4, 32, rand_augment="rand-m7-n2-mstd0.5-inc1", max_short_side=limit)
    source = TrainSource(reader, TrainSampler(1, 1, seed=3), clip, 1, 0, 1, first=0)
    request, _, (params,) = source.sample(0)
    loaded = reader.load(request)
    assert not loaded.reason and request.row is not None
    return {**loaded.arrays, **params.arrays, "roi": params.roi}, request.row


def test_a_scaled_video_has_the_augmentation_of_a_smaller_one(tmp_path: Path) -> None:
    """So a limit gives what a video stored at this size gives; the graph's decoder leaves it to PyAV."""
    video = make_video(tmp_path, FULL_COLOUR)
    row = row_of(video)
    large = Dataset([write_manifest(tmp_path / "large.arrow", [row], ["a"])])
    lossless = Kind("libx264rgb", "mkv", {"qp": "0"}, pixels="rgb24")
    stored_video = make_video(tmp_path, lossless, decode_frames(video, np.arange(40), max_short_side=HALF))
    small = Dataset([write_manifest(tmp_path / "small.arrow", [row_of(stored_video)], ["a"])])
    scaled, _ = sample_of(large, Decoding("hybrid"), HALF)
    stored, small_row = sample_of(small, Decoding("pyav"), None)
    assert (small_row.height, small_row.width) == (HALF, 56)
    assert not scaled.pop("in_graph")
    for name in ("roi", "crop_matrix", "operations", "frames"):
        np.testing.assert_array_equal(scaled[name], stored[name], err_msg=name)
