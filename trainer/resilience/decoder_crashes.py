"""Videos that crashed DALI's decoder, and so the rank, in an earlier attempt: DALI is not given them again.

DALI decodes in the rank's process. The batches in flight are recorded in `in-flight/` of the run directory.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from pipelines.augment.params import TrainClipSpec, ViewSpec
from pipelines.autotune import LoaderOptions
from pipelines.dali.sample_reader import CrashedSamples
from pipelines.dataset.concat import Dataset
from pipelines.formatting import format_list
from pipelines.in_flight import find_crashed
from pipelines.sampling.sampler import TrainSampler, ViewSampler
from trainer.distributed.collectives import broadcast_from_main, gather, run_on_all_ranks
from trainer.distributed.environment import Environment
from trainer.monitoring.run_dir import RunDir
from trainer.system.files import read_json, write_json

_MAX_NAMED = 3


@dataclass(frozen=True)
class LoaderInput:
    """What the training or the evaluation loaders read."""

    kind: str
    """`train` or `val`: the prefix of their in-flight files."""
    dataset: Dataset
    sampler: TrainSampler | ViewSampler
    clip: TrainClipSpec | ViewSpec


def in_flight_file(folder: RunDir, kind: str, rank: int) -> Path:
    """The file in which a rank's loader records its batches in flight."""
    return folder.in_flight / f"{kind}-{rank:05d}.json"


def find_crashed_videos(
    readings: Iterable[LoaderInput], folder: RunDir, environment: Environment, options: LoaderOptions
) -> tuple[dict[str, CrashedSamples], tuple[str, ...]]:
    """The samples to withhold from DALI's decoder, by kind of loader, and notes on new ones. Collective.

    Each rank decodes a share of the samples that were in flight when an earlier attempt ended, in another
    process; rank 0 records the crashes. Nothing is decoded if the graph does not decode, or all loaders were
    closed.
    """
    if not options.decodes_in_graph:
        return {}, ()
    crashed: dict[str, CrashedSamples] = {}
    notes: list[str] = []
    for reading in readings:
        known, left = broadcast_from_main(_left(reading, folder) if environment.is_main else ({}, []))
        found = _found_by_all(reading, left, environment, options)
        new = {sample: reason for sample, reason in found.items() if sample not in known}
        crashed[reading.kind] = {**known, **new}
        if left:  # wait: the next loaders write files of the same names
            if environment.is_main:
                if new:
                    with folder.best_effort(folder.decoder_crashes):
                        recorded = read_json(folder.decoder_crashes)
                        recorded[reading.dataset.fingerprint] = crashed[reading.kind]
                        write_json(folder.decoder_crashes, recorded)
                for path in map(Path, left):
                    with folder.best_effort(path):
                        path.unlink(missing_ok=True)
            dist.barrier()
        notes += _notes(new, reading.dataset, options)
    return crashed, tuple(notes)


def _found_by_all(
    reading: LoaderInput, left: list[str], environment: Environment, options: LoaderOptions
) -> CrashedSamples:
    if not left:
        return {}
    own = [Path(path) for path in left[environment.rank :: environment.world_size]]
    found = run_on_all_ranks(
        lambda: find_crashed(own, reading.dataset, reading.sampler, reading.clip, options)
    )
    return {sample: reason for part in gather(found) for sample, reason in part.items()}


def _left(reading: LoaderInput, folder: RunDir) -> tuple[CrashedSamples, list[str]]:
    """Recorded crashes of this data, and the files of loaders that were not closed."""
    files = sorted(map(str, folder.in_flight.glob(f"{reading.kind}-*.json")))
    try:
        known = read_json(folder.decoder_crashes).get(reading.dataset.fingerprint, {}).items()
        return {int(sample): str(reason) for sample, reason in known}, files
    except (ValueError, AttributeError):
        return {}, files


def _notes(new: CrashedSamples, dataset: Dataset, options: LoaderOptions) -> list[str]:
    if not new:
        return []
    named = format_list([dataset.printable_path(sample) for sample in sorted(new)], _MAX_NAMED)
    what = "PyAV decodes them" if options.splits else "they are left out"
    return [f"DALI's decoder ended a rank at an earlier start over {named}: {what} from now on"]
