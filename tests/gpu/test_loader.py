"""Batches on a GPU: with each decoder and prefetch, while the GPU works on earlier batches."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipelines.augment.params import TrainClipSpec, ViewSpec
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import Manifest
from pipelines.loader import ClipBatch, view_loader
from pipelines.sampling.sampler import ViewSampler
from tests.conftest import MotionSet
from tests.pipelines.batches import ALL, HALF, digests, loader, options, take

pytestmark = pytest.mark.gpu

PLAIN = TrainClipSpec(4, 64, flip=0)
LEVEL = 127.5  # of 255 to one, for clips normalised with HALF
# Mean differences of a clip in levels. Decoders upsample chroma differently: by 6.7 on average in clips like
# these on an H100; wrong frames differ by 20 and more. An operation with a threshold (solarize, posterize)
# may turn one level into many.
DECODERS, AUGMENTED = 12.0, 18.0
SAME_DECODER = 1.0  # the kernels of the crop and the resize differ by rounding
BUSY, LONG = 0.05, 0.4  # seconds of GPU work before each batch is used


def alike(one: ClipBatch, other: ClipBatch) -> bool:
    names = ("ids", "labels", "valid", "keys")
    return all(torch.equal(getattr(one, name).cpu(), getattr(other, name).cpu()) for name in names)


def distances(one: ClipBatch, other: ClipBatch) -> torch.Tensor:
    """Of each clip, or of each video's views, in levels."""
    return (one.clips.cpu() - other.clips.cpu()).abs().flatten(1).mean(1) * LEVEL


@pytest.mark.parametrize("decoder", ["pyav", "auto", "hybrid"])
@pytest.mark.parametrize(("clip", "bound"), [(PLAIN, DECODERS), (ALL, AUGMENTED)], ids=["plain", "augmented"])
def test_batches_are_those_of_the_cpu(
    motion_set: MotionSet, decoder: str, clip: TrainClipSpec, bound: float, device: torch.device
) -> None:
    on_cpu = take(loader(motion_set.train, clip, batch=16), 2)
    found = take(loader(motion_set.train, clip, batch=16, how=options(decoder, workers=2, device=device)), 2)
    for one, other in zip(found, on_cpu, strict=True):
        assert one.clips.device == device and one.labels.device == device
        assert alike(one, other) and bool(one.valid.all())
        assert distances(one, other).max() < bound
    apart = torch.cat([distances(one, other) for one, other in zip(found, on_cpu, strict=True)])
    if decoder == "auto" and clip is PLAIN:
        assert (apart > SAME_DECODER).any(), "no clip was decoded by NVDEC"


def test_views_are_those_of_the_cpu(motion_set: MotionSet, device: torch.device) -> None:
    manifest = Manifest.open(motion_set.val)

    def views(device: torch.device) -> list[ClipBatch]:
        clips = view_loader(
            Dataset([manifest]), ViewSampler(16, 8, 1), ViewSpec(4, 48, clips=2, crops=3),
            mean=HALF, std=HALF, rank=0, options=options("auto", device=device),
        )  # fmt: skip
        found = list(clips)
        clips.close()
        return found

    for one, other in zip(views(device), views(torch.device("cpu")), strict=True):
        assert alike(one, other)
        assert distances(one, other).max() < DECODERS


def spin(device: torch.device, seconds: float) -> Callable[[], None]:
    """A call that occupies torch's stream for about so many seconds, and nothing else of the GPU."""
    if device.type == "cpu":
        return lambda: None
    cycles = 10_000_000
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize(device)
    begun = time.perf_counter()
    torch.cuda._sleep(cycles)
    torch.cuda.synchronize(device)
    enough = int(cycles * seconds / (time.perf_counter() - begun))
    return lambda: torch.cuda._sleep(enough)


@pytest.mark.parametrize("clip", [PLAIN, ALL], ids=["plain", "augmented"])
@pytest.mark.parametrize("decoder", ["pyav", "auto", "hybrid"])
def test_buffers_are_not_reused_before_the_gpu_has_read_them(
    motion_set: MotionSet, decoder: str, clip: TrainClipSpec, device: torch.device
) -> None:
    """Each batch is read after other work on torch's stream, and dropped immediately. Whatever the prefetch,
    batches are equal bit for bit."""
    count, spun = 16, spin(device, BUSY)
    expected = digests(take(loader(motion_set.train, clip, how=options(decoder, device=device)), count))
    for prefetch in (1, 4):
        clips = loader(motion_set.train, clip, how=options(decoder, 2, prefetch, device))
        copies = []
        for _, batch in zip(range(count), clips, strict=False):
            spun()
            read = {
                name: getattr(batch, name).clone() for name in ("clips", "labels", "ids", "valid", "keys")
            }
            copies.append(ClipBatch(**read))
            del batch, read
        clips.close()
        assert digests(copies) == expected, f"prefetch {prefetch}"


def test_the_next_batch_does_not_wait_for_the_gpu(motion_set: MotionSet, device: torch.device) -> None:
    """The loader returns prefetched batches while the GPU still works on earlier ones."""
    clips = loader(motion_set.train, TrainClipSpec(4, 32), how=options("pyav", 2, 8, device))
    batches, spun = iter(clips), spin(device, LONG)
    next(batches)
    time.sleep(2)  # eight are prefetched by then
    waited = []
    for _ in range(2):  # with a third, the loader waits for the first by design
        spun()
        begun = time.perf_counter()
        next(batches)
        waited.append(time.perf_counter() - begun)
    clips.close()
    assert max(waited) < LONG / 2, waited


def test_two_passes_are_bit_identical(motion_set: MotionSet, tmp_path: Path, device: torch.device) -> None:
    """Two loaders with NVDEC and different numbers of workers."""
    first, second = (
        digests(take(loader(motion_set.train, ALL, batch=16, how=options("auto", workers, 3, device)), 4))
        for workers in (1, 4)
    )
    assert first == second
