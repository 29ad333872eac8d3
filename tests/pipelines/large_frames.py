"""Measures the memory and CPU time of a loader of large videos.

    python -m tests.pipelines.large_frames [MAX_SHORT_SIDE [PREFETCH]]

Ten seconds of 1920x1080 by FFmpeg, clips of 64 frames at 336 pixels, four a batch, two workers. Prints the
peak of the proportional set size of all processes, and CPU seconds a clip. `none` does not scale.
"""

import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import psutil
import torch

from pipelines.augment.params import TrainClipSpec
from pipelines.autotune import LoaderOptions
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import write_manifest
from pipelines.loader import train_loader
from pipelines.sampling.sampler import TrainSampler
from tests.pipelines.dataset.test_source import row_of

BATCH, BATCHES = 4, 7
HALF = (0.5, 0.5, 0.5)


def main(short_side: int | None, prefetch: int | None, folder: Path) -> None:
    video = folder / "large.mp4"
    subprocess.run(
        ["ffmpeg", "-v", "error", "-f", "lavfi", "-i", "testsrc2=size=1920x1080:rate=25:duration=10",
         "-pix_fmt", "yuv420p", "-c:v", "libx264", "-preset", "veryfast", "-g", "48", str(video)],
        check=True,
    )  # fmt: skip
    dataset = Dataset([write_manifest(folder / "large.arrow", [row_of(video)] * 8, ["a"])])
    policy = "rand-m7-n4-mstd0.5-inc1"
    loader = train_loader(
        dataset, TrainSampler(len(dataset), BATCH, 0),
        TrainClipSpec(64, 336, rand_augment=policy, max_short_side=short_side), mean=HALF, std=HALF,
        micro_batch=BATCH, rank=0, world_size=1, first_step=0,
        options=LoaderOptions(torch.device("cpu"), "pyav", workers=2, prefetch=prefetch),
    )  # fmt: skip
    print(loader.resources.summary)
    begun = sum(map(cpu_seconds, processes()))
    with closing(loader), watched() as peak:
        for _, batch in zip(range(BATCHES), loader, strict=False):
            assert batch.valid.all()
        seconds = sum(map(cpu_seconds, processes())) - begun
    print(f"peak {peak[0] / 2**30:.2f} GiB, {seconds / (BATCH * BATCHES):.2f} CPU s a clip")


def processes() -> list[psutil.Process]:
    own = psutil.Process()
    return [own, *own.children(recursive=True)]


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


@contextmanager
def watched() -> Iterator[list[int]]:
    """The peak, in bytes, of the memory of all processes, in a list of one."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.3):
            total = 0
            for process in processes():
                with suppress(psutil.Error):
                    total += process.memory_full_info().pss
            peak[0] = max(peak[0], total)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    given = [None if each == "none" else int(each) for each in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as made:
        main(*[*given, None, None][:2], Path(made))
