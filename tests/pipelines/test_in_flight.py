"""The file of the batches that a rank worked on when it died."""

from pathlib import Path

import pytest

from pipelines.dali.external_source import TrainSource
from pipelines.dali.sample_reader import Decoding, SampleReader
from pipelines.dataset.concat import Dataset
from pipelines.in_flight import InFlight, InFlightFile, read_in_flight
from pipelines.sampling.sampler import TrainSampler
from tests.conftest import MotionSet
from tests.pipelines.batches import ALL


def source(motion_set: MotionSet, *, micro_batch: int, rank: int, world_size: int, first: int) -> TrainSource:
    dataset = Dataset.open([motion_set.train])
    sampler = TrainSampler(len(dataset), 16, seed=3)
    return TrainSource(
        SampleReader(dataset, Decoding("dali")), sampler, ALL, micro_batch, rank, world_size, first
    )


def test_another_number_of_ranks_asks_for_the_same_samples(motion_set: MotionSet, tmp_path: Path) -> None:
    path = tmp_path / "in-flight/train-00001.json"
    died = source(motion_set, micro_batch=4, rank=1, world_size=2, first=6)
    file = InFlightFile(path, died, ahead=4)
    file.write(3)
    found = read_in_flight(path)
    assert found == InFlight(batch=9, ahead=4, samples=4, rank=1, world_size=2)
    then = found.source(source(motion_set, micro_batch=16, rank=0, world_size=1, first=0))
    assert isinstance(then, TrainSource)
    later = [died.request(position).key for position in range(3 * 4, 5 * 4)]
    assert [then.request(position).key for position in range(2 * 4)] == later
    file.close()
    assert read_in_flight(path) is None and not path.exists()
    file.write(4)
    assert not path.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[1, 2]",
        b"\xff" * 300,
        b'{"batch": -1, "ahead": 4, "samples": 4, "rank": 0, "world_size": 2}',
        b'{"batch": 1e400, "ahead": 4, "samples": 4, "rank": 0, "world_size": 2}',
        b'{"batch": 1, "ahead": 4, "samples": 0, "rank": 0, "world_size": 2}',
        b'{"batch": 1, "ahead": 4, "samples": 4, "rank": 2, "world_size": 2}',
        b'{"batch": 1, "ahead": 99999, "samples": 4, "rank": 0, "world_size": 2}',
    ],
)
def test_a_damaged_file_is_ignored(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "train-00000.json"
    path.write_bytes(content)
    assert read_in_flight(path) is None


def test_a_sampler_of_other_batches_has_no_such_source(motion_set: MotionSet) -> None:
    now = source(motion_set, micro_batch=16, rank=0, world_size=1, first=0)
    assert InFlight(batch=9, ahead=4, samples=3, rank=1, world_size=2).source(now) is None


def test_a_folder_that_cannot_be_written_loses_only_the_file(motion_set: MotionSet, tmp_path: Path) -> None:
    (tmp_path / "in-flight").write_text("a file")
    died = source(motion_set, micro_batch=4, rank=1, world_size=2, first=6)
    file = InFlightFile(tmp_path / "in-flight/train-00001.json", died, ahead=4)
    file.write(3)
    file.write(4)
    file.close()


def test_the_file_stays_open_between_batches(motion_set: MotionSet, tmp_path: Path) -> None:
    now = source(motion_set, micro_batch=4, rank=1, world_size=2, first=10**6)
    file = InFlightFile(tmp_path / "in-flight/train-00001.json", now, ahead=4)
    file.write(0)
    (tmp_path / "in-flight").rename(tmp_path / "moved")  # another open would create the folder again
    file.write(1)
    found = read_in_flight(tmp_path / "moved/train-00001.json")
    assert found is not None and found.batch == 10**6 + 1
    assert not (tmp_path / "in-flight").exists()
    file.close()
