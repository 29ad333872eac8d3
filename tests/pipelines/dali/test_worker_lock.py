"""A worker dies while it holds the lock of DALI's queue: the batches are unaffected."""

from pathlib import Path

import pytest

from pipelines.dali.external_source import TrainSource
from pipelines.dali.pipeline import Graph
from pipelines.dali.sample_reader import Decoding
from pipelines.dataset.concat import Dataset
from pipelines.loader import ClipLoader
from pipelines.sampling.sampler import TrainSampler
from tests.conftest import MotionSet
from tests.pipelines.batches import ALL, HALF, digests, loader, resources, take
from tests.pipelines.started import LockingReader


@pytest.mark.soak
def test_a_worker_that_dies_with_the_lock_changes_no_batch(motion_set: MotionSet, tmp_path: Path) -> None:
    undisturbed = digests(take(loader(motion_set.train, ALL), 4))
    dataset = Dataset.open([motion_set.train])
    sampler = TrainSampler(len(dataset), 8, seed=3)
    late = sampler.slot(step=2, index=3).sample
    reader = LockingReader(dataset, Decoding("pyav"), late=late, once=tmp_path / "died")
    source = TrainSource(reader, sampler, ALL, 8, rank=0, world_size=1, first=0)
    endless = ClipLoader(Graph(source, HALF, HALF), resources(workers=2), batches=0)
    seen = [batch for _, batch in zip(range(4), endless, strict=False)]
    endless.close()
    assert (tmp_path / "died").exists()
    assert digests(seen) == undisturbed
    assert endless.bad_samples.pop_new() == []
