"""Damaged and unusual annotation files of each data set: read, or refused with their place."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.dataset.prepare.activitynet import list_activitynet
from pipelines.dataset.prepare.hacs import list_hacs
from pipelines.dataset.prepare.kinetics import list_kinetics
from pipelines.dataset.prepare.kinetics710_union import list_kinetics710
from pipelines.dataset.prepare.listing import Listing
from pipelines.dataset.prepare.moments_in_time import list_moments
from pipelines.dataset.prepare.something_something import list_something
from pipelines.dataset.prepare.something_something_v1 import list_something_v1
from pipelines.errors import DataError

ID = "abcdefghij0"
OTHER = "abcdefghij1"
KINETICS = f"label,youtube_id,time_start,time_end,split\nabseiling,{ID},1,11,train\n"
HACS = f"classname,youtube_id,subset,start,end,label\nArchery,{ID},training,1,3,1\n"
ANET = (
    f'"{ID}": {{"subset": "training", "duration": 20, "annotations": [{{"segment": [1, 5], "label": "A"}}]}}'
)

# Annotations that give one row with the files of `local`.
GOOD = {
    "kinetics": KINETICS,
    "kinetics710": KINETICS,
    "mit": "abseiling/a.mp4,abseiling,3,1\n",
    "ssv1": "1;Holding something\n",
    "ssv2": json.dumps([{"id": "1", "template": "Holding [something]"}]),
    "ssv2 frames": json.dumps([{"id": "1", "template": "Holding [something]"}]),
    "activitynet": f'{{"database": {{{ANET}}}}}',
    "hacs": HACS,
}


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    for name in (f"{ID}.mp4", "abseiling/a.mp4", "1.webm", "f/1/00001.jpg", os.fsdecode(b"bad\xff.mp4")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for name, target in (
        ("loop.mp4", "loop.mp4"), ("abseiling/loop.mp4", "loop.mp4"), ("up", "."), ("2", "2"),
    ):  # fmt: skip
        os.symlink(target, folder / name)
    (folder / "held.csv").write_text("youtube_id,time_start,time_end,split\nzzzzzzzzzzz,1,2,test\n")
    (folder / "mit.txt").write_text("abseiling,0\n")
    (folder / "ssv1.csv").write_text("Holding something\n")
    (folder / "ssv2.json").write_text('{"Holding something": "0"}')
    return folder


def read(name: str, file: Path, local: Path, labels: Path | None = None) -> Listing:
    readers: dict[str, Callable[[], Listing]] = {
        "kinetics": lambda: list_kinetics(file, [local], version="400"),
        "kinetics710": lambda: list_kinetics710([file], [local / "held.csv"], [local]),
        "mit": lambda: list_moments(file, local, labels or local / "mit.txt"),
        "ssv1": lambda: list_something_v1(file, [local], labels or local / "ssv1.csv"),
        "ssv2": lambda: list_something(file, [local], labels or local / "ssv2.json"),
        "ssv2 frames": lambda: list_something(file, [], local / "ssv2.json", frames=[local]),
        "activitynet": lambda: list_activitynet(file, [local], subset="training"),
        "hacs": lambda: list_hacs(file, [local], subset="training"),
    }
    return readers[name]()


@pytest.mark.parametrize("name", GOOD)
def test_encodings_and_line_ends(name: str, local: Path, tmp_path: Path) -> None:
    file, text = tmp_path / ("a.csv" if "," in GOOD[name][:10] else "a"), GOOD[name]
    for content in (
        text.encode(), text.encode("utf-8-sig"), text.encode("utf-16"), text.encode("utf-16-le"),
        text.encode("utf-32"), text.replace("\n", "\r\n").encode(), (text + "\n\n  \n").encode(),
    ):  # fmt: skip
        file.write_bytes(content)
        assert len(read(name, file, local)) == 1, content
    for content in (
        b"", b"\n \n", text.encode("utf-16")[:-1], text.encode()[:-8], b"\x1f\x8b\x08\0\0\0", b"[" * 100_000,
        b"<!DOCTYPE html>", b"null", b"{}", b"[1, null]", b"x" * 3_000_000, b"[" + b"9" * 5000 + b"]",
    ):  # fmt: skip
        file.write_bytes(content)
        with pytest.raises(DataError):
            read(name, file, local)
    file.unlink()
    for make in (file.mkdir, lambda: os.mkfifo(file), lambda: os.symlink(file.name, file)):
        make()
        with pytest.raises(DataError, match="cannot be read"):
            read(name, file, local)
        file.rmdir() if file.is_dir() else file.unlink()


ROW = f"abseiling,{OTHER},"


@pytest.mark.parametrize(
    ("name", "text", "token"),
    [
        *(("kinetics", f"{KINETICS}{ROW}{times},train\n", "line 3.*no time span")
          for times in ("nan,5", "5,nan", "-1,5", "5,5", "9,5", "inf,9", ",", "a,b", "1e400,2")),
        ("kinetics", f"{KINETICS}abseiling\n", "line 3: 1 fields"),
        ("kinetics", f"{KINETICS}a, b,{OTHER},1,11,train\n", "line 3.*comma"),
        ("kinetics", f"{KINETICS},{OTHER},1,11,train\n", f"{OTHER} 1-11 s: has no label"),
        ("kinetics", KINETICS.replace("split\n", "label\n", 1), "line 1: has the column label 2 times"),
        ("kinetics", KINETICS.replace("time_end", "end"), "line 1: no column time_end"),
        ("kinetics710", f"{KINETICS},{OTHER},1,11,train\n", "has no label"),
        *(("hacs", f"{HACS}Archery,{OTHER},training,{times},1\n", "line 3.*no number of seconds")
          for times in ("nan,5", "5,inf", "a,b", ",")),
        ("hacs", f"{HACS}Archery,{OTHER},training,1,3,0\n", "line 3: the label is '0'"),
        ("hacs", HACS.replace("label\n", "label,label\n", 1).replace("3,1", "3,1,-1"), "label 2 times"),
        ("hacs", f"{HACS}Cut, dry,{OTHER},training,1,3,1\n", "line 3.*comma"),
        ("mit", ",abseiling,1,1\n", "line 1: '' is no file name"),
        ("mit", "../a.mp4,abseiling,1,1\n", "line 1.*outside"),
        ("mit", "abseiling/a\0.mp4,abseiling,1,1\n", "line 1.*no file name"),
        ("ssv1", ";Holding something\n", "line 1: expected ID;CLASS"),
        ("ssv1", "1\0;Holding something\n", "line 1.*not UTF-8"),
        *(("ssv2", f'[{{"id": {value}, "template": "Holding [something]"}}]', "entry 0: its id")
          for value in ("null", "true", "[1]", '""', "1.0")),
        ("ssv2", '[{"id": "\\ud800", "template": "Holding [something]"}]', "cannot be read as JSON"),
        *(("activitynet", GOOD["activitynet"].replace("[1, 5]", value), f"{ID}, annotation 0")
          for value in ("[NaN, 5]", "[1, 1e400]", "[null, 2]", "[1]", '"12"', '{"0": 1, "1": 2}', "null")),
        *(("activitynet", GOOD["activitynet"].replace("20", value), f"{ID}, duration")
          for value in ("NaN", "-5", "null", '"x"')),
        ("activitynet", GOOD["activitynet"].replace('"A"', '"\\udfff"'), "cannot be read as JSON"),
    ],
)  # fmt: skip
def test_a_wrong_row_is_refused_with_its_place(
    name: str, text: str, token: str, local: Path, tmp_path: Path
) -> None:
    (tmp_path / "a").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=token):
        read(name, tmp_path / "a", local)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("ssv1", "\0\0\n"),
        ("ssv2", '{"Holding something": "%s"}' % ("9" * 5000)),
        ("ssv2", '{"": "0"}'),
        ("ssv2", '{"Holding something": "0", "Holding something ": "1"}'),
        ("ssv2", '{"\\ud800": "0"}'),
        ("mit", "abseiling,0\nab\0,1\n"),
    ],
)
def test_wrong_class_names_are_refused(name: str, text: str, local: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text(GOOD[name])
    (tmp_path / "labels").write_text(text)
    with pytest.raises(DataError, match="labels"):
        read(name, tmp_path / "a", local, tmp_path / "labels")


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("hacs", f"{HACS}Archery,{ID},training,9,5,1\n", "end before they begin"),
        ("hacs", f"{HACS}Archery,{ID},training,9,5,-1\n", "do not show the action"),
        ("mit", GOOD["mit"] + "./abseiling//a.mp4,abseiling,1,1\n", "more than once"),
        ("mit", GOOD["mit"] + "abseiling/loop.mp4,abseiling,1,1\n", "without a local file"),
        ("ssv1", GOOD["ssv1"] + "2;Holding something\n", "without a local file"),
        ("kinetics", f"{KINETICS}{ROW}1,11,train\n", "without a local file"),
    ],
)
def test_what_is_left_out_is_listed(name: str, text: str, kind: str, local: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_text(text)
    listing = read(name, tmp_path / "a", local)
    assert len(listing) == 1
    assert [kind in each for each in listing.findings.kinds()].count(True) == 1
