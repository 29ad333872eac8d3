"""Tables and lists of class names in the forms that programs write."""

import os
from pathlib import Path

import pytest

from pipelines.dataset.prepare.class_names import read_class_names
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.table import read_table
from pipelines.errors import DataError

TWO = [("v1.mp4", "a"), ("v2.mp4", "b")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("v1.mp4", "v2.mp4", "v3.mp4", "v4.mp4", "sp ace.mp4", "#hash.mp4", " lead.mp4"):
        (tmp_path / name).touch()
    return tmp_path


def read(
    folder: Path, content: str | bytes, *columns: str | None, classes: tuple[str, ...] | None = None
) -> Listing:
    path = folder / "list.csv"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_table(path, class_names=classes, columns=(*columns, None, None, None)[:3])


def rows(listing: Listing, folder: Path) -> list[tuple[str, str]]:
    """Path and name of the class of each video."""
    return [(os.path.relpath(path, folder), listing.class_names[label]) for path, label in listing]


def findings_of(listing: Listing) -> str:
    """All notes and findings of the reader on one line."""
    return " ".join([*listing.findings.notes, *listing.findings.table()])


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfpath,label\r\nv1.mp4,a\r\nv2.mp4,b\r\n",
        "video_path,class\nv1.mp4,a\nv2.mp4,b\n",
        "Video Path,Class-Name\nv1.mp4,a\nv2.mp4,b\n",
        "label,path\na,v1.mp4\nb,v2.mp4\n",
        "path;label\nv1.mp4;a\nv2.mp4;b\n",
        "v1.mp4;a\nv2.mp4;b\n",
        "v1.mp4|a\nv2.mp4|b\n",
        "v1.mp4\ta\nv2.mp4\tb\n",
        "sep=;\nfile;action\nv1.mp4;a\nv2.mp4;b\n",
        ",path,label\n0,v1.mp4,a\n1,v2.mp4,b\n",
        "Unnamed: 0,path,label\n0,v1.mp4,a\n1,v2.mp4,b\n",
        "path,label,,\nv1.mp4,a,,\nv2.mp4,b,,\n,,,\n",
        "v1.mp4,a\n\n# a comment, with a comma\n# \"\nv2.mp4,b\n",
        "# path label\nv1.mp4 a\nv2.mp4 b\n",
        "v1.mp4,a\rv2.mp4,b\r",
        '"v1.mp4" "a"\n"v2.mp4" b\n',
        "v1.mp4,a\nv2.mp4,b\n".encode("utf-16"),
        "v1.mp4,a\nv2.mp4,b\n".encode("utf-16-le"),
        "v1.mp4,a\nv2.mp4,b\n".encode("utf-16-be"),
        "v1.mp4,a\nv2.mp4,b\n".encode("utf-32"),
    ],
)  # fmt: skip
def test_the_same_two_videos(folder, content):
    assert rows(read(folder, content), folder) == TWO


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("0,v1.mp4,a\n1,v2.mp4,b\n", "counts the lines"),
        ("a,v1.mp4\nb,v2.mp4\n", "label, path"),
        ("a v1.mp4\nb v2.mp4\n", "label, path"),
        ("'v1.mp4',a\n'v2.mp4',b\n", "Single quotes"),
        (".\\v1.mp4,a\n.\\v2.mp4,b\n", "Backslashes"),
        ("path,label,split\nv1.mp4,a,train\nv2.mp4,b,val\n", "train 1, val 1"),
        ("path,label,frames\nv1.mp4,a,3\nv2.mp4,b,4\n", "Ignored: frames"),
        ("media_name,kind\nv1.mp4,a\nv2.mp4,b\n", "Line 1 is read as a header"),
        ("path,kind\nv1.mp4,a\nv2.mp4,b\n", "Line 1 is read as a header"),
        ("path,label\nv1.mp4,a\npath,label\nv2.mp4,b\n", "repeat the header"),
        ("v1.mp4 40 a\nv2.mp4 50 b\n", "number of frames"),
    ],
)
def test_interpretations_are_noted(folder, content, word):
    listing = read(folder, content)
    assert rows(listing, folder) == TWO
    assert word in findings_of(listing)


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("what,which,else\nv1.mp4,a,x\nv2.mp4,b,y\n", ("what", "which")),
        ("else,which,what\nx,a,v1.mp4\ny,b,v2.mp4\n", ("what", "WHICH")),
        ("x,a,v1.mp4\ny,b,v2.mp4\n", ("3", "2")),
        ("path,label,class\nv1.mp4,1,a\nv2.mp4,2,b\n", (None, "class")),
        ("youtube_id,label,start\nv1.mp4,a,1\nv2.mp4,b,2\n", ("youtube_id",)),
        ("v1.mp4,a,2\nv2.mp4,b,1\n", ("1", "2", "3")),
    ],
)
def test_columns_can_be_named(folder, content, columns):
    listing = read(folder, content, *columns)
    assert rows(listing, folder) == TWO
    assert (listing.weights is not None) == (len(columns) == 3)


