"""Pipelines that break: DALI's decoder refuses damage, a worker dies, a decoder crashes."""

import gc
import os
import shutil
import signal
import threading
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.augment.params import TrainClipSpec, ViewSpec
from pipelines.dali.external_source import TrainSource
from pipelines.dali.pipeline import Graph
from pipelines.dali.sample_reader import Decoding, LoadedSample, SampleReader, SampleRequest
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import Manifest
from pipelines.decode_recovery import CRASHES, find_culprits
from pipelines.loader import WORKER_EXIT_TIMEOUT, ClipLoader, view_loader
from pipelines.sampling.sampler import TrainSampler, ViewSampler
from tests.conftest import MotionSet
from tests.pipelines.batches import ALL, HALF, digests, loader, options, resources, take
from tests.pipelines.conftest import FRAMES, damage, encode_vp9
from tests.pipelines.started import CrashingReader


@pytest.mark.soak
def test_damage_that_dalis_decoder_refuses_makes_one_bad_sample(vp9_set: Path) -> None:
    clip = TrainClipSpec(4, 32)
    endless = loader(vp9_set, clip, batch=4, how=options("dali"))
    batches = [batch for _, batch in zip(range(6), endless, strict=False)]
    ids, valid = torch.cat([b.ids for b in batches]), torch.cat([b.valid for b in batches])
    assert sorted(ids.tolist()) == sorted([*range(12)] * 2)
    assert set(ids[~valid].tolist()) == {5}
    (bad,) = endless.bad_samples.pop_new()
    assert bad.path.endswith("5.webm")
    assert "cannot be decoded" in bad.reason
    assert endless.bad_samples.pop_counts() == (24, 2)
    endless.close()


