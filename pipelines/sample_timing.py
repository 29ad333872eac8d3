"""What the first samples of a source cost, measured in a process of its own.

It imports neither torch nor DALI, which would take that process seconds.
"""

import time
from dataclasses import dataclass

import numpy as np

from pipelines.dali.external_source import Source
from pipelines.dali.sample_layout import Arrays
from pipelines.dataset.prepare.decode_cost import CHEAP_CODING, CHEAP_SCALE, EXPENSIVE

TIMING_SECONDS = 1.0  # no further sample is read after this time
TIMED_SAMPLES = 16  # at most


@dataclass(frozen=True)
class SampleTiming:
    """The mean cost of the first samples."""

    read: float
    """Seconds to read one."""
    decode: float
    """Seconds of CPU time to decode one."""
    bytes: float
    """Of its arrays."""
    samples: tuple[Arrays, ...] = ()
    """The arrays themselves, where they are asked for."""

    @property
    def summary(self) -> str:
        read, decode = 1000 * self.read, 1000 * self.decode
        return f"{read:.1f} ms to read, {decode:.1f} ms of CPU time in the workers a video"

    @property
    def advice(self) -> str:
        """What makes the videos cheaper to read; empty where they are cheap."""
        if self.decode < EXPENSIVE:
            return ""
        return (
            f"a clip of these videos costs {self.decode:.1f} s of CPU time to decode. Smaller frames and a "
            f"keyframe every 12 frames make it cheap: ffmpeg -i IN -vf {CHEAP_SCALE} {CHEAP_CODING} OUT.mp4"
        )


def measure_samples(source: Source, keep: bool) -> SampleTiming | None:
    """What the first samples cost; None where none can be read. keep: return their arrays."""
    begun = time.perf_counter()
    samples, costs = [], []
    for position in range(TIMED_SAMPLES):
        request = source.request(position)
        loaded = source.reader.load(request)
        if request.row is not None and not loaded.reason:
            samples.append(loaded.arrays)
            size = sum(array.nbytes for array in loaded.arrays.values())
            costs.append((loaded.cost.read, loaded.cost.decode, size))
        if time.perf_counter() - begun > TIMING_SECONDS:
            break
    if not costs:
        return None
    read, decode, mean_size = np.mean(costs, axis=0).tolist()
    return SampleTiming(read, decode, mean_size, tuple(samples) if keep else ())
