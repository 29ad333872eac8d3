"""Folders with links, system folders, unusual names, and folders of the wrong level."""

import os
from pathlib import Path

import pytest

from pipelines.dataset.prepare.folder import read_folder
from pipelines.dataset.prepare.listing import Listing
from pipelines.errors import DataError


def files(root: Path, *names: str | bytes) -> Path:
    for name in names:
        path = root / os.fsdecode(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


def taken(listing: Listing, root: Path) -> list[tuple[str, str]]:
    """Path and name of the class of each video."""
    return [(str(path.relative_to(root)), listing.class_names[label]) for path, label in listing]


def findings_of(listing: Listing) -> dict[str, int]:
    """The count of each kind of finding."""
    return {kind: listing.findings.counted(kind) for kind in listing.findings.kinds()}


def test_system_folders_are_skipped(tmp_path):
    junk = (
        "__MACOSX",
        "@eaDir",
        "lost+found",
        ".hidden",
        "#recycle",
        "$RECYCLE.BIN",
        "System Volume Information",
    )
    names = [f"{folder}/1.mp4" for folder in junk] + [f"a/{folder}/1.mp4" for folder in junk]
    root = files(tmp_path, "a/1.mp4", "b/._1.mp4", "b/1.mp4", *names)
    listing = read_folder(root)
    assert taken(listing, root) == [("a/1.mp4", "a"), ("b/1.mp4", "b")]
    assert listing.class_names == ("a", "b")
    assert findings_of(listing) == {
        "hidden folders and system folders, skipped": 14,
        "hidden files, skipped": 1,
    }


def test_links_are_followed_and_loops_end(tmp_path):
    root = files(tmp_path / "root", "a/1.mp4", "a/real/2.mp4", "c/3.mp4")
    files(tmp_path / "elsewhere", "part/4.mp4", "part/5.mp4")
    for link, target in (
        ("b", tmp_path / "elsewhere"),  # a class that is a link
        ("a/again", "real"),  # twice within a class: taken once, by its own name
        ("a/loop", "."),
        ("a/up", ".."),
        ("a/above", tmp_path),
        ("a/other", "../c"),  # what another class has, too
        ("a/real/back", ".."),
        ("a/file.mp4", "1.mp4"),
        ("a/gone.mp4", "nowhere"),
        ("a/self.mp4", "self.mp4"),
    ):
        (root / link).symlink_to(target)
    listing = read_folder(root)
    assert taken(listing, root) == [
        ("a/1.mp4", "a"),
        ("a/file.mp4", "a"),
        ("a/other/3.mp4", "a"),
        ("a/real/2.mp4", "a"),
        ("b/part/4.mp4", "b"),
        ("b/part/5.mp4", "b"),
        ("c/3.mp4", "c"),
    ]
    assert findings_of(listing) == {
        "broken links, skipped": 2,
        "links to a parent folder or to a folder that is already included, not followed": 5,
    }


def test_many_links_between_folders_take_little_time(tmp_path):
    for number in range(12):
        files(tmp_path / "root", f"a/{number:02d}/{number}.mp4")
    for number in range(12):
        for other in range(12):
            (tmp_path / f"root/a/{number:02d}/to{other}").symlink_to(f"../{other:02d}")
    assert len(read_folder(tmp_path / "root")) == 12


def test_skipped_files_are_counted_and_listed(tmp_path):
    root = files(tmp_path, "a/1.mp4", "b/2.GIF", "empty/readme.txt", "top.mkv", "a/x", "b/3.mp4.part")
    files(root, *(f"a/frames/{number}.jpg" for number in range(50)), "a/frames/one.png")
    os.mkfifo(root / "a/pipe.mp4")
    listing = read_folder(root)
    assert taken(listing, root) == [("a/1.mp4", "a"), ("b/2.GIF", "b")]
    assert findings_of(listing) == {
        "videos outside the class folders, skipped: they have no class": 1,
        "special files such as pipes, skipped": 1,
        "still images, skipped": 51,
        "files .part, skipped": 1,
        "files .txt, skipped": 1,
        "files without an extension, skipped": 1,
        "class folders without a video, which keep their class number": 1,
    }
    lines = listing.findings.write_list(tmp_path / "list.txt").read_text().splitlines()
    assert f"{root}/a/frames\tskipped: 50 files .jpg" in lines
    assert len(lines) == 8
    assert taken(read_folder(root, more_extensions=["part"]), root)[-1] == ("b/3.mp4.part", "b")


def test_names_that_are_not_utf_8(tmp_path):
    root = files(tmp_path, b"a/caf\xe9.mp4", b"caf\xe9/1.mp4")
    listing = read_folder(root)
    assert taken(listing, root) == [
        (os.fsdecode(b"a/caf\xe9.mp4"), "a"),
        (os.fsdecode(b"caf\xe9/1.mp4"), r"caf\xe9"),
    ]
    assert findings_of(listing) == {r"class names that are not UTF-8; such a byte is written as \xNN": 1}
    assert read_folder(root, ["x", "a", r"caf\xe9"]).labels[1] == 2


def test_composed_and_decomposed_names_are_one_class(tmp_path):
    root = files(tmp_path, "Caf\u00e9/1.mp4", "Cafe\u0301/2.mp4", "b /3.mp4")
    listing = read_folder(root)
    assert listing.class_names == ("Caf\u00e9", "b")
    assert sorted(label for _, label in listing) == [0, 0, 1]
    assert (
        findings_of(listing)["folders with the same class name (in Unicode NFC, without blanks at the ends)"]
        == 1
    )
    assert [label for _, label in read_folder(root, ["b", "Cafe\u0301"])] == [1, 1, 0]
    assert "classes whose names differ only in case or blanks" in findings_of(
        read_folder(files(root, "B/4.mp4"))
    )


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("train/a/1.mp4", "val/a/2.mp4"), r"one level too high.*\n.*folder .*/train --out train\.arrow"),
        (("1.mp4", "2.mp4"), r"2 videos outside a class folder.* give its parent"),
        (("a/1.xyz",), r"files \.xyz.* --extension"),
    ],
)
def test_a_wrong_folder_is_refused_with_advice(tmp_path, names, message):
    with pytest.raises(DataError, match=message):
        read_folder(files(tmp_path, *names))


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (
            ("a/train/1.mp4", "a/val/2.mp4", "b/train/3.mp4"),
            "2 class folders have only the folders train, val",
        ),
        (("x/a/1.mp4", "x/b/2.mp4"), "All videos are a level deeper"),
        (("a/1.mp4",), "Only one class has videos"),
        (tuple(f"v{number}/1.mp4" for number in range(12)), "Each class has only one video"),
    ],
)
def test_a_note_for_a_doubtful_level(tmp_path, names, note):
    listing = read_folder(files(tmp_path, *names))
    assert len(listing) == len(names)
    assert any(note in sentence for sentence in listing.findings.notes)


def test_splits_may_be_classes_if_given_by_name(tmp_path):
    root = files(tmp_path, "train/1.mp4", "test/2.mp4")
    assert len(read_folder(root)) == 2
    root = files(tmp_path / "deep", "train/a/1.mp4", "test/a/2.mp4")
    assert len(read_folder(root, ["train", "test"])) == 2


def test_folders_that_are_not_in_the_class_names(tmp_path):
    root = files(tmp_path, "a/1.mp4", "thumbs/1.jpg")
    kind = "folders without a video that are not in the class names; they get no class number"
    assert findings_of(read_folder(root, ["a"]))[kind] == 1
    files(root, "jumb/2.mp4", "zoo/2.mp4")
    with pytest.raises(DataError, match=r"class 'jumb' is not among .* 'jump'\?, and 1 more such folders"):
        read_folder(root, ["a", "jump"])
