"""The graphs for a GPU, put together in DALI's Python: no GPU is needed until they are built."""

from collections import defaultdict
from typing import Any

import pytest
import torch

from pipelines.augment.params import TrainClipSpec, ViewSpec
from pipelines.dali.encoded_input import GraphDecoder
from pipelines.dali.external_source import TrainSource, ViewSource
from pipelines.dali.pipeline import Graph, assemble
from pipelines.dali.sample_reader import Decoding, SampleReader
from pipelines.dataset.concat import Dataset
from pipelines.sampling.sampler import TrainSampler, ViewSampler
from tests.conftest import MotionSet
from tests.pipelines.batches import ALL, HALF, resources

BATCH = 4
NUMBERS = {
    "Cast", "CastLike", "Cat", "Constant", "ExternalSource", "Max", "Merge", "Reshape", "Split", "Stack",
    "_ArithmeticGenericOp", "_Shape", "_TensorSubscript",
}  # fmt: skip
"""Operators on the CPU: they make the parameters of others from a sample's arrays."""


def make_graph(kind: str, motion_set: MotionSet, decoder: str) -> Graph:
    dataset = Dataset.open([motion_set.train])
    reader = SampleReader(dataset, Decoding(decoder, GraphDecoder.NVDEC))
    if kind == "views":
        return Graph(
            ViewSource(reader, ViewSampler(len(dataset), BATCH, 1), ViewSpec(4, 32, 2, 3), 0), HALF, HALF
        )
    clip, repeats = {
        "plain": (TrainClipSpec(4, 32), 1),
        "augmented": (ALL, 1),
        "repeated": (ALL, 2),
    }[kind]
    sampler = TrainSampler(len(dataset), BATCH, 3, repeats)
    return Graph(TrainSource(reader, sampler, clip, BATCH, rank=0, world_size=1, first=0), HALF, HALF)


def operators(pipeline: Any) -> dict[str, set[str]]:
    """The operators of a pipeline's graph on each device."""
    pipeline._build_graph()  # what build() does before it makes the backend, which needs a driver
    found: dict[str, set[str]] = defaultdict(set)
    for instance in pipeline._ops:
        found[instance._op.device].add(type(instance._op).__name__)
    return found


@pytest.mark.parametrize("decoder", ["pyav", "dali", "hybrid"])
@pytest.mark.parametrize("kind", ["plain", "augmented", "repeated", "views"])
def test_a_graph_for_a_gpu_is_put_together(motion_set: MotionSet, kind: str, decoder: str) -> None:
    """Decoded by NVDEC, or copied to the GPU; all that changes pixels is on the GPU."""
    gpu = torch.device("cuda", 0)
    found = operators(assemble(make_graph(kind, motion_set, decoder), resources(device=gpu)))
    assert found["mixed"] == (set() if decoder == "pyav" else {"Video"})
    assert found["cpu"] <= NUMBERS
    assert "CropMirrorNormalize" in found["gpu"]
