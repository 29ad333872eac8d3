"""Opens this project's loader for the benchmark."""

from collections.abc import Generator

import torch

from pipelines.augment.params import TrainClipSpec
from pipelines.autotune import LoaderOptions
from pipelines.benchmark.workload import CROP_RATIO, CROP_SCALE, FLIP, MEAN, STD, Workload
from pipelines.dataset.concat import Dataset
from pipelines.errors import DataError
from pipelines.loader import ClipLoader, train_loader
from pipelines.sampling.sampler import TrainSampler


def open_loader(workload: Workload, cores: int) -> ClipLoader:
    """The training loader on the CPU for so many cores; PyAV decodes."""
    dataset = Dataset.open([workload.manifest])
    clip = TrainClipSpec(
        workload.frames, workload.size, CROP_SCALE, CROP_RATIO, FLIP, rand_augment=workload.rand_augment
    )
    return train_loader(
        dataset,
        TrainSampler(len(dataset), workload.batch, workload.seed),
        clip,
        mean=(MEAN,) * 3,
        std=(STD,) * 3,
        micro_batch=workload.batch,
        rank=0,
        world_size=1,
        first_step=0,
        options=LoaderOptions(torch.device("cpu"), "pyav", cores=cores),
    )


def valid_clips(loader: ClipLoader, workload: Workload) -> Generator[torch.Tensor, None, None]:
    """An endless iterator of batches, (B, 3, T, size, size); closing it closes the loader.

    Raises DataError at a bad sample: its placeholder clip needs no decoding, so the figures would be too
    good.
    """
    try:
        for batch in loader:
            if not batch.valid.all():
                raise DataError(
                    f"{workload.manifest} lists videos that cannot be used; "
                    f"`uniformerv2 prepare check {workload.manifest} --deep` names them"
                )
            yield batch.clips
    finally:
        loader.close()
