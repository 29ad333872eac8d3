"""The sample layout: the arrays that a worker gives to the DALI graph and to the loader, in their order.

Every worker imports this module: it imports neither torch nor DALI.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pipelines.augment.params import TrainClipSpec

Arrays = dict[str, NDArray[Any]]
"""Arrays of a sample by their names in a layout."""


@dataclass(frozen=True)
class ArraySpec:
    """One array of a sample."""

    name: str
    dtype: type[np.generic]
    rank: int
    """Number of dimensions; the sizes may differ from sample to sample."""
    consumer: Literal["graph", "loader"] = "graph"
    dali_layout: str = ""
    """Names of the dimensions as DALI has them; empty where they have none."""


FRAMES = ArraySpec("frames", np.uint8, 4, dali_layout="FHWC")
"""Decoded frames."""

ENCODED = (
    ArraySpec("video", np.uint8, 1),
    ArraySpec("indices", np.int32, 1),
    ArraySpec("color", np.float32, 2),
    ArraySpec("orientation", np.int32, 1),
)
"""A video for the graph's decoder: the fields of `GraphDecodeInput`."""

IN_GRAPH = ArraySpec("in_graph", np.int32, 0)
"""1 where the graph decodes the sample, 0 where a worker did."""

ROI = ArraySpec("roi", np.int32, 2)
"""(clips, 4): top, left, bottom, right of each clip's part of the frames, where the graph crops to it."""

AUGMENTATION = (
    ArraySpec("crop_matrix", np.float32, 2),  # (clips, 9)
    ArraySpec("operations", np.float32, 3),  # (clips, N, roi.PARAMETER_COUNT)
    ArraySpec("jitter_codes", np.int32, 2),  # (clips, 3)
    ArraySpec("jitter_factors", np.float32, 2),  # (clips, 3)
)
"""`ClipParams.arrays` of all clips made of a sample, stacked."""

VIEWS = (
    ArraySpec("view_size", np.float32, 1),  # (2,)
    ArraySpec("crop_positions", np.float32, 2),  # (crops, 2)
)
"""`view_arrays` of a video."""

RECORD = ArraySpec("record", np.uint8, 1, "loader")
"""One value of `record_dtype`, as bytes."""

REASON = ArraySpec("reason", np.uint8, 1, "loader")
"""Why the sample is bad, in UTF-8; one zero byte where it is not."""


@dataclass(frozen=True)
class SampleLayout:
    """The arrays of a sample in the order of a pipeline's external source."""

    arrays: tuple[ArraySpec, ...]

    def __iter__(self) -> Iterator[ArraySpec]:
        return iter(self.arrays)

    @property
    def for_loader(self) -> tuple[str, ...]:
        """Names of what the pipeline passes on unchanged, behind the clips."""
        return tuple(array.name for array in self.arrays if array.consumer == "loader")

    def pack(self, arrays: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        """The arrays in order, as an external source returns them."""
        return tuple(arrays[array.name] for array in self.arrays)

    def by_name(self, nodes: Sequence[Any]) -> dict[str, Any]:
        """Graph nodes or batches, one for each array in order, by name."""
        # Not zip: DALI replaces it, in the functions that build a graph, by one without `strict`.
        return {array.name: nodes[index] for index, array in enumerate(self.arrays)}


def decoding_layout(decoder: str) -> SampleLayout:
    """The inputs from which the graph has decoded frames.

    decoder: `pyav`, `dali` or `hybrid`.
    """
    arrays = {"pyav": (FRAMES,), "dali": ENCODED, "hybrid": (*ENCODED, FRAMES, IN_GRAPH)}
    return SampleLayout(arrays[decoder])


def train_layout(decoder: str, clip: TrainClipSpec, *, crops_in_graph: bool) -> SampleLayout:
    """What a training sample consists of.

    crops_in_graph: whether the graph has to crop the frames to each clip's ROI.
    """
    unused: tuple[str, ...] = () if crops_in_graph else ("roi",)
    if not clip.operations:
        unused += ("operations",)
    if not clip.color_jitter:
        unused += ("jitter_codes", "jitter_factors")
    of_clips = (array for array in (ROI, *AUGMENTATION) if array.name not in unused)
    return SampleLayout((*decoding_layout(decoder), RECORD, REASON, *of_clips))


def view_layout(decoder: str) -> SampleLayout:
    """What an evaluated video consists of."""
    return SampleLayout((*decoding_layout(decoder), RECORD, REASON, *VIEWS))


def record_dtype(keys: int) -> np.dtype[np.void]:
    """What the loader reads of a sample, beside `reason`.

    sample: row of the dataset, -1 for none. label: -1 where it is not known. valid: 0 for a placeholder.
    keys: of the dropout masks, one for each clip made of the sample (`TrainSampler.mask_key`). read: seconds
    to read it. decode: seconds of CPU time to decode it. bytes: of the arrays for the graph's
    decoder, or of the frames.
    """
    return np.dtype(
        [
            ("sample", np.int64),
            ("label", np.int64),
            ("valid", np.int64),
            ("keys", np.int64, (keys,)),
            ("read", np.float64),
            ("decode", np.float64),
            ("bytes", np.int64),
        ]
    )
