"""The placeholder of a video that cannot be read: the same whenever and wherever the video was found bad."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.dali.external_source import TrainSource
from pipelines.dali.sample_reader import Decoding, SampleReader
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import Manifest, write_manifest
from pipelines.sampling.sampler import TrainSampler
from tests.conftest import MotionSet
from tests.pipelines.batches import ALL


@pytest.fixture(scope="module")
def truncated(motion_set: MotionSet, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two videos in VP9 of which the first quarter is left."""
    folder = tmp_path_factory.mktemp("truncated")
    manifest = Manifest.open(motion_set.train)
    rows = [row for row in map(manifest.row, range(len(manifest))) if row.codec == "vp9"][:2]
    for row in rows:
        path = folder / row.path
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(manifest.absolute_path(row), path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])
    return Dataset.open([write_manifest(folder / "train.arrow", rows, manifest.class_names).path])


def graph_inputs(source: TrainSource, position: int) -> dict[str, np.ndarray]:
    """What the graph makes the clips of; the sample is bad."""
    arrays = source.layout.by_name(source(SimpleNamespace(idx_in_epoch=position)))
    (record,) = arrays.pop("record").view(source.record)
    assert not record["valid"] and arrays.pop("reason").tobytes() != b"\0"
    return arrays


@pytest.mark.parametrize("decoder", ["pyav", "dali", "hybrid"])
@pytest.mark.parametrize("repeats", [1, 2])
def test_a_video_known_to_be_bad_has_the_placeholder_of_one_found_bad(
    truncated: Dataset, decoder: str, repeats: int
) -> None:
    def source(seed: int, **known: dict) -> TrainSource:
        reader = SampleReader(truncated, Decoding(decoder), **known)
        return TrainSource(reader, TrainSampler(2, 2 * repeats, seed, repeats), ALL, 2 * repeats, 0, 1, 0)

    reading = source(3)
    requests = [reading.request(position) for position in range(2)]
    refused = source(3, refused={request.key: "broke a pipeline" for request in requests})
    crashed = source(3, crashed={request.sample: "ended a process" for request in requests})
    expected = graph_inputs(reading, 0)
    for other in (reading, refused, crashed, source(4)):  # no draw matters, the seed's neither
        for position in range(2):
            found = graph_inputs(other, position)
            assert found.keys() == expected.keys()
            for name, array in found.items():
                np.testing.assert_array_equal(array, expected[name], err_msg=name)
