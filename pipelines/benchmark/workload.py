"""What every loader has to do: the same clips of the same files, cropped and augmented in the same way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.augment.rand_augment import parse_policy
from pipelines.dataset.manifest import Manifest
from pipelines.errors import DataError

NO_POLICY = "none"
CROP_SCALE = (0.08, 1.0)  # share of the frame's area
CROP_RATIO = (3 / 4, 4 / 3)  # width / height
FLIP = 0.5  # probability of a mirrored clip
MEAN, STD = 0.45, 0.225  # of every channel, for values in 0..1


@dataclass(frozen=True)
class Workload:
    """Training clips of one manifest."""

    manifest: str
    """Path of the manifest."""
    name: str
    """Name of its videos in tables."""
    frames: int
    """Frames T of a clip, sampled sparsely over the whole video."""
    rand_augment: str | None = None
    """A policy such as `rand-m7-n4-mstd0.5-inc1` on full-size frames, or None."""
    size: int = 224
    """Height and width of a clip in pixels."""
    batch: int = 8
    """Clips per batch."""
    seed: int = 0
    """Seed of the order of the videos."""

    def __str__(self) -> str:
        return f"{self.name}, {self.frames} frames, {self.rand_augment or 'no RandAugment'}"


def check_policies(policies: Sequence[str]) -> None:
    """Raises DataError for a policy that is neither RandAugment nor `none`."""
    for policy in policies:
        if policy != NO_POLICY:
            parse_policy(policy)


def combine_workloads(
    manifests: Mapping[str, Path], frames: Sequence[int], policies: Sequence[str]
) -> list[Workload]:
    """All combinations of manifests, frame counts and RandAugment policies. manifests: by name in tables.

    Raises:
        DataError: a manifest cannot be read or is empty.
    """
    for path in manifests.values():
        manifest = Manifest.open(path)
        if len(manifest) == 0:
            raise DataError(f"{path} lists no video, so there is nothing to measure")
        for batch in manifest.record_batches():
            if "source" in batch.schema.names and any(batch["source"].to_pylist()):
                raise DataError(
                    f"{path} lists folders of frames; the other libraries read video files only. Use videos"
                )
    return [
        Workload(str(path.absolute()), name, count, None if policy == NO_POLICY else policy)
        for policy in policies
        for count in frames
        for name, path in manifests.items()
    ]
