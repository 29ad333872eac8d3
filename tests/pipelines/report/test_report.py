"""The report of a manifest: its numbers are those of the rows, its page is one file that a browser opens."""

import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from pipelines.dataset.manifest import Manifest, encode_path, write_manifest
from pipelines.dataset.prepare.transcode import TranscodeOptions
from pipelines.errors import DataError
from pipelines.formatting import format_size
from pipelines.report.advice import choose_advice
from pipelines.report.charts import bar_chart, histogram, ranked_curve
from pipelines.report.copies import Copies, find_copies
from pipelines.report.page import _durations, _table
from pipelines.report.sample import Sample, open_sample
from pipelines.report.speed import Gain, Speed
from pipelines.report.survey import survey_manifest
from pipelines.report.write_report import write_report
from tests.browser import CHROMIUM, Browser
from tests.conftest import MotionSet
from tests.pipelines.damaged_manifests import change_rows

ROOT = Path(__file__).parents[3]


@contextmanager
def silent(_: str) -> Iterator[object]:
    yield lambda done, total: None


@pytest.fixture
def manifest(motion_set: MotionSet, tmp_path: Path) -> Manifest:
    """The embedded videos under class names that are HTML, with a repeated, an empty and a changed video, and
    a row of a wrong label."""
    source = Manifest.open(motion_set.train)
    rows = [
        replace(row, path=encode_path(source.path_at(index)))
        for index, row in ((index, source.row(index)) for index in range(len(source)))
    ]
    (empty := tmp_path / "empty.mp4").touch()
    changed = shutil.copy(source.path_at(2), tmp_path / "changed.bin")
    rows += [rows[0], replace(rows[1], path=str(empty))]
    rows += [replace(rows[2], path=str(changed), frames=rows[2].frames + 1)]
    names = [f"<b>{name}</b> & co" for name in source.class_names[:-1]] + ["跳舞" * 20]
    path = write_manifest(tmp_path / "m.arrow", [*rows, rows[5]], names).path
    change_rows(path, {len(rows): {"label": 99}})
    return Manifest.open(path)


def test_the_counts_are_those_of_the_rows(manifest: Manifest) -> None:
    survey = survey_manifest(manifest)
    rows = [manifest.row(index) for index in range(len(manifest) - 1)]
    assert survey.rows == len(rows)
    assert survey.classes.tolist() == [sum(row.label == label for row in rows) for label in range(8)]
    assert survey.frames == sum(row.frames for row in rows)
    assert survey.sizes == Counter((row.width, row.height) for row in rows)
    assert survey.codecs == Counter(row.codec for row in rows)
    assert np.allclose(np.sort(survey.seconds), sorted(row.frames / row.fps for row in rows))
    assert (survey.verification.wrong_rows, survey.verification.repeated_rows) == (1, 1)


def test_the_sample_names_defects_and_what_nvdec_does_not_decode(manifest: Manifest) -> None:
    sample = open_sample(manifest, 1000, workers=1)
    assert [index for index, _ in sample.defects] == [33, 34, 35]
    assert "empty" in sample.defects[0][1] and "was changed" in sample.defects[1][1]
    assert "label 99" in sample.defects[2][1]
    for video in sample.videos:
        row, path = manifest.row(video.index), manifest.path_at(video.index)
        assert video.size == path.stat().st_size and video.frames == row.frames
        assert 1 <= video.keyframe_distance <= row.frames
        assert (video.nvdec_refusal == "") <= (row.codec == "h264")
        assert row.codec == "h264" or video.nvdec_refusal == f"is {row.codec}"
    assert len(open_sample(manifest, 5, workers=1)) == 5


