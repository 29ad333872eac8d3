"""Many runs compared: all that a report shows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from trainer.errors import RunError
from trainer.evaluation.significance import bootstrap_interval, holm, mcnemar
from trainer.tracking.comparison.differences import Difference, SeedGroup, differences, seed_groups
from trainer.tracking.comparison.paired_scores import PairedScores, VideoScores, pair, read_scores
from trainer.tracking.comparison.runs import ComparedRun, in_order
from trainer.tracking.comparison.same_data import data_comparer

MOST_TESTED = 20
"""Runs that are tested against the baseline, the best ones: more tests say less each."""


@dataclass(frozen=True)
class PairedTest:
    """One run against the baseline. run: its place in the list. low, high: of the 95 % interval of the
    difference in top-1, run less baseline, 0..1. adjusted: p by Holm.
    """

    run: int
    pairs: PairedScores
    low: float
    high: float
    p: float
    adjusted: float
    views: str | None
    """Where the two were evaluated with different views: both."""


@dataclass(frozen=True)
class Comparison:
    """runs: by their best top-1. baseline: its place among them. data: for each run but the baseline, what it
    has in common with the baseline's data.
    """

    runs: list[ComparedRun]
    baseline: int
    differences: list[Difference]
    groups: list[SeedGroup]
    data: list[tuple[int, str]]
    tests: list[PairedTest]
    notes: list[str] = field(default_factory=list)


def compare(
    found: Sequence[ComparedRun],
    baseline: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Comparison:
    """Compare runs. baseline: the source of one of them; None takes the one with the best top-1 that has
    scores, or else the best. progress: takes (runs whose data were compared, all of them).

    Raises RunError without a run.
    """
    if not found:
        raise RunError("there is no run to compare")
    runs = in_order(list(found))
    places = {run.source: place for place, run in enumerate(runs)}
    notes: list[str] = []
    asked = None if baseline is None else places[baseline]
    candidates = range(min(len(runs), MOST_TESTED)) if asked is None else (asked, *range(MOST_TESTED))
    scores = _scores(runs, dict.fromkeys(place for place in candidates if place < len(runs)), notes)
    base = asked if asked is not None else next(iter(scores), 0)
    data = []
    compare_data = data_comparer(runs[base])
    for place, run in enumerate(runs):
        if place != base:
            data.append((place, compare_data(run)))
        progress(place + 1, len(runs))
    tests = _tests(scores, base, notes)
    return Comparison(runs, base, differences(runs), seed_groups(runs), data, tests, notes)


def _scores(
    runs: Sequence[ComparedRun], places: Sequence[int] | dict[int, None], notes: list[str]
) -> dict[int, VideoScores]:
    found = {}
    for place in places:
        path = runs[place].find_scores()
        if path is None:
            continue
        try:
            found[place] = read_scores(path)
        except RunError as error:
            notes.append(str(error))
            continue
        last, step = runs[place].last, found[place].about.get("step")
        if last is not None and isinstance(step, int) and step != last.step:
            notes.append(
                f"Run {place + 1}: its scores per video are of step {step}, its last evaluation is of step "
                f"{last.step}"
            )
    return found


def _tests(scores: dict[int, VideoScores], base: int, notes: list[str]) -> list[PairedTest]:
    """Of each run with scores of the baseline's videos; none where the baseline has no scores."""
    if base not in scores:
        return []
    compared = {place: pair(scores[base], own) for place, own in scores.items() if place != base}
    for place in [place for place, pairs in compared.items() if not pairs.counts.videos]:
        del compared[place]
        notes.append(f"Run {place + 1}: not tested, its scores are of none of the baseline's videos")
    p_values = [mcnemar(pairs.counts) for pairs in compared.values()]
    tests = []
    for (place, pairs), p, adjusted in zip(compared.items(), p_values, holm(p_values), strict=True):
        low, high = bootstrap_interval(pairs.counts)
        views = [
            f"{one.about.get('clips')} x {one.about.get('crops')}" for one in (scores[base], scores[place])
        ]
        tests.append(
            PairedTest(
                place, pairs, low, high, p, adjusted, " and ".join(views) if views[0] != views[1] else None
            )
        )
    return tests
