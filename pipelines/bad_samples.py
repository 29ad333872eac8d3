"""Bad samples: counted by clip, recorded once each."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class BadSample:
    """A video that could not be read or decoded."""

    sample: int
    """Row of the dataset."""
    path: str
    """As in messages."""
    reason: str


@dataclass
class BadSamples:
    """The bad samples of a loader so far."""

    seen: int = 0
    """Clips since the last `pop_counts`."""
    bad: int = 0
    """Of those, the ones of bad samples."""
    videos: dict[int, BadSample] = field(default_factory=dict)
    """All bad samples, by row."""
    new: list[BadSample] = field(default_factory=list)
    """Those found since the last `pop_new`."""

    def add(self, bad_sample: BadSample) -> None:
        """Record a bad sample; a known one changes nothing."""
        if bad_sample.sample not in self.videos:
            self.videos[bad_sample.sample] = bad_sample
            self.new.append(bad_sample)

    def pop_counts(self) -> tuple[int, int]:
        """Clips and bad clips since the last call."""
        counts, self.seen, self.bad = (self.seen, self.bad), 0, 0
        return counts

    def pop_new(self) -> list[BadSample]:
        """The bad samples found since the last call."""
        new, self.new = self.new, []
        return new
