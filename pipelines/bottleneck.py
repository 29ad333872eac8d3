"""What making clips costs, stage by stage, and which stage keeps a run waiting."""

import os
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

from pipelines.dali.pipeline import LoaderResources

BUSY = 0.75  # share of its time from which on a stage counts as the one that limits
WAITING = 0.05  # share of the time that a run may wait for data before anyone need care

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
    """Spent since a loader began, or between two moments.

    clips: made. decodings: that took, fewer where samples are repeated. read: seconds waiting for files.
    decode: CPU seconds in the workers. augment: CPU seconds of DALI's threads, decoding in the graph
    included; what a GPU does for the graph is not seen. transfer: seconds of copying to the device, from the
    bytes and how long a byte takes.
    """

    clips: int = 0
    decodings: int = 0
    read: float = 0.0
    decode: float = 0.0
    augment: float = 0.0
    transfer: float = 0.0

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
    """What limits: `model`, or a stage; how busy each stage was, 0..1; what to change, in words."""

    stage: str
    busy: dict[str, float]
    advice: str = ""


def find_bottleneck(
    costs: StageCosts, seconds: float, wait_share: float, resources: LoaderResources, cores: int
) -> Bottleneck:
    """What limited a run over `seconds` of which it waited `wait_share` (0..1) for data.

    cores: those that this rank may use.
    """
    workers = max(1e-9, seconds * resources.workers)
    busy = {
        "read": costs.read / workers,
        "decode": costs.decode / workers,
        "augment": costs.augment / max(1e-9, seconds * resources.threads),
        "transfer": costs.transfer / max(1e-9, seconds),
    }
    busy["cores"] = (costs.decode + costs.augment) / max(1e-9, seconds * cores)
    if wait_share < WAITING:
        return Bottleneck("model", busy)
    reading = "read" if busy["read"] > busy["decode"] else "decode"
    candidates = {reading: busy["read"] + busy["decode"], **{n: busy[n] for n in ("augment", "transfer")}}
    stage = max(candidates, key=lambda name: candidates[name])
    if candidates[stage] < BUSY:
        stage = "cores" if busy["cores"] > BUSY else "device" if resources.gpu else "latency"
    return Bottleneck(stage, busy, ADVICE[stage])


def own_threads() -> frozenset[int]:
    """This process's threads by number; none are known where Linux is not."""
    tasks = Path("/proc/self/task")
    return frozenset(int(thread.name) for thread in tasks.iterdir()) if tasks.is_dir() else frozenset()


def cpu_seconds(threads: Iterable[int]) -> float:
    """CPU time that these threads of this process have used; ended ones count nothing."""
    ticks = 0
    for thread in threads:
        text = _text(Path(f"/proc/self/task/{thread}/stat"))
        # user and system time are the fields 14 and 15; the name before them may hold spaces
        ticks += sum(int(field) for field in text.rpartition(")")[2].split()[11:13])
    return ticks / os.sysconf("SC_CLK_TCK")


def _text(path: Path) -> str:
    """The content of a thread's file; nothing once the thread has ended."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""