def test_the_page_is_one_file_and_escapes_all_names(manifest: Manifest, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report(
        manifest, out, opened=100, copies=100, transcoded=0, seconds=0, workers=1, progress_of=silent
    )
    page = out.read_text(encoding="utf-8")
    assert not re.search(r"https?:|//|<script|<link|<img|@import|url\(", page.replace("</", "<"))
    assert "<b>grow</b>" not in page and "&lt;b&gt;grow&lt;/b&gt; &amp; co" in page
    for text in (
        "empty",
        "was changed",
        "label",
        "36</b><span>videos",
        "NVDEC",
        "prepare check",
        "prepare verify",
    ):
        assert text in page, text
    for chart in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(chart)
    with pytest.raises(DataError, match="--out"):
        write_report(
            manifest, tmp_path, opened=9, copies=9, transcoded=0, seconds=0, workers=1, progress_of=silent
        )


def test_a_page_that_cannot_be_written_is_refused_before_anything_is_read(
    manifest: Manifest, tmp_path: Path
) -> None:
    def refuse(activity: str) -> AbstractContextManager[Callable[[int, int], None]]:
        raise AssertionError(activity)

    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"--out .*page\.html cannot be written: .*file: Not a directory"):
        write_report(
            manifest, tmp_path / "file" / "page.html",
            opened=9, copies=9, transcoded=0, seconds=0, workers=1, progress_of=refuse,
        )  # fmt: skip
    out = tmp_path / "new" / "page.html"
    write_report(manifest, out, opened=1, copies=0, transcoded=0, seconds=0, workers=1, progress_of=silent)
    assert out.is_file()


def test_copies_under_other_names_are_found(motion_set: MotionSet, tmp_path: Path) -> None:
    source = Manifest.open(motion_set.train)
    paths = [source.path_at(index) for index in range(8)]
    rows = [replace(source.row(index), path=encode_path(path)) for index, path in enumerate(paths)]
    packed = (tmp_path / "shard.tar").open("wb")
    packed.write(bytes(512) + paths[5].read_bytes())
    packed.close()
    copy, other = shutil.copy(paths[0], tmp_path / "copy"), shutil.copy(paths[1], tmp_path / "other")
    changed = bytearray(Path(other).read_bytes())
    changed[-1] ^= 1  # the same size, and other content
    Path(other).write_bytes(changed)
    (tmp_path / "folder").mkdir()
    part = {"frames": 5, "video_frames": rows[0].frames}
    rows += [
        rows[3],  # a repeated row is no copy
        replace(rows[0], path=str(copy), label=1),
        replace(rows[1], path=str(other)),
        replace(rows[0], path=str(copy), first_frame=2, **part),  # another segment of the same file
        replace(rows[5], path="shard.tar", offset=512, length=paths[5].stat().st_size),
        replace(rows[2], path="missing.mp4"),
        replace(rows[2], path="folder"),
    ]
    manifest = write_manifest(tmp_path / "m.arrow", rows, source.class_names, sources=True)
    found = find_copies(manifest, 100, workers=1)
    assert (found.videos, found.compared, found.number) == (13, found.candidates, 1)
    assert found.found == [[0, 9]]
    # At most so many are compared, those first that resemble fewest others.
    few = find_copies(manifest, 2, workers=1)
    assert (few.compared, few.candidates) == (2, found.candidates)
    assert find_copies(manifest, 0, workers=1).compared == 0
    out = tmp_path / "report.html"
    write_report(manifest, out, opened=2, copies=100, transcoded=0, seconds=0, workers=1, progress_of=silent)
    page = out.read_text(encoding="utf-8")
    assert f"{paths[0]}, {copy}" in page and "1 video is a copy" in page


def test_equal_durations_are_not_said_to_differ(manifest: Manifest, tmp_path: Path) -> None:
    survey = survey_manifest(manifest)
    assert "Median" in _durations(replace(survey, seconds=np.array([1, 2, 3], np.float32)))
    assert "All have 2 s." in _durations(replace(survey, seconds=np.full(9, 2, np.float32)))


def test_the_head_of_a_column_is_aligned_as_its_cells() -> None:
    table = _table(("Time", "Decoding", "The rest"), [("all", "1 ms", "2 ms")])
    assert table.count('<th class="n">') == table.count('<td class="n">') == 2


