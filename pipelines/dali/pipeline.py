"""The DALI pipelines: a source's samples → frames → clips on the device.

Every `nodes` method here builds graph nodes and runs at build time.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from nvidia.dali import fn, pipeline_def

from pipelines.augment.dali_nodes import augment_clip, crop_views
from pipelines.augment.params import ViewSpec
from pipelines.dali.external_source import TrainSource, ViewSource
from pipelines.dali.sample_reader import Arrays, Decoding, RefusedRequests
from pipelines.decode.dali_nodes import decode_in_graph

Colours = tuple[float, ...]


@dataclass(frozen=True)
class LoaderResources:
    """How a pipeline is spread over a machine; nothing here changes what it makes.

    workers: processes that read, and decode where the graph does not. threads: of DALI, on the CPU. prefetch:
    batches made ahead.
    """

    device: torch.device
    workers: int
    threads: int
    prefetch: int

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass(frozen=True)
class TrainGraph:
    """Source → training clips, float32, normalised with mean and std.

    Per sample (3, T, size, size), or (repeats, 3, T, size, size) where a sample is repeated.
    """

    source: TrainSource
    mean: Colours
    std: Colours

    def nodes(self, frames: Any, numbers: Any) -> Any:
        clip, repeats, cuts = self.source.clip, self.source.sampler.repeats, self.source.cuts
        each = clip.array_count + cuts
        clips = []
        for repeat in range(repeats):
            own = numbers[repeat * each : (repeat + 1) * each]
            cut = _window(frames, own[0]) if cuts else frames
            clips.append(augment_clip(cut, own[cuts:], clip, self.mean, self.std))
        return fn.stack(*clips) if repeats > 1 else clips[0]


@dataclass(frozen=True)
class ViewGraph:
    """Source → all views of a video: per sample (views, 3, T, size, size), ordered by clip, then by crop."""

    source: ViewSource
    mean: Colours
    std: Colours

    def nodes(self, frames: Any, numbers: Any) -> Any:
        return view_nodes(frames, numbers, self.source.clip, self.mean, self.std)


def view_nodes(frames: Any, numbers: Any, clip: ViewSpec, mean: Colours, std: Colours) -> Any:
    """Graph nodes: the frames of all clips of a video, one clip after another, and `view_numbers` → views."""
    size, positions = numbers
    # (crops, 3, clips * T, H, W) → (views, 3, T, H, W): the clips lie one after another along the frames
    stacked = crop_views(frames, size, positions, clip.crops, clip.size, mean, std)
    split = fn.reshape(stacked, shape=[clip.crops, 3, clip.clips, clip.frames, clip.size, clip.size])
    ordered = fn.transpose(split, perm=[2, 0, 1, 3, 4, 5])
    return fn.reshape(ordered, shape=[clip.views, 3, clip.frames, clip.size, clip.size])


Graph = TrainGraph | ViewGraph


def starting_at(graph: Graph, batch: int, refused: RefusedRequests) -> Graph:
    """The same graph from so many batches later on, leaving out what is refused."""
    source = graph.source
    reader = replace(source.reader, refused=refused)
    moved: Any = replace(source, reader=reader, first=source.first + batch)
    return replace(graph, source=moved)


def with_decoding(graph: Graph, decoding: Decoding) -> Graph:
    """The same graph with somebody else decoding."""
    source = graph.source
    moved: Any = replace(source, reader=replace(source.reader, decoding=decoding))
    return replace(graph, source=moved)


def assemble(graph: Graph, resources: LoaderResources) -> Any:
    """The pipeline, not built yet; its outputs are clips, identity, reasons and costs, a sample each."""
    source = graph.source
    decoding = source.reader.decoding
    payload = len(decoding.layouts)
    layouts = [*decoding.layouts, *[""] * (3 + source.numbers)]

    @pipeline_def(
        batch_size=source.samples,
        num_threads=resources.threads,
        device_id=(resources.device.index or 0) if resources.gpu else None,
        prefetch_queue_depth=resources.prefetch,
        py_num_workers=resources.workers,
        py_start_method="spawn",
        enable_conditionals=True,
    )
    def build() -> Any:
        outputs = fn.external_source(
            source=source,
            num_outputs=len(layouts),
            layout=layouts,
            batch=False,
            parallel=True,
            prefetch_queue_depth=resources.prefetch,
        )
        frames = decoded(outputs[:payload], decoding, gpu=resources.gpu)
        identity, reasons, costs = outputs[payload : payload + 3]
        return graph.nodes(frames, outputs[payload + 3 :]), identity, reasons, costs

    return build()


def decode_only(
    source: Callable[[Any], Arrays], decoding: Decoding, *, batch: int, threads: int, device: torch.device
) -> Any:
    """A built pipeline of the decoding alone, fed by `source`, one batch at a time and none ahead."""
    gpu = device.type == "cuda"

    @pipeline_def(
        batch_size=batch,
        num_threads=threads,
        device_id=(device.index or 0) if gpu else None,
        prefetch_queue_depth=1,
        enable_conditionals=True,
    )
    def alone() -> Any:
        layouts = decoding.layouts
        payload = fn.external_source(source=source, num_outputs=len(layouts), layout=layouts, batch=False)
        return decoded(payload, decoding, gpu=gpu)

    pipeline = alone()
    pipeline.build()
    return pipeline


def decoded(payload: Any, decoding: Decoding, *, gpu: bool) -> Any:
    """Uint8 frames, layout FHWC, on the pipeline's device, whoever decodes them."""
    if decoding.name == "pyav":
        return payload[0].gpu() if gpu else payload[0]
    if decoding.name == "dali":
        return decode_in_graph(*payload, gpu=gpu)
    return _either(*payload, gpu=gpu)


def _either(*payload: Any, gpu: bool) -> Any:
    *encoded, frames, in_graph = payload
    if in_graph:  # noqa: SIM108 - DALI turns statements into graph nodes, not expressions
        result = decode_in_graph(*encoded, gpu=gpu)
    else:
        result = frames.gpu() if gpu else frames
    return result


def _window(frames: Any, window: Any) -> Any:
    """The part of the frames between (top, left) and (bottom, right)."""
    return fn.slice(frames, start=window[0:2], end=window[2:4], axis_names="HW")
