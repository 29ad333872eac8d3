"""Manifests with damage where it matters, and files beside them, read in a separate process in every way."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.dataset import manifest
from pipelines.dataset.manifest import Manifest, SourceKind, write_manifest
from pipelines.dataset.packet_table import packets_path, write_packet_table
from pipelines.dataset.prepare.transcode import SETTINGS, TranscodeOptions, transcode_manifest
from pipelines.dataset.prepare.verify import verify_manifest
from pipelines.decode.packet_index import make_packet_index
from pipelines.errors import DataError
from tests.conftest import MotionSet
from tests.fuzzing.damage import damaged
from tests.pipelines.damaged_manifests import ManifestReader, mutant
from tests.pipelines.dataset.test_damaged_manifest import CLASSES, ROWS

SOURCES = [
    *(replace(row, first_frame=5, video_frames=row.frames + 9) for row in ROWS[:4]),
    *(replace(row, source=SourceKind.FRAMES, codec="jpeg") for row in ROWS[4:8]),
    *ROWS[8:],
]
"""Segments, folders of frames, and whole files."""


def read_mutants(folder: Path, count: int, seed: int) -> Counter[str]:
    """The results of reading `count` mutants, by kind. Raises AssertionError for any but the three kinds."""
    chance = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest, "ROWS_PER_BATCH", 4)
        written = [
            write_manifest(folder / "plain.arrow", ROWS, CLASSES).path,
            write_manifest(folder / "weighted.arrow", ROWS, CLASSES, weighted=True).path,
            write_manifest(folder / "sources.arrow", SOURCES, CLASSES, weighted=True, sources=True).path,
        ]
    whole = [path.read_bytes() for path in written]
    results: Counter[str] = Counter()
    with ManifestReader() as reader:
        assert [reader.read(path) for path in written] == ["read"] * 3
        for number in range(count):
            path = folder / f"{number}.arrow"
            kind = damaged(whole, chance) if number % 4 == 0 else mutant(chance.choice(whole), chance)
            path.write_bytes(kind)
            result = reader.read(path)
            assert result == "read" or str(path) in result, (number, result)
            results[result.partition(":")[0]] += 1
            path.unlink()
    return results


def test_hundreds_of_mutants_are_read_or_refused_with_a_message(tmp_path: Path) -> None:
    results = read_mutants(tmp_path, 300, seed=1)
    assert results.keys() == {"read", "refused", "damaged"}
    assert min(results.values()) > 10


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(2, 6))
def test_thousands_of_mutants_are_read_or_refused_with_a_message(tmp_path: Path, seed: int) -> None:
    print(read_mutants(tmp_path, 5000, seed))


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.soak)])
def test_mutants_of_the_packet_indexes_are_read_or_refused_with_a_message(
    motion_set: MotionSet, tmp_path: Path, count: int
) -> None:
    source = Manifest.open(motion_set.train)
    indexes = [make_packet_index(source.path_at(number)) for number in range(len(ROWS))]
    path = write_manifest(tmp_path / "m.arrow", ROWS, CLASSES).path
    with write_packet_table(path) as table:
        for index in indexes:
            table.add(b"" if index is None else index.to_bytes())
        table.finish(Manifest.open(path).fingerprint)
    assert any(indexes) and not verify_manifest(Manifest.open(path)).is_wrong
    packets = packets_path(path)
    whole, chance = packets.read_bytes(), random.Random(0)
    results: Counter[str] = Counter()
    with ManifestReader() as reader:
        for number in range(count):
            (new := packets.with_suffix(".new")).write_bytes(damaged([whole], chance))
            new.replace(packets)  # what is mapped must not be shortened
            result = reader.read(path)
            assert result == "read" or str(packets) in result, (number, result)
            results[result.partition(":")[0]] += 1
    assert results.keys() == {"read", "refused"} and min(results.values()) > 10


def test_a_damaged_settings_file_of_transcoded_videos_is_refused_by_name(tmp_path: Path) -> None:
    made = write_manifest(tmp_path / "m.arrow", ROWS[:1], CLASSES)
    settings = tmp_path / "small" / SETTINGS
    with pytest.raises(DataError, match="no video could be transcoded"):
        transcode_manifest(Manifest.open(made.path), settings.parent, TranscodeOptions(), workers=1)
    whole, chance = settings.read_bytes(), random.Random(0)
    for content in (b"[" * 100_000, b"", b"\xff", b"null", *(damaged([whole], chance) for _ in range(100))):
        if content == whole:
            continue
        settings.write_bytes(content)
        with pytest.raises(DataError) as refused:
            transcode_manifest(made, settings.parent, TranscodeOptions(), workers=1)
        assert str(settings.parent) in str(refused.value) or "no video" in str(refused.value)
