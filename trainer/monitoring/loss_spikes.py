"""Marks steps whose loss stands out above those before it: the first sign of a run that diverges.

What stands out is measured by the median and the median absolute deviation of the latest losses, which a few
outliers do not move, so that one spike does not hide the next. A falling loss lies below its median. All is
done with logarithms: the losses of small batches, and of a model that has learnt nearly everything, reach far
above their median often, by a factor and not by an amount.
"""

import math
from collections import deque
from dataclasses import dataclass
from statistics import median

_WINDOW = 128  # losses looked back at: a thousand bytes, and short enough to follow a falling loss
_WARM_UP = 32  # losses before any can stand out; the first ones fall fast, and their spread says little
_DEVIATIONS = 6.0  # standard deviations above the median
_SPREAD = 1.4826  # standard deviations per median absolute deviation, of a normal distribution
_LEAST = 0.02  # what counts as one standard deviation at least, 2 %, where the loss hardly varies
_NOTHING = 0.001  # added to every loss, for the logarithm of 0
_WORTH = 0.05  # above the usual at least, in nats: a loss that small says that all is well


@dataclass(frozen=True)
class LossSpike:
    """loss: that stands out. usual: the median of those before it. deviations: how far above it, in standard
    deviations of the logarithm.
    """

    loss: float
    usual: float
    deviations: float


class LossSpikeDetector:
    """Looks at one loss after the other; all are at least 0, as a cross-entropy is."""

    def __init__(self) -> None:
        self._logs: deque[float] = deque(maxlen=_WINDOW)
        self._high = False

    def detect(self, loss: float) -> LossSpike | None:
        """The spike that begins with this loss, if one does; it ends with the first loss that is usual again.

        A loss that is not finite is none, and is not remembered.
        """
        if not math.isfinite(loss):
            return None
        spike = self._compare(loss) if len(self._logs) >= _WARM_UP else None
        begins = spike is not None and not self._high
        self._high = spike is not None
        # Spikes are remembered too: a loss that stays up becomes the usual one.
        self._logs.append(math.log(loss + _NOTHING))
        return spike if begins else None

    def _compare(self, loss: float) -> LossSpike | None:
        centre = median(self._logs)
        spread = max(_SPREAD * median(abs(earlier - centre) for earlier in self._logs), _LEAST)
        deviations = (math.log(loss + _NOTHING) - centre) / spread
        usual = math.exp(centre) - _NOTHING
        stands_out = deviations > _DEVIATIONS and loss - usual > _WORTH
        return LossSpike(loss, usual, deviations) if stands_out else None
