"""Detects loss spikes, the first sign of a diverging run.

A loss is compared with the median and the median absolute deviation of the latest losses, which a few
outliers do not change, so that one spike does not hide the next. Logarithms are compared, because the losses
of small batches, and small losses, vary by a factor.
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

_WINDOW = 128  # latest losses: few enough to follow a falling loss
_WARM_UP = 32  # losses before any can be a spike: the first ones fall fast
_DEVIATIONS = 6.0  # standard deviations above the median
_SPREAD = 1.4826  # standard deviations per median absolute deviation, of a normal distribution
_LEAST = 0.02  # smallest standard deviation, 2 %, for losses that hardly vary
_EPSILON = 0.001  # added to every loss before the logarithm
_LEAST_RISE = 0.05  # smallest rise above the median, in nats


@dataclass(frozen=True)
class LossSpike:
    """A loss far above those before it."""

    loss: float
    usual: float
    """Median of the losses before it."""
    deviations: float
    """Distance from the median in standard deviations of the logarithm."""


class LossSpikeDetector:
    """Compares each loss, at least 0, with those before it."""

    def __init__(self) -> None:
        self._logs: deque[float] = deque(maxlen=_WINDOW)
        self._high = False

    def detect(self, loss: float) -> LossSpike | None:
        """The spike that begins with this loss, or None; it lasts until the first loss that is no spike.

        Losses that are not finite are ignored.
        """
        if not math.isfinite(loss):
            return None
        spike = self._compare(loss) if len(self._logs) >= _WARM_UP else None
        begins = spike is not None and not self._high
        self._high = spike is not None
        # Spikes are recorded too: a lasting rise becomes the median.
        self._logs.append(math.log(loss + _EPSILON))
        return spike if begins else None

    def _compare(self, loss: float) -> LossSpike | None:
        centre = median(self._logs)
        spread = max(_SPREAD * median(abs(earlier - centre) for earlier in self._logs), _LEAST)
        deviations = (math.log(loss + _EPSILON) - centre) / spread
        usual = math.exp(centre) - _EPSILON
        is_spike = deviations > _DEVIATIONS and loss - usual > _LEAST_RISE
        return LossSpike(loss, usual, deviations) if is_spike else None
