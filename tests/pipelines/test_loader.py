"""Batches from real files through real worker processes."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.augment.params import TrainClipSpec, ViewSpec, draw_clip_params
from pipelines.dali.encoded_input import GraphDecoder
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import Manifest, encode_path, write_manifest
from pipelines.decode.pyav import decode_frames
from pipelines.loader import ClipBatch, view_loader
from pipelines.sampling.sampler import TrainSampler, ViewSampler
from tests.conftest import MotionSet
from tests.pipelines.batches import HALF, loader, options, take
from tests.pipelines.damaged_manifests import change_rows


def joined(batches: list[ClipBatch]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([batch.clips for batch in batches]), torch.cat([batch.ids for batch in batches])


def test_a_clip_without_augmentation_is_its_resized_frames(
    motion_set: MotionSet, device: torch.device
) -> None:
    """A crop of just the wanted size needs no interpolation, so it must be exact."""
    manifest = Manifest.open(motion_set.train)
    clip = TrainClipSpec(4, 72, crop_scale=(1, 1), crop_ratio=(1, 1), flip=1.0)
    square = [i for i in range(len(manifest)) if manifest.row(i).width == manifest.row(i).height == 72]
    batches = take(loader(motion_set.train, clip, batch=16, micro=16, how=options(device=device)), 2)
    clips, ids = (part.cpu() for part in joined(batches))
    checked = 0
    for pixels, sample in zip(clips, ids.tolist(), strict=True):
        if sample not in square:
            continue
        row = manifest.row(sample)
        drawn = draw_clip_params(
            clip, seed=3, epoch=0, sample=sample, repeat=0, frames=row.frames, height=72, width=72
        )
        frames = decode_frames(manifest.absolute_path(row), drawn.indices)
        expected = torch.from_numpy(frames[:, :, ::-1].copy()).permute(3, 0, 1, 2) / 255
        torch.testing.assert_close(pixels, (expected - 0.5) / 0.5, atol=1e-5, rtol=0)
        checked += 1
    assert checked > 3


def test_a_batch_keeps_its_pixels_while_others_are_made(motion_set: MotionSet, device: torch.device) -> None:
    """DALI's buffers are not copied, so DALI must not reuse one while a batch is referenced."""
    held, copies = [], []
    endless = loader(motion_set.train, TrainClipSpec(4, 32), how=options(device=device))
    for _, batch in zip(range(12), endless, strict=False):
        held.append(batch.clips)
        copies.append(batch.clips.clone())
    endless.close()
    assert all(torch.equal(one, copy) for one, copy in zip(held, copies, strict=True))
    assert len({tensor.data_ptr() for tensor in held}) == len(held)


def test_labels_are_the_manifests_and_the_hash_is_of_the_clips(motion_set: MotionSet) -> None:
    manifest = Manifest.open(motion_set.train)
    for batch in take(loader(motion_set.train, TrainClipSpec(4, 32), hashes=True), 2):
        assert batch.known_hash is not None and batch.hash() == replace(batch, known_hash=None).hash()
        assert batch.labels.tolist() == [manifest.row(sample).label for sample in batch.ids.tolist()]


def test_decoding_in_the_graph_agrees_with_pyav(
    motion_set: MotionSet, tmp_path: Path, device: torch.device
) -> None:
    """They upsample chroma differently, which changes pixels by a few levels.

    By 6.7 on an H100: NVDEC's frames are about 2 levels brighter than FFmpeg's, which rounds down.
    """
    codec = "h264" if device.type == "cuda" else "mjpeg"
    manifest = Manifest.open(motion_set.train)
    rows = [manifest.row(i) for i in range(len(manifest))]
    absolute = [replace(row, path=str(manifest.absolute_path(row))) for row in rows if row.codec == codec]
    path = write_manifest(tmp_path / "one_codec.arrow", absolute, manifest.class_names).path
    clip = TrainClipSpec(4, 64, flip=0)
    in_graph, in_source = (
        take(loader(path, clip, batch=4, micro=4, how=options(decoder, device=device)), 2)
        for decoder in ("dali", "pyav")
    )
    for one, other in zip(in_graph, in_source, strict=True):
        assert torch.equal(one.ids, other.ids)
        difference = (one.clips - other.clips).abs().mean() * 127.5
        # Wrong frames or channels differ by more than 20.
        assert difference < (4.0 if device.type == "cpu" else 9.0)


