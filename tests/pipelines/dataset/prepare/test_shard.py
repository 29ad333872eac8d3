"""Shards: their bytes, their manifest, and what interrupted calls and damaged videos leave."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.dali.sample_reader import Decoding, SampleReader, SampleRequest
from pipelines.dataset.concat import Dataset
from pipelines.dataset.manifest import Manifest, ManifestRow, SourceKind, encode_path, write_manifest
from pipelines.dataset.packet_table import packets_path
from pipelines.dataset.prepare.build import check_manifest, check_out
from pipelines.dataset.prepare.index import index_manifest
from pipelines.dataset.prepare.shard import (
    ShardOptions,
    finish_shards,
    parse_size,
    write_isolated,
    write_shards,
)
from pipelines.dataset.prepare.shard_writer import (
    ShardJob,
    ShardStopped,
    examine,
    read_result,
    result_path,
    write_shard,
)
from pipelines.dataset.prepare.verify import OUTSIDE, verify_manifest
from pipelines.dataset.probe import CRASHES, VideoInfo, probe_video
from pipelines.dataset.shards import member_extension, sample_name
from pipelines.dataset.source import open_source
from pipelines.dataset.split_overlap import find_overlap
from pipelines.dataset.spot_check import spot_check
from pipelines.decode.packet_index import make_packet_index
from pipelines.decode.video_file import VideoContent
from pipelines.errors import DataError, VideoError
from pipelines.storage.object_store import StoreUnavailable
from pipelines.storage.remote_range import StorageOptions
from tests.conftest import MotionSet
from tests.pipelines.batches import ALL, loader, options, take
from tests.pipelines.videos import KINDS, make_video
from tests.s3_server import S3Server, s3_server

ROOT = Path(__file__).parents[4]
NAMES = ("h264 with B-frames", "vp9", "h264 in a transport stream", "h264 with its index in front", "mjpeg")
"""Of the videos; the third has no packet index."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Twenty videos in four containers, and two that cannot be used: one is missing, one was changed."""
    folder = tmp_path_factory.mktemp("source")
    rows = []
    for number, name in enumerate(NAMES):
        (folder / str(number)).mkdir()
        video = make_video(folder / str(number), KINDS[name])
        info = probe_video(video)
        relative = encode_path(video.relative_to(folder))
        rows.append(
            ManifestRow(
                relative, 0, 0, number % 2, info.frames, info.fps, info.width, info.height, info.codec
            )
        )
    several = [replace(rows[number % 5], label=number % 3) for number in range(20)]
    several.insert(7, replace(rows[0], path="missing.mp4"))
    several.append(replace(rows[1], frames=39))
    return write_manifest(folder / "train.arrow", several, ["a", "b", "c"])


def pack(
    source: Manifest, out: Path | str, manifest: Path, size: int = 200_000, workers: int = 1
) -> Manifest:
    options = ShardOptions(str(out), manifest, size)
    write_shards(source, options, workers=workers)
    return finish_shards(source, options).manifest


def digests(*folders: Path) -> dict[str, str]:
    files = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def frames_of(reader: SampleReader, sample: int, in_graph: bool = False) -> np.ndarray:
    row = reader.dataset.row(sample)
    indices = np.array([0, 17, 3, 39], np.int32)
    loaded = reader.load(SampleRequest(sample, row, indices, None, in_graph))
    assert not loaded.reason, loaded.reason
    return loaded.arrays["frames"]


