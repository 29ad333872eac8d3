"""Damaged manifests are read or refused with a message, and never crash a process."""

import math
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from pipelines.augment.params import TrainClipSpec, ViewSpec
from pipelines.dali.external_source import TrainSource, ViewSource
from pipelines.dali.sample_reader import Decoding, SampleReader, SampleRequest
from pipelines.dataset import manifest
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import Manifest, ManifestRow, write_manifest
from pipelines.dataset.split_overlap import find_overlap
from pipelines.errors import DataError, VideoError
from pipelines.loader import train_loader
from pipelines.sampling.sampler import Part, TrainSampler, ViewSampler
from tests.pipelines.batches import HALF, options
from tests.pipelines.damaged_manifests import (
    change_header,
    change_rows,
    parts,
    write_parts,
)

CLASSES = ("fall", "rise", "überholen")
ROWS = [
    ManifestRow(f"videos/клип {i}.mp4", 0, 0, i % 3, 100 + i, 25.0, 320, 240, "h264", float(i % 4))
    for i in range(10)
]

WRONG: dict[str, tuple[str, Any, str]] = {
    "negative label": ("label", -1, "has label -1 in the manifest, but there are 3 classes"),
    "label beyond the classes": ("label", 3, "labels go from 0 to 2"),
    "no frame": ("frames", 0, "has 0 frames"),
    "negative frames": ("frames", -(2**31), "has -2147483648 frames"),
    "no width": ("width", 0, "0x240 pixels"),
    "no height": ("height", 0, "320x0 pixels"),
    "negative height": ("height", -5, "320x-5 pixels"),
    "enormous width": ("width", 2**31 - 1, "a side has 1 to"),
    "rate that is no number": ("fps", math.nan, "nan frames per second"),
    "infinite rate": ("fps", math.inf, "inf frames per second"),
    "negative rate": ("fps", -1.0, "-1 frames per second"),
    "negative offset": ("offset", -1, "offset -1"),
    "offset without length": ("offset", 5, "offset 5 and length 0"),
    "negative length": ("length", -(2**63), "length -9223372036854775808"),
    "no path": ("path", "", "has no path"),
    "path with a NUL": ("path", "a\0b", "NUL"),
    "negative weight": ("weight", -1.0, "weight -1"),
    "weight that is no number": ("weight", math.nan, "weight nan"),
    "unknown source": ("source", 99, "source 99 in the manifest, which this program does not know"),
    "first frame of a whole video": ("first_frame", 1, "from frame 1 on"),
    "segment beyond its video": ("video_frames", 104, "a segment of 105 frames"),
    "video of negative length": ("video_frames", -(2**31), "a video of -2147483648 frames"),
}


