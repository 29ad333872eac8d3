"""The summary of `prepare.py` and the lists that it writes."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from pipelines.dataset import manifest
from pipelines.dataset.content_key import BLOCK, content_key
from pipelines.dataset.manifest import Manifest
from pipelines.dataset.prepare import duplicates
from pipelines.dataset.prepare.build import (
    build_manifest,
    check_manifest,
    check_out,
)
from pipelines.dataset.prepare.decode_cost import CostSummary, clip_seconds
from pipelines.dataset.prepare.duplicates import compare_with_other_manifests
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.prepare.folder import read_folder
from pipelines.dataset.prepare.summary import ManifestReport
from pipelines.dataset.prepare.table import read_table
from pipelines.dataset.probe import VideoInfo
from pipelines.errors import DataError
from pipelines.formatting import WIDTH
from trainer.monitoring.progress import show_progress

ROOT = Path(__file__).parents[4]


def make_video(path: Path, seed: int, frames: int = 4, codec: str = "mpeg4", form: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w", format=form) as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = {"mjpeg": "yuvj420p", "gif": "rgb8", "apng": "rgb24"}.get(codec, "yuv420p")
        for _ in range(frames):
            image = av.VideoFrame.from_ndarray(rng.integers(0, 255, (48, 64, 3), np.uint8), format="rgb24")
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    return path


def lines_of(path: Path) -> dict[Path, str]:
    r"""A list as docs/formats.md describes it: escapes as in bash's $'...', then a tab."""
    named = {"n": b"\n", "t": b"\t", "r": b"\r", "\\": b"\\"}
    found = {}
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        name, reason = line.split("\t")
        plain = re.sub(
            rb"\\(?:x([0-9a-f]{2})|u([0-9a-f]{4})|([ntr\\]))",
            lambda m: (
                bytes([int(m[1], 16)])
                if m[1]
                else chr(int(m[2], 16)).encode()
                if m[2]
                else named[m[3].decode()]
            ),
            name.encode(),
        )
        found[Path(os.fsdecode(plain))] = reason
    return found


@pytest.fixture(scope="module")
def collection(tmp_path_factory) -> tuple[Path, ManifestReport]:
    """Videos with every kind of finding, prepared once beside another manifest."""
    root = tmp_path_factory.mktemp("collection")
    first = make_video(root / "train/a/1.mp4", 1)
    for copy in ("train/a/copy.mp4", "train/b/copy.mp4", "val/a/9.mp4"):
        (root / copy).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(first, root / copy)
    shutil.copy(make_video(root / "train/b/2.mp4", 2), root / "train/b/two.mp4")
    make_video(root / os.fsdecode(b"train/b/caf\xe9.mp4"), 3, frames=1)
    make_video(root / "val/b/8.mp4", 8)
    (root / "train/empty").mkdir()
    for number, name in enumerate(
        (b"bad\n\tline.mp4", b"bad\\\x1b[31m.mp4", b"bad\xff\xc2\x85.mp4", b"bad'.mp4")
    ):
        (root / "train/a" / os.fsdecode(name)).write_bytes(b"x" * (number + 10))
    (root / "other.arrow").write_bytes(b"no manifest")
    build_manifest(root / "val.arrow", read_folder(root / "val"), workers=1)
    report = build_manifest(root / "train.arrow", read_folder(root / "train"), workers=1)
    compare_with_other_manifests(report, workers=1, progress_of=show_progress)
    return root, report


def test_every_video_is_included_whatever_its_name(collection):
    _, report = collection
    manifest = Manifest.open(report.manifest.path)
    manifest.verify()
    paths = {manifest.absolute_path(manifest.row(index)).name for index in range(len(manifest))}
    assert paths == {"1.mp4", "copy.mp4", "2.mp4", "two.mp4", os.fsdecode(b"caf\xe9.mp4")}


def test_the_lists_can_be_parsed(collection):
    root, report = collection
    bad = lines_of(report.bad_list)
    assert {path.name for path in bad} == {
        os.fsdecode(name)
        for name in (b"bad\n\tline.mp4", b"bad\\\x1b[31m.mp4", b"bad\xff\xc2\x85.mp4", b"bad'.mp4")
    }
    assert all(path.is_file() for path in bad)
    found = lines_of(report.report)
    in_train = {root / "train" / name for name in ("empty", "a/1.mp4", "b/2.mp4")}
    assert found.keys() == {*in_train, root / "other.arrow"}


