"""Which videos were bad so far: counted by clip, named once each."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class BadSample:
    """A video that could not be used: its row in the dataset, its path as it is shown, and why."""

    sample: int
    path: str
    reason: str


@dataclass
class BadSamples:
    """What was bad so far: each video once, however often it comes up.

    seen, bad: clips since they were last taken. videos: all bad ones, by row. fresh: those not yet taken.
    """

    seen: int = 0
    bad: int = 0
    videos: dict[int, BadSample] = field(default_factory=dict)
    new: list[BadSample] = field(default_factory=list)

    def add(self, defect: BadSample) -> None:
        """Name a bad video; one that is known already changes nothing."""
        if defect.sample not in self.videos:
            self.videos[defect.sample] = defect
            self.new.append(defect)

    def pop_counts(self) -> tuple[int, int]:
        """Clips seen and clips bad since the last call."""
        counts, self.seen, self.bad = (self.seen, self.bad), 0, 0
        return counts

    def pop_new(self) -> list[BadSample]:
        """The defects found since the last call."""
        new, self.new = self.new, []
        return new
