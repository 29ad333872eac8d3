import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines.dataset import manifest
from pipelines.dataset.manifest import Manifest, ManifestRow, SourceKind, write_columns, write_manifest
from pipelines.errors import DataError

CLASSES = ("fall", "rise", "überholen")


def some_rows(count: int) -> list[ManifestRow]:
    return [
        ManifestRow(f"videos/клип {i}.mp4", i * 7, i * 11, i % 3, 100 + i, 24000 / 1001, 320, 240 + i, "h264")
        for i in range(count)
    ]


def test_rows_are_read_as_they_were_written(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "ROWS_PER_BATCH", 4)
    rows = some_rows(10)
    write_manifest(tmp_path / "m.arrow", iter(rows), CLASSES)
    read = Manifest.open(tmp_path / "m.arrow")
    assert len(read) == 10
    assert read.class_names == CLASSES
    assert read.path == tmp_path / "m.arrow"
    for index in (9, 0, 3, 4, 7, 8):
        expected = replace(rows[index], fps=float(np.float32(rows[index].fps)))
        assert read.row(index) == expected
        assert read.row(np.int64(index)) == expected


@pytest.mark.parametrize("index", [-1, 3])
def test_an_index_out_of_range_is_an_index_error(tmp_path, index):
    with pytest.raises(IndexError, match=f"row {index} .* 3 rows"):
        write_manifest(tmp_path / "m.arrow", some_rows(3), CLASSES).row(index)


def test_relative_paths_are_relative_to_the_manifest_s_folder(tmp_path, monkeypatch):
    rows = [*some_rows(1), replace(some_rows(1)[0], path="/far/away.mp4")]
    monkeypatch.chdir(tmp_path)
    write_manifest(Path("m.arrow"), rows, CLASSES)
    opened = Manifest.open("m.arrow")
    monkeypatch.chdir("/")
    assert opened.absolute_path(opened.row(0)) == tmp_path / "videos/клип 0.mp4"
    assert opened.absolute_path(opened.row(1)) == Path("/far/away.mp4")


SEGMENT = ManifestRow("a.mp4", 0, 0, 1, 30, 25.0, 64, 48, "h264", 2.0, 0, 40, 300)
FRAMES = ManifestRow("videos/1", 0, 0, 0, 36, 12.0, 176, 100, "jpeg", 0.5, SourceKind.FRAMES)


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_that_are_not_whole_video_files_have_three_more_columns(tmp_path, weighted):
    rows = [SEGMENT, FRAMES, *some_rows(2)]
    made = write_manifest(tmp_path / "m.arrow", rows, CLASSES, weighted=weighted, sources=True)
    made.verify()
    expected = [replace(row, weight=row.weight if weighted else 1.0, fps=np.float32(row.fps)) for row in rows]
    assert [made.row(index) for index in range(4)] == expected
    assert [row.is_segment for row in expected] == [True, False, False, False]
    with pa.ipc.open_file(str(made.path)) as file:
        assert file.schema.metadata[b"manifest_version"] == b"3"
        assert file.schema.names[9:] == [
            "source", "first_frame", "video_frames", *(["weight", "weight_before"] if weighted else []),
        ]  # fmt: skip
    copied = write_columns(tmp_path / "copy.arrow", made.record_batches(), CLASSES)
    assert copied.fingerprint == made.fingerprint
    changed = [replace(SEGMENT, first_frame=41), *rows[1:]]
    other = write_manifest(tmp_path / "other.arrow", changed, CLASSES, weighted=weighted, sources=True)
    assert other.fingerprint != made.fingerprint


@pytest.mark.parametrize("row", [SEGMENT, FRAMES])
def test_such_a_row_is_never_written_as_a_whole_video_file(tmp_path, row):
    with pytest.raises(ValueError, match="sources"):
        write_manifest(tmp_path / "m.arrow", [row], CLASSES)


