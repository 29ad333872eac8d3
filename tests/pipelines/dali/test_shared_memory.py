"""How much of /dev/shm a pipeline takes: the estimate against the kernel's count."""

import os
from pathlib import Path

import pytest
import torch

from pipelines.augment.params import TrainClipSpec, ViewSpec
from pipelines.autotune import LoaderOptions
from pipelines.dali.external_source import TrainSource, ViewSource
from pipelines.dali.pipeline import Graph, LoaderResources
from pipelines.dali.sample_reader import Decoding, SampleReader
from pipelines.dali.shared_memory import SharedMemoryNeed, shared_memory_need
from pipelines.dataset.concat import Dataset
from pipelines.loader import view_loader
from pipelines.sampling.sampler import TrainSampler, ViewSampler
from tests.conftest import MotionSet
from tests.pipelines.batches import HALF

CPU = torch.device("cpu")
OVERHEAD = 16_384  # bytes of each chunk beside the samples


def test_views_take_whole_frames(motion_set: MotionSet) -> None:
    dataset = Dataset.open([motion_set.val])
    source = ViewSource(
        SampleReader(dataset, Decoding("pyav")), ViewSampler(len(dataset), 4, 1), ViewSpec(4, 32, 2, 1), 0
    )
    need = shared_memory_need(Graph(source, HALF, HALF), LoaderResources(CPU, 3, 1, 2))
    rows = [dataset.row(number) for number in range(len(dataset))]
    sizes = [2 * 4 * row.height * row.width * 3 for row in rows]  # two clips of four frames
    assert abs(need.least - 2 * 2 * (4 * sum(sizes) / len(sizes) + 3 * OVERHEAD)) <= 1
    assert need.least <= need.most <= 2 * 2 * (4 * max(sizes) + 3 * OVERHEAD)


def test_training_needs_cropped_frames_or_the_bytes_that_the_graph_decodes(
    motion_set: MotionSet,
) -> None:
    dataset = Dataset.open([motion_set.train])
    row = dataset.row(0)
    sampler = TrainSampler(len(dataset), 8, seed=3)

    def need_of(decoder: str) -> SharedMemoryNeed:
        reader = SampleReader(dataset, Decoding(decoder))
        source = TrainSource(reader, sampler, TrainClipSpec(4, 32), 8, 0, 1, 0)
        return shared_memory_need(Graph(source, HALF, HALF), LoaderResources(CPU, 2, 1, 1))

    need = need_of("pyav")
    whole = 2 * 8 * 4 * row.height * row.width * 3
    assert 0.3 * whole < need.least < need.most < whole + 4 * OVERHEAD
    encoded = need_of("dali")
    sizes = [(dataset.row(n).length or dataset.path(n).stat().st_size) for n in range(len(dataset))]
    assert 2 * 8 * min(sizes) < encoded.least - 4 * OVERHEAD < 2 * 8 * max(sizes)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_a_loader_needs_the_computed_bytes(motion_set: MotionSet) -> None:
    """The pages of the chunks that are mapped in this process, counted by the kernel."""
    dataset = Dataset.open([motion_set.val])
    sampler = ViewSampler(len(dataset), 4, 1)
    loader = view_loader(
        dataset, sampler, ViewSpec(8, 64, 3, 1), mean=HALF, std=HALF, rank=0,
        options=LoaderOptions(CPU, "pyav", workers=2, threads=1, prefetch=2),
    )  # fmt: skip
    try:
        need = loader.shared_memory()
        before = _shared_bytes()
        for _ in range(3):
            for _ in loader:
                pass
        assert need.least * 0.8 < _shared_bytes() - before < need.most * 1.1
    finally:
        loader.close()


def _shared_bytes() -> int:
    """Allocated blocks of the files in /dev/shm that are open here and already unlinked."""
    seen: dict[int, int] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/dev/shm/" in line and "(deleted)" in line:
            place = Path("/proc/self/map_files") / line.split()[0]
            facts = os.stat(place)
            seen[facts.st_ino] = facts.st_blocks * 512
    return sum(seen.values())
