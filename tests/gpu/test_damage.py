"""Damaged videos in a graph that decodes with NVDEC: a bad sample does not affect the others."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.augment.params import TrainClipSpec
from pipelines.dali.encoded_input import GraphDecodeInput, GraphDecoder
from pipelines.dali.external_source import TrainSource
from pipelines.dali.pipeline import Graph
from pipelines.dali.sample_reader import NO_VIDEO, Decoding, SampleReader, SampleRequest
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import Manifest, ManifestRow, write_manifest
from pipelines.loader import ClipBatch, ClipLoader
from pipelines.sampling.sampler import TrainSampler
from tests.pipelines.batches import HALF, loader, options, resources, take
from tests.pipelines.videos import Kind, make_video

pytestmark = pytest.mark.gpu

CLIP = TrainClipSpec(4, 32)
VIDEOS, BAD, FRAMES, SIZE = 12, 5, 20, (64, 96)
BATCH, BATCHES = 4, 6  # two epochs


def make_set(folder: Path, device: torch.device) -> Path:
    """Twelve clips in a codec of the device's decoder; their manifest."""
    codec, options = (
        ("libx264", {"g": "10"}) if device.type == "cuda" else ("libvpx-vp9", {"g": "10", "cpu-used": "8"})
    )
    kind = Kind(codec, "mkv", options, size=SIZE, frames=FRAMES)
    rows = []
    for number in range(VIDEOS):
        pixels = np.random.default_rng(number).integers(0, 255, (*SIZE, 3)).astype(np.uint8)
        moving = np.stack([np.roll(pixels, index, axis=1) for index in range(FRAMES)])
        path = make_video(folder, kind, moving).rename(folder / f"{number}.mkv")
        name = "h264" if device.type == "cuda" else "vp9"
        rows.append(ManifestRow(path.name, 0, 0, number % 2, FRAMES, 25.0, SIZE[1], SIZE[0], name))
    return write_manifest(folder / "train.arrow", rows, ["a", "b"]).path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Path:
    return make_set(tmp_path_factory.mktemp("whole"), device)


@pytest.fixture(scope="module")
def sound(whole: Path, device: torch.device) -> list[ClipBatch]:
    """The batches of the set where nothing is damaged."""
    return take(loader(whole, CLIP, batch=BATCH, how=options("dali", workers=2, device=device)), BATCHES)


def only_the_bad_one_differs(found: list[ClipBatch], sound: list[ClipBatch]) -> bool:
    others = [batch.ids != BAD for batch in sound]
    return all(
        torch.equal(one.ids, other.ids)
        and bool(one.valid[kept].all())
        and torch.equal(one.clips[kept], other.clips[kept])
        for one, other, kept in zip(found, sound, others, strict=True)
    )


def flip_bytes(content: bytes) -> bytes:
    """One byte in the middle, and one in each quarter."""
    changed = bytearray(content)
    for part in (1, 2, 3):
        changed[part * len(content) // 4] ^= 0xFF
    return bytes(changed)


def zero_the_middle(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes(200) + content[middle + 200 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "flipped bytes": flip_bytes,
    "zeros in the middle": zero_the_middle,
    "cut short": lambda content: content[: len(content) // 2],
}


def damaged_copy(whole: Path, folder: Path, change: Callable[[bytes], bytes]) -> Path:
    folder.mkdir()
    for path in whole.parent.iterdir():
        content = path.read_bytes()
        (folder / path.name).write_bytes(change(content) if path.name == f"{BAD}.mkv" else content)
    return folder / whole.name


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_inside_a_stream_reaches_no_other_clip(
    whole: Path, sound: list[ClipBatch], tmp_path: Path, damage: str, device: torch.device
) -> None:
    """NVDEC may or may not notice the damage: the sample is bad, or has wrong pixels."""
    path = damaged_copy(whole, tmp_path / "set", DAMAGES[damage])
    clips = loader(path, CLIP, batch=BATCH, how=options("dali", workers=2, device=device))
    found = [batch for _, batch in zip(range(BATCHES), clips, strict=False)]
    reasons = {bad.sample: bad.reason for bad in clips.bad_samples.pop_new()}
    clips.close()
    assert reasons.keys() <= {BAD}
    if damage == "cut short":
        assert "frames" in reasons[BAD], "the check before the decoder finds it"
    assert only_the_bad_one_differs(found, sound)


@dataclass
class UncheckedReader(SampleReader):
    """Gives one video to the graph's decoder without a check."""

    def _encoded(
        self, request: SampleRequest, row: ManifestRow, source: Path | bytes
    ) -> GraphDecodeInput | None:
        if request.sample == BAD and isinstance(source, bytes):
            video = np.frombuffer(source, np.uint8)
            return replace(NO_VIDEO, video=video, indices=request.indices.astype(np.int32))
        return super()._encoded(request, row, source)


def not_for_the_decoder(folder: Path, name: str) -> bytes:
    if name == "no video":
        return b"no video" * 500
    kind = Kind("libx264", "mkv", {"g": "10"}, name, SIZE, FRAMES)
    return make_video(folder, kind).read_bytes()


@pytest.mark.parametrize(
    ("name", "prefetch"),
    [("no video", 1), ("yuv444p", 1), ("yuv444p", 3), ("yuv422p", 2), ("yuv420p10le", 2)],
)
def test_a_video_that_breaks_the_decoder_is_a_bad_sample(
    whole: Path, sound: list[ClipBatch], tmp_path: Path, name: str, prefetch: int, device: torch.device
) -> None:
    """Among them pixel formats that NVDEC does not support: `auto` leaves such videos to PyAV."""
    content = not_for_the_decoder(tmp_path, name)
    path = damaged_copy(whole, tmp_path / "set", lambda _: content)
    decoding = Decoding("dali", GraphDecoder.for_device(gpu=device.type == "cuda"))
    reader = UncheckedReader(Dataset([Manifest.open(path)]), decoding)
    sampler = TrainSampler(VIDEOS, BATCH, seed=3)
    source = TrainSource(reader, sampler, CLIP, BATCH, rank=0, world_size=1, first=0)
    clips = ClipLoader(Graph(source, HALF, HALF), resources(2, prefetch, device), batches=0)
    found = [batch for _, batch in zip(range(BATCHES), clips, strict=False)]
    reasons = {bad.sample: bad.reason for bad in clips.bad_samples.pop_new()}
    clips.close()
    ids, valid = (torch.cat([getattr(batch, part) for batch in found]).cpu() for part in ("ids", "valid"))
    assert sorted(ids.tolist()) == sorted([*range(VIDEOS)] * 2)
    assert set(ids[~valid].tolist()) == {BAD}
    assert reasons[BAD].startswith("cannot be decoded")
    assert only_the_bad_one_differs(found, sound)