def test_the_message_for_an_unknown_column_lists_the_columns(folder):
    with pytest.raises(DataError, match="line 1: no column 'video'; there are 2: 'path', 'label'"):
        read(folder, "path,label\nv1.mp4,a\n", "video")
    with pytest.raises(DataError, match="no column '3'"):
        read(folder, "v1.mp4,a\n", "3")


def test_blanks_stay_in_names_and_labels(folder):
    assert rows(read(folder, "v1.mp4\triding a bike\nsp ace.mp4\tyoga\n"), folder) == [
        ("v1.mp4", "riding a bike"),
        ("sp ace.mp4", "yoga"),
    ]
    assert rows(read(folder, 'v1.mp4 "riding a bike"\nsp ace.mp4 yoga\n'), folder)[0][1] == "riding a bike"
    assert rows(read(folder, '"sp ace.mp4",a\n"two\nlines.mp4",b\n'), folder)[1] == ("two\nlines.mp4", "b")
    assert rows(read(folder, '"two\nlines.mp4",a\nv1.mp4,b\n'), folder)[0] == ("two\nlines.mp4", "a")
    assert rows(read(folder, '" lead.mp4",a\n"sp ace.mp4",b\n'), folder)[0] == (" lead.mp4", "a")
    assert rows(read(folder, "#hash.mp4,a\nv1.mp4,b\n# v1.mp4,b\n"), folder) == [
        ("#hash.mp4", "a"),
        ("v1.mp4", "b"),
    ]
    with pytest.raises(DataError, match=r"line 1: there is no file 'v1\.mp4 riding a'.* tab or a comma"):
        read(folder, "v1.mp4 riding a bike\nsp ace.mp4 yoga\n")


def test_numeric_labels_are_ordered_as_numbers(folder):
    text = "path,label\n" + "".join(
        f"v{i}.mp4,{label}\n" for i, label in ((1, "0.0"), (2, "2.0"), (3, "10.0"))
    )
    listing = read(folder, text)
    assert listing.class_names == tuple(map(str, range(11)))
    assert [label for _, label in listing] == [0, 2, 10]
    assert "2.0" in findings_of(listing)
    listing = read(folder, "v1.mp4,1\nv2.mp4,2\n")
    assert [label for _, label in listing] == [1, 2]
    assert "begin at 1, and no video has label 0" in findings_of(listing)


def test_equal_accents_are_one_class_and_one_file(folder):
    composed, decomposed = "Caf\u00e9", "Cafe\u0301"
    (folder / f"{composed}.mp4").touch()
    listing = read(folder, f"v1.mp4,{composed}\nv2.mp4,{decomposed}\n{decomposed}.mp4,b\n")
    assert listing.class_names == (composed, "b")
    assert Path(listing.paths[2]) == folder / f"{composed}.mp4"
    assert read(folder, f"v1.mp4,{decomposed}\n", classes=(composed, "x")).labels[0] == 0
    assert read(folder, f"v1.mp4,{composed}\n", classes=("x", decomposed)).labels[0] == 1


