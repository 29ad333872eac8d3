"""The section `data` of a recipe: where the clips come from and how they are read."""

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipelines.storage.remote_range import StorageOptions
from trainer.config.section import Section
from trainer.config.value_types import (
    MAX_RATIO,
    MIN_RATIO,
    FilePath,
    Length,
    Seed,
    Share,
    check_path,
)


class EmbeddedSection(Section):
    """The embedded data set, which needs no download: rendered clips of moving shapes."""

    train_clips: Length
    """Clips to render for training."""

    val_clips: Length
    """Clips to render for validation."""

    seed: Seed = 0
    """Seed of the rendering; the same seed renders the same clips."""

    size: Annotated[int, Field(ge=32, le=2048, multiple_of=2)] = 72
    """Shorter side of a rendered frame in pixels, even."""


class TrainManifest(Section):
    """One of several training manifests."""

    manifest: FilePath
    """Manifest of training videos."""

    ratio: Annotated[float, Field(ge=MIN_RATIO, le=MAX_RATIO)] | None = None
    """Its share in every batch, relative to the other manifests' ratios; null, for all of them, shows every
    video once an epoch."""


class DataSection(Section):
    """Where the clips come from and how they are read."""

    train: FilePath | tuple[TrainManifest, ...]
    """Manifest of the training videos; or a list of several, each as a path or as
    `{manifest: PATH, ratio: NUMBER}`."""

    val: FilePath
    """Manifest of the validation videos."""

    node_copy: FilePath | None = None
    """Folder on each node's own disk into which the first rank there copies the manifests, for all ranks of
    the node to read; null reads them where they are. Videos are always read from the paths in the
    manifest."""

    store_cache: FilePath | None = None
    """Folder on each node's own disk that keeps what is read of videos in an object store (`s3://...`), for
    all ranks of the node; null keeps nothing."""

    store_cache_gib: Annotated[float, Field(ge=0.0625, le=2**20)] = 100.0
    """Most GiB in `store_cache`; what was used least recently is deleted first."""

    store_seconds: Annotated[float, Field(ge=0, le=24 * 3600)] = 300.0
    """How long a request to an object store is repeated when it fails, before the run stops; less than
    `hang_minutes`."""

    embedded: EmbeddedSection | None = None
    """Render the embedded motion data set where the two manifests are missing; null never does."""

    bad_share: Share = 0.01
    """Stop when more than this share of the clips so far could not be read, and more than three videos (of a
    very small data set, more than half); 0 stops at the first."""

    workers: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    """Worker processes per rank, which read samples, and decode those that PyAV decodes; `auto` chooses by
    the rank's share of the node's cores and the measured cost of the first videos."""

    prefetch: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    """Batches prefetched before the step that uses them; `auto` prefetches enough to keep all workers
    busy."""

    threads: Annotated[int, Field(ge=1, le=1024)] | Literal["auto"] = "auto"
    """DALI threads per rank; `auto` divides the node's cores among its ranks."""

    decoder: Literal["auto", "dali", "pyav", "hybrid"] = "auto"
    """Decoder: `dali` (NVDEC on a GPU), `pyav` (any codec, on CPU cores), or `hybrid`, both at once, split by
    their speed as measured at the first start of the run; `auto` is `pyav` on a CPU and `hybrid` on a GPU."""

    @field_validator("train", mode="before")
    @classmethod
    def _list_of_manifests(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        if not value:
            raise ValueError("the list is empty; name at least one manifest")
        parts = [_parse_train_manifest(number, entry) for number, entry in enumerate(value, start=1)]
        without = [number for number, part in enumerate(parts, start=1) if part.ratio is None]
        if 0 < len(without) < len(parts):
            raise ValueError(
                f"entry {without[0]} has no ratio, others have one; give one to all, or to none, which shows "
                "every video once an epoch"
            )
        return tuple(parts)

    @model_validator(mode="after")
    def _renders_one_manifest(self) -> Self:
        if self.embedded is not None and not isinstance(self.train, Path):
            raise ValueError("`embedded` renders a single `train` manifest: name that one, or leave it out")
        return self

    @property
    def storage(self) -> StorageOptions:
        """How videos in an object store are read."""
        return StorageOptions(self.store_cache, int(self.store_cache_gib * 2**30), self.store_seconds)

    @property
    def train_manifests(self) -> tuple[TrainManifest, ...]:
        """The training manifests with their ratios, however `train` is written."""
        return (TrainManifest(manifest=self.train),) if isinstance(self.train, Path) else self.train

    @property
    def manifest_fields(self) -> list[tuple[str, Path]]:
        """All manifests with the fields that name them, training manifests first."""
        return [*(("data.train", part.manifest) for part in self.train_manifests), ("data.val", self.val)]


def _parse_train_manifest(number: int, entry: Any) -> TrainManifest:
    """Parse an entry of the list of training manifests. Raises ValueError, with its number, for a wrong
    one."""
    found = json.dumps(entry, ensure_ascii=False)
    if isinstance(entry, str):
        _check_entry_path(number, entry)
        return TrainManifest(manifest=Path(entry))
    if not isinstance(entry, dict):
        raise ValueError(
            f"entry {number}: found {found}; allowed: a path, or {{manifest: PATH, ratio: NUMBER}}"
        )
    for name in entry.keys() - TrainManifest.model_fields:
        near = difflib.get_close_matches(name, TrainManifest.model_fields, n=1)
        hint = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(TrainManifest.model_fields)}"
        raise ValueError(f"entry {number}: {name}: no such field; {hint}")
    if "manifest" not in entry:
        raise ValueError(f"entry {number}: manifest: missing in {found}; allowed: a path")
    if not isinstance(entry["manifest"], str):
        raise ValueError(f"entry {number}: manifest: found {json.dumps(entry['manifest'])}; allowed: a path")
    _check_entry_path(number, entry["manifest"])
    ratio = entry.get("ratio")
    is_number = isinstance(ratio, int | float) and not isinstance(ratio, bool)
    if ratio is not None and not (is_number and MIN_RATIO <= ratio <= MAX_RATIO):
        raise ValueError(
            f"entry {number}: ratio: found {json.dumps(ratio)}; allowed: a number, at least "
            f"{MIN_RATIO:g}, at most {MAX_RATIO:g}"
        )
    return TrainManifest(manifest=Path(entry["manifest"]), ratio=ratio)


def _check_entry_path(number: int, path: str) -> None:
    try:
        check_path(path)
    except ValueError as error:
        raise ValueError(f"entry {number}: manifest: {error}") from None
