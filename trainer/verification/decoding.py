"""Compares NVDEC through DALI with PyAV: frames, colours and speed. On a CPU, DALI decodes VP9 instead."""

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.augment.params import TrainClipSpec
from pipelines.autotune import LoaderOptions
from pipelines.dali.encoded_input import GraphDecoder, check_encoded
from pipelines.dali.pipeline import decode_only
from pipelines.dali.sample_reader import Decoding
from pipelines.dataset.concat import Dataset
from pipelines.dataset.video_list import probe_row
from pipelines.decode.pyav import decode_frames
from pipelines.loader import train_loader
from pipelines.sampling.sampler import TrainSampler
from trainer.engine.memory_estimate import GIB
from trainer.verification.sample_videos import (
    BT709,
    VideoEncoding,
    make_manifest,
    make_videos,
    numbered,
    read_number,
)
from trainer.verification.steps import VerificationTask

B_FRAMES = "bframes=3:b-adapt=0"
CLOSED = "log-level=error:pools=none:frame-threads=1:open-gop=0"
COMPARED = (
    VideoEncoding(352, 256, 12, 120),
    VideoEncoding(340, 256, 12, 120),
    VideoEncoding(340, 256, 250, 300, parameters=B_FRAMES),
    VideoEncoding(640, 360, 60, 120),
    VideoEncoding(1920, 1080, 30, 60),
    VideoEncoding(352, 256, 12, 120, encoder="libx265", parameters=CLOSED),
    VideoEncoding(340, 256, 12, 120, matrix=BT709),
    VideoEncoding(340, 256, 12, 120, full_range=True),
)
COMPARED_ON_CPU = (VideoEncoding(160, 96, 12, 40, encoder="libvpx-vp9"),)
MOST_APART = 4.0
"""Levels of 255, mean over a frame: the two upsample chroma differently, and agree otherwise."""
MOST_TINTED = 3.0
"""Levels of 255, of a colour's mean over a frame. FFmpeg's conversion is 1.5 below the exact one in green, 1
in red and blue; a wrong matrix would be 7 off, a wrong range 8 and more."""

RATE_SECONDS = 2.0
"""Seconds for which a loader is measured on a GPU; on a CPU a quarter."""
RATE_CLIPS = 200
"""Clips that NVDEC alone decodes at least, for each size and number of threads."""
NVDEC_THREADS = (4, 8, 16)
MOST_GROWN = 0.25
"""GiB by which a pipeline's GPU memory may grow from its second batch to the last."""
BATCH = 32
MEAN = STD = (0.5, 0.5, 0.5)
POLICY = "rand-m7-n4-mstd0.5-inc1"


