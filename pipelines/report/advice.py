"""What to do about a data set, from what was counted and measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from pipelines.formatting import format_count, printable
from pipelines.report.copies import Copies
from pipelines.report.sample import Sample
from pipelines.report.speed import Gain, Speed
from pipelines.report.survey import Survey

WORTH_IT = 1.3
"""Times the CPU time of a clip before transcoding, over that after it, from which it is advised."""

_UNEQUAL = 10  # times as many videos in the largest class as in the smallest, from which weights are advised


@dataclass(frozen=True)
class Advice:
    """One recommendation."""

    is_warning: bool
    """Whether something is to be done; otherwise it is fine as it is."""
    title: str
    text: str


def choose_advice(
    survey: Survey, sample: Sample, copies: Copies, speed: Speed, gain: Gain | None
) -> Iterator[Advice]:
    """The recommendations, the most important first."""
    name = printable(survey.manifest.path)
    if survey.verification.is_wrong:
        yield Advice(
            True,
            f"{format_count(survey.verification.wrong_rows, 'row')} of the manifest cannot be used",
            f"`prepare verify {name}` lists them. Make the manifest again.",
        )
    if sample.defects:
        yield Advice(
            True,
            f"{len(sample.defects):,} of {len(sample):,} opened videos cannot be used",
            f"`prepare check {name} --deep` finds all. A run stops when more than data.bad_share of the "
            "clips are bad.",
        )
    if survey.verification.repeated_rows:
        count = survey.verification.repeated_rows
        repeated = f"{count:,} rows repeat" if count > 1 else "1 row repeats"
        yield Advice(
            True,
            f"{repeated} a video of another row",
            "Each is drawn as often as its rows. See the duplicates below.",
        )
    if copies.number:
        copied = f"{copies.number:,} videos are copies" if copies.number > 1 else "1 video is a copy"
        yield Advice(
            True,
            f"{copied} of another under another name",
            "Each is drawn as often as its copies. See the duplicates below.",
        )
    yield from _on_transcoding(survey, sample, speed, gain)
    yield from _on_classes(survey)
    if sample.videos:
        taken = sum(not video.nvdec_refusal for video in sample.videos)
        yield Advice(
            False,
            f"NVDEC decodes {taken:,} of {len(sample.videos):,} opened videos",
            "On a GPU with data.decoder auto, they are decoded by NVDEC and the CPU cores together, the "
            "others by the cores."
            if taken
            else "On a GPU too, the CPU cores decode all of them.",
        )


def transcoding_hours(gain: Gain, survey: Survey) -> float:
    """Hours to transcode all videos on this machine."""
    return gain.seconds / max(gain.videos, 1) * survey.rows / 3600


def _on_transcoding(survey: Survey, sample: Sample, speed: Speed, gain: Gain | None) -> Iterator[Advice]:
    if gain is None or not gain.factor:
        reason = speed.problem if gain is None else gain.problem or gain.before.problem or gain.after.problem
        yield Advice(False, "The gain by transcoding was not measured", reason or "It was not asked for.")
        return
    options = gain.options
    size = gain.bytes_after / max(gain.bytes_before, 1)
    measured = (
        f"Measured on {format_count(gain.videos, 'video')}: {gain.before.cpu_ms:.3g} ms of CPU time per "
        f"clip as they are, {gain.after.cpu_ms:.3g} ms with a short side of at most {options.short_side} "
        f"pixels and a keyframe every {options.keyframe_interval} frames, in {size:.0%} of the space."
    )
    if gain.factor >= WORTH_IT:
        hours = transcoding_hours(gain, survey)
        duration = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"
        name = printable(survey.manifest.path)
        yield Advice(
            True,
            f"Transcode: a clip takes {1 - 1 / gain.factor:.0%} less CPU time",
            f"{measured} All {survey.rows:,} take about {duration} on this machine: "
            f"`prepare transcode {name} --to FOLDER --out FOLDER/{printable(survey.manifest.path.name)}`; "
            "--part divides the work.",
        )
    else:
        yield Advice(False, "Transcoding is not worth it", measured)


def _on_classes(survey: Survey) -> Iterator[Advice]:
    counts = survey.classes
    filled = counts[counts > 0]
    empty = int((counts == 0).sum())
    if empty:
        yield Advice(
            True,
            f"{format_count(empty, 'class')} without a video",
            "The model has an output for each. To remove a class, remove it where the class names come from.",
        )
    if len(filled) > 1 and filled.max() >= _UNEQUAL * filled.min():
        ratio = int(filled.max()) / int(filled.min())
        name = printable(survey.manifest.path)
        yield Advice(
            True,
            f"The largest class has {ratio:.0f} times as many videos as the smallest",
            f"`prepare balance {name} --power 0.5 --out BALANCED.arrow` draws rare classes more often.",
        )
    elif len(filled) > 1:
        spread = float(np.std(filled) / np.mean(filled))
        yield Advice(
            False,
            f"No class has {_UNEQUAL} times as many videos as another",
            f"Standard deviation: {spread:.0%} of the mean class size.",
        )
