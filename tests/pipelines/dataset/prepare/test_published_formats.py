"""Manifests of published annotations with real local files: rows, frames of segments, and what is listed."""

from pathlib import Path

import numpy as np
import pytest

from launch import prepare
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import Manifest, SourceKind
from pipelines.dataset.prepare import annotations, build, untrimmed
from pipelines.dataset.prepare.findings import Findings
from pipelines.dataset.source import open_source
from pipelines.decode.pyav import decode_frames
from pipelines.errors import DataError
from tests.pipelines.published import (
    DATA,
    FORMATS,
    HEIGHT,
    RATE,
    SECONDS,
    WIDTH,
    Published,
    make_local_files,
)

FRAMES = SECONDS * RATE


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    return {name: make_local_files(each, folder / name / "local") for name, each in FORMATS.items()}


def make(name: str, local: dict[str, Path], *more: str, val: bool = False) -> Manifest:
    """The manifest that the command makes, beside the local files."""
    out = local[name].parent / ("val.arrow" if val else "train.arrow")
    arguments = FORMATS[name].arguments(local[name], val=val)
    assert prepare.run([*arguments, *more, "--out", str(out), "--workers", "1"]) == 0
    return Manifest.open(out)


def rows_of(manifest: Manifest, local: Path) -> dict[str, tuple[str, int, int]]:
    """By path: class, first frame and number of frames."""
    found = {}
    for index in range(len(manifest)):
        row = manifest.row(index)
        name = str(manifest.absolute_path(row).relative_to(local))
        name += f" {row.first_frame}" if row.is_segment else ""
        found[name] = (manifest.class_names[row.label], row.first_frame, row.frames)
    return found


def report(manifest: Manifest) -> list[str]:
    path = manifest.path.with_name(f"{manifest.path.name}.report.txt")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def lines_with(manifest: Manifest, kind: str) -> int:
    return sum(kind in line for line in report(manifest))


def test_activitynet_trains_on_segments_by_their_frames(local: dict[str, Path]) -> None:
    manifest = make("activitynet", local)
    assert manifest.class_names == ("Archery", "Ping-pong", "Zumba")
    assert rows_of(manifest, local["activitynet"]) == {
        # frames that begin from 0.01 s on and before 4.47 s, at 0.2 s each
        "v_--1DO2V4K74.avi 1": ("Archery", 1, 22),
        "v_--1DO2V4K74.avi 31": ("Archery", 31, 29),
        "-2VzSMAdzl4.avi 5": ("Zumba", 5, 10),
        "-2VzSMAdzl4.avi 25": ("Ping-pong", 25, 20),
        "v_v_k-eF6rJrz.avi 53": ("Zumba", 53, 7),  # cut at the end of the video
        "7IVvFgOZIYI_000005_000012.avi": ("Archery", 0, FRAMES),  # the file is the segment
    }
    text = " ".join(report(manifest))
    assert lines_with(manifest, untrimmed.EMPTY) == 2
    assert lines_with(manifest, untrimmed.AMBIGUOUS) == 2
    assert lines_with(manifest, annotations.REPEATED) == 1
    assert lines_with(manifest, "labels 'Zumba' and 'Archery'") == 1
    assert lines_with(manifest, annotations.MISSING) == 1
    assert lines_with(manifest, "without a segment") == 1
    assert "from 10.5 to 13.25 s in a video of 12.00 s" in text
    bad = (local["activitynet"].parent / "train.arrow.bad.txt").read_text()
    assert "v_v_k-eF6rJrz.avi\thas a segment from 12.5 to 14 s, but is 12.00 s long" in bad
    manifest.verify()
    assert prepare.run(["check", str(manifest.path), "--workers", "1", "--deep"]) == 0
    assert prepare.run(["verify", str(manifest.path)]) == 0


def test_a_segment_shows_the_frames_between_its_times(local: dict[str, Path]) -> None:
    manifest = make("activitynet", local)
    row = next(row for row in map(manifest.row, range(len(manifest))) if row.first_frame == 25)
    path = manifest.absolute_path(row)
    every = np.arange(row.frames, dtype=np.int32)
    shown = open_source(path, row).read(every).decode(None, (HEIGHT, WIDTH))
    expected = decode_frames(path, np.arange(25, 45))  # 5 to 9 s at 5 frames a second
    np.testing.assert_array_equal(shown, expected)


def test_activitynet_is_validated_on_whole_videos(local: dict[str, Path]) -> None:
    manifest = make("activitynet", local, val=True)
    assert rows_of(manifest, local["activitynet"]) == {
        "v_validation1.avi": ("Zumba", 0, FRAMES),
        "validation2.avi": ("Archery", 0, FRAMES),
    }
    assert lines_with(manifest, "labels 'Archery' and 'Zumba'") == 1  # validation3
    assert lines_with(manifest, "is 12.00 s long, 30 s by the annotations") == 1  # validation2
    rows = make("activitynet", local, "--rows", "segments", val=True)
    assert len(rows) == 5


