"""The DALI pipelines: a source's samples → frames → clips on the device.

Functions that take graph nodes run once, while DALI builds the graph.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def, types

from pipelines.augment.dali_nodes import augment_clip, crop_views
from pipelines.augment.params import ViewSpec
from pipelines.dali.external_source import Source, TrainSource, ViewSource
from pipelines.dali.sample_layout import AUGMENTATION, Arrays, SampleLayout, decoding_layout
from pipelines.dali.sample_reader import Decoding, RefusedRequests
from pipelines.decode.dali_nodes import decode_in_graph

Colours = tuple[float, ...]
Nodes = Mapping[str, Any]
"""Graph nodes by the names of a sample layout."""

_DALI_TYPES = {np.uint8: types.UINT8, np.int32: types.INT32, np.float32: types.FLOAT}


@dataclass(frozen=True)
class LoaderResources:
    """How a pipeline is spread over a machine; it does not change the batches."""

    device: torch.device
    workers: int
    """Processes that read, and decode what the graph does not."""
    threads: int
    """DALI's CPU threads."""
    prefetch: int
    """Batches made ahead."""
    summary: str = ""
    """What was chosen and why, for logs."""

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Graph:
    """A source's samples → clips, float32, normalised with mean and std."""

    source: Source
    mean: Colours
    std: Colours

    def clips(self, frames: Any, nodes: Nodes) -> Any:
        """Graph nodes: frames and the arrays of the source's layout → clips, or views of a video."""
        source = self.source
        if isinstance(source, ViewSource):
            return view_nodes(frames, nodes, source.clip, self.mean, self.std)
        return train_nodes(frames, nodes, source, self.mean, self.std)


def train_nodes(frames: Any, nodes: Nodes, source: TrainSource, mean: Colours, std: Colours) -> Any:
    """Graph nodes: (3, T, size, size) per sample, or (repeats, 3, T, size, size) where it is repeated."""
    names = [array.name for array in AUGMENTATION if array.name in nodes]
    clips = []
    for repeat in range(source.clips_per_sample):
        own = frames
        if source.crops_in_graph:
            roi = nodes["roi"][repeat]
            own = fn.slice(frames, start=roi[0:2], end=roi[2:4], axis_names="HW")
        arrays = {name: nodes[name][repeat] for name in names}
        clips.append(augment_clip(own, arrays, source.clip, mean, std))
    return fn.stack(*clips) if len(clips) > 1 else clips[0]


def view_nodes(frames: Any, nodes: Nodes, clip: ViewSpec, mean: Colours, std: Colours) -> Any:
    """Graph nodes: the frames of all clips of a video, one clip after another, and `VIEWS` → its views,
    (views, 3, T, size, size), ordered by clip, then by crop."""
    # (crops, 3, clips * T, H, W) → (views, 3, T, H, W): the clips follow one another along the frame axis
    stacked = crop_views(
        frames, nodes["view_size"], nodes["crop_positions"], clip.crops, clip.size, mean, std
    )
    split = fn.reshape(stacked, shape=[clip.crops, 3, clip.clips, clip.frames, clip.size, clip.size])
    ordered = fn.transpose(split, perm=[2, 0, 1, 3, 4, 5])
    return fn.reshape(ordered, shape=[clip.views, 3, clip.frames, clip.size, clip.size])


def starting_at(graph: Graph, batch: int, refused: RefusedRequests) -> Graph:
    """The same graph from `batch` batches later on, without the refused requests."""
    source = graph.source
    reader = replace(source.reader, refused=refused)
    moved: Any = replace(source, reader=reader, first=source.first + batch)
    return replace(graph, source=moved)


def assemble(graph: Graph, resources: LoaderResources) -> Any:
    """The pipeline, not built yet. Its outputs are the clips, then what the layout has for the loader."""
    source = graph.source

    def clips() -> Any:
        nodes = external_arrays(
            source.layout,
            source,
            batch=False,
            parallel=True,
            prefetch_queue_depth=resources.prefetch,
        )
        frames = decode(nodes, source.reader.decoding, gpu=resources.gpu)
        return graph.clips(frames, nodes), *(nodes[name] for name in source.layout.for_loader)

    return make_pipeline(
        clips,
        batch=source.samples,
        threads=resources.threads,
        device=resources.device,
        prefetch_queue_depth=resources.prefetch,
        py_num_workers=resources.workers,
        py_start_method="spawn",
    )


def make_pipeline(
    nodes: Callable[[], Any], *, batch: int, threads: int, device: torch.device, **options: Any
) -> Any:
    """The pipeline of the graph nodes that `nodes` returns, not built yet.

    options: of `nvidia.dali.Pipeline`. Without them it makes one batch at a time, in this process.
    """
    return pipeline_def(nodes, enable_conditionals=True)(
        batch_size=batch,
        num_threads=threads,
        device_id=(device.index or 0) if device.type == "cuda" else None,
        **{"prefetch_queue_depth": 1, **options},
    )


def decode_only(
    source: Callable[[Any], Arrays], decoding: Decoding, *, batch: int, threads: int, device: torch.device
) -> Any:
    """A built pipeline of the decoding alone, which asks `source` for one batch at a time.

    source: gives the arrays of `decoding_layout` for DALI's sample info.
    """
    layout = decoding_layout(decoding.name)

    def frames() -> Any:
        nodes = external_arrays(layout, lambda info: layout.pack(source(info)), batch=False)
        return decode(nodes, decoding, gpu=device.type == "cuda")

    pipeline = make_pipeline(frames, batch=batch, threads=threads, device=device)
    pipeline.build()
    return pipeline


def external_arrays(layout: SampleLayout, source: Callable[..., Any], **options: Any) -> Nodes:
    """Graph nodes: an external source's outputs, by name.

    source: returns what `SampleLayout.pack` makes, or lists of it. options: of `fn.external_source`.
    """
    nodes = fn.external_source(
        source=source,
        num_outputs=len(layout.arrays),
        layout=[array.dali_layout for array in layout],
        dtype=[_DALI_TYPES[array.dtype] for array in layout],
        ndim=[array.rank for array in layout],
        **options,
    )
    return layout.by_name(nodes)


def decode(nodes: Nodes, decoding: Decoding, *, gpu: bool) -> Any:
    """Graph nodes: uint8 frames, layout FHWC, on the pipeline's device, whoever decodes them."""
    if decoding.name == "pyav":
        return nodes["frames"].gpu() if gpu else nodes["frames"]
    if decoding.name == "dali":
        return _decode_encoded(nodes, gpu=gpu)
    return _decode_either(nodes, gpu=gpu)


def _decode_encoded(nodes: Nodes, *, gpu: bool) -> Any:
    return decode_in_graph(nodes["video"], nodes["indices"], nodes["color"], nodes["orientation"], gpu=gpu)


def _decode_either(nodes: Nodes, *, gpu: bool) -> Any:
    frames = nodes["frames"]
    if nodes["in_graph"]:  # noqa: SIM108 - DALI turns statements into graph nodes, not expressions
        result = _decode_encoded(nodes, gpu=gpu)
    else:
        result = frames.gpu() if gpu else frames
    return result
