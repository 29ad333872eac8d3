"""How many bad videos a run tolerates."""

import math
from collections.abc import Iterable

from pipelines.bad_samples import BadSample
from pipelines.dataset.spot_check import format_defects

FEW = 3
"""So many bad videos never stop a run, however small the data set."""

CHANCE = 10_000
"""At most one in so many data sets with a tolerable number of bad videos is refused by its first samples."""


def always_tolerated(share: float, videos: int) -> int:
    """How many bad videos of so many are always tolerated: at most half; none where the share is 0."""
    return 0 if share == 0 else min(FEW, videos // 2)


def exceeds_limit(bad: int, share: float, videos: int) -> bool:
    """Whether so many bad videos, of so many read, are too many. share: `data.bad_share`."""
    return bad > max(share * videos, always_tolerated(share, videos))


def is_surely_over_limit(bad: int, share: float, opened: int, videos: int) -> bool:
    """Whether a run that tried some of its videos need not begin: it cannot do without all that are bad.

    It is where all that were tried are bad, which few data sets are by chance and all are that were moved, or
    where one of `CHANCE` samples or fewer holds so many, of a data set with as many as a run does without.

    Args:
        bad: videos of those opened.
        share: `data.bad_share`.
        opened: how many were tried.
        videos: of the data set.
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
        """Add videos; one that is known already changes nothing."""
        for defect in bad_samples:
            self._found.setdefault(defect.sample, defect)

    def exceeds_limit(self, bad: int, clips: int, share: float, videos: int) -> bool:
        """Whether the run stops: for the share of its clips that are bad, and the number of bad videos.

        Args:
            bad: clips that could not be read, of so many seen.
            share: `data.bad_share`.
            videos: of the training set.
        """
        return bad > share * max(clips, videos) and len(self) > always_tolerated(share, videos)

    @property
    def first_reasons(self) -> str:
        return format_defects([(defect.path, defect.reason) for defect in self._found.values()])


class BadClipLimit:
    """Counts the training clips of a run, and finds when too many of them are bad."""

    def __init__(self, share: float, videos: int, *, clips: int = 0, bad: int = 0) -> None:
        """
        Args:
            share: `data.bad_share`.
            videos: of the training set.
            clips, bad: seen in earlier attempts; what has been repaired since must not stop the run again.
        """
        self.clips = clips
        """Clips seen so far, over all ranks and attempts."""
        self.bad = bad
        """Of these clips, those that could not be read."""
        self.videos = BadVideos()
        self._share, self._training_set = share, videos
        self._clips_before, self._bad_before = clips, bad

    def add(self, clips: int, bad: int) -> None:
        """Count the clips of a step."""
        self.clips += clips
        self.bad += bad

    @property
    def is_exceeded(self) -> bool:
        """Whether the run has to stop."""
        bad, clips = self.bad - self._bad_before, self.clips - self._clips_before
        return self.videos.exceeds_limit(bad, clips, self._share, self._training_set)

    def describe(self) -> str:
        """The numbers of this attempt and the first reasons, for a message."""
        return (
            f"{self.bad - self._bad_before} of {self.clips - self._clips_before} clips could not be read, "
            f"more than data.bad_share ({self._share:g}) allows; {self.videos.first_reasons}"
        )