def test_hacs_segments_and_clips(local: dict[str, Path]) -> None:
    segments = make("hacs", local)
    assert rows_of(segments, local["hacs"]) == {
        "Dodgeball/v_--0edUL8zmA.avi 12": ("Dodgeball", 12, 16),
        "Dodgeball/v_--0edUL8zmA.avi 33": ("Dodgeball", 33, 23),
        "Archery/a2X2hz1G6i8.avi 0": ("Archery", 0, FRAMES),
        "v_NUdji_CqvcY.avi 15": ("Archery", 15, 5),
    }
    clips = make("hacs_clips", local)
    assert clips.class_names == ("Archery", "Dodgeball", "Zumba")
    assert rows_of(clips, local["hacs_clips"]) == {
        "Dodgeball/v_--0edUL8zmA.avi 0": ("Dodgeball", 0, 10),
        "Dodgeball/v_--0edUL8zmA.avi 30": ("Dodgeball", 30, 10),
        "Archery/a2X2hz1G6i8.avi 28": ("Archery", 28, 10),  # 5.5 s is inside frame 27
        "v_NUdji_CqvcY.avi 10": ("Archery", 10, 10),
    }
    assert lines_with(clips, "'Dodgeball' and not 'Dodgeball' (line 8, line 9)") == 1
    assert lines_with(clips, annotations.REPEATED) == 1
    val = make("hacs_clips", local, val=True)
    assert rows_of(val, local["hacs_clips"]) == {"0O_qMHxBfXg.avi 23": ("Archery", 23, 10)}


def test_something_something_v1_has_a_row_per_folder(local: dict[str, Path], tmp_path: Path) -> None:
    manifest = make("ssv1", local)
    assert len(manifest.class_names) == 5 and list(manifest.class_names) == sorted(manifest.class_names)
    holding, turning = "Holding something", "Turning something upside down"
    rows = rows_of(manifest, local["ssv1"])
    assert {name: label for name, (label, _, _) in rows.items()} == {
        "20bn/100218": holding,
        "20bn/24413": turning,
        "20bn/48032": "Putting something, something and something on the table",
        "20bn/12": "Approaching something with your camera",
        "20bn/86000": "Pushing something so that it almost falls off but doesn't",
        "more/5": holding,
    }
    row = manifest.row(0)
    assert (row.source, row.codec, row.fps, row.frames) == (SourceKind.FRAMES, "jpeg", 12.0, 2 * RATE)
    assert (row.height, row.width) == (HEIGHT, WIDTH)
    assert lines_with(manifest, annotations.MISSING) == 1  # 99999
    assert lines_with(manifest, "labels 'Holding something' and") == 1  # 73196
    assert lines_with(manifest, "folders of frames that no row") == 2  # of the other split, and 73196
    assert len(make("ssv1", local, "--fps", "24", val=True)) == 1
    with pytest.raises(DataError, match=r"something-something-v1-test\.csv, line 1.*without labels"):
        prepare.run(
            ["ssv1", str(DATA / "something-something-v1-test.csv"), "--frames", str(local["ssv1"]),
             "--labels", str(DATA / "something-something-v1-labels.csv"), "--out", str(tmp_path / "x.arrow")]
        )  # fmt: skip
    for rate in ("0", "-5", "nan", "inf"):
        with pytest.raises(DataError, match="--fps"):
            make("ssv1", local, "--fps", rate)


def test_something_something_v2_extracted_to_frames(tmp_path: Path) -> None:
    """The same rows as of the video files."""
    numbers = (78687, 42326, 100904, 7, 64760)
    files = FORMATS["ssv2"]
    folders = Published(files.job.replace("--videos", "--frames"), folders=tuple(f"a/{n}" for n in numbers))
    found = {}
    for name, format in (("files", files), ("frames", folders)):
        local = make_local_files(format, tmp_path / name / "local")
        out = tmp_path / name / "train.arrow"
        assert prepare.run([*format.arguments(local), "--out", str(out), "--workers", "1"]) == 0
        manifest = Manifest.open(out)
        kinds = (annotations.REPEATED, annotations.CONTRADICTORY, annotations.MISSING)
        listed = [lines_with(manifest, kind) for kind in kinds]
        rows = rows_of(manifest, local).items()
        found[name] = {Path(path).stem: label for path, (label, _, _) in rows}, manifest.class_names, listed
    assert found["files"] == found["frames"] and len(found["frames"][0]) == 4
    row = manifest.row(0)
    assert (row.source, row.codec, row.fps, row.frames) == (SourceKind.FRAMES, "jpeg", 12.0, 2 * RATE)
    with pytest.raises(DataError, match="--fps"):
        prepare.run([*folders.arguments(local), "--out", str(out), "--fps", "0"])


@pytest.mark.parametrize("name", ["ssv1", "activitynet", "hacs_clips"])
def test_the_same_input_gives_the_same_bytes(name: str, local: dict[str, Path]) -> None:
    manifest = make(name, local)
    first = manifest.path.read_bytes(), report(manifest)
    again = make(name, local)
    assert (again.path.read_bytes(), report(again)) == first
    again.verify()
    assert len(Dataset([again])) >= 4