@pytest.mark.skipif(CHROMIUM is None, reason="NO BROWSER HERE: apt-get install chromium")
def test_a_browser_opens_the_page_offline(manifest: Manifest, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_report(manifest, out, opened=8, copies=0, transcoded=0, seconds=0, workers=1, progress_of=silent)
    with Browser(tmp_path / "profile") as browser:
        browser.open(out.as_uri())
        assert browser.errors == [] and list(browser.statuses) == [out.as_uri()]
        assert browser.evaluate("document.querySelectorAll('section').length") == 9
        # Nothing is wider than its card, and no text of a chart is outside it.
        assert browser.evaluate(
            "[...document.querySelectorAll('.card')].every(e => e.scrollWidth <= e.clientWidth + 1)"
        )
        assert browser.evaluate(
            "[...document.querySelectorAll('svg text')].every(t => { const a = t.getBoundingClientRect(); "
            "const b = t.closest('svg').getBoundingClientRect(); "
            "return a.left > b.left - 1 && a.right < b.right + 1 })"
        )


@pytest.mark.parametrize(
    "values",
    [
        np.zeros(5, np.float32), np.array([3]), np.arange(1000), np.array([1.0, 2.5, 1e6], np.float32),
        np.concatenate([np.ones(500), [1000]]), np.array([12, 12, 250]),
    ],
)  # fmt: skip
def test_a_histogram_has_every_value_once(values: np.ndarray) -> None:
    chart = histogram(values, lambda value: f"{value:g}", "frames")
    titles = [title.text or "" for title in ElementTree.fromstring(chart).iter("title")]
    assert sum(int(title.rpartition(": ")[2].replace(",", "")) for title in titles) == len(values)


def test_charts_of_no_and_of_many_values_are_valid() -> None:
    for chart in (
        bar_chart([], [], str), bar_chart(["a < b & c" * 9], [0.0], str),
        ranked_curve(np.arange(700), "classes"), ranked_curve(np.zeros(30, int), "classes"),
    ):  # fmt: skip
        ElementTree.fromstring(chart)


def test_an_empty_manifest_has_a_page(tmp_path: Path) -> None:
    empty = write_manifest(tmp_path / "empty.arrow", [], ("a", "b"))
    out = tmp_path / "report.html"
    write_report(empty, out, opened=9, copies=9, transcoded=2, seconds=1, workers=1, progress_of=silent)
    assert "0</b><span>videos" in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("before", "after", "token"), [(90.0, 30.0, "67% less"), (90.0, 85.0, "not worth it")]
)
def test_transcoding_is_advised_by_the_measured_gain(
    motion_set: MotionSet, before: float, after: float, token: str
) -> None:
    survey = survey_manifest(Manifest.open(motion_set.train))
    gain = Gain(8, Speed(20.0, before), Speed(25.0, after), TranscodeOptions(), 4.0, 1000, 300)
    advice = [
        each
        for each in choose_advice(survey, Sample(), Copies(), gain.before, gain)
        if "ranscod" in each.title
    ]
    assert len(advice) == 1 and token in advice[0].title and "30% of the space" in advice[0].text
    assert advice[0].is_warning == (token == "67% less")


@pytest.mark.soak
@pytest.mark.skipif(CHROMIUM is None, reason="NO BROWSER HERE: apt-get install chromium")
def test_the_command_measures_and_transcodes_a_sample(motion_set: MotionSet, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "prepare.py"), "report", str(motion_set.train),
         "--out", str(out), "--seconds", "2", "--transcode", "4", "--workers", "1"],
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    page = out.read_text(encoding="utf-8")
    assert "the same, transcoded" in page and "Measured on 4 videos" in page
    with Browser(tmp_path / "profile") as browser:
        browser.open(out.as_uri())
        browser.screenshot(tmp_path / "page.png")
        assert browser.errors == [] and list(browser.statuses) == [out.as_uri()]
    assert (tmp_path / "page.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("count", "text"),
    [(512, "512 B"), (63_500, "63.5 kB"), (999_900, "1 MB"), (2**30, "1.07 GB"), (5e12, "5 TB")],
)
def test_a_size_has_three_digits_and_its_unit(count: float, text: str) -> None:
    assert format_size(count) == text
