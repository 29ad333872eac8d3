"""What clips cost in each stage of the input pipeline, and which stage limits a run."""

from dataclasses import astuple, dataclass
from operator import add, sub

import psutil

from pipelines.dali.pipeline import LoaderResources

BUSY = 0.75  # utilisation from which a stage counts as the bottleneck
WAITING = 0.05  # share of the time waiting for data below which the model is the bottleneck

ADVICE = {
    "read": "Reading limits: more data.workers, or a faster or nearer disk",
    "decode": "Decoding limits: more cores (data.workers), or videos re-encoded, smaller or with a keyframe "
    "every 12 frames",
    "augment": "Augmentation limits: more cores (data.threads), a GPU, or fewer or cheaper operations "
    "(augmentation.rand_augment)",
    "transfer": "Copying to the device limits: data.decoder auto with videos in H.264, or smaller videos",
    "cores": "All cores are busy: more of them, fewer or cheaper operations, smaller videos, more keyframes",
    "device": "The GPU decodes or augments more slowly than it trains: data.decoder hybrid or pyav, or fewer "
    "operations (augmentation.rand_augment)",
    "latency": "No stage is busy by itself: raise data.prefetch; or other programs hold the cores",
}


@dataclass(frozen=True)
class StageCosts:
    """What clips have cost since a loader was opened, or between two moments."""

    clips: int = 0
    """Clips made."""
    read: float = 0.0
    """Seconds of reading files."""
    decode: float = 0.0
    """CPU seconds in the workers."""
    augment: float = 0.0
    """CPU seconds of DALI's threads, decoding in the graph included. GPU work does not count."""
    transfer: float = 0.0
    """Seconds of copying to the device, estimated from the bytes."""

    def __add__(self, other: "StageCosts") -> "StageCosts":
        return StageCosts(*map(add, astuple(self), astuple(other)))

    def __sub__(self, earlier: "StageCosts") -> "StageCosts":
        return StageCosts(*map(sub, astuple(self), astuple(earlier)))

    def per_clip(self) -> dict[str, float]:
        """Milliseconds a clip of each stage."""
        names = ("read", "decode", "augment", "transfer")
        return {name: 1000 * getattr(self, name) / max(1, self.clips) for name in names}


@dataclass(frozen=True)
class Bottleneck:
    """The stage that limits a run's speed."""

    stage: str
    """`model`, or a key of `ADVICE`."""
    advice: str = ""
    """What to change."""


def find_bottleneck(
    costs: StageCosts, seconds: float, wait_share: float, resources: LoaderResources, cores: int
) -> Bottleneck:
    """What limited a run over `seconds` of which it waited `wait_share` (0..1) for data.

    cores: those that this rank may use.
    """
    if wait_share < WAITING:
        return Bottleneck("model")
    workers = max(1e-9, seconds * resources.workers)
    busy = {
        "read" if costs.read > costs.decode else "decode": (costs.read + costs.decode) / workers,
        "augment": costs.augment / max(1e-9, seconds * resources.threads),
        "transfer": costs.transfer / max(1e-9, seconds),
    }
    stage = max(busy, key=lambda name: busy[name])
    if busy[stage] < BUSY:
        all_cores = (costs.decode + costs.augment) / max(1e-9, seconds * cores) > BUSY
        stage = "cores" if all_cores else "device" if resources.gpu else "latency"
    return Bottleneck(stage, ADVICE[stage])


def thread_seconds() -> dict[int, float]:
    """CPU seconds, user and system, of each thread of this process by its ID."""
    return {each.id: each.user_time + each.system_time for each in psutil.Process().threads()}
