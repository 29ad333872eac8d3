"""Videos that are in training and in validation."""

import os
from collections.abc import Iterable
from pathlib import Path

from pipelines.dataset import Dataset
from pipelines.manifest import Row, write_manifest
from pipelines.overlap import find_overlap, overlap_notes
from pipelines.paths import encode_path


def dataset(file: Path, videos: Iterable[tuple[str, int]]) -> Dataset:
    rows = (Row(path, offset, 10 if offset else 0, 0, 8, 25.0, 64, 48, "h264") for path, offset in videos)
    return Dataset([write_manifest(file, rows, ["a"])])


def test_the_same_file_by_several_names(tmp_path: Path) -> None:
    (tmp_path / "one/videos").mkdir(parents=True)
    (tmp_path / "two").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "one/videos")
    for name in "abcdé":
        (tmp_path / f"one/videos/{name}.mp4").touch()
    (tmp_path / "two/b.mp4").symlink_to(tmp_path / "one/videos/b.mp4")
    train = dataset(tmp_path / "one/train.arrow", [(f"videos/{name}.mp4", 0) for name in "abcdé"])
    others = [
        ("../linked/a.mp4", 0),
        ("b.mp4", 0),
        (str(tmp_path / "one/videos/é.mp4"), 0),
        ("../one/videos/c.mp4", 100),  # another video in the same file
        ("a.mp4", 0),
    ]
    val = dataset(tmp_path / "two/val.arrow", others)
    overlap = find_overlap(train, val)
    assert (overlap.shared, overlap.train_rows, overlap.val_rows) == (3, 5, 5)
    assert overlap.names == tuple(str(tmp_path / f"one/videos/{name}.mp4") for name in "abé")
    (note,) = overlap_notes(train, val)
    assert note.startswith("3 of 5 validation videos are in training, too: ")


def test_names_that_are_not_utf8_or_cannot_be(tmp_path: Path) -> None:
    odd = [(encode_path(Path(os.fsdecode(b"caf\xe9/\xff.mp4"))), 0), ("a\0b.mp4", 0), ("new\nline.mp4", 0)]
    several = [*odd, *((f"{n}.mp4", 0) for n in range(10_001))]
    for videos in (odd, several):
        data = dataset(tmp_path / "train.arrow", videos)
        assert find_overlap(data, data).shared == len(videos)
        (note,) = overlap_notes(data, data)
        assert "\n" not in note and "\0" not in note and "new\\nline.mp4" in note
    data = dataset(tmp_path / "odd.arrow", odd)
    assert r"caf\xe9/\xff.mp4" in overlap_notes(data, data)[0]


def test_nothing_shared_is_no_note(tmp_path: Path) -> None:
    train = dataset(tmp_path / "train.arrow", [("a.mp4", 0), ("s.tar", 512)])
    assert overlap_notes(train, dataset(tmp_path / "val.arrow", [("b.mp4", 0), ("s.tar", 1024)])) == ()


def test_large_datasets_are_compared_in_a_sample_which_the_note_says(tmp_path: Path) -> None:
    train = dataset(tmp_path / "train.arrow", ((f"c{n % 7}/{n}.mp4", 0) for n in range(70_000)))
    val = dataset(tmp_path / "val.arrow", ((f"c{n % 7}/{n}.mp4", 0) for n in range(60_000, 90_000)))
    exact = find_overlap(train, val)
    assert (exact.shared, exact.train_rows, exact.val_rows) == (10_000, 70_000, 30_000)
    assert "and 9,997 more" in overlap_notes(train, val)[0]
    overlap = find_overlap(train, val, most=35_000)
    assert 0 < overlap.shared < 10_000
    assert overlap.train_rows <= 35_002
    assert "compared were 30,000 of 30,000 and 35,000 of 70,000" in overlap_notes(train, val, 35_000)[0]
