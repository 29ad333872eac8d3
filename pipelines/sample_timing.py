"""What the first samples of a source cost, and one sample read: calls for a process of their own.

No torch and no DALI here: such a process would import them, for seconds.
"""

import time
from dataclasses import dataclass

import numpy as np

from pipelines.dali.external_source import Source
from pipelines.dali.sample_reader import Arrays, LoadedSample, SampleReader, SampleRequest
from pipelines.dataset.prepare.decode_cost import CHEAP_CODING, CHEAP_SCALE, EXPENSIVE

TIMING_SECONDS = 1.0  # seconds that the first samples may be read for, to see what they cost
TIMED_SAMPLES = 16


@dataclass(frozen=True)
class SampleTiming:
    """What the first samples cost each: seconds of reading, seconds of CPU time, bytes handed over.

    samples: what the graph would get of them, where that was asked for.
    """

    read: float
    decode: float
    bytes: float
    samples: tuple[Arrays, ...] = ()

    @property
    def words(self) -> str:
        milliseconds = f"{1000 * self.read:.1f} ms to read, {1000 * self.decode:.1f} ms of CPU time"
        return f"{milliseconds} in the workers a video; "

    @property
    def advice(self) -> str:
        """What makes the videos cheaper to read; nothing where they are cheap."""
        if self.decode < EXPENSIVE:
            return ""
        return (
            f"; a clip of these videos costs {self.decode:.1f} s of CPU time to decode. Smaller frames and a "
            f"keyframe every 12 frames make it cheap: ffmpeg -i IN -vf {CHEAP_SCALE} {CHEAP_CODING} OUT.mp4"
        )


def measure_samples(source: Source, keep: bool) -> SampleTiming | None:
    """What the first samples cost; None where none could be read. keep: their arrays come back, too."""
    payload = len(source.reader.decoding.layouts)
    begun = time.perf_counter()
    samples, costs = [], []
    for position in range(TIMED_SAMPLES):
        request = source.request(position)
        loaded = source.reader.load(request)
        if request.row is not None and not loaded.reason:
            arrays = loaded.arrays[:payload]
            samples.append(arrays)
            costs.append((loaded.cost.read, loaded.cost.decode, sum(array.nbytes for array in arrays)))
        if time.perf_counter() - begun > TIMING_SECONDS:
            break
    if not costs:
        return None
    read, decode, size = (float(mean) for mean in np.mean(costs, axis=0))
    return SampleTiming(read, decode, size, tuple(samples) if keep else ())


def load(reader: SampleReader, request: SampleRequest) -> LoadedSample:
    return reader.load(request)