@pytest.mark.parametrize(
    ("text", "token"),
    [
        ("[]", "database"),
        ('{"database": {"short": {"subset": "training", "annotations": []}}}', "short.*YouTube id"),
        ('{"database": {"AAAAAAAAAAA": {"subset": "train", "annotations": []}}}', "AAAAAAAAAAA.*subset"),
        ('{"database": {"AAAAAAAAAAA": {"subset": "training"}}}', "expected annotations"),
        ('{"database": {"AAAAAAAAAAA": {"subset": "training", "annotations": [{"label": "a"}]}}}', "segment"),
        (
            '{"database": {"AAAAAAAAAAA": {"subset": "training", "annotations": '
            '[{"label": "a", "segment": ["x", 2]}]}}}',
            "annotation 0: 'x' is no number of seconds",
        ),
        ('{"database": {"AAAAAAAAAAA": 1, "AAAAAAAAAAA": 2}}', "'AAAAAAAAAAA' twice"),
        ('{"database": {"AAAAAAAAAAA": {"subset": "testing", "annotations": []}}}', "no video of the subset"),
    ],
)
def test_a_wrong_database_is_refused_with_its_key(tmp_path: Path, text: str, token: str) -> None:
    from pipelines.dataset.prepare.activitynet import read_database

    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=token):
        read_database(tmp_path / "a.json", "training", Findings())


@pytest.mark.parametrize(
    ("row", "token"),
    [
        ("Archery,AAAAAAAAAAA,training,1,3,0", "line 2: the label is '0'"),
        ("Archery,AAAAAAAAAAA,train,1,3,1", "line 2: 'train' is no subset"),
        ("Archery,AAAAAAAAAAA,training,1,3", "line 2: 5 fields"),
        (",AAAAAAAAAAA,training,1,3,1", "line 2: the class name is empty"),
        ("Archery,AAAAAAAAAAA,training,nan,3,1", "line 2: 'nan'"),
        ("Archery,AAAAAAAAAAA,training,1,3,-1", "no positive clip"),
    ],
)
def test_wrong_clips_are_refused_with_their_line(tmp_path: Path, row: str, token: str) -> None:
    from pipelines.dataset.prepare.hacs import read_clips

    path = tmp_path / "clips.csv"
    path.write_text(f"classname,youtube_id,subset,start,end,label\n{row}\n")
    with pytest.raises(DataError, match=token):
        read_clips(path, "training", Findings())


def test_probed_folders_of_frames_are_kept_until_a_file_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_local_files(FORMATS["ssv1"], tmp_path / "ssv1" / "local")
    command = [*FORMATS["ssv1"].arguments(folder), "--out", str(tmp_path / "train.arrow"), "--workers", "1"]
    assert prepare.run([*command, "--part", "1/2"]) == 0  # has all of the few videos
    assert not (tmp_path / "train.arrow").exists()
    damaged = folder / "20bn/12/00003.jpg"
    with damaged.open("r+b") as file:  # leaves the folder's time of change as it was
        file.write(b"no JPEG")
    assert prepare.run(command) == 0
    manifest = Manifest.open(tmp_path / "train.arrow")
    assert len(manifest) == 5
    assert "20bn/12" in (tmp_path / "train.arrow.bad.txt").read_text()
    assert "5 videos had been probed by an earlier call." in capsys.readouterr().out


def test_a_video_under_both_names_is_used_once_and_listed(local: dict[str, Path], tmp_path: Path) -> None:
    folder = make_local_files(FORMATS["hacs"], tmp_path / "hacs" / "local")
    (folder / "v_NUdji_CqvcY.avi").rename(folder / "NUdji_CqvcY.avi")
    (folder / "v_NUdji_CqvcY.avi").write_bytes((folder / "NUdji_CqvcY.avi").read_bytes())
    manifest = make("hacs", {"hacs": folder})
    assert len(manifest) == 4
    assert lines_with(manifest, "NUdji_CqvcY.avi\tthe same video as") == 1


def test_frames_that_cannot_be_used_are_bad_videos(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_local_files(FORMATS["ssv1"], tmp_path / "ssv1" / "local")
    (folder / "20bn/12/00003.jpg").unlink()
    whole = (folder / "20bn/24413/00010.jpg").read_bytes()
    (folder / "20bn/24413/00010.jpg").write_bytes(whole[: len(whole) // 2])
    manifest = make("ssv1", {"ssv1": folder})
    assert len(manifest) == 4
    bad = (tmp_path / "ssv1" / "train.arrow.bad.txt").read_text().splitlines()
    assert any("20bn/12\tlacks frame 3" in line for line in bad)
    assert any("20bn/24413\tis damaged in frame 9 of 10 (00010.jpg)" in line for line in bad)
    assert build.CUT not in " ".join(report(manifest))
    assert "lacks frame 3: 00002.jpg is followed by 00004.jpg: 1" in " ".join(capsys.readouterr().out.split())
