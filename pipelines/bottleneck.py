"""What clips cost in each stage of the input pipeline, and which stage limits a run."""

import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

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
    decodings: int = 0
    """Decodings that they took: fewer where samples have repeats."""
    read: float = 0.0
    """Seconds of reading files."""
    decode: float = 0.0
    """CPU seconds in the workers."""
    augment: float = 0.0
    """CPU seconds of DALI's threads, decoding in the graph included. GPU work does not count."""
    transfer: float = 0.0
    """Seconds of copying to the device, estimated from the bytes."""

    def __add__(self, other: "StageCosts") -> "StageCosts":
        return StageCosts(
            *(one + another for one, another in zip(astuple(self), astuple(other), strict=True))
        )

    def __sub__(self, earlier: "StageCosts") -> "StageCosts":
        return StageCosts(
            *(one - before for one, before in zip(astuple(self), astuple(earlier), strict=True))
        )

    def per_clip(self) -> dict[str, float]:
        """Milliseconds a clip of each stage."""
        stages = {
            "read": self.read,
            "decode": self.decode,
            "augment": self.augment,
            "transfer": self.transfer,
        }
        return {name: 1000 * seconds / max(1, self.clips) for name, seconds in stages.items()}


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


def own_threads() -> frozenset[int]:
    """IDs of this process's threads; empty on systems without /proc."""
    tasks = Path("/proc/self/task")
    return frozenset(int(thread.name) for thread in tasks.iterdir()) if tasks.is_dir() else frozenset()


def cpu_seconds(threads: Iterable[int]) -> float:
    """CPU seconds of these threads of this process; threads that have ended count as 0."""
    ticks = 0
    for thread in threads:
        text = _text(Path(f"/proc/self/task/{thread}/stat"))
        # user and system time are the fields 14 and 15; the name before them may hold spaces
        ticks += sum(int(field) for field in text.rpartition(")")[2].split()[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def _text(path: Path) -> str:
    """The content of a thread's file; empty once the thread has ended."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
