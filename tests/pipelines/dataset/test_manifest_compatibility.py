"""Manifests that an earlier program wrote, of format 1 and of format 2 (with weights)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.dataset import manifest
from pipelines.dataset.manifest import Manifest, ManifestRow, write_manifest

DATA = Path(__file__).parent / "data"
CLASSES = ("fall", "rise", "überholen")
ROWS = [
    ManifestRow("videos/fall/1.mp4", 0, 0, 0, 120, 25.0, 320, 240, "h264", 1.0),
    ManifestRow("videos/rise/клип 2.mkv", 0, 0, 1, 1, 0.0, 1080, 1920, "vp9", 0.0),
    ManifestRow("shards/00.tar", 512, 40960, 2, 300, 29.97, 64, 48, "mjpeg", 2.5),
    ManifestRow("shards/00.tar", 41984, 1024, 0, 7, 1000.0, 65536, 1, "ffv1", 0.1),
    ManifestRow("/mnt/data/caf\0e9.avi", 0, 0, 1, 2**31 - 1, 23.976, 640, 360, "av1", 1e-9),
]
FINGERPRINTS = {
    1: "c03a95f2dc90ff57a49896db82c5d29bdda5db6d67f9538f76bd824c94de00b0",
    2: "33e3136a813046cb42971690168a7e8f99f3bfe29d37171f9dd7ed69641295c0",
}


@pytest.mark.parametrize("version", FINGERPRINTS)
def test_a_manifest_of_an_earlier_program_is_read_and_written_unchanged(version, tmp_path, monkeypatch):
    file = DATA / f"manifest_v{version}.arrow"
    opened = Manifest.open(file)
    opened.verify()
    assert opened.fingerprint == FINGERPRINTS[version]
    assert opened.class_names == CLASSES
    assert opened.rows_per_batch == 2 and opened.num_batches == 3
    assert opened.weighted == (version == 2)
    assert opened.total_weight == (3.600000001 if opened.weighted else 5)
    expected = [replace(row, fps=float(np.float32(row.fps))) for row in ROWS]
    if not opened.weighted:
        expected = [replace(row, weight=1.0) for row in expected]
    rows = [opened.row(index) for index in range(len(opened))]
    assert rows == expected
    monkeypatch.setattr(manifest, "ROWS_PER_BATCH", 2)
    written = write_manifest(tmp_path / file.name, rows, opened.class_names, weighted=opened.weighted)
    assert written.path.read_bytes() == file.read_bytes()