def test_the_fingerprint_does_not_depend_on_batches_or_path(tmp_path, monkeypatch):
    here = write_manifest(tmp_path / "a" / "m.arrow", some_rows(10), CLASSES)
    monkeypatch.setattr(manifest, "ROWS_PER_BATCH", 3)
    in_batches = write_manifest(tmp_path / "b.arrow", some_rows(10), CLASSES)
    in_batches.verify()
    shutil.move(tmp_path / "a", tmp_path / "moved")
    assert Manifest.open(tmp_path / "moved" / "m.arrow").fingerprint == here.fingerprint
    assert in_batches.fingerprint == here.fingerprint


def test_the_fingerprint_depends_on_every_column_and_the_classes(tmp_path):
    rows = some_rows(3)
    changes = {
        "path": "other",
        "offset": 1,
        "length": 1,
        "label": 0,
        "frames": 9,
        "fps": 9.0,
        "width": 9,
        "height": 9,
        "codec": "vp9",
    }
    variants = {
        name: [rows[0], replace(rows[1], **{name: value}), rows[2]] for name, value in changes.items()
    }
    variants["order"] = rows[::-1]
    variants["border"] = [replace(rows[0], path="ab"), replace(rows[1], path="c"), rows[2]]
    variants["other border"] = [replace(rows[0], path="a"), replace(rows[1], path="bc"), rows[2]]
    seen = {write_manifest(tmp_path / "m.arrow", rows, CLASSES).fingerprint}
    seen.add(write_manifest(tmp_path / "m.arrow", rows, CLASSES[::-1]).fingerprint)
    seen |= {
        write_manifest(tmp_path / "m.arrow", variant, CLASSES).fingerprint for variant in variants.values()
    }
    assert len(seen) == 2 + len(variants)


def test_verify_finds_a_changed_byte(tmp_path):
    path = write_manifest(tmp_path / "m.arrow", some_rows(50), CLASSES).path
    Manifest.open(path).verify()
    content = path.read_bytes()
    path.write_bytes(content.replace("клип 33".encode(), "клип 34".encode()))
    with pytest.raises(DataError, match="damaged"):
        Manifest.open(path).verify()


def test_opening_a_million_rows_reads_few_bytes(tmp_path):
    one = ManifestRow(
        "videos/of_a_class/with_a_long_name/0123456789.mp4", 0, 0, 1, 300, 25.0, 340, 256, "h264"
    )
    big = write_manifest(tmp_path / "big.arrow", repeat(one, 1_000_000), CLASSES).path
    small = write_manifest(tmp_path / "small.arrow", [one], CLASSES).path
    # In a process of its own, because this one has the big manifest's pages in its memory already.
    program = """
import sys
from pipelines.dataset.manifest import Manifest

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

Manifest.open(sys.argv[1]).row(0)
before = resident()
manifest = Manifest.open(sys.argv[2])
print(len(manifest), resident() - before)
manifest.row(999_999)
"""
    command = [sys.executable, "-c", program, str(small), str(big)]
    count, growth = map(
        int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    )
    assert count == 1_000_000
    assert big.stat().st_size > 90e6
    assert growth < 4e6


def test_a_manifest_pickles_as_its_path_and_refuses_a_replaced_file(tmp_path):
    first = write_manifest(tmp_path / "m.arrow", some_rows(1000), CLASSES)
    first.row(5)
    pickled = pickle.dumps(first)
    assert len(pickled) < 1000
    assert pickle.loads(pickled).row(7) == first.row(7)
    write_manifest(tmp_path / "m.arrow", some_rows(999), CLASSES)
    with pytest.raises(DataError, match="replaced"):
        pickle.loads(pickled)


def test_the_message_for_a_missing_manifest_has_the_command_to_make_one(tmp_path):
    with pytest.raises(DataError, match=r"no manifest at .*none\.arrow.*uniformerv2 prepare"):
        Manifest.open(tmp_path / "none.arrow")