def test_the_summary(collection):
    root, report = collection
    text = report.summary()
    assert text.isprintable() is False and re.sub(r"\n", "", text).isprintable()
    lines = text.splitlines()
    assert lines[0] == f"{root}/train.arrow: 6 videos of 3 classes"
    assert "a 2, b 4, empty 0" in lines[1]
    assert lines[2] == "  1 class without a video keeps its class number: empty (2)"
    assert "4 bad videos are left out, listed in" in lines
    for words in (
        "videos that occur with two or more labels: 1",
        "videos that occur more than once, with one label: 1",
        "class folders without a video, which keep their class number: 1",
        "other manifests of the folder that could not be compared: 1",
        "videos that are also in val.arrow: 1",
        "one frame only: 1",
    ):
        assert f"  {words}" in lines
    assert f"      = {root}/train/b/copy.mp4 (b) and 1 more" in lines
    assert any(f"{root}/other.arrow is not a manifest" in line for line in lines), text
    assert any("val.arrow: the classes or their order differ" in line for line in lines)
    assert all(len(line) <= WIDTH for line in lines if str(root) not in line)


def test_a_summary_stays_short_whatever_is_found():
    findings = Findings()
    for kind in range(30):
        for item in range(kind + 1):
            findings.add(f"of kind {kind:02}", Path(f"{kind}/{item}.mp4"))
    lines = findings.table()
    assert [line for line in lines if line.startswith("  of")] == [
        *(f"  of kind {kind}: {kind + 1}" for kind in range(20, 30)),
        f"  of 20 more kinds: {sum(range(1, 21))}",
    ]
    assert lines.count("    and 26 more") == 1 and len(lines) <= 10 * 5 + 1


def test_many_manifests_that_cannot_be_compared_are_counted(tmp_path):
    make_video(tmp_path / "train/a/1.mp4", 1)
    for number in range(12):
        (tmp_path / f"{number}.arrow").write_bytes(b"no manifest")
    report = build_manifest(tmp_path / "train.arrow", read_folder(tmp_path / "train"), workers=1)
    compare_with_other_manifests(report, workers=1, progress_of=show_progress)
    assert "other manifests of the folder that could not be compared: 12" in report.summary()
    assert report.summary().count("not a manifest") == 3
    assert len(lines_of(report.report)) == 12


def test_the_same_bytes_whatever_the_workers(collection, tmp_path, monkeypatch):
    root, _ = collection
    names = [path.relative_to(root / "train") for path in sorted((root / "train").rglob("*.mp4"))]
    table = tmp_path / "list.tsv"
    table.write_bytes(
        b"".join(os.fsencode(name) + b"\tb\n" for name in names[1:] * 6 if "\n" not in str(name))
    )
    beside = tmp_path / "beside.csv"
    beside.write_text("val/a/9.mp4,b\nval/b/8.mp4,b\n" * 17)
    build_manifest(tmp_path / "val.arrow", read_table(beside, root), workers=1)
    monkeypatch.setattr(duplicates, "_FEW", 0)
    results = []
    for workers in (1, 2):
        listing = read_table(table, root / "train")
        report = build_manifest(tmp_path / "m.arrow", listing, workers=workers)
        compare_with_other_manifests(report, workers=workers, progress_of=show_progress)
        results.append([path.read_bytes() for path in sorted(tmp_path.glob("m.arrow*"))] + [report.summary()])
    assert len(listing) >= 32  # enough for two workers
    assert len(results[0]) == 4 and results[0] == results[1]


def test_copies_in_a_table_are_named_with_their_lines(collection, tmp_path):
    root, _ = collection
    table = tmp_path / "list.csv"
    table.write_text("train/a/1.mp4,a\ntrain/b/2.mp4,b\ntrain/a/1.mp4,b\n./train/b/2.mp4,b\ngone.mp4,a\n")
    report = build_manifest(tmp_path / "m.arrow", read_table(table, root), workers=1)
    found = lines_of(report.report)
    first, second = (found[root / name] for name in ("train/a/1.mp4", "train/b/2.mp4"))
    assert "two or more labels" in first and "(a, line 1)" in first and "(b, line 3)" in first
    assert "one label" in second and "(b, line 2)" in second and "(b, line 4)" in second
    assert report.bad == 1