def compare_frames(task: VerificationTask) -> None:
    """Compares NVDEC's frame numbers and colours with PyAV's, for each of `COMPARED`."""
    compared = COMPARED if task.gpu else COMPARED_ON_CPU
    videos = [task.shared / "videos" / f"compared-{number}" / "000.mp4" for number in range(len(compared))]
    make_videos(list(zip(videos, compared, strict=True)))
    for video, coding in zip(videos, compared, strict=True):
        wanted = np.array([0, 1, 11, 12, 13, coding.frames // 2, 5, 5, coding.frames - 1])
        try:
            (decoded,) = decoding_pipeline(task, [video], [wanted], threads=1).run()
            graph = np.array(decoded.as_cpu()[0])
        except Exception as error:
            task.report.check(coding.name, False, f"{type(error).__name__}: {error}"[:300], "is decoded")
            continue
        pyav = decode_frames(video, wanted)
        numbers = [read_number(frame) for frame in graph]
        task.report.check(
            f"{coding.name}: frames", numbers == wanted.tolist(), str(numbers), str(wanted.tolist())
        )
        difference = graph.astype(np.float64) - pyav.astype(np.float64)
        apart = np.max(np.abs(difference).mean(axis=(1, 2, 3)))
        tint = np.max(np.abs(difference.mean(axis=(1, 2))))
        task.report.check(
            f"{coding.name}: colours",
            bool(apart <= MOST_APART and tint <= MOST_TINTED),
            f"{apart:.2f} apart, tint {tint:.2f} of 255",
            f"at most {MOST_APART:g} and {MOST_TINTED:g}",
        )


def decoding_pipeline(
    task: VerificationTask, videos: Sequence[Path], wanted: Sequence[np.ndarray], threads: int
) -> Any:
    """A DALI pipeline that decodes the frames at `wanted` of each video: T H W 3 uint8."""
    decoder = GraphDecoder.for_device(gpu=task.gpu)
    payloads = [
        vars(check_encoded(video.read_bytes(), probe_row(video), indices, decoder))
        for video, indices in zip(videos, wanted, strict=True)
    ]
    return decode_only(
        lambda info: payloads[info.idx_in_batch],
        Decoding("dali", decoder),
        batch=len(videos),
        threads=threads,
        device=task.device,
    )


def measure_rates(task: VerificationTask) -> None:
    """Measures clips of 8 frames per second: NVDEC alone, then whole loaders."""
    small = VideoEncoding(340, 256, 250, 128)
    fitting = VideoEncoding(352, 256, 250, 128)
    keyframes = VideoEncoding(340, 256, 12, 128)
    large = VideoEncoding(1920, 1080, 30, 64)
    counts = {small: 48, fitting: 48, keyframes: 48, large: 16}
    if not task.gpu:
        small = VideoEncoding(160, 96, 12, 20, encoder="libvpx-vp9")
        counts = {small: 4}
    folders = {coding: task.shared / "videos" / f"rates-{number}" for number, coding in enumerate(counts)}
    videos = {coding: numbered(folders[coding], count) for coding, count in counts.items()}
    make_videos([(path, coding) for coding, paths in videos.items() for path in paths])
    for coding, paths in videos.items():
        for threads in NVDEC_THREADS if coding != keyframes else ():
            measure_graph(task, coding, paths, threads)
    for coding, paths in videos.items():
        manifest = make_manifest(folders[coding], paths)
        cases: list[tuple[str, str | None]] = [("pyav", None), ("auto", None)]
        if coding == fitting:
            cases = [("pyav", None)]
        elif coding == small:
            cases += [("dali", None), ("pyav", POLICY)]
        if not task.gpu:
            cases = [("hybrid", None), ("pyav", POLICY)]
        for decoder, policy in cases:
            measure_loader(task, coding, manifest, decoder, policy)


def measure_graph(task: VerificationTask, coding: VideoEncoding, videos: list[Path], threads: int) -> None:
    """Measures NVDEC's rate on clips of 8 frames spread over up to 64, and the GPU memory that it takes."""
    rng = np.random.default_rng(0)
    spread = min(64, coding.frames - 8)
    wanted = [
        int(rng.integers(0, coding.frames - spread)) + np.arange(0, spread, spread // 8)[:8] for _ in videos
    ]
    free = free_bytes(task)
    pipeline = decoding_pipeline(task, videos, wanted, threads)

    def decode() -> float:
        """Decode a batch; returns the GiB of the GPU that the pipeline has then."""
        (decoded,) = pipeline.run()
        np.array(decoded.as_cpu()[0])  # waits until the batch is there
        return (free - free_bytes(task)) / GIB

    decode()
    early = last = decode()
    clips, begun = 0, time.perf_counter()
    while clips < (RATE_CLIPS if task.gpu else len(videos)):
        last = decode()
        clips += len(videos)
    rate = clips / (time.perf_counter() - begun)
    frames = np.mean([np.max(indices) + 1 for indices in wanted])
    task.report.check(
        f"{'NVDEC' if task.gpu else 'DALI'} alone, {coding.name}, {threads} threads",
        last - early <= MOST_GROWN,
        f"{rate:.0f} clips/s ({rate * frames:.0f} frames/s up to the last wanted), "
        f"{last:.2f} GiB after {clips} clips, {early:.2f} before",
        f"memory grows by at most {MOST_GROWN:g} GiB",
    )


def measure_loader(
    task: VerificationTask, coding: VideoEncoding, manifest: Path, decoder: str, policy: str | None
) -> None:
    """Measures the rate of a training loader and the GPU memory that it takes."""
    size = 224 if task.gpu else 64
    batch = BATCH if task.gpu else 4
    dataset = Dataset.open([manifest])
    free = free_bytes(task)
    loader = train_loader(
        dataset,
        TrainSampler(len(dataset), batch, 0),
        TrainClipSpec(8, size, rand_augment=policy),
        mean=MEAN,
        std=STD,
        micro_batch=batch,
        rank=0,
        world_size=1,
        first_step=0,
        options=LoaderOptions(task.device, decoder),
    )
    watch = _LeastFree(task) if task.gpu else None
    try:
        batches = iter(loader)
        for _ in range(4):
            next(batches)
        seconds = RATE_SECONDS if task.gpu else RATE_SECONDS / 4
        clips, begun = 0, time.perf_counter()
        while time.perf_counter() - begun < seconds:
            next(batches)
            clips += batch
        if task.gpu:
            torch.cuda.synchronize(task.device)
        rate = clips / (time.perf_counter() - begun)
        taken = f", {(free - watch.least) / GIB:.2f} GiB" if watch else ""
        bad = loader.bad_samples.bad
        task.report.check(
            f"loader, {decoder}, {coding.name}{', RandAugment' if policy else ''}",
            bad == 0,
            f"{rate:.0f} clips/s{taken}; {bad} bad; {loader.resources.summary}",
            "no bad clip",
        )
    finally:
        if watch:
            watch.stop()
        loader.close()


def free_bytes(task: VerificationTask) -> int:
    """Free memory of the GPU; 0 on a CPU."""
    return torch.cuda.mem_get_info(task.device)[0] if task.gpu else 0


class _LeastFree(threading.Thread):
    """Records the least free memory of the GPU, read every 50 ms."""

    def __init__(self, task: VerificationTask) -> None:
        super().__init__(daemon=True)
        self._task, self._stopped = task, threading.Event()
        self.least = free_bytes(task)
        self.start()

    def run(self) -> None:
        while not self._stopped.wait(0.05):
            self.least = min(self.least, free_bytes(self._task))

    def stop(self) -> None:
        self._stopped.set()
        self.join()