def test_a_path_may_hold_any_bytes_but_a_label_may_not(folder):
    name = os.fsdecode(b"caf\xe9.mp4")
    (folder / name).touch()
    assert rows(read(folder, b"caf\xe9.mp4,a\n"), folder) == [(name, "a")]
    with pytest.raises(DataError, match=r"line 2: label 'caf\\xe9' is not UTF-8"):
        read(folder, b"v1.mp4,b\nv2.mp4,caf\xe9\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("v1.mp4,0\nv2.mp4,-1\n", "line 2: label -1 is negative"),
        ("v1.mp4,0\nv2.mp4,0.5\n", "line 2: label 0.5 is not a whole number"),
        ("v1.mp4,0\nv2.mp4," + "9" * 4000 + "\n", "line 2: label 9+ is more than"),
        ("v1.mp4,a\nv2\0.mp4,b\n", "line 2 .* NUL"),
        ("v1.mp4,a,b\nv2.mp4,b\n", "line 1: .* several labels"),
        ("path,label\nv1.mp4,a\nv2.mp4,b,c\n", "line 3: .* several labels"),
        ("path,label\nv1.mp4,\"[1, 2]\"\n", "line 2: .*looks like several"),
        ("label,youtube_id,time_start\na,abc,1\n", "--path-column"),
        ("youtube_id,label\nabc,a\n", "--path-column"),
        ("path,kind,sort\nv1.mp4,a,b\n", "--label-column"),
        ("http://host/v1.mp4,a\n", "line 1: 'http://host/v1.mp4' is a URL"),
        ("path,label\nv1.mp4,a\n\nv2.mp4\n", "line 4: expected a path and a label, found 1 field"),
        ("path,label,weight\nv1.mp4,,1\n", "line 2: expected .* without a label"),
        ("path,label\nv1.mp4,3 5\nv2.mp4,1\n", "line 2: label '3 5' looks like several"),
        ('v1.mp4,"a\nv2.mp4,b\n', "line 1: a double quote is not closed"),
        ('[{"path": "v1.mp4", "label": 0}]\n', "looks like JSON"),
        ("[\n  {\n", "looks like JSON"),
        ("x" * 2**20 + "\n", "line 1 is longer"),
        ("#only\n", "found 1 field|no video"),
    ],
)  # fmt: skip
def test_invalid_lines_are_refused_with_their_number(folder, content, message):
    with pytest.raises(DataError, match=message):
        read(folder, content)


def test_folders_of_images_are_refused(folder):
    (folder / "video1").mkdir()
    with pytest.raises(DataError, match=r"line 1: .*video1 is a folder: .* of images"):
        read(folder, "video1 40 0\nvideo2 50 1\n")


def test_paths_relative_to_the_current_folder_are_recognised(folder, monkeypatch):
    (folder / "lists").mkdir()
    monkeypatch.chdir(folder)
    path = Path("lists/list.csv")
    path.write_text("v1.mp4,a\n")
    assert "give --root ." in findings_of(read_table(path))


def test_unusual_labels_are_noted(folder):
    assert "'A' and 'a'" in findings_of(read(folder, "v1.mp4,a\nv2.mp4,A\n"))
    assert "look like several" in findings_of(read(folder, "v1.mp4,a\nv2.mp4,b\nv3.mp4,a|b\n"))
    unique = "".join(f"v{i}.mp4,name{i}\n" for i in range(12))
    assert "a different class" in findings_of(read(folder, unique))


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (b"\xef\xbb\xbfa\nb\n", ("a", "b")),
        (b"a\nb\n\n\n", ("a", "b")),
        (b"0 a\n1 b\n", ("a", "b")),
        (b"1 b\n0 a\n", ("a", "b")),
        (b"id,name\n0,a\n1,b\n", ("a", "b")),
        (b"name;id\nb;1\na;0\n", ("a", "b")),
        (b"0\ta long name\n1\tb\n", ("a long name", "b")),
        (b'0,"cut, slice"\n1,b\n', ("cut, slice", "b")),
        (b"cut, slice\nb\n", ("cut, slice", "b")),
        (b"2 a\n7 b\n", ("2 a", "7 b")),
        ("Cafe\u0301\nb\n".encode(), ("Caf\u00e9", "b")),
        ("a\r\nb\r\n".encode("utf-16"), ("a", "b")),
    ],
)
def test_lists_of_class_names(tmp_path, content, names):
    (tmp_path / "classes.txt").write_bytes(content)
    assert read_class_names(tmp_path / "classes.txt") == names


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\ncaf\xe9\n", r"line 2: 'caf\\xe9' is not UTF-8"),
        (b"a\n\0\n", "line 2: .* NUL"),
        ("Caf\u00e9\nCafe\u0301\n".encode(), "line 2: class 'Caf\u00e9' .* line 1"),
    ],
)
def test_invalid_lists_of_class_names_are_refused(tmp_path, content, message):
    (tmp_path / "classes.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_class_names(tmp_path / "classes.txt")


def test_numeric_labels_follow_a_class_list_that_counts_from_1(folder):
    (folder / "classes.txt").write_text("1 a\n2 b\n")
    names = read_class_names(folder / "classes.txt")
    assert "1 is the first class" in names.note
    assert rows(read(folder, "v1.mp4 1\nv2.mp4 2\n", classes=names), folder) == TWO
    with pytest.raises(DataError, match="line 2: label 0, but labels begin at 1"):
        read(folder, "v1.mp4 1\nv2.mp4 0\n", classes=names)
