"""How many bad videos a run tolerates."""

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pipelines.bad_samples import BadSample
from pipelines.dataset.spot_check import format_defects

FEW = 3
"""Number of bad videos that never stops a run, whatever the size of the data set."""

CHANCE = 10_000
"""At most one in this many data sets within the limit is refused because of the sample that was opened."""


def always_tolerated(share: float, videos: int) -> int:
    """Number of bad videos among `videos` that never stops a run: at most half; 0 where the share is 0."""
    return 0 if share == 0 else min(FEW, videos // 2)


def exceeds_limit(bad: int, share: float, videos: int) -> bool:
    """Whether `bad` of `videos` videos are more than allowed. share: `data.bad_share`."""
    return bad > max(share * videos, always_tolerated(share, videos))


def is_surely_over_limit(bad: int, share: float, opened: int, videos: int) -> bool:
    """Whether a sample of a data set shows that the data set has more bad videos than allowed.

    True where all opened videos are bad, as after the data set was moved. Also true where a data set at the
    limit would give a sample with `bad` or more bad videos with a probability below 1 / `CHANCE`
    (hypergeometric distribution).

    Args:
        bad: number of opened videos that are bad.
        share: `data.bad_share`.
        opened: number of videos that were opened.
        videos: number of videos in the data set.
    """
    if bad <= always_tolerated(share, opened) or share == 1:
        return False
    if bad == opened:
        return True
    most = int(max(share * videos, always_tolerated(share, videos)))
    as_bad = sum(
        math.comb(most, found) * math.comb(videos - most, opened - found) for found in range(bad, opened + 1)
    )
    return as_bad * CHANCE < math.comb(videos, opened)


class BadVideos:
    """The training videos that any rank found bad in this attempt; the same on all ranks."""

    def __init__(self) -> None:
        self._found: dict[int, BadSample] = {}

    def __len__(self) -> int:
        return len(self._found)

    def add(self, bad_samples: Iterable[BadSample]) -> None:
        """Add videos. The first reason for a video is kept."""
        for defect in bad_samples:
            self._found.setdefault(defect.sample, defect)

    @property
    def first_reasons(self) -> str:
        """The first bad videos with their reasons, for a message."""
        return format_defects([(defect.path, defect.reason) for defect in self._found.values()])


@dataclass
class BadClipLimit:
    """Counts the training clips of a run, and decides when too many of them are bad.

    Clips of earlier attempts do not count towards the limit, so that a run resumes after its videos were
    repaired.
    """

    share: float
    """`data.bad_share`."""
    training_set: int
    """Number of videos in it."""
    clips: int = 0
    """Clips read so far, over all ranks and attempts."""
    bad: int = 0
    """Of these clips, those that could not be read."""

    def __post_init__(self) -> None:
        self.videos = BadVideos()
        self._clips_before, self._bad_before = self.clips, self.bad

    def add(self, clips: int, bad: int) -> None:
        """Count the clips of a step."""
        self.clips += clips
        self.bad += bad

    @property
    def is_exceeded(self) -> bool:
        """Whether the run stops: both the share of bad clips and the number of bad videos are too large."""
        bad, clips = self.bad - self._bad_before, self.clips - self._clips_before
        are_many = len(self.videos) > always_tolerated(self.share, self.training_set)
        return are_many and bad > self.share * max(clips, self.training_set)

    def describe(self) -> str:
        """The counts of this attempt and the first reasons, for a message."""
        return (
            f"{self.bad - self._bad_before} of {self.clips - self._clips_before} clips could not be read, "
            f"more than data.bad_share ({self.share:g}) allows; {self.videos.first_reasons}"
        )
