"""Videos over which DALI's decoder ended a rank at an earlier start: found, named and kept from it.

DALI decodes in the rank's own process. What its loaders were at lies in `in-flight/` of the run's folder.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from pipelines.augment.params import TrainClipSpec, ViewSpec
from pipelines.autotune import LoaderOptions
from pipelines.dali.sample_reader import CrashedSamples
from pipelines.dataset.concat import Dataset
from pipelines.in_flight import find_crashed
from pipelines.sampling.sampler import TrainSampler, ViewSampler
from trainer.distributed.collectives import broadcast_from_main, run_on_all_ranks
from trainer.distributed.environment import Environment
from trainer.monitoring.run_dir import RunDir
from trainer.system.files import write_json

T = TypeVar("T")

_MOST_NAMED = 3


@dataclass(frozen=True)
class LoaderInput:
    """What loaders of one kind read. kind: `train` or `val`, with which the names of their files begin."""

    kind: str
    dataset: Dataset
    sampler: TrainSampler | ViewSampler
    clip: TrainClipSpec | ViewSpec


def in_flight_file(folder: RunDir, kind: str, rank: int) -> Path:
    """Where a rank's loader keeps which batches it is at."""
    return folder.in_flight / f"{kind}-{rank:05d}.json"


def find_crashed_videos(
    readings: Iterable[LoaderInput], folder: RunDir, environment: Environment, options: LoaderOptions
) -> tuple[dict[str, CrashedSamples], tuple[str, ...]]:
    """What DALI's decoder is not to be given, by the kind of reading, and notes on what is new. Collective.

    Each rank tries its share of what was in flight when an earlier start died, and rank 0 keeps what is found
    in the run's folder. Nothing is tried where the graph does not decode, or all loaders were closed.
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
        if left:  # waited for: the loaders that are made next have files of the same names
            if environment.is_main:
                _close(left, crashed[reading.kind] if new else {}, reading.dataset.fingerprint, folder)
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
    gathered: list[CrashedSamples] = [{}] * environment.world_size
    dist.all_gather_object(gathered, found)
    return {sample: reason for part in gathered for sample, reason in part.items()}


def _left(reading: LoaderInput, folder: RunDir) -> tuple[CrashedSamples, list[str]]:
    """What is known of the data, and the files of loaders that were not closed."""
    files = sorted(map(str, folder.in_flight.glob(f"{reading.kind}-*.json")))
    try:
        known = _kept(folder).get(reading.dataset.fingerprint, {}).items()
        return {int(sample): str(reason) for sample, reason in known}, files
    except (ValueError, AttributeError):
        return {}, files


def _kept(folder: RunDir) -> dict[str, Any]:
    """What the file holds, by the fingerprint of the data; nothing where it cannot be read."""
    try:
        stored = json.loads(folder.decoder_crashes.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return stored if isinstance(stored, dict) else {}


def _close(left: list[str], crashes: CrashedSamples, fingerprint: str, folder: RunDir) -> None:
    """Write down what is new, then remove the files that it was found with."""
    if crashes:
        _keep(crashes, fingerprint, folder)
    for path in map(Path, left):
        with folder.best_effort(path):
            path.unlink(missing_ok=True)


def _keep(crashes: CrashedSamples, fingerprint: str, folder: RunDir) -> None:
    with folder.best_effort(folder.decoder_crashes):
        write_json(folder.decoder_crashes, {**_kept(folder), fingerprint: crashes})


def _notes(new: CrashedSamples, dataset: Dataset, options: LoaderOptions) -> list[str]:
    if not new:
        return []
    samples = sorted(new)
    named = ", ".join(dataset.printable_path(sample) for sample in samples[:_MOST_NAMED])
    more = f" and {len(samples) - _MOST_NAMED} more" if len(samples) > _MOST_NAMED else ""
    what = "PyAV decodes them" if options.splits else "they are left out"
    return [f"DALI's decoder ended a rank at an earlier start over {named}{more}: {what} from now on"]
