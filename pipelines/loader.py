"""`ClipLoader`: iterate and get `ClipBatch`es on the device, from any step on."""

import gc
import multiprocessing
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, pipeline_def

from . import DataError
from .augment import augment, cut, jitter, normalise, views
from .decode import choose_decoder, decode_in_graph
from .draw import TrainClip, ViewClip
from .manifest import Manifest
from .parallel import signals_blocked, usable_cores
from .plan import TrainPlan, ViewPlan
from .source import Reader, TrainSource, ViewSource

WORKER_PATIENCE = 5.0  # seconds that a closing loader gives its workers to finish their video


@dataclass(frozen=True)
class ClipBatch:
    """What one rank's forward pass takes.

    clips: float32, (B, 3, T, H, W), or (B, V, 3, T, H, W) with V views in evaluation. labels, ids: int64,
    (B,); ids are rows of the manifest. valid: bool, (B,); False for stand-ins, whose label must not count.
    """

    clips: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    valid: torch.Tensor


@dataclass(frozen=True)
class Defect:
    """A video that could not be used: its row in the manifest, its path, and why, in words."""

    sample: int
    path: str
    reason: str


@dataclass(frozen=True)
class LoaderOptions:
    """How batches are made; nothing here changes what is in them.

    device: where they end up. decoder: `auto`, `dali` or `pyav`. workers: processes that read (and decode,
    with pyav). threads: DALI's CPU threads. prefetch: batches made ahead.
    """

    device: torch.device
    decoder: str = "auto"
    workers: int | None = None
    threads: int | None = None
    prefetch: int = 2

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass
class Defects:
    """What was bad so far: each video once, however often it comes up.

    seen, bad: clips since they were last taken. videos: all bad ones, by row. fresh: those not yet taken.
    """

    seen: int = 0
    bad: int = 0
    videos: dict[int, Defect] = field(default_factory=dict)
    fresh: list[Defect] = field(default_factory=list)

    def take_counts(self) -> tuple[int, int]:
        """Clips seen and clips bad since the last call."""
        counts, self.seen, self.bad = (self.seen, self.bad), 0, 0
        return counts

    def take_fresh(self) -> list[Defect]:
        """The defects found since the last call."""
        fresh, self.fresh = self.fresh, []
        return fresh


