"""A worker's arrays have the names, types and ranks of the source's layout."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest

from pipelines.augment.params import TrainClipSpec, ViewSpec
from pipelines.dali.external_source import Source, TrainSource, ViewSource
from pipelines.dali.sample_layout import view_layout
from pipelines.dali.sample_reader import Decoding, SampleReader
from pipelines.dataset.concat import Dataset
from pipelines.sampling.sampler import TrainSampler, ViewSampler
from tests.conftest import MotionSet

CLIPS = {
    "plain": TrainClipSpec(4, 32),
    "jitter": TrainClipSpec(4, 32, color_jitter=0.4),
    "all": TrainClipSpec(4, 32, color_jitter=0.4, rand_augment="rand-m7-n2-inc1"),
}


def check_arrays(source: Source) -> None:
    travelled = pickle.loads(pickle.dumps(source))
    for position in range(4):
        packed = travelled(SimpleNamespace(idx_in_epoch=position))
        assert len(packed) == len(source.layout.arrays)
        for spec, array in zip(source.layout, packed, strict=True):
            assert (array.dtype, array.ndim) == (spec.dtype, spec.rank), spec.name
        arrays = source.layout.by_name(packed)
        (record,) = arrays["record"].view(source.record)
        assert record["sample"] == source.request(position).sample
        assert record["bytes"] > 0 and bool(record["valid"]) == (arrays["reason"].tobytes() == b"\0")


@pytest.mark.parametrize("decoder", ["pyav", "dali", "hybrid"])
@pytest.mark.parametrize("repeats", [1, 2])
@pytest.mark.parametrize("clip", CLIPS)
def test_training_arrays_are_those_of_the_layout(
    motion_set: MotionSet, decoder: str, repeats: int, clip: str
) -> None:
    dataset = Dataset.open([motion_set.train])
    reader = SampleReader(dataset, Decoding(decoder, graph_share=0.5))
    sampler = TrainSampler(len(dataset), 8, seed=3, repeats=repeats)
    check_arrays(TrainSource(reader, sampler, CLIPS[clip], 8, rank=0, world_size=1, first=0))


@pytest.mark.parametrize("decoder", ["pyav", "dali", "hybrid"])
def test_view_arrays_are_those_of_the_layout(motion_set: MotionSet, decoder: str) -> None:
    dataset = Dataset.open([motion_set.val])
    reader = SampleReader(dataset, Decoding(decoder, graph_share=0.5))
    check_arrays(ViewSource(reader, ViewSampler(len(dataset), 4, 1), ViewSpec(4, 32, 2, 3), rank=0))


def test_packing_without_an_array_names_it() -> None:
    with pytest.raises(KeyError, match="record"):
        view_layout("pyav").pack({"frames": np.zeros((1, 1, 1, 3), np.uint8)})