@pytest.mark.soak
def test_whether_a_clip_is_bad_does_not_depend_on_earlier_clips(vp9_set: Path, tmp_path: Path) -> None:
    """Number 5 is good, number 7 damaged in its second half: only draws that reach the damage are bad, for a
    loader that begins there as well.
    """
    manifest = shutil.copytree(vp9_set.parent, tmp_path / "set") / vp9_set.name
    encode_vp9(manifest.parent / "5.webm", seed=5)
    damage(manifest.parent / "7.webm", packet=FRAMES // 2)
    clip = TrainClipSpec(1, 32)  # one frame: a draw of an early one does not reach the end
    epochs, steps = 8, 3
    endless = loader(manifest, clip, batch=4, how=options("dali", workers=2))
    through = [batch for _, batch in zip(range(epochs * steps), endless, strict=False)]
    endless.close()
    valid = [bool(v) for b in through for i, v in zip(b.ids, b.valid, strict=True) if i == 7]
    assert len(valid) == epochs
    assert {True, False} == set(valid)
    for step in (5, 11, 20):
        begun_there = take(loader(manifest, clip, batch=4, first_step=step, how=options("dali")), 3)
        assert digests(begun_there) == digests(through[step : step + 3])


@pytest.mark.soak
def test_hybrid_leaves_to_pyav_what_dali_refuses(vp9_set: Path) -> None:
    """PyAV refuses it as well, and gives its own reason."""
    clips = loader(vp9_set, TrainClipSpec(4, 32), batch=4, how=replace(options("hybrid"), graph_share=1.0))
    seen = [batch for _, batch in zip(range(6), clips, strict=False)]
    assert {int(i) for b in seen for i, v in zip(b.ids, b.valid, strict=True) if not v} == {5}
    (bad,) = clips.bad_samples.pop_new()
    assert "is damaged at or before frame" in bad.reason  # PyAV's words
    clips.close()


def test_damage_is_masked_in_evaluation_as_well(vp9_set: Path) -> None:
    views = view_loader(
        Dataset.open([vp9_set]), ViewSampler(12, 4, 1), ViewSpec(4, 32), mean=HALF, std=HALF, rank=0,
        options=options("dali"),
    )  # fmt: skip
    for _ in range(2):
        seen = [(int(i), bool(v)) for batch in views for i, v in zip(batch.ids, batch.valid, strict=True)]
        assert seen == [(sample, sample != 5) for sample in range(12)]
    views.close()


def test_a_killed_worker_changes_no_batch(motion_set: MotionSet, device: torch.device) -> None:
    """As when the kernel kills one for lack of memory: no video is the culprit, and none is refused."""
    undisturbed = digests(take(loader(motion_set.train, ALL, how=options(device=device)), 6))
    endless = loader(motion_set.train, ALL, how=options(workers=2, device=device))
    batches = iter(endless)
    seen = [next(batches), next(batches)]
    victim = min(endless._workers, key=lambda process: process.pid or 0)
    os.kill(victim.pid or 0, signal.SIGKILL)
    victim.join()
    broken = weakref.ref(endless._pipeline)
    gc.freeze()  # as a training does: the loader frees the broken pipeline all the same
    gc.disable()
    try:
        seen += [next(batches) for _ in range(4)]
        assert broken() is None
    finally:
        gc.unfreeze()
        gc.enable()
    assert digests(seen) == undisturbed
    assert endless.bad_samples.pop_new() == []
    if endless._ahead is not None:
        endless._ahead.stop(WORKER_EXIT_TIMEOUT, interrupt=endless._kill_workers)
        time.sleep(0.3)  # Linux ends a worker with the thread that has started it
        assert all(worker.is_alive() for worker in endless._workers)
    endless.close()


@dataclass
class WaitingReader(SampleReader):
    """Waits over one video as long as a file exists, and creates another meanwhile."""

    late: int = -1
    wait: Path = Path()

    def load(self, request: SampleRequest) -> LoadedSample:
        while request.sample == self.late and self.wait.exists():
            self.wait.with_suffix(".waits").touch()
            time.sleep(0.01)
        return super().load(request)


def waiting_loader(motion_set: MotionSet, wait: Path) -> ClipLoader:
    """Whose fourth batch waits."""
    wait.touch()
    dataset = Dataset.open([motion_set.train])
    sampler = TrainSampler(len(dataset), 8, seed=3)
    reader = WaitingReader(dataset, Decoding("pyav"), late=sampler.slot(step=3, index=5).sample, wait=wait)
    waiting = TrainSource(reader, sampler, ALL, 8, rank=0, world_size=1, first=0)
    return ClipLoader(Graph(waiting, HALF, HALF), resources(workers=2), batches=0)


def test_a_loader_is_closed_while_a_worker_reads_for_long(
    motion_set: MotionSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.loader.WORKER_EXIT_TIMEOUT", 0.5)
    endless = waiting_loader(motion_set, tmp_path / "wait")
    batches = iter(endless)
    next(batches)
    while not (tmp_path / "wait.waits").exists():
        time.sleep(0.01)
    endless.close()
    assert not any(process.is_alive() for process in endless._workers)
    assert all(thread.name != "batches" for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)


@pytest.mark.soak
def test_workers_killed_over_a_video_change_no_batch(motion_set: MotionSet, tmp_path: Path) -> None:
    undisturbed = digests(take(loader(motion_set.train, ALL), 4))
    wait = tmp_path / "wait"
    endless = waiting_loader(motion_set, wait)

    def end_workers() -> None:
        while not wait.with_suffix(".waits").exists():
            time.sleep(0.01)
        wait.unlink()
        for process in endless._workers:
            os.kill(process.pid or 0, signal.SIGKILL)

    ender = threading.Thread(target=end_workers)
    ender.start()
    seen = [batch for _, batch in zip(range(4), endless, strict=False)]
    ender.join()
    assert digests(seen) == undisturbed
    assert endless.bad_samples.pop_new() == []
    endless.close()


def source(reader: SampleReader) -> TrainSource:
    sampler = TrainSampler(len(reader.dataset), 4, seed=3)
    return TrainSource(reader, sampler, TrainClipSpec(4, 32), 4, rank=0, world_size=1, first=0)


@pytest.mark.soak
@pytest.mark.parametrize("prefetch", [1, 4])
def test_a_loader_continues_after_a_video_that_crashes_its_decoder(
    motion_set: MotionSet, prefetch: int
) -> None:
    reader = CrashingReader(Dataset.open([motion_set.train]), Decoding("pyav"))
    graph = Graph(source(reader), HALF, HALF)
    clips = ClipLoader(graph, resources(workers=2, prefetch=prefetch), batches=0)
    seen = [batch for _, batch in zip(range(8), clips, strict=False)]
    ids, valid = torch.cat([b.ids for b in seen]), torch.cat([b.valid for b in seen])
    assert sorted(ids.tolist()) == list(range(32))
    assert ids[~valid].tolist() == [2]
    assert [bad.reason for bad in clips.bad_samples.pop_new()] == [CRASHES]
    clips.close()


def test_a_closed_loader_stays_closed(motion_set: MotionSet) -> None:
    clips = loader(motion_set.train, ALL)
    next(iter(clips))
    clips.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(iter(clips))


def test_a_video_that_crashes_its_decoder_is_named(motion_set: MotionSet) -> None:
    dataset = Dataset.open([motion_set.train])
    requests = [
        SampleRequest(sample, dataset.row(sample), np.arange(2, dtype=np.int32), None, False)
        for sample in range(5)
    ]
    reader = CrashingReader(dataset, Decoding("pyav"))
    culprits = find_culprits(reader, [requests[:2], requests[2:]], torch.device("cpu"))
    assert culprits == {requests[2].key: CRASHES}


def test_hybrid_takes_every_codec_and_splits_each_batch(motion_set: MotionSet, tmp_path: Path) -> None:
    """The graph decodes its share of what it supports; the decoder changes only the colours."""
    clip = TrainClipSpec(4, 32, flip=0)
    by_pyav = take(loader(motion_set.train, clip, batch=16), 2)
    hybrid = loader(motion_set.train, clip, batch=16, how=options("hybrid"))
    assert "decoding by dali and pyav" in hybrid.resources.summary
    batches = take(hybrid, 2)
    for one, other in zip(batches, by_pyav, strict=True):
        assert one.valid.all()
        assert torch.equal(one.ids, other.ids)
        assert (one.clips - other.clips).abs().mean() * 127.5 < 4.0
    manifest = Manifest.open(motion_set.train)
    assert {manifest.row(index).codec for index in range(len(manifest))} > {"h264"}


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 8), (0.7, 22), (1.0, 32)])
def test_the_graph_share_is_spread_evenly(share: float, expected: int) -> None:
    decoding = Decoding("hybrid", graph_share=share)
    chosen = [decoding.in_graph(number) for number in range(32)]
    assert sum(chosen) == expected
    for start in range(0, 32, 8):
        assert abs(sum(chosen[start : start + 8]) - 8 * share) < 1


def test_a_copy_without_the_file_is_a_bad_sample(motion_set: MotionSet, tmp_path: Path) -> None:
    shutil.copytree(motion_set.root, tmp_path / "set")
    manifest = Manifest.open(tmp_path / "set" / "train.arrow")
    manifest.absolute_path(manifest.row(3)).unlink()
    batches = take(loader(manifest.path, ALL, batch=16, repeats=2), 4)
    valid, ids = torch.cat([b.valid for b in batches]), torch.cat([b.ids for b in batches])
    assert ids[~valid].tolist() == [3, 3]