class ClipLoader:
    """Batches of one rank, made ahead in DALI's threads and worker processes.

    Make one with `train_loader` or `view_loader`. `batches`: of one pass, 0 for an endless stream.
    `close()` ends the worker processes.
    """

    def __init__(self, pipeline: Any, manifest: Manifest, options: LoaderOptions, batches: int) -> None:
        self.manifest = manifest
        self.defects = Defects()
        self._pipeline = pipeline
        self._options = options
        self.batches = batches
        self._served = 0
        before = set(multiprocessing.active_children())
        with signals_blocked(signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            pipeline.build()
        self._workers = set(multiprocessing.active_children()) - before

    def __iter__(self) -> Iterator[ClipBatch]:
        """Training: an endless stream that goes on where the last iteration stopped. Evaluation: one pass."""
        if self.batches == 0:
            while True:
                yield self._next()
        if self._served % self.batches:
            raise RuntimeError("the previous pass over this loader was left in the middle; make a new loader")
        for _ in range(self.batches):
            yield self._next()

    def _next(self) -> ClipBatch:
        clips, identity, reasons = self._pipeline.run()
        self._served += 1
        identity = np.array(identity.as_tensor())
        self._note(identity, reasons)
        labels, ids, valid = identity[:, 1], identity[:, 0], identity[:, 2].astype(bool)
        device = self._options.device
        return ClipBatch(
            clips=_copied(clips, device),
            labels=torch.from_numpy(labels.copy()).to(device),
            ids=torch.from_numpy(ids.copy()).to(device),
            valid=torch.from_numpy(valid).to(device),
        )

    def _note(self, identity: np.ndarray, reasons: Any) -> None:
        self.defects.seen += int((identity[:, 0] >= 0).sum())
        for place in np.flatnonzero((identity[:, 0] >= 0) & (identity[:, 2] == 0)):
            self.defects.bad += 1
            sample = int(identity[place, 0])
            if sample not in self.defects.videos:
                path = str(self.manifest.absolute_path(self.manifest.row(sample)))
                reason = bytes(np.array(reasons[int(place)])).decode()
                self.defects.videos[sample] = Defect(sample, path, reason)
                self.defects.fresh.append(self.defects.videos[sample])

    def close(self) -> None:
        """End the worker processes; the loader gives no more batches."""
        # DALI asks the workers to leave and, after a second, terminates those in the middle of a video. They
        # do not hear that signal either, and DALI would wait for ever.
        deadline = threading.Timer(WORKER_PATIENCE, self._kill_workers)
        deadline.start()
        self._pipeline = None
        gc.collect()
        deadline.cancel()

    def _kill_workers(self) -> None:
        for process in self._workers:
            process.kill()


def _copied(clips: Any, device: torch.device) -> torch.Tensor:
    """The clips in a tensor of their own: DALI reuses its buffer for the next batch.

    On a GPU the copy has a stream to itself and is waited for. On torch's own stream it would stand behind
    the training steps in the queue, and DALI, which knows nothing of them, might write before it is read.
    """
    if device.type == "cpu":
        return torch.from_dlpack(clips.as_tensor()).clone()
    with torch.cuda.stream(torch.cuda.Stream(device)):
        copy = torch.from_dlpack(clips.as_tensor()).clone()
        torch.cuda.current_stream(device).synchronize()
    copy.record_stream(torch.cuda.current_stream(device))
    return copy


def train_loader(
    manifest: Manifest,
    plan: TrainPlan,
    clip: TrainClip,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    micro_batch: int,
    rank: int,
    world_size: int,
    first_step: int,
    options: LoaderOptions,
) -> ClipLoader:
    """An endless loader of training micro-batches, the first of them belonging to `first_step`.

    Raises DataError for an empty manifest, or options this machine cannot follow.
    """
    source = TrainSource(_reader(manifest, options), plan, clip, micro_batch, rank, world_size, first_step)

    def graph(payload: tuple[Any, ...], numbers: tuple[Any, ...]) -> Any:
        crop, mirror, *rest = numbers
        frames = _frames(payload, options)
        if clip.operations:
            frames = augment(frames, rest[-2], rest[-1], clip.operations)
        frames = cut(frames, crop, clip.size)
        if clip.color_jitter:
            frames = jitter(frames, rest[0])
        return normalise(frames, mirror, mean, std)

    numbers = 2 + (clip.color_jitter > 0) + 2 * (clip.operations > 0)
    return ClipLoader(_pipeline(source, graph, numbers, micro_batch, options), manifest, options, batches=0)


def view_loader(
    manifest: Manifest,
    plan: ViewPlan,
    clip: ViewClip,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    rank: int,
    options: LoaderOptions,
) -> ClipLoader:
    """A loader of all views of every video; each iteration over it is one pass, in the manifest's order.

    Raises DataError for an empty manifest, or options this machine cannot follow.
    """
    source = ViewSource(_reader(manifest, options), plan, clip, rank)

    def graph(payload: tuple[Any, ...], numbers: tuple[Any, ...]) -> Any:
        size, positions = numbers
        # (crops, 3, clips * T, H, W) → (views, 3, T, H, W): the clips lie one after another along the frames
        stacked = views(_frames(payload, options), size, positions, clip.crops, clip.size, mean, std)
        split = fn.reshape(stacked, shape=[clip.crops, 3, clip.clips, clip.frames, clip.size, clip.size])
        ordered = fn.transpose(split, perm=[2, 0, 1, 3, 4, 5])
        return fn.reshape(ordered, shape=[clip.views, 3, clip.frames, clip.size, clip.size])

    pipeline = _pipeline(source, graph, 2, plan.batch, options)
    return ClipLoader(pipeline, manifest, options, batches=plan.batches)


def _reader(manifest: Manifest, options: LoaderOptions) -> Reader:
    if len(manifest) == 0:
        raise DataError(f"{manifest.path} lists no video")
    decoder, codecs = choose_decoder(options.decoder, gpu=options.gpu)
    return Reader(manifest, decoder, codecs)


def _frames(payload: tuple[Any, ...], options: LoaderOptions) -> Any:
    """Graph node: decoded frames on the pipeline's device, whoever decodes them."""
    if len(payload) == 1:
        return payload[0].gpu() if options.gpu else payload[0]
    return decode_in_graph(*payload, gpu=options.gpu)


def _pipeline(source: Any, graph: Any, numbers: int, batch: int, options: LoaderOptions) -> Any:
    """The DALI pipeline: external source → graph → (clips, identity, reasons)."""
    in_graph = source.reader.decoder == "dali"
    payload = 2 if in_graph else 1
    layouts = ["" if in_graph else "FHWC", *[""] * (payload - 1 + 2 + numbers)]
    cores = usable_cores()

    @pipeline_def(
        batch_size=batch,
        num_threads=options.threads or cores,
        device_id=(options.device.index or 0) if options.gpu else None,
        prefetch_queue_depth=options.prefetch,
        py_num_workers=options.workers or cores,
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
            prefetch_queue_depth=options.prefetch,
        )
        identity, reasons = outputs[payload : payload + 2]
        clips = graph(outputs[:payload], outputs[payload + 2 :])
        return clips, identity, reasons

    return build()
