"""Videos that are in training and in validation."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pytest

from pipelines.dataset import manifest, split_overlap
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import ManifestRow, write_manifest
from pipelines.dataset.paths import encode_path
from pipelines.dataset.split_overlap import find_overlap, overlap_notes


def dataset(file: Path, videos: Iterable[tuple[str, int]]) -> Dataset:
    rows = (
        ManifestRow(path, offset, 10 if offset else 0, 0, 8, 25.0, 64, 48, "h264") for path, offset in videos
    )
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
    found = find_overlap(train, val)
    assert (found.shared, found.train_rows, found.val_rows) == (3, 5, 5)
    for shown, name in zip(found.names, "abé", strict=True):
        assert shown.endswith(f"one/videos/{name}.mp4")  # a long path is cut in front
    (note,) = overlap_notes(train, val)
    assert note.startswith("3 of 5 validation videos are also in training: ")


def test_a_file_of_which_several_rows_are_shared_is_named_once(tmp_path: Path) -> None:
    data = dataset(tmp_path / "train.arrow", [(f"{name}.mp4", 0) for name in "aaaaabbcd"])
    (note,) = overlap_notes(data, data)
    assert note.startswith("9 of 9 validation videos are also in training: ") and " and 1 more. " in note
    assert [note.count(f"/{name}.mp4") for name in "abcd"] == [1, 1, 1, 0]


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


def test_no_note_if_nothing_is_shared(tmp_path: Path) -> None:
    train = dataset(tmp_path / "train.arrow", [("a.mp4", 0), ("s.tar", 512)])
    assert overlap_notes(train, dataset(tmp_path / "val.arrow", [("b.mp4", 0), ("s.tar", 1024)])) == ()


def test_large_datasets_are_compared_partly_and_the_note_has_the_numbers(tmp_path: Path) -> None:
    train = dataset(tmp_path / "train.arrow", ((f"c{n % 7}/{n}.mp4", 0) for n in range(70_000)))
    val = dataset(tmp_path / "val.arrow", ((f"c{n % 7}/{n}.mp4", 0) for n in range(60_000, 90_000)))
    exact = find_overlap(train, val)
    assert (exact.shared, exact.train_rows, exact.val_rows) == (10_000, 70_000, 30_000)
    assert "and 9,997 more" in overlap_notes(train, val)[0]
    sample = find_overlap(train, val, most=35_000)
    assert 0 < sample.shared < 10_000
    assert sample.train_rows <= 35_002
    assert "30,000 of 30,000 validation videos and 35,000 of 70,000" in overlap_notes(train, val, 35_000)[0]
    other = dataset(tmp_path / "other.arrow", [("new.mp4", 0)])
    assert overlap_notes(train, other) == ()
    (note,) = overlap_notes(train, other, 35_000)
    assert note.startswith(
        "no validation video was found in training (compared: 1 of 1 validation videos and 35,000 of 70,"
    )


def test_the_work_does_not_grow_with_the_number_of_record_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One hash table is built, each folder is resolved once, and of many record batches some are read."""
    monkeypatch.setattr(manifest, "ROWS_PER_BATCH", 10)
    monkeypatch.setattr(split_overlap, "MOST_LINKS", 0)
    data = dataset(tmp_path / "train.arrow", ((f"c{n % 7}/{n}.mp4", 0) for n in range(1000)))
    calls = {"is_in": 0, "realpath": 0}

    def counted(module: Any, name: str) -> None:
        function = getattr(module, name)

        def call(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return function(*arguments, **named)

        monkeypatch.setattr(module, name, call)

    counted(pc, "is_in")
    counted(os.path, "realpath")
    assert find_overlap(data, data).shared == 1000
    assert calls == {"is_in": 1, "realpath": 7}
    monkeypatch.setattr(split_overlap, "MOST_BATCHES", 30)
    found = find_overlap(data, data)
    assert (found.train_rows, found.shared) == (250, 250)  # every fourth batch
    assert "compared: 250 of 1,000" in overlap_notes(data, data)[0]
