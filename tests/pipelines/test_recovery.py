"""Pipelines that break: by damage that DALI's decoder refuses, a worker that dies, a decoder that crashes."""

import io
import os
import shutil
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from pipelines.dataset import Dataset
from pipelines.draw import TrainClip, ViewClip
from pipelines.graph import Processes
from pipelines.loader import view_loader
from pipelines.manifest import Manifest, Row, write_manifest
from pipelines.plan import TrainPlan, ViewPlan
from pipelines.recovery import CRASHES, find_culprits
from pipelines.source import Decoding, Loaded, Reader, Request
from tests.conftest import MotionSet
from tests.pipelines.batches import ALL, HALF, digests, loader, options, take

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
    """Overwrite the beginning of a packet with zeros: the file can still be demuxed, not decoded."""
    data = path.read_bytes()
    with av.open(io.BytesIO(data)) as container:
        packets = [bytes(found) for found in container.demux(video=0) if found.size]
    at = data.find(packets[packet][:64])
    assert at > 0
    path.write_bytes(data[:at] + bytes(60) + data[at + 60 :])


@pytest.fixture
def vp9_set(tmp_path: Path) -> Path:
    """Twelve VP9 clips, of which number 5 is damaged inside its stream."""
    rows = []
    for index in range(12):
        path = tmp_path / f"{index}.webm"
        encode_vp9(path, index)
        rows.append(Row(path.name, 0, 0, index % 2, FRAMES, 25.0, WIDTH, HEIGHT, "vp9"))
    damage(tmp_path / "5.webm", packet=0)
    return write_manifest(tmp_path / "train.arrow", rows, ["a", "b"]).path


def test_damage_that_dalis_decoder_refuses_costs_one_video_not_the_run(vp9_set: Path) -> None:
    clip = TrainClip(4, 32)
    endless = loader(vp9_set, clip, batch=4, how=options("dali", workers=2))
    batches = [batch for _, batch in zip(range(6), endless, strict=False)]
    ids, valid = torch.cat([b.ids for b in batches]), torch.cat([b.valid for b in batches])
    assert sorted(ids.tolist()) == sorted([*range(12)] * 2)
    assert set(ids[~valid].tolist()) == {5}
    (defect,) = endless.defects.take_fresh()
    assert defect.path.endswith("5.webm")
    assert "cannot be decoded" in defect.reason
    assert endless.defects.take_counts() == (24, 2)
    endless.close()
    # what came before and after the damage is what a loader that never met it gives
    for step in range(6):
        if 5 not in batches[step].ids.tolist():
            alone = take(loader(vp9_set, clip, batch=4, first_step=step, how=options("dali")), 1)
            assert digests(alone) == digests(batches[step : step + 1])


def test_damage_is_masked_in_evaluation_as_well(vp9_set: Path) -> None:
    views = view_loader(
        Dataset.open([vp9_set]), ViewPlan(12, 4, 1), ViewClip(4, 32), mean=HALF, std=HALF, rank=0,
        options=options("dali"),
    )  # fmt: skip
    for _ in range(2):
        seen = [(int(i), bool(v)) for batch in views for i, v in zip(batch.ids, batch.valid, strict=True)]
        assert seen == [(sample, sample != 5) for sample in range(12)]
    views.close()


def test_a_killed_worker_changes_no_batch(motion_set: MotionSet) -> None:
    """As when the kernel ends one for want of memory: no video is to blame, and none is given up."""
    undisturbed = digests(take(loader(motion_set.train, ALL), 6))
    endless = loader(motion_set.train, ALL, how=options(workers=2))
    batches = iter(endless)
    seen = [next(batches), next(batches)]
    victim = min(endless._workers, key=lambda process: process.pid or 0)
    os.kill(victim.pid or 0, signal.SIGKILL)
    victim.join()
    seen += [next(batches) for _ in range(4)]
    assert digests(seen) == undisturbed
    assert endless.defects.take_fresh() == []
    endless.close()


def test_workers_killed_over_a_video_change_no_batch(motion_set: MotionSet, tmp_path: Path) -> None:
    """The video is a pipe that nobody writes to, until the workers that wait for it are dead."""
    shutil.copytree(motion_set.root, tmp_path / "set")
    manifest = Manifest.open(tmp_path / "set" / "train.arrow")
    undisturbed = digests(take(loader(manifest.path, ALL), 4))
    endless = loader(manifest.path, ALL, how=options(workers=2))
    late = TrainPlan(len(manifest), 8, seed=3).slot(step=3, place=5).sample
    path, aside = manifest.absolute_path(manifest.row(late)), tmp_path / "aside"
    path.rename(aside)
    os.mkfifo(path)

    def end_workers() -> None:
        aside.replace(path)
        for process in endless._workers:
            os.kill(process.pid or 0, signal.SIGKILL)

    timer = threading.Timer(3.0, end_workers)
    timer.start()
    seen = [batch for _, batch in zip(range(4), endless, strict=False)]
    assert not timer.is_alive()
    assert digests(seen) == undisturbed
    assert endless.defects.take_fresh() == []
    endless.close()


@dataclass
class CrashingReader(Reader):
    """Dies over one video, as a decoder with a fault does."""

    def load(self, request: Request) -> Loaded:
        if request.sample == 2:
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().load(request)


def test_a_video_that_crashes_its_decoder_is_named(motion_set: MotionSet) -> None:
    dataset = Dataset.open([motion_set.train])
    requests = [
        Request(sample, dataset.row(sample), np.arange(2, dtype=np.int32), None, False) for sample in range(5)
    ]
    processes = Processes(torch.device("cpu"), workers=1, threads=1, prefetch=2)
    culprits = find_culprits(CrashingReader(dataset, Decoding("pyav")), requests, processes)
    assert culprits == {2: CRASHES}


def test_hybrid_takes_every_codec_and_splits_each_batch(motion_set: MotionSet, tmp_path: Path) -> None:
    """The graph decodes what it can and as much as it should; who decodes shows in the colours only."""
    clip = TrainClip(4, 32, flip=0)
    by_pyav = take(loader(motion_set.train, clip, batch=16), 2)
    hybrid = loader(motion_set.train, clip, batch=16, how=options("hybrid"))
    assert "hybrid" in hybrid.tuning
    batches = take(hybrid, 2)
    for one, other in zip(batches, by_pyav, strict=True):
        assert one.valid.all()
        assert torch.equal(one.ids, other.ids)
        assert (one.clips - other.clips).abs().mean() * 127.5 < 4.0
    manifest = Manifest.open(motion_set.train)
    assert {manifest.row(index).codec for index in range(len(manifest))} > {"h264"}


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 8), (0.7, 22), (1.0, 32)])
def test_the_graphs_share_is_spread_evenly(share: float, expected: int) -> None:
    decoding = Decoding("hybrid", frozenset({"vp9"}), share)
    chosen = [decoding.in_graph(position) for position in range(32)]
    assert sum(chosen) == expected
    for start in range(0, 32, 8):
        assert abs(sum(chosen[start : start + 8]) - 8 * share) < 1


def test_a_copy_without_the_file_is_a_defect_of_that_sample_only(
    motion_set: MotionSet, tmp_path: Path
) -> None:
    shutil.copytree(motion_set.root, tmp_path / "set")
    manifest = Manifest.open(tmp_path / "set" / "train.arrow")
    manifest.absolute_path(manifest.row(3)).unlink()
    batches = take(loader(manifest.path, ALL, batch=16, repeats=2), 4)
    valid, ids = torch.cat([b.valid for b in batches]), torch.cat([b.ids for b in batches])
    assert ids[~valid].tolist() == [3, 3]