def test_a_file_that_is_not_a_manifest_is_refused(tmp_path):
    path = write_manifest(tmp_path / "m.arrow", some_rows(50), CLASSES).path
    cut = tmp_path / "cut.arrow"
    cut.write_bytes(path.read_bytes()[:-40])
    text = tmp_path / "text.arrow"
    text.write_text("path,label\n")
    empty = tmp_path / "empty.arrow"
    empty.touch()
    for wrong in (cut, text, empty):
        with pytest.raises(DataError, match=f"{wrong.name} is not a manifest"):
            Manifest.open(wrong)


def rewritten(path: Path, schema: pa.Schema) -> Path:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema):
        return path


def test_other_arrow_files_and_newer_formats_are_refused(tmp_path):
    schema = pa.schema([("path", pa.string())])
    with pytest.raises(DataError, match="not a manifest"):
        Manifest.open(rewritten(tmp_path / "other.arrow", schema))
    newer = schema.with_metadata({"manifest_version": "4"})
    with pytest.raises(DataError, match="manifest format 4; this program reads up to 3"):
        Manifest.open(rewritten(tmp_path / "newer.arrow", newer))
    columns = schema.with_metadata({"manifest_version": "1"})
    with pytest.raises(DataError, match="columns"):
        Manifest.open(rewritten(tmp_path / "columns.arrow", columns))


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_leaves_the_old_manifest_unchanged(tmp_path, label):
    before = write_manifest(tmp_path / "m.arrow", some_rows(5), CLASSES)
    with pytest.raises(DataError, match=f"away.mp4 has label {label}.* 3 classes"):
        write_manifest(
            before.path, [*some_rows(9), replace(some_rows(1)[0], path="away.mp4", label=label)], CLASSES
        )
    assert Manifest.open(before.path).fingerprint == before.fingerprint
    assert list(tmp_path.iterdir()) == [before.path]


def test_class_names_must_differ(tmp_path):
    with pytest.raises(DataError, match="rise"):
        write_manifest(tmp_path / "m.arrow", some_rows(1), ["rise", "fall", "rise"])


def weighted_rows(weights: list[float]) -> list[ManifestRow]:
    return [replace(row, weight=weight) for row, weight in zip(some_rows(len(weights)), weights, strict=True)]


def test_weights_are_read_and_rows_found_by_cumulative_weight(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "ROWS_PER_BATCH", 3)
    weights = [0, 2, 0, 0.5, 0, 0, 0, 0, 0, 1, 3, 0, 0]
    made = write_manifest(tmp_path / "m.arrow", weighted_rows(weights), CLASSES, weighted=True)
    assert (made.weighted, made.total_weight) == (True, 6.5)
    assert [made.row(index).weight for index in range(len(weights))] == weights
    starts = {0: 1, 1.9: 1, 2: 3, 2.49: 3, 2.5: 9, 3.49: 9, 3.5: 10, np.nextafter(6.5, 0): 10}
    assert {weight: made.row_at_weight(weight) for weight in starts} == starts
    for weight in (-0.1, 6.5, np.nan):
        with pytest.raises(IndexError, match="sum up to"):
            made.row_at_weight(weight)
    made.verify()


def test_every_row_with_a_weight_is_found_by_the_middle_of_its_interval(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "ROWS_PER_BATCH", 64)
    weights = np.random.default_rng(0).exponential(size=1000) ** 3
    weights[::7] = 0
    weights[640:710] = 0  # a whole batch without weight
    made = write_manifest(tmp_path / "m.arrow", weighted_rows(list(weights)), CLASSES, weighted=True)
    assert made.total_weight == pytest.approx(weights.sum(), rel=1e-15)
    ends = np.cumsum(weights)
    found = [
        made.row_at_weight(end - weight / 2) for end, weight in zip(ends, weights, strict=True) if weight
    ]
    assert found == list(np.flatnonzero(weights))
    grid = np.arange(100_000) * (made.total_weight / 100_000)
    counts = np.bincount([made.row_at_weight(weight) for weight in grid], minlength=1000)
    assert counts[weights == 0].sum() == 0
    np.testing.assert_allclose(counts, weights / weights.sum() * 100_000, atol=1)


