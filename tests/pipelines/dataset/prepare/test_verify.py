"""`verify` lists every wrong row with its column, and repeated videos; a valid manifest has none."""

import math
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines.dataset import manifest
from pipelines.dataset.manifest import Manifest, write_manifest
from pipelines.dataset.prepare.verify import WHOLE, verify_manifest
from tests.pipelines.damaged_manifests import change_header, change_rows
from tests.pipelines.dataset.test_damaged_manifest import CLASSES, ROWS, WRONG, cut_a_batch

ROOT = Path(__file__).parents[4]


@pytest.fixture
def weighted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A manifest of three record batches, with weights."""
    monkeypatch.setattr(manifest, "ROWS_PER_BATCH", 4)
    return write_manifest(tmp_path / "m.arrow", ROWS, CLASSES, weighted=True).path


def listed(path: Path) -> list[tuple[str, str]]:
    """Row and column of each line of the list that `verify` writes."""
    result = verify_manifest(Manifest.open(path))
    result.write_list()
    file = path.with_name(f"{path.name}.verify.txt")
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    assert all(line.count("\t") == 1 for line in lines)
    return [(row, text.partition(":")[0]) for row, text in (line.split("\t") for line in lines)]


def test_a_valid_manifest_has_no_list_and_all_batches_are_reported(weighted: Path) -> None:
    done: list[tuple[int, int]] = []
    result = verify_manifest(Manifest.open(weighted), progress=lambda *counts: done.append(counts))
    assert not result.is_wrong and not result.repeated_rows
    assert done == [(4, 10), (8, 10), (10, 10)]
    assert listed(weighted) == []


@pytest.mark.parametrize(("column", "value", "reason"), WRONG.values(), ids=WRONG)
def test_a_wrong_value_is_listed_with_row_and_column(
    weighted: Path, column: str, value: Any, reason: str
) -> None:
    write_manifest(weighted, ROWS, CLASSES, weighted=True, sources=True)
    change_rows(weighted, {5: {column: value}})
    found = [line for line in listed(weighted) if line != ("row 5", "weight_before")]  # of a wrong weight
    named = {"offset": ("offset", "length"), "video_frames": ("video_frames", "first_frame")}
    assert len(found) == 1 and found[0][0] == "row 5"
    assert found[0][1] in named.get(column, (column, "video_frames"))
    assert reason.split("x")[0] in weighted.with_name("m.arrow.verify.txt").read_text(encoding="utf-8")


def test_all_wrong_values_are_listed(weighted: Path) -> None:
    change_rows(weighted, {0: {"label": -1, "fps": math.nan, "width": 0}, 9: {"label": 3}})
    assert listed(weighted) == [("row 0", "label"), ("row 0", "width"), ("row 0", "fps"), ("row 9", "label")]
    assert verify_manifest(Manifest.open(weighted)).wrong_rows == 2


def test_strings_outside_their_buffer_and_bytes_that_are_not_utf8_are_listed(weighted: Path) -> None:
    content = weighted.read_bytes()
    ends = struct.pack("<5i", 0, *(len(f"videos/клип {i}.mp4".encode()) * (i + 1) for i in range(4)))
    place = content.index(ends) + 8
    weighted.write_bytes(content[:place] + struct.pack("<i", -1) + content[place + 4 :])
    assert listed(weighted) == [("row 1", "path"), ("row 2", "path")]
    weighted.write_bytes(content.replace("клип 7".encode(), b"\xff" * 10))
    assert listed(weighted)[0] == ("row 7", "path")


def test_sums_fingerprint_and_missing_rows_are_listed(weighted: Path) -> None:
    change_rows(weighted, {6: {"weight_before": 100.0}})
    assert listed(weighted) == [("row 5", "weight_before"), ("row 6", "weight_before")]
    change_rows(weighted, {6: {"weight_before": 7.0}})
    change_header(weighted, fingerprint="0" * 64)
    assert ("header", "fingerprint") in listed(weighted)
    cut_a_batch(weighted)
    result = verify_manifest(Manifest.open(weighted))
    assert (result.wrong_rows, result.problems.counted(WHOLE)) == (4, 1)
    assert "rows 4 to 7" in result.summary()


def test_damage_before_the_first_row_is_listed(weighted: Path) -> None:
    content = weighted.read_bytes()
    fingerprint = Manifest.open(weighted).fingerprint.encode()
    for damaged in (
        content.replace(fingerprint, fingerprint[::-1], 1),  # the first of two
        content[:8] + bytes(16) + content[24:],
        content[:8] + b"\xff\xff\xff\xff\xff\xff\xff\x7f" + content[16:],
    ):
        weighted.write_bytes(damaged)
        assert Manifest.open(weighted).row(0)
        assert [row for row, _ in listed(weighted)] == ["head"]
        assert "the schema before the first row" in weighted.with_name("m.arrow.verify.txt").read_text()


def test_a_video_of_two_rows_is_listed_and_no_other(tmp_path: Path) -> None:
    other_bytes = replace(ROWS[5], offset=9, length=9)
    rows = [*ROWS, replace(ROWS[3], codec="vp9"), replace(ROWS[4], label=2), other_bytes]
    path = write_manifest(tmp_path / "m.arrow", rows, CLASSES).path
    result = verify_manifest(Manifest.open(path))
    assert (result.repeated_rows, result.is_wrong) == (2, False)
    assert listed(path) == [("row 10", "path"), ("row 11", "path")]
    text = path.with_name("m.arrow.verify.txt").read_text(encoding="utf-8")
    assert "is also row 4, with label 1 there and 2 here" in text


def test_segments_of_one_video_are_not_the_same_and_their_columns_are_checked(tmp_path: Path) -> None:
    row = replace(ROWS[0], frames=10, video_frames=100)
    rows = [row, replace(row, first_frame=10), replace(row, frames=11), row, replace(row, first_frame=90)]
    path = write_manifest(tmp_path / "m.arrow", rows, CLASSES, sources=True).path
    assert listed(path) == [("row 3", "path")]
    wrong = {0: {"source": 9}, 1: {"first_frame": 91}, 2: {"first_frame": -1}, 4: {"video_frames": 0}}
    change_rows(path, wrong)
    columns = ["source", "first_frame", "first_frame", "video_frames"]
    assert listed(path) == list(zip(("row 0", "row 1", "row 2", "row 4"), columns, strict=True))


def verify(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "prepare.py"), "verify", *map(str, arguments)],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_exits_with_0_1_or_2(tmp_path: Path) -> None:
    path = write_manifest(tmp_path / "m.arrow", [*ROWS, ROWS[0]], CLASSES).path
    done = verify(path)
    assert (done.returncode, done.stderr) == (1, "")
    assert "verifying: 11 of 11" in done.stdout and "row 10 is also row 0" in done.stdout
    assert verify(path, "--allow-repeats").returncode == 0
    path.write_bytes(path.read_bytes()[:-9])
    done = verify(path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