@pytest.fixture(scope="module")
def packed(source: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("shards")
    return pack(source, folder, folder / "train.arrow")


def test_a_shard_is_a_tar_file_in_the_layout_of_webdataset(source: Manifest, packed: Manifest) -> None:
    seen = []
    for shard in sorted(packed.folder.glob("shard-*.tar")):
        assert shard.stat().st_size <= 200_000
        with tarfile.open(shard) as file:
            members = file.getmembers()
            for label, about, video in zip(*[iter(members)] * 3, strict=True):
                row = int(video.name.partition(".")[0])
                original = source.row(row)
                path = source.path_at(row)
                names = [f"{row:06d}{suffix}" for suffix in (".cls", ".json", path.suffix)]
                assert [label.name, about.name, video.name] == names
                assert file.extractfile(label).read() == str(original.label).encode()
                assert json.load(file.extractfile(about))["source"] == original.path
                assert file.extractfile(video).read() == path.read_bytes()
                seen.append((row, (shard.name, video.offset_data, video.size)))
    rows = [packed.row(index) for index in range(len(packed))]
    assert [(row.path, row.offset, row.length) for row in rows] == [place for _, place in seen]
    assert [row for row, _ in seen] == [row for row in range(21) if row != 7]


def test_rows_read_the_same_frames_as_from_the_files(source: Manifest, packed: Manifest) -> None:
    here, there = (SampleReader(Dataset([m]), Decoding("pyav")) for m in (source, packed))
    kept = [row for row in range(21) if row != 7]
    for sample, original in enumerate(kept[:8]):
        np.testing.assert_array_equal(frames_of(there, sample), frames_of(here, original))
    indexed = [packed.packets_at(sample) is not None for sample in range(5)]
    assert indexed == [True, True, False, True, True]
    assert not spot_check(packed).bad_samples


def test_the_graph_is_given_the_whole_video(source: Manifest, packed: Manifest) -> None:
    here, there = (SampleReader(Dataset([m]), Decoding("dali")) for m in (source, packed))
    indices = np.array([0, 9], np.int32)
    loaded, expected = (
        reader.load(SampleRequest(1, reader.dataset.row(1), indices, None, in_graph=True))
        for reader in (there, here)
    )
    assert not loaded.reason
    for name, array in loaded.arrays.items():
        np.testing.assert_array_equal(array, expected.arrays[name])


def test_bytes_do_not_depend_on_workers_parts_or_folders(
    source: Manifest, packed: Manifest, tmp_path: Path
) -> None:
    pack(source, tmp_path / "two", tmp_path / "two" / "train.arrow", workers=2)
    options = ShardOptions(str(tmp_path / "parts"), tmp_path / "parts" / "train.arrow", 200_000)
    for part in (1, 0, 2):
        write_shards(source, options, workers=1, part=(part, 3))
        if part != 2:
            with pytest.raises(DataError, match="missing"):
                finish_shards(source, options)
    finish_shards(source, options)
    assert digests(packed.folder) == digests(tmp_path / "two") == digests(tmp_path / "parts")


def test_bad_videos_are_left_out_with_their_reasons(source: Manifest, tmp_path: Path) -> None:
    options = ShardOptions(str(tmp_path), tmp_path / "train.arrow", 200_000)
    write_shards(source, options, workers=1)
    report = finish_shards(source, options)
    assert (len(report.manifest), report.bad.total, report.indexed) == (20, 2, 16)
    text = report.bad.write_list(tmp_path / "bad.txt").read_text()
    assert "missing.mp4\tcannot be read" in text and "40 frames" in text and "39 frames" in text


def test_an_interrupted_deletion_of_the_results_is_continued(
    source: Manifest, packed: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever was deleted: the shards are not written again, and the report is the same."""
    options = ShardOptions(str(tmp_path), tmp_path / "train.arrow", 200_000)
    write_shards(source, options, workers=1)
    results = {path.name: path.read_bytes() for path in options.results.iterdir()}
    expected = finish_shards(source, options)
    unlink = Path.unlink
    for deleted in range(len(results)):
        (tmp_path / "train.arrow").unlink()
        options.results.mkdir()
        for name, content in results.items():
            (options.results / name).write_bytes(content)
        left = deleted

        def interrupted(path: Path, missing_ok: bool = False) -> None:
            nonlocal left
            if path.parent == options.results and left == 0:
                raise KeyboardInterrupt
            left -= path.parent == options.results
            unlink(path, missing_ok)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(Path, "unlink", interrupted)
            finish_shards(source, options)
        assert len(list(options.results.iterdir())) == len(results) - deleted
        before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()}
        assert write_shards(source, options, workers=1) == expected.shards
        report = finish_shards(source, options)
        assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.is_file()} == before
        assert not options.results.exists()
        assert (report.shards, report.bytes, report.indexed) == (
            expected.shards,
            expected.bytes,
            expected.indexed,
        )
        assert report.bad.table() == expected.bad.table()
    assert digests(tmp_path) == digests(packed.folder)


def test_only_own_files_of_the_folder_of_results_are_deleted(source: Manifest, tmp_path: Path) -> None:
    for out in ("train.shards", "train.shards/0"):
        with pytest.raises(DataError, match="deletes"):
            ShardOptions(str(tmp_path / out), tmp_path / "train.arrow")
    options = ShardOptions(str(tmp_path), tmp_path / "train.arrow", 2**20)
    for name in ("train.finished/0.arrow", "train.shards/notes.txt"):  # the first of an earlier version
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("kept")
    write_shards(source, options, workers=1)
    finish_shards(source, options)
    assert [path.name for path in options.results.iterdir()] == ["notes.txt"]
    assert (tmp_path / "train.finished/0.arrow").exists()


def test_killed_at_random_moments_and_continued_it_gives_the_same_bytes(
    source: Manifest, packed: Manifest, tmp_path: Path
) -> None:
    out, work = tmp_path / "killed", tmp_path / "killed" / "train.shards"
    command = [sys.executable, str(ROOT / "launch/prepare.py"), "shard", str(source.path)]
    command += ["--out", str(out), "--size", "200000", "--workers", "2"]
    draws, finished, kills = random.Random(0), 0, 0
    while finished < 2:
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            start_new_session=True,
            stdout=subprocess.DEVNULL,
        )
        end = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end:
            if len(list(work.glob("0*.arrow"))) > finished:
                time.sleep(draws.uniform(0, 0.1))
                break
            time.sleep(0.002)
        if process.poll() is not None:
            break
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
        finished = len(list(work.glob("0*.arrow")))
    assert kills and not (out / "train.arrow").exists(), "it ended before it was killed"
    assert subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}).returncode == 0
    made = digests(out)
    made.pop("train.arrow.bad.txt")
    assert made == digests(packed.folder)
    assert not work.exists() and not list(out.glob(".*"))


def examine_or_die(content: VideoContent) -> tuple[VideoInfo, bytes]:
    """Ends the process over Matroska."""
    if isinstance(content, bytes) and content.startswith(b"\x1a\x45\xdf\xa3"):
        os._exit(1)
    return examine(content)


def test_a_video_that_crashes_its_process_is_left_out(source: Manifest, tmp_path: Path) -> None:
    (running := tmp_path / "running").touch()
    job = ShardJob(source.path, 0, range(5), str(tmp_path), tmp_path, running)
    result = write_isolated(job, examine_or_die)
    assert result.bad == [(1, CRASHES)] and [video.row for video in result.videos] == [0, 2, 3, 4]
    assert read_result(tmp_path, 0) == result


def test_an_interrupted_shard_is_not_finished(source: Manifest, tmp_path: Path) -> None:
    job = ShardJob(source.path, 0, range(5), str(tmp_path), tmp_path, tmp_path / "gone")
    with pytest.raises(ShardStopped):
        write_shard(job)
    assert not list(tmp_path.iterdir())


def test_a_damaged_shard_is_written_again(source: Manifest, packed: Manifest, tmp_path: Path) -> None:
    options = ShardOptions(str(tmp_path), tmp_path / "train.arrow", 200_000)
    write_shards(source, options, workers=1)
    (tmp_path / "shard-000000.tar").write_bytes(b"half")
    result_path(options.results, 1).write_bytes(b"half")
    write_shards(source, options, workers=1)
    finish_shards(source, options)
    assert digests(tmp_path) == digests(packed.folder)


def test_other_shards_are_not_overwritten(source: Manifest, packed: Manifest, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds shards already"):
        pack(source, packed.folder, tmp_path / "again.arrow")
    options = ShardOptions(str(tmp_path), tmp_path / "train.arrow", 200_000)
    write_shards(source, options, workers=1, part=(0, 2))
    with pytest.raises(DataError, match="another size"):
        write_shards(source, replace(options, size=300_000), workers=1)


def test_segments_share_their_video(source: Manifest, tmp_path: Path) -> None:
    whole = replace(source.row(0), path=encode_path(source.path_at(0)), video_frames=40)
    parts = [replace(whole, first_frame=first, frames=10, label=first // 20) for first in (0, 10, 25)]
    given = write_manifest(tmp_path / "segments.arrow", parts, ["a", "b"], sources=True)
    packed = pack(given, tmp_path / "out", tmp_path / "out" / "train.arrow")
    rows = [packed.row(index) for index in range(3)]
    assert len({row.video for row in rows}) == 1
    assert (tmp_path / "out/shard-000000.tar").stat().st_size < 2 * source.path_at(0).stat().st_size
    for index, row in enumerate(rows):
        wanted = np.array([0, 9], np.int32)
        read = open_source(packed.path_at(index), row, packed.packets_at(index)).read(wanted)
        expected = open_source(given.path_at(index), given.row(index)).read(wanted)
        size = (row.height, row.width)
        np.testing.assert_array_equal(read.decode(None, size), expected.decode(None, size))

    # One packet index for all rows of a video, also where others are between them.
    other = replace(source.row(1), path=encode_path(source.path_at(1)), video_frames=40, frames=40)
    mixed = [*parts[:2], other, parts[2]]
    separate = write_manifest(tmp_path / "files.arrow", mixed, ["a", "b"], sources=True)
    done: list[tuple[int, int]] = []
    assert index_manifest(separate, workers=1, progress=lambda *counts: done.append(counts)) == 4
    assert done == [(1, 2), (2, 2)]
    first, second = (make_packet_index(path.read_bytes()).to_bytes() for path in map(source.path_at, (0, 1)))
    assert packets_path(packed.path).stat().st_size == 64 + len(first) + 3 * 16
    assert packets_path(separate.path).stat().st_size == 64 + len(first) + len(second) + 4 * 16
    reopened = Manifest.open(separate.path)
    assert [reopened.packets_at(row).to_bytes() for row in range(4)] == [first, first, second, first]

    # Version 1: a record for each row.
    records = [first, b"", second, first]
    ends = np.cumsum([64, *map(len, records)])
    header = b"UFv2PKTS" + np.array([1, 4, ends[-1]], "<i8").tobytes() + bytes.fromhex(separate.fingerprint)
    packets_path(separate.path).write_bytes(header + b"".join(records) + ends.astype("<i8").tobytes())
    reopened = Manifest.open(separate.path)
    found = [reopened.packets_at(row) for row in range(4)]
    assert [b"" if packets is None else packets.to_bytes() for packets in found] == records


def test_folders_of_frames_are_refused(source: Manifest, tmp_path: Path) -> None:
    row = replace(source.row(0), source=SourceKind.FRAMES)
    given = write_manifest(tmp_path / "frames.arrow", [row], ["a"], sources=True)
    with pytest.raises(DataError, match="folder of frames"):
        pack(given, tmp_path / "out", tmp_path / "out.arrow")


def test_an_index_beside_a_manifest_of_files(source: Manifest, tmp_path: Path) -> None:
    rows = [replace(source.row(n), path=encode_path(source.path_at(n))) for n in range(22)]
    manifest = write_manifest(tmp_path / "train.arrow", rows, ["a", "b", "c"])
    assert index_manifest(manifest, workers=1) == 17
    reopened = Manifest.open(manifest.path)
    assert [reopened.packets_at(row) is not None for row in range(8)] == [
        True,
        True,
        False,
        *[True] * 4,
        False,
    ]
    readers = [SampleReader(Dataset([m]), Decoding("pyav")) for m in (manifest, reopened)]
    for sample in range(5):
        np.testing.assert_array_equal(*(frames_of(reader, sample) for reader in readers))

    # The file must be whole, and of this manifest.
    content = packets_path(manifest.path).read_bytes()
    for damaged in (b"", content[:30], content[:-1], b"other" + content[5:], content + b"x"):
        packets_path(manifest.path).write_bytes(damaged)
        with pytest.raises(DataError, match="prepare index"):
            Manifest.open(manifest.path)
        Manifest.open(manifest.path, indexed=False)

    # Nothing replaces or deletes a file that is not one of packet indexes.
    packets_path(manifest.path).write_bytes(b"video" + content)
    for write in (
        lambda: check_out(manifest.path),
        lambda: write_manifest(manifest.path, rows[:5], ["a", "b", "c"]),
        lambda: index_manifest(manifest, workers=1),
    ):
        with pytest.raises(DataError, match="rename it or the manifest"):
            write()
    assert packets_path(manifest.path).read_bytes() == b"video" + content and len(manifest) == 22
    packets_path(manifest.path).write_bytes(content[:70] + b"damage" + content[76:])
    with pytest.raises(VideoError, match="packet index"):
        Manifest.open(manifest.path).packets_at(0)
    again = write_manifest(tmp_path / "train.arrow", rows[:5], ["a", "b", "c"])
    assert again.packets_at(0) is None and not packets_path(again.path).exists()


def test_verify_finds_ranges_outside_their_shards(packed: Manifest, tmp_path: Path) -> None:
    assert not verify_manifest(packed).problems.counted(OUTSIDE)
    rows = [replace(packed.row(n), path=encode_path(packed.path_at(n))) for n in range(4)]
    rows[1] = replace(rows[1], length=10**9)
    rows[2] = replace(rows[2], path="missing.tar")  # which `check` reports
    found = verify_manifest(write_manifest(tmp_path / "train.arrow", rows, packed.class_names))
    assert found.wrong_rows == found.problems.counted(OUTSIDE) == 1
    text = found.problems.write_list(tmp_path / "list.txt").read_text()
    assert "row 1\tlength: " in text and "1000" in text and "row 2" not in text
    check_manifest(found.manifest.path, workers=1)
    listed = (tmp_path / "train.arrow.check.txt").read_text().splitlines()
    assert [line.partition("\t")[0] for line in listed] == [
        f"{found.manifest.path_at(n)} at byte {rows[n].offset}" for n in (1, 2)
    ]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as environment, s3_server(environment) as running:
        yield running


def test_shards_in_an_object_store(
    source: Manifest, packed: Manifest, server: S3Server, tmp_path: Path
) -> None:
    stored = pack(source, "s3://videos/k400", tmp_path / "k400.arrow", workers=2)
    store = server.store()
    for shard in sorted(packed.folder.glob("shard-*.tar")):
        assert store.cat_file(f"s3://videos/k400/{shard.name}") == shard.read_bytes()
    assert not verify_manifest(stored).problems.counted(OUTSIDE) and not spot_check(stored).bad_samples
    assert stored.printable_path(0) == f"s3://videos/k400/shard-000000.tar at byte {stored.row(0).offset}"
    with pytest.raises(DataError, match="holds shards already"):
        pack(source, "s3://videos/k400", tmp_path / "again.arrow")

    (tmp_path / "val").mkdir()
    rows = [stored.row(row) for row in (3, 5)]
    val = Dataset([write_manifest(tmp_path / "val" / "val.arrow", rows, stored.class_names)])
    assert find_overlap(Dataset([stored]), val).shared == 2

    here = SampleReader(Dataset([packed]), Decoding("pyav"))
    cache = StorageOptions(tmp_path / "cache", 2**30, patience=0)
    for storage in (StorageOptions(patience=0), cache):
        there = SampleReader(Dataset([stored]), Decoding("pyav"), storage=storage)
        for sample in range(5):
            np.testing.assert_array_equal(frames_of(there, sample), frames_of(here, sample))

    # A missing object is a bad video; a store that is away is none.
    missing = replace(stored.row(0), path="s3://videos/k400/other.tar")
    gone = write_manifest(tmp_path / "gone.arrow", [missing], stored.class_names)
    request = SampleRequest(0, missing, np.zeros(1, np.int32), None, False)
    assert "no such object" in SampleReader(Dataset([gone]), Decoding("pyav")).load(request).reason
    server.stop()
    try:
        away = SampleReader(Dataset([stored]), Decoding("pyav"), storage=StorageOptions(patience=0.1))
        with pytest.raises(DataError, match="AWS_ENDPOINT_URL") as error:
            away.load(SampleRequest(0, stored.row(0), np.zeros(1, np.int32), None, False))
        assert not isinstance(error.value, VideoError)
        with pytest.raises(StoreUnavailable, match=r"for 0\.1 s"):
            spot_check(stored, storage=StorageOptions(patience=0.1))
        cached = SampleReader(Dataset([stored]), Decoding("pyav"), storage=cache)
        np.testing.assert_array_equal(frames_of(cached, 1), frames_of(here, 1))
    finally:
        server.start()


def test_a_loader_reads_the_store_and_ends_when_it_is_away(
    motion_set: MotionSet, server: S3Server, tmp_path: Path
) -> None:
    source = Manifest.open(motion_set.train)
    stored = pack(source, "s3://videos/motion", tmp_path / "motion.arrow")
    how = replace(options(), storage=StorageOptions(patience=0.2))
    here, there = (take(loader(m.path, ALL, how=how), 2) for m in (source, stored))
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.clips, other.clips) and torch.equal(one.ids, other.ids)
    reading = loader(stored.path, ALL, how=how)
    server.stop()
    try:
        with closing(reading), pytest.raises(DataError, match="AWS_ENDPOINT_URL"):
            for _ in reading:
                pass
    finally:
        server.start()


def test_names() -> None:
    assert [sample_name(5, 10), sample_name(5, 10**7 + 1)] == ["000005", "00000005"]
    names = ["a.MP4", "a", "a.json", "a.cls", "a.m p", "a.é", "s3://b/c.webm"]
    assert list(map(member_extension, names)) == [
        ".mp4", ".video", ".video", ".video", ".video", ".video", ".webm",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "size"),
    [("1GiB", 2**30), ("500 MB", 5 * 10**8), ("4096", 4096), ("1.5k", 1500), ("2TiB", 2**41)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "big", "-1", "1 XB", "1GiBs"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(DataError, match="--size"):
        parse_size(text)