def test_rounding_never_selects_a_row_of_weight_zero(tmp_path):
    # Added up one by one, ten times 0.1 is less than the 1.0 that it is when summed exactly.
    made = write_manifest(tmp_path / "m.arrow", weighted_rows([0.1] * 10 + [0]), CLASSES, weighted=True)
    assert made.total_weight == 1.0
    assert made.row_at_weight(np.nextafter(1, 0)) == 9


def test_without_weights_each_row_has_weight_one_and_the_format_is_version_1(tmp_path):
    plain = write_manifest(tmp_path / "m.arrow", some_rows(5), CLASSES)
    assert (plain.weighted, plain.total_weight) == (False, 5.0)
    assert [plain.row_at_weight(weight) for weight in (0, 0.9, 1, 4.999)] == [0, 0, 1, 4]
    assert plain.row(3).weight == 1
    with pa.ipc.open_file(str(plain.path)) as reader:
        assert reader.schema.metadata[b"manifest_version"] == b"1"
        assert "weight" not in reader.schema.names
    ones = write_manifest(tmp_path / "ones.arrow", some_rows(5), CLASSES, weighted=True)
    assert ones.weighted
    assert ones.fingerprint != plain.fingerprint


def test_the_fingerprint_depends_on_the_weights(tmp_path):
    seen = {
        write_manifest(tmp_path / "m.arrow", weighted_rows(weights), CLASSES, weighted=True).fingerprint
        for weights in ([1, 2, 3], [1, 2, 4], [1, 3, 2])
    }
    assert len(seen) == 3


@pytest.mark.parametrize("weight", [-1, float("nan"), float("inf")])
def test_an_invalid_weight_is_refused(tmp_path, weight):
    with pytest.raises(DataError, match=rf"клип 1\.mp4 at byte 7 has weight {weight:g}"):
        write_manifest(tmp_path / "m.arrow", weighted_rows([1, weight, 1]), CLASSES, weighted=True)
    assert not list(tmp_path.iterdir())


def test_all_weights_zero_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"m\.arrow: the weights of all 3 videos are 0"):
        write_manifest(tmp_path / "m.arrow", weighted_rows([0, 0, 0]), CLASSES, weighted=True)


def test_columns_and_rows_give_the_same_manifest(tmp_path, monkeypatch):
    monkeypatch.setattr(manifest, "ROWS_PER_BATCH", 4)
    by_rows = write_manifest(tmp_path / "m.arrow", some_rows(10), CLASSES)
    by_columns = write_columns(tmp_path / "n.arrow", by_rows.record_batches(), CLASSES)
    assert by_columns.path.read_bytes() == by_rows.path.read_bytes()
    batches = list(by_rows.record_batches())
    with pytest.raises(ValueError, match="only the last batch"):
        write_columns(tmp_path / "n.arrow", [batches[2], batches[0]], CLASSES)


def test_a_path_that_cannot_be_written_is_refused_before_the_first_row(tmp_path):
    """Rows may take hours to compute."""
    (tmp_path / "file").touch()
    (tmp_path / "folder.arrow").mkdir()
    places = [tmp_path / "file" / "m.arrow", tmp_path / "folder.arrow", tmp_path / f"{'n' * 250}.arrow"]
    places.append(Path("/proc/m.arrow"))

    def rows():
        raise AssertionError("asked for a row")
        yield

    for place in places:
        with pytest.raises(DataError, match=rf"{place.name[-9:]} cannot be written: "):
            write_manifest(place, rows(), CLASSES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.arrow"]