def test_different_videos_have_different_content_keys(tmp_path):
    block = BLOCK
    contents = [
        b"a" * 5 * block,
        b"b" + b"a" * (5 * block - 1),
        b"a" * (5 * block - 1) + b"b",
        b"a" * 4 * block,
    ]
    contents.append(b"a" * (5 * block // 2) + b"b" + b"a" * (5 * block - 5 * block // 2 - 1))
    for number, content in enumerate(contents):
        (tmp_path / f"{number}").write_bytes(content)
    keys = [content_key(tmp_path / f"{number}") for number in range(len(contents))]
    assert len(set(keys)) == len(keys)
    (tmp_path / "shard").write_bytes(contents[1] + contents[2])
    assert content_key(tmp_path / "shard", len(contents[1]), len(contents[2])) == keys[2]
    os.mkfifo(tmp_path / "pipe")
    assert content_key(tmp_path / "none") == content_key(tmp_path) == 0


def test_paths_of_a_table_that_are_not_files_are_bad_videos(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    make_video(tmp_path / "good.mp4", 1)
    table = tmp_path / "list.csv"
    table.write_text("folder.mp4,a\npipe.mp4,a\ngood.mp4,a\n" + "x" * 300 + ".mp4,a\n")
    report = build_manifest(tmp_path / "m.arrow", read_table(table), workers=1)
    assert sorted(lines_of(report.bad_list).values()) == [
        "cannot be read: File name too long",
        "is a folder",
        "is not a regular file",
    ]


def test_a_file_of_another_kind_is_not_replaced(tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("v.mp4,a\n")
    with pytest.raises(DataError, match="exists and is not a manifest"):
        build_manifest(table, read_table(table), workers=1)
    with pytest.raises(DataError, match="is a folder"):
        build_manifest(tmp_path, read_table(table), workers=1)
    assert table.read_text() == "v.mp4,a\n"


@pytest.mark.parametrize("name", ["file/m.arrow", "file/new/m.arrow", "/proc/m.arrow"])
def test_an_output_path_that_cannot_be_written_is_refused(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"m\.arrow cannot be written: .*Give another --out"):
        check_out(str(tmp_path / name))
    assert check_out(str(tmp_path / "new/m.arrow")) == tmp_path / "new/m.arrow"
    assert sorted(tmp_path.iterdir()) == [tmp_path / "file"]


def test_the_command_checks_the_output_before_the_videos(tmp_path):
    (tmp_path / "file").touch()
    command = [sys.executable, "launch/prepare.py", "folder", str(tmp_path / "none"), "--out"]
    command.append(str(tmp_path / "file/m.arrow"))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "m.arrow cannot be written" in done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_a_check_reports_its_findings_if_its_list_cannot_be_written(tmp_path):
    path = build_manifest(tmp_path / "m.arrow", read_folder(one_video(tmp_path)), workers=1).manifest.path
    (tmp_path / "m.arrow.check.txt").mkdir()
    (tmp_path / "videos").rename(tmp_path / "moved")
    report = check_manifest(path, workers=1)
    text = " ".join(report.summary().split())
    assert report.bad == 1 and "That list could not be written: Is a directory." in text
    assert f"Note: none of 1 video was found under {tmp_path}/videos, a folder that does not exist" in text


def one_video(folder: Path) -> Path:
    make_video(folder / "videos/a/1.mp4", 1)
    return folder / "videos"


def test_the_message_if_no_video_can_be_used(tmp_path):
    table = tmp_path / "list.csv"
    table.write_text("videos\\1.mp4,a\nvideos\\2.mp4,b\n")
    with pytest.raises(DataError) as raised:
        build_manifest(tmp_path / "m.arrow", read_table(table), workers=1)
    message = str(raised.value)
    assert "No such file or directory: 2" in message and "Backslashes" in message
    assert f"{tmp_path}/videos/1.mp4" in message


def test_files_of_all_formats_are_included(tmp_path):
    kinds = {
        "gif": ("gif", None),
        "apng": ("apng", "apng"),
        "mxf": ("mpeg2video", None),
        "divx": ("mpeg4", "avi"),
        "m2v": ("mpeg2video", "mpeg2video"),
        "y4m": ("wrapped_avframe", "yuv4mpegpipe"),
        "f4v": ("mpeg4", "mp4"),
        "qt": ("mjpeg", "mov"),
        "3g2": ("mpeg4", "3g2"),
        "nut": ("mpeg4", None),
        "ivf": ("libvpx", None),
        "mjpg": ("mjpeg", "mjpeg"),
        "rm": ("rv10", None),
        "m2t": ("mpeg2video", "mpegts"),
        "MOD": ("mpeg2video", "vob"),
    }
    made = [
        make_video(tmp_path / "a" / f"x.{ending}", 1, frames=8, codec=codec, form=form)
        for ending, (codec, form) in kinds.items()
    ]
    report = build_manifest(tmp_path / "m.arrow", read_folder(tmp_path), workers=1)
    assert report.bad == 0, report.summary()
    rows = [report.manifest.row(index) for index in range(len(report.manifest))]
    assert {report.manifest.absolute_path(row): row.frames for row in rows} == dict.fromkeys(made, 8)


def info(frames: int, distance: int, width: int, height: int) -> VideoInfo:
    return VideoInfo(frames, 25.0, width, height, "h264", keyframe_distance=distance)


def test_expensive_videos_are_reported_with_a_command(tmp_path):
    cost = CostSummary()
    for number, video in enumerate((info(300, 250, 340, 256), info(9000, 12, 1280, 720))):
        cost.add(Path(f"cheap{number}.mp4"), video)
    assert cost.lines() == []
    cost.add(Path("long.mp4"), info(9000, 250, 1920, 1080))
    cost.add(Path("longer.mp4"), info(9000, 500, 1920, 1080))
    lines = cost.lines()
    assert lines[0].startswith("2 videos cost more than 0.5 s")
    assert any("longer.mp4" in line for line in lines) and any(
        "1920x1080, 9000 frames" in line for line in lines
    )
    assert all(len(line) <= WIDTH for line in "\n".join(lines).splitlines())
    assert clip_seconds(info(9000, 12, 568, 320)) < clip_seconds(info(9000, 250, 1920, 1080)) / 50


def test_memory_does_not_grow_with_the_findings(tmp_path):
    findings = Findings()
    for number in range(2000):
        findings.add(f"kind {number}", Path(f"file {number}"))
    assert findings.total == 2000 and len(findings.kinds()) <= 201
    assert len(findings.write_list(tmp_path / "list.txt").read_text().splitlines()) == 2000
    Findings().write_list(tmp_path / "list.txt")
    assert not (tmp_path / "list.txt").exists()


def test_reasons_that_differ_in_numbers_are_one_kind_with_the_first_as_an_example(tmp_path):
    findings = Findings()
    for number in (3, 3, 17):
        findings.add_reason(f"lacks frame {number}", f"video {number}")
    findings.add_reason("is empty (0 bytes)", "video")
    assert findings.table() == [
        "  lacks frame 3 (numbers differ): 3", "    video 3", "    video 3", "    video 17",
        "  is empty (0 bytes): 1", "    video",
    ]  # fmt: skip
    assert "video 17\tlacks frame 17\n" in findings.write_list(tmp_path / "list.txt").read_text()


def test_the_reported_ffmpeg_command_works(tmp_path):
    if shutil.which("ffmpeg") is None:
        pytest.skip("needs the ffmpeg program")
    make_video(tmp_path / "in.mp4", 1, frames=30)
    cost = CostSummary()
    cost.add(Path("in.mp4"), info(9000, 250, 1920, 1080))
    command = "\n".join(line for line in cost.lines() if "ffmpeg" in line or "OUT" in line)
    command = command.replace(" IN ", " in.mp4 ").replace("OUT", "out")
    done = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert (container.streams.video[0].width, container.streams.video[0].height) == (426, 320)


def test_a_large_manifest_is_compared_by_all_paths_and_some_contents(tmp_path, monkeypatch):
    """Rows 0 and 1 are copies of other files under another path, rows 2 to 4 are the same files."""
    names = [f"{number}.mp4" for number in range(12)]
    data = make_video(tmp_path / "v/0.mp4", 1).read_bytes()
    for number, name in enumerate(names):
        (tmp_path / "v" / name).write_bytes(data + bytes([number]))
    (tmp_path / "w").mkdir()
    for number in (0, 5):
        (tmp_path / "w" / f"{number}.mp4").write_bytes(data + bytes([number]))
    (tmp_path / "linked").symlink_to(tmp_path / "v")

    def made(name: str, paths: list[str]) -> ManifestReport:
        (tmp_path / "list.csv").write_text("".join(f"{path},0\n" for path in paths))
        return build_manifest(tmp_path / name, read_table(tmp_path / "list.csv", tmp_path), workers=1)

    monkeypatch.setattr(manifest, "ROWS_PER_BATCH", 4)
    made("train.arrow", [f"v/{name}" for name in names])
    ours = ["w/0.mp4", "w/5.mp4", "linked/2.mp4", "linked/3.mp4", "v/4.mp4"]
    kind = "videos that are also in train.arrow"
    report = made("val.arrow", ours)
    compare_with_other_manifests(report, workers=1, progress_of=show_progress)
    assert report.findings.counted(kind) == 5 and not report.findings.notes

    read = []
    monkeypatch.setattr(duplicates, "MOST_READ", 4)
    monkeypatch.setattr(duplicates, "MOST_LINKS", 0)
    key_of_row = duplicates._key_of_row
    monkeypatch.setattr(duplicates, "_key_of_row", lambda job: read.append(job[0].name) or key_of_row(job))
    for held in (duplicates.MOST_HELD, 4):
        monkeypatch.setattr(duplicates, "MOST_HELD", held)
        report, read[:] = replace(report, findings=Findings()), []
        compare_with_other_manifests(report, workers=1, progress_of=show_progress)
        assert read == ["0.mp4", "3.mp4", "6.mp4", "9.mp4"]
        assert lines_of(report.report).keys() >= {tmp_path / "w/0.mp4", tmp_path / "linked/2.mp4"}
        assert report.findings.counted(kind) == (4 if held > 4 else 3)  # not the copy of 5
        assert "4 of 12 videos of" in report.findings.notes[-1]
        assert len(report.findings.notes) == (1 if held > 4 else 2)
