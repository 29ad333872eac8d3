"""Opening a few videos of a manifest."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from pipelines.dataset.manifest import Manifest, ManifestRow, write_manifest
from pipelines.dataset.spot_check import OPENED, spot_check
from pipelines.synthetic.video_writer import MJPEG, encode_video


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    """Of 20 rows that share four videos, one of them as a piece of a larger file."""
    for name in "abc":
        path = tmp_path / f"videos/{name}.avi"
        path.parent.mkdir(exist_ok=True)
        encode_video(path, np.zeros((2, 48, 64, 3), np.uint8), MJPEG, Fraction(25), keyframe_interval=1)
    data = (tmp_path / "videos/a.avi").read_bytes()
    (tmp_path / "videos/shard").write_bytes(b"before" + data + b"after")
    places = [("a.avi", 0, 0), ("b.avi", 0, 0), ("c.avi", 0, 0), ("shard", 6, len(data))]
    rows = [
        ManifestRow(f"videos/{name}", offset, length, 0, 2, 25.0, 64, 48, "mjpeg")
        for name, offset, length in places * 5
    ]
    return write_manifest(tmp_path / "train.arrow", rows, ["cat"])


def test_good_videos_are_opened_evenly_without_a_message(manifest: Manifest) -> None:
    found = spot_check(manifest)
    assert 4 < found.opened <= OPENED and not found.bad_samples and found.message == ""
    assert spot_check(manifest, most=100).opened == 20


def test_some_bad_videos_are_named_with_their_reasons(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "videos/b.avi").write_bytes(b"")
    found = spot_check(manifest, "data.train", most=100)
    assert found.message.startswith("5 of 20 videos of data.train cannot be used; the first: ")
    assert found.message.count(f"{tmp_path}/videos/b.avi is empty") == 1  # of five rows
    for name in ("a.avi", "c.avi", "shard"):
        (tmp_path / "videos" / name).write_bytes(b"")
    assert spot_check(manifest).message.startswith("none of 7 tried videos of")


def test_a_folder_that_was_moved_is_named(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "videos").rename(tmp_path / "elsewhere")
    found = spot_check(manifest)
    assert found.lost == tmp_path / "videos"
    assert f"found under {tmp_path}/videos, a folder that does not exist: were they moved?" in found.message
    (tmp_path / "videos").mkdir()
    assert f"found under {tmp_path}/videos: were they moved?" in spot_check(manifest).message
