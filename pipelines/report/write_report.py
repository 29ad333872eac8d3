"""Makes the report of a manifest: counts its rows, opens a sample, measures, writes the page."""

from pathlib import Path

import numpy as np

from pipelines.atomic_file import atomic_file
from pipelines.dataset.manifest import Manifest
from pipelines.dataset.paths import check_writable
from pipelines.errors import DataError
from pipelines.formatting import printable
from pipelines.report.copies import find_copies
from pipelines.report.page import format_page
from pipelines.report.sample import open_sample
from pipelines.report.speed import Speed, measure_gain, measure_speed
from pipelines.report.survey import survey_manifest
from pipelines.worker_pool import ProgressOf

MOST_MEASURED = 64
"""Videos of the sample that the speed is measured on."""


def write_report(
    manifest: Manifest,
    out: Path,
    *,
    opened: int,
    copies: int,
    transcoded: int,
    seconds: float,
    workers: int,
    progress_of: ProgressOf,
) -> None:
    """Write the page about a manifest to `out`.

    Args:
        opened: most videos to open, evenly over the manifest.
        copies: most videos to compare with others; 0 for none.
        transcoded: videos to transcode into a temporary folder to measure the gain; 0 for none.
        seconds: of each measurement of the speed; 0 measures nothing.
        workers: processes.

    Raises:
        DataError: the manifest is damaged as a whole, or the page cannot be written.
    """
    if out.is_dir() or out == manifest.path:
        raise DataError(f"--out {printable(out)}: give the HTML file to write, such as report.html")
    try:
        check_writable(out.parent)
    except OSError as error:
        raise DataError(
            f"--out {printable(out)} cannot be written: {printable(Path(error.filename))}: {error.strerror}"
        ) from error
    with progress_of("reading rows") as progress:
        survey = survey_manifest(manifest, progress)
    with progress_of("opening a sample") as progress:
        sample = open_sample(manifest, opened, workers=workers, progress=progress)
    with progress_of("searching copies") as progress:
        found = find_copies(manifest, copies, workers=workers, progress=progress)
    usable = [video.index for video in sample.videos]
    speed, gain = Speed(problem="no video of the sample can be used" if not usable else ""), None
    if usable and seconds:
        with progress_of("measuring") as progress:
            speed = measure_speed(manifest, _spread(usable, MOST_MEASURED), seconds)
            progress(1, 1)
        if transcoded and not speed.problem:
            gain = measure_gain(
                manifest, _spread(usable, transcoded), seconds, workers=workers, progress_of=progress_of
            )
    page = format_page(survey, sample, found, speed, gain)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(out) as new:
            new.write_text(page, encoding="utf-8")
    except OSError as error:
        raise DataError(f"--out {printable(out)} cannot be written: {error.strerror}") from error


def _spread(indices: list[int], most: int) -> list[int]:
    """At most `most` of the indices, evenly."""
    places = np.linspace(0, len(indices) - 1, min(most, len(indices))).round().astype(int)
    return [indices[place] for place in np.unique(places).tolist()]
