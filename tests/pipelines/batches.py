"""Loaders over the motion set, and digests of their batches."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from pipelines.augment.mixing import MixingSpec
from pipelines.augment.params import TrainClipSpec
from pipelines.autotune import LoaderOptions
from pipelines.dali.pipeline import LoaderResources
from pipelines.dataset.concat import Dataset
from pipelines.loader import ClipBatch, ClipLoader, train_loader
from pipelines.sampling.sampler import TrainSampler

HALF = (0.5, 0.5, 0.5)
ALL = TrainClipSpec(4, 32, color_jitter=0.4, rand_augment="rand-m7-n2-mstd0.5-inc1")


CPU = torch.device("cpu")


def options(
    decoder: str = "pyav", workers: int = 1, prefetch: int = 2, device: torch.device = CPU
) -> LoaderOptions:
    """A split gives half of the samples to the graph: a measured share differs each time."""
    return LoaderOptions(device, decoder, workers, threads=1, prefetch=prefetch, graph_share=0.5)


def resources(workers: int = 1, prefetch: int = 2, device: torch.device = CPU) -> LoaderResources:
    """Those of `options`."""
    return LoaderResources(device, workers, threads=1, prefetch=prefetch)


def loader(
    manifest: Path,
    clip: TrainClipSpec,
    *,
    batch: int = 8,
    micro: int | None = None,
    rank: int = 0,
    ranks: int = 1,
    first_step: int = 0,
    repeats: int = 1,
    how: LoaderOptions | None = None,
    mixing: MixingSpec | None = None,
    hashes: bool = False,
) -> ClipLoader:
    """A training loader with seed 3; `micro` None is the rank's whole share of the batch."""
    dataset = Dataset.open([manifest])
    return train_loader(
        dataset, TrainSampler(len(dataset), batch, seed=3, repeats=repeats), clip, mean=HALF, std=HALF,
        micro_batch=micro or batch // ranks, rank=rank, world_size=ranks, first_step=first_step,
        options=how or options(), mixing=mixing, hashes=hashes,
    )  # fmt: skip


def take(loader: ClipLoader, count: int) -> list[ClipBatch]:
    """The next batches; the loader is closed."""
    batches = [batch for _, batch in zip(range(count), loader, strict=False)]
    loader.close()
    return batches


def digests(batches: Sequence[ClipBatch | Sequence[ClipBatch]]) -> list[str]:
    """SHA-256 of each batch's pixels, labels, ids, valid and keys; one for all batches of an inner list."""
    found = []
    for entry in batches:
        parts = [entry] if isinstance(entry, ClipBatch) else entry
        digest = hashlib.sha256()
        for name in ("clips", "labels", "ids", "valid", "keys"):
            digest.update(torch.cat([getattr(part, name) for part in parts]).cpu().numpy().tobytes())
        found.append(digest.hexdigest())
    return found
