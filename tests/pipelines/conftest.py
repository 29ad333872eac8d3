"""Videos that break DALI's decoder."""

import io
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.dataset.manifest import ManifestRow, write_manifest

FRAMES, HEIGHT, WIDTH = 20, 64, 96


def encode_vp9(path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libvpx-vp9", rate=25, options={"g": "10", "cpu-used": "8"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        base = rng.integers(0, 255, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        for index in range(FRAMES):
            frame = av.VideoFrame.from_ndarray(np.roll(base, index, axis=1), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def damage(path: Path, packet: int) -> None:
    """Overwrite the beginning of a packet with zeros: the file can be demuxed, but not decoded."""
    data = path.read_bytes()
    with av.open(io.BytesIO(data)) as container:
        packets = [bytes(found) for found in container.demux(video=0) if found.size]
    at = data.find(packets[packet][:64])
    assert at > 0
    path.write_bytes(data[:at] + bytes(60) + data[at + 60 :])


@pytest.fixture(scope="session")
def vp9_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve VP9 clips; number 5 is damaged after its first frame. Read only."""
    folder, rows = tmp_path_factory.mktemp("vp9"), []
    for index in range(12):
        path = folder / f"{index}.webm"
        encode_vp9(path, index)
        rows.append(ManifestRow(path.name, 0, 0, index % 2, FRAMES, 25.0, WIDTH, HEIGHT, "vp9"))
    damage(folder / "5.webm", packet=1)
    return write_manifest(folder / "train.arrow", rows, ["a", "b"]).path