@pytest.fixture
def weighted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A manifest of three record batches, with weights."""
    monkeypatch.setattr(manifest, "ROWS_PER_BATCH", 4)
    return write_manifest(tmp_path / "m.arrow", ROWS, CLASSES, weighted=True).path


@pytest.fixture
def plain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(manifest, "ROWS_PER_BATCH", 4)
    return write_manifest(tmp_path / "plain.arrow", ROWS, CLASSES).path


@pytest.mark.parametrize(("column", "value", "reason"), WRONG.values(), ids=WRONG)
def test_a_row_with_a_wrong_value_is_refused_and_listed(
    weighted: Path, column: str, value: Any, reason: str
) -> None:
    write_manifest(weighted, ROWS, CLASSES, weighted=True, sources=True)
    change_rows(weighted, {5: {column: value}})
    opened = Manifest.open(weighted)
    with pytest.raises(VideoError) as refused:
        opened.row(5)
    assert reason in str(refused.value)
    assert list(opened.wrong_rows()) == [(5, str(refused.value))]
    assert opened.row(4) == ROWS[4]
    opened.verify_fingerprint()
    name = str(weighted.parent / opened._batch(1).text("path", 1))
    offset = int(opened._batch(1).numbers("offset")[1])
    name += f" at byte {offset}" if offset else ""
    assert opened.printable_path(5) == (f"row 5 of {weighted}" if value == "a\0b" else name)
    with pytest.raises(DataError, match=r"m\.arrow is damaged: row 5, .*uniformerv2 prepare"):
        opened.verify()
    with pytest.raises(DataError, match="damaged: row 5"):
        list(opened.record_batches())


HEADERS: dict[str, dict[str, str | bytes | None]] = {
    "rows": {"rows": "11"},
    "fewer rows": {"rows": "0"},
    "negative rows": {"rows": "-1"},
    "digits of another script": {"rows": "١٠"},
    "endless rows": {"rows": "1" * 5000},
    "no rows": {"rows": None},
    "batch of none": {"rows_per_batch": "0"},
    "another batch": {"rows_per_batch": "3"},
    "words for a number": {"rows_per_batch": "four"},
    "rows that the file cannot hold": {"rows": "3000000", "rows_per_batch": "1000000"},
    "no version": {"manifest_version": ""},
    "fingerprint": {"fingerprint": "0"},
    "no fingerprint": {"fingerprint": None},
    "bytes": {"fingerprint": b"\xff" * 64},
    "no classes": {"class_names": None},
    "classes that are no JSON": {"class_names": "fall, rise"},
    "classes that are no list": {"class_names": '{"fall": 0}'},
    "classes that are no names": {"class_names": "[1, 2, 3]"},
    "class named twice": {"class_names": '["fall", "rise", "fall"]'},
    "deep nesting": {"class_names": "[" * 100_000},
    "name that cannot be written": {"class_names": '["\\ud800", "rise", "fall"]'},
    "no weight": {"total_weight": None},
    "weight of zero": {"total_weight": "0"},
    "infinite weight": {"total_weight": "1e999"},
    "weight that is no number": {"total_weight": "nan"},
}


@pytest.mark.parametrize("values", HEADERS.values(), ids=HEADERS)
def test_an_invalid_header_is_refused_when_opened(
    weighted: Path, values: dict[str, str | bytes | None]
) -> None:
    change_header(weighted, **values)
    with pytest.raises(DataError, match=rf"m\.arrow is damaged: .*{next(iter(values))}.* Make it again"):
        Manifest.open(weighted)


def test_columns_of_other_types_and_missing_values_are_refused(plain: Path) -> None:
    schema, batches = parts(plain)

    def refused(schema: pa.Schema, columns: list[list[Any]], message: str, **options: Any) -> None:
        made = [pa.RecordBatch.from_arrays(arrays, schema=schema) for arrays in columns]
        write_parts(plain, schema, made, **options)
        with pytest.raises(DataError, match=message):
            Manifest.open(plain).row(5)

    whole = [batch.columns for batch in batches]
    long = [[pa.array(["x" * 10_000] * len(c[0])), *c[1:]] for c in whole]
    for compression in ("zstd", "lz4"):  # what a few bytes become has no limit
        refused(schema, long, "it is compressed", compression=compression)
    place = schema.get_field_index("label")
    wide = schema.set(place, pa.field("label", pa.int64(), nullable=False))
    refused(wide, [[*c[:3], c[3].cast(pa.int64()), *c[4:]] for c in whole], "columns of a manifest")
    loose = schema.set(place, schema.field(place).with_nullable(True))
    refused(loose, whole, "columns of a manifest")
    holes = [[*c[:3], pa.array([None] * len(c[3]), pa.int32()), *c[4:]] for c in whole]
    refused(schema, holes, "damaged: column label has missing values")
    refused(schema, [whole[0], whole[2], whole[1]], "damaged: a batch has 4 rows")
    refused(schema, whole[:2], "rows 10 and rows_per_batch 4, .* 2 batches")


def test_strings_outside_the_file_are_refused_row_by_row(plain: Path, tmp_path: Path) -> None:
    content = plain.read_bytes()
    ends = struct.pack("<5i", 0, *(len(f"videos/клип {i}.mp4".encode()) * (i + 1) for i in range(4)))
    assert content.count(ends) >= 1
    place = content.index(ends) + 8  # where row 2 begins
    for wrong in (-1, 2**31 - 1, -(2**31), 5000, 1):
        plain.write_bytes(content[:place] + struct.pack("<i", wrong) + content[place + 4 :])
        opened = Manifest.open(plain)
        refused = [index for index, reason in opened.wrong_rows() if "damaged" in reason]
        assert set(refused) <= {1, 2} and refused
        assert opened.row(3) == ManifestRow(**_plain(3))
        assert opened.printable_path(refused[0]) == f"row {refused[0]} of {plain}"
        with pytest.raises(DataError, match="damaged"):
            opened.verify()


def _plain(index: int) -> dict[str, Any]:
    return {name: getattr(ROWS[index], name) for name in ManifestRow.__slots__ if name != "weight"}


@pytest.mark.parametrize(
    "changes",
    [
        {5: {"weight_before": 100.0}},
        {4: {"weight_before": -3.0}},
        {9: {"weight_before": math.nan}},
        {1: {"weight": 2.0}},
        {9: {"weight": 3.0}},
        {index: {"weight_before": float(-index)} for index in range(10)},
        {index: {"weight_before": math.nan} for index in range(10)},
    ],
)
def test_wrong_sums_of_weights_are_refused_when_sampled(
    weighted: Path, changes: dict[int, dict[str, float]]
) -> None:
    change_rows(weighted, changes)
    opened = Manifest.open(weighted)
    sampler = TrainSampler(10, 10, seed=0, parts=(Part(10, 1.0, opened),))
    with pytest.raises(DataError, match=r"m\.arrow is damaged: .* weight"):
        for place in range(10):
            sampler.slot(0, place)
    with pytest.raises(DataError, match="damaged"):
        opened.verify()


def cut_a_batch(path: Path) -> None:
    """Take the last row from the middle one of three record batches."""
    schema, batches = parts(path)
    batches[1] = batches[1].slice(0, 3)
    write_parts(path, schema, batches)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: change_rows(path, {5: {"weight_before": math.nan}}), "row .* has weight"),
        (cut_a_batch, "a batch has 3 rows"),
    ],
    ids=["a sum of weights", "a record batch"],
)
def test_a_damaged_manifest_ends_a_loader_with_a_message(
    weighted: Path, damage: Callable[[Path], None], words: str
) -> None:
    """Missing videos are bad samples; damage of the manifest itself ends the run."""
    damage(weighted)
    dataset = Dataset.open([weighted])
    sampler = TrainSampler(10, 4, seed=0, parts=(Part(10, 1.0, dataset.manifests[0]),))
    clips = train_loader(
        dataset, sampler, TrainClipSpec(2, 16), mean=HALF, std=HALF, micro_batch=4, rank=0, world_size=1,
        first_step=0, options=options(workers=2),
    )  # fmt: skip
    try:
        with pytest.raises(DataError, match=rf"m\.arrow is damaged: {words}.* Make it again") as raised:
            for _, _ in zip(range(20), clips, strict=False):
                pass
        assert "Traceback" not in str(raised.value)
        assert raised.value.__context__ is None  # nothing holds the pipeline
    finally:
        clips.close()


def test_an_old_manifest_with_an_empty_class_name_is_read(weighted: Path) -> None:
    change_header(weighted, class_names='["fall", "", "rise"]')
    opened = Manifest.open(weighted)
    assert opened.class_names == ("fall", "", "rise")
    assert opened.row(1).label == 1
    with pytest.raises(DataError, match="a class name is empty"):
        write_manifest(weighted, ROWS, opened.class_names)


def test_a_total_that_is_not_the_sum_is_refused_at_the_first_draw(weighted: Path) -> None:
    for total in ("12.5", "1e300", "1e-300", "13.001"):
        change_header(weighted, total_weight=total)
        with pytest.raises(DataError, match="damaged: row 9 has weight"):
            Manifest.open(weighted).row_at_weight(0)


def test_a_dataset_names_a_bad_row_by_its_path(weighted: Path, plain: Path) -> None:
    change_rows(plain, {2: {"label": -7}})
    dataset = Dataset.open([weighted, plain])
    with pytest.raises(VideoError, match="label -7"):
        dataset.row(12)
    assert dataset.path(12) == plain.parent / ROWS[2].path
    assert dataset.printable_path(12) == str(plain.parent / ROWS[2].path)


@pytest.mark.parametrize("decoder", ["pyav", "dali", "hybrid"])
def test_a_bad_row_gives_a_placeholder_without_a_label_in_training_and_evaluation(
    plain: Path, decoder: str
) -> None:
    unused = ("weight", "first_frame", "video_frames")
    wrong = {name: value for name, value, _ in WRONG.values() if name not in unused}
    write_manifest(plain, ROWS, CLASSES, sources=True)
    change_rows(plain, {index: {name: value} for index, (name, value) in enumerate(wrong.items())})
    dataset = Dataset.open([plain])
    samples = SampleReader(dataset, Decoding(decoder, graph_share=0.5))
    train = TrainSource(samples, TrainSampler(10, 20, 0, repeats=2), TrainClipSpec(4, 32), 20, 0, 1, 0)
    views = ViewSource(samples, ViewSampler(10, 10, 1), ViewSpec(4, 32, 2, 3), 0)
    for source in (train, views):
        found = []
        for position in range(10):
            arrays = source.layout.by_name(source(SimpleNamespace(idx_in_epoch=position)))
            record, reason = arrays["record"].view(source.record)[0], arrays["reason"].tobytes()
            assert reason != b"\0"  # the videos of good rows do not exist
            if record["sample"] < len(wrong):
                assert (record["label"], record["valid"]) == (-1, 0)
                assert b"manifest" in reason or b"NUL" in reason
            found.append(int(record["sample"]))
        assert sorted(found) == list(range(10))


def test_a_folder_a_device_or_a_range_outside_a_shard_is_a_bad_video(plain: Path) -> None:
    (plain.parent / "shard").write_bytes(b"0123")
    changes = {
        0: {"path": "/dev/null", "length": 4},
        1: {"path": ".."},
        2: {"path": "/dev/zero"},
        3: {"path": "shard", "offset": 2**63 - 1, "length": 2**63 - 1},
        4: {"path": "shard", "length": 2**62},
        5: {"path": "shard", "offset": 2, "length": 3},
    }
    change_rows(plain, changes)
    samples = SampleReader(Dataset.open([plain]), Decoding("pyav"))
    reasons = []
    for index in changes:
        row, _ = samples.row(index)
        reasons.append(samples.load(SampleRequest(index, row, np.zeros(1, np.int32), None, False)).reason)
    assert reasons[:3] == ["is no regular file"] * 3
    assert reasons[3:6] == [
        f"shard ends after {n} of {size} bytes" for n, size in ((0, 2**63 - 1), (4, 2**62), (2, 3))
    ]


def test_rows_with_bad_values_have_readable_paths(plain: Path) -> None:
    change_rows(plain, {0: {"label": -1}, 9: {"height": 0}})
    dataset = Dataset.open([plain])
    assert find_overlap(dataset, dataset).shared == 10
    pieces = [batch["path"].to_pylist() for batch in dataset.manifests[0].batch_slices(2)]
    assert pieces == [[ROWS[index].path for index in indices] for indices in ((0, 1), (6, 7), (8,))]


def test_a_batch_outside_the_file_is_refused(plain: Path) -> None:
    content = plain.read_bytes()
    (footer,) = struct.unpack("<i", content[-10:-6])
    begin = len(content) - 10 - footer
    for place in range(begin - begin % 8, len(content) - 10, 4):  # one of them is the last batch's place
        for wrong in (-8, 2**30):
            plain.write_bytes(content[:place] + struct.pack("<i", wrong) + content[place + 4 :])
            try:
                Manifest.open(plain).verify()
            except DataError as error:
                assert "plain.arrow" in str(error)