def broken_set(motion_set: MotionSet, folder: Path) -> Path:
    """A copy of the training set with broken videos in rows 0..4, each in another way, and invalid rows 6..9;
    the names of 2 and 5 are not UTF-8.
    """
    shutil.copytree(motion_set.root, folder)
    path = folder / "train.arrow"
    manifest = Manifest.open(path)
    rows = [manifest.row(i) for i in range(len(manifest))]
    for i in (2, 5):
        file = manifest.absolute_path(rows[i])
        renamed = file.rename(file.with_name(os.fsdecode(b"\xe9\n%d" % i)))
        rows[i] = replace(rows[i], path=encode_path(renamed.relative_to(folder)))
    files = [manifest.absolute_path(row) for row in rows[:5]]
    files[0].unlink()
    files[1].write_bytes(b"")
    files[2].write_text("no video")
    files[3].write_bytes(files[3].read_bytes()[: files[3].stat().st_size // 2])
    rows[4] = replace(rows[4], width=rows[4].width + 2)
    write_manifest(path, rows, manifest.class_names)
    change_rows(path, {6: {"label": -1}, 7: {"label": 99}, 8: {"frames": 0}, 9: {"height": 0}})
    return path


@pytest.mark.parametrize("decoder", ["pyav", "dali"])
def test_bad_samples_leave_the_batch_complete_and_are_reported(
    motion_set: MotionSet, tmp_path: Path, decoder: str, device: torch.device
) -> None:
    path = broken_set(motion_set, tmp_path / "set")
    manifest = Manifest.open(path)
    clips = loader(path, TrainClipSpec(4, 32), how=options(decoder, device=device))
    batches, counts = [], []
    for _, batch in zip(range(4), clips, strict=False):
        batches.append(batch)
        counts.append(clips.bad_samples.pop_counts())
    clips.close()
    assert counts == [(8, int((~batch.valid).sum())) for batch in batches]  # and not of batches made ahead
    ids = torch.cat([batch.ids for batch in batches]).cpu()
    valid = torch.cat([batch.valid for batch in batches]).cpu()
    assert sorted(ids.tolist()) == list(range(32))
    bad = set(ids[~valid].tolist())
    wrong = {i for i, _ in manifest.wrong_rows()}
    assert wrong == {6, 7, 8, 9}
    good_rows = set(range(32)) - wrong
    pixels = torch.cat([batch.clips for batch in batches]).cpu()
    of_videos = pixels[~valid & torch.tensor([i in good_rows for i in ids.tolist()])]
    assert torch.equal(of_videos, of_videos[:1, :, :1, :1, :1].expand_as(of_videos))  # one and the same grey
    supported = GraphDecoder.for_device(gpu=device.type == "cuda").codecs
    unsupported = {i for i in good_rows if decoder == "dali" and manifest.row(i).codec not in supported}
    assert bad == {0, 1, 2, 3, 4} | wrong | unsupported
    labels = torch.cat([batch.labels for batch in batches]).tolist()
    assert {label for i, label in zip(ids.tolist(), labels, strict=True) if i in wrong} == {-1}
    bad_samples = clips.bad_samples.pop_new()
    assert [Path(each.path).name for each in bad_samples if each.sample == 2] == [r"\xe9\n2"]
    reasons = {each.sample: each.reason for each in bad_samples}
    assert set(reasons) == bad
    assert "No such file" in reasons[0]
    assert "empty" in reasons[1]
    assert "is not a video" in reasons[2]
    assert "the manifest has" in reasons[4] or (4 in unsupported and device.type == "cuda")
    assert "has label -1 in the manifest" in reasons[6]
    assert "0 pixels" in reasons[9]
    assert clips.bad_samples.pop_new() == []


def test_a_batch_has_the_mask_keys_of_its_slots(motion_set: MotionSet) -> None:
    (batch,) = take(loader(motion_set.train, TrainClipSpec(4, 32), batch=8, repeats=2), 1)
    sampler = TrainSampler(32, 8, seed=3, repeats=2)
    slots = [sampler.slot(0, index) for index in range(8)]
    assert batch.keys.tolist() == [sampler.mask_key(slot) for slot in slots]
    assert batch.keys.dtype == torch.int64
    assert batch.ids.tolist() == [slot.sample for slot in slots]


def test_a_short_video_repeats_frames(motion_set: MotionSet, tmp_path: Path) -> None:
    manifest = Manifest.open(motion_set.train)
    row = replace(manifest.row(0), path=str(manifest.absolute_path(manifest.row(0))), frames=2)
    path = write_manifest(tmp_path / "short.arrow", [row], manifest.class_names).path
    (batch,) = take(loader(path, TrainClipSpec(8, 32), batch=2, micro=2), 1)
    assert batch.valid.all()
    assert batch.clips.shape == (2, 3, 8, 32, 32)


def test_views_of_every_video_once_per_pass(motion_set: MotionSet, device: torch.device) -> None:
    manifest = Manifest.open(motion_set.val)
    clip = ViewSpec(frames=4, size=48, clips=2, crops=3)
    seen: list[int] = []
    for rank in (0, 1):
        views = view_loader(
            Dataset([manifest]), ViewSampler(16, 3, 2), clip, mean=HALF, std=HALF, rank=rank,
            options=options(device=device),
        )  # fmt: skip
        first, second = list(views), list(views)
        for one, other in zip(first, second, strict=True):
            assert torch.equal(one.clips, other.clips)
            assert one.clips.shape == (3, 6, 3, 4, 48, 48)
            assert one.keys.tolist() == [0] * 3
        seen += [sample for batch in first for sample in batch.ids[batch.valid].tolist()]
        views.close()
    assert sorted(seen) == list(range(16))


def test_views_are_ordered_by_clip_then_crop(motion_set: MotionSet, device: torch.device) -> None:
    manifest = Manifest.open(motion_set.val)

    def views(clips: int, crops: int) -> torch.Tensor:
        loader = view_loader(
            Dataset([manifest]), ViewSampler(16, 16, 1), ViewSpec(4, 48, clips, crops), mean=HALF, std=HALF,
            rank=0, options=options(device=device),
        )  # fmt: skip
        (batch,) = list(loader)
        loader.close()
        return batch.clips

    many, centre = views(3, 3), views(1, 1)
    # with three clips the middle one is shifted by half a segment, as the only one is
    torch.testing.assert_close(many[:, 4], centre[:, 0])
    wide = [i for i in range(16) if manifest.row(i).width > manifest.row(i).height]
    for sample in wide:
        assert not torch.equal(many[sample, 3], many[sample, 5])


def test_another_pass_after_an_unfinished_one_is_an_error(motion_set: MotionSet) -> None:
    manifest = Manifest.open(motion_set.val)
    views = view_loader(
        Dataset([manifest]),
        ViewSampler(16, 8, 1),
        ViewSpec(4, 48),
        mean=HALF,
        std=HALF,
        rank=0,
        options=options(),
    )
    next(iter(views))
    with pytest.raises(RuntimeError, match="previous pass"):
        next(iter(views))
    views.close()


def test_view_pixels_are_the_resized_centre(motion_set: MotionSet, device: torch.device) -> None:
    """At the video's own size there is no interpolation."""
    manifest = Manifest.open(motion_set.val)
    side = 72
    clip = ViewSpec(4, side)
    loader = view_loader(
        Dataset([manifest]), ViewSampler(16, 16, 1), clip, mean=HALF, std=HALF, rank=0,
        options=options(device=device),
    )  # fmt: skip
    (batch,) = list(loader)
    loader.close()
    from pipelines.sampling.temporal import view_indices

    checked = 0
    for sample in range(16):
        row = manifest.row(sample)
        if min(row.width, row.height) != side:
            continue
        frames = decode_frames(manifest.absolute_path(row), view_indices(row.frames, 4, 1)[0])
        top, left = round((row.height - side) / 2), round((row.width - side) / 2)
        middle = frames[:, top : top + side, left : left + side]
        expected = np.transpose(middle, (3, 0, 1, 2)).astype(np.float32) / 127.5 - 1
        np.testing.assert_allclose(batch.clips[sample, 0].cpu().numpy(), expected, atol=1e-5)
        checked += 1
    assert checked > 3
