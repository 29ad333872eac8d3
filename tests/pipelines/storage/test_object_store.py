"""Objects of a real S3 server: ranges, missing objects, a server that is away, credentials."""

import asyncio
import pickle
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import pytest

from pipelines.decode.pyav import decode_frames
from pipelines.errors import DataError, VideoError
from pipelines.storage import byte_range_file, object_records, object_store
from pipelines.storage.block_cache import BLOCK
from pipelines.storage.byte_range_file import ByteRangeFile
from pipelines.storage.object_store import (
    ObjectInfo,
    StoreUnavailable,
    check_url,
    is_url,
    object_info,
    object_size,
    read_ranges,
    upload,
)
from pipelines.storage.remote_range import RemoteRange, StorageOptions
from tests.pipelines.videos import KINDS, make_video
from tests.s3_server import S3Server, s3_server

URL = "s3://videos/folder/shard-000000.tar"
CONTENT = np.random.default_rng(0).integers(0, 256, 5 * BLOCK + 77, np.uint8).tobytes()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with pytest.MonkeyPatch.context() as environment, s3_server(environment) as running:
        _upload(tmp_path_factory.mktemp("object"))
        yield running


def _upload(folder: Path) -> None:
    (folder / "object").write_bytes(CONTENT)
    upload(folder / "object", URL)


def test_ranges_of_an_object(server: S3Server) -> None:
    ranges = [(0, 10), (10, 11), (100, 4000), (len(CONTENT) - 5, len(CONTENT))]
    assert read_ranges(URL, ranges) == [CONTENT[begin:end] for begin, end in ranges]
    assert read_ranges(URL, []) == []
    assert object_size(URL) == len(CONTENT)


@pytest.mark.parametrize("ranges", [[(0, 10)], [(0, 10), (20, 30)]])
def test_a_missing_object_is_a_bad_video(server: S3Server, ranges: list[tuple[int, int]]) -> None:
    with pytest.raises(VideoError, match="no such object"):
        read_ranges("s3://videos/folder/missing.tar", ranges)
    with pytest.raises(VideoError, match="no such object"):
        object_size("s3://videos/folder/missing.tar")


def test_a_failed_range_leaves_no_downloads_of_the_others(server: S3Server) -> None:
    """Their next attempt would run beside them."""
    beyond = (len(CONTENT) + 5, len(CONTENT) + 6)
    with pytest.raises(VideoError, match="shorter"):
        read_ranges(URL, [beyond, *[(0, len(CONTENT))] * 12])
    tasks = asyncio.all_tasks(object_store._filesystem("s3").loop)
    assert not [task for task in tasks if "_get" in repr(task.get_coro())]


@pytest.mark.parametrize("begin", [len(CONTENT) - 5, len(CONTENT), len(CONTENT) + 5])
def test_an_object_that_is_too_short_is_a_bad_video(server: S3Server, begin: int) -> None:
    with pytest.raises(VideoError, match=r"shard ends|shorter"):
        read_ranges(URL, [(begin, begin + 10)])


def test_a_missing_bucket_is_no_property_of_a_video(server: S3Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    for attempt in (
        lambda: read_ranges("s3://other/key", [(0, 10)]),
        lambda: object_size("s3://other/key"),
        lambda: upload(tmp_path / "file", "s3://other/key"),
    ):
        with pytest.raises(StoreUnavailable, match="NoSuchBucket"):
            attempt()


def test_a_server_that_is_away_and_one_that_comes_back(server: S3Server, tmp_path: Path) -> None:
    server.stop()
    try:
        for ranges in ([(0, 10)], [(0, 10), (20, 30)]):
            with pytest.raises(StoreUnavailable, match="AWS_ENDPOINT_URL") as error:
                read_ranges(URL, ranges, patience=0.2)
            assert not isinstance(error.value, VideoError) and "secret" not in str(error.value)

        def restart() -> None:
            time.sleep(0.5)
            server.start()
            _upload(tmp_path)

        back = threading.Thread(target=restart)
        back.start()
        # The bucket and the object come a moment after the server: neither may be missed in between.
        while back.is_alive():
            try:
                found = read_ranges(URL, [(0, 10)], patience=60)
            except (StoreUnavailable, VideoError) as missing:
                assert "NoSuchBucket" in str(missing) or "no such object" in str(missing)
        back.join()
        found = read_ranges(URL, [(0, 10)])
    finally:
        if server.store().exists(URL) is False:
            _upload(tmp_path)
    assert found == [CONTENT[:10]]


def test_a_store_that_goes_away_while_ffmpeg_reads_is_no_bad_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_range_file, "_MOST_AHEAD", 1)
    monkeypatch.setattr(byte_range_file, "_READ_AHEAD", 1)
    content = make_video(tmp_path, KINDS["h264 with B-frames"]).read_bytes()

    class Failing:
        size = len(content)
        left = 0  # answers before the store goes away

        def open(self) -> AbstractContextManager[ByteRangeFile]:
            return nullcontext(ByteRangeFile(self))

        def read_ranges(self, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
            self.left -= 1
            if self.left < 0:
                raise StoreUnavailable("the store has not answered")
            return [content[begin:end] for begin, end in ranges]

    outages = 0
    for answers in range(100):
        store = Failing()
        store.left = answers
        try:
            decode_frames(store, np.array([0, 30]))
        except StoreUnavailable:
            outages += 1
        else:
            break
    assert 3 <= outages < 99


def test_reading_as_a_file_with_and_without_a_cache(server: S3Server, tmp_path: Path) -> None:
    offset, length = 1000, 4 * BLOCK
    expected = CONTENT[offset : offset + length]
    cached = StorageOptions(tmp_path / "cache", 2**30)
    for options in (StorageOptions(), cached, cached):
        video = pickle.loads(pickle.dumps(RemoteRange(URL, offset, length, options)))
        with video.open() as file:
            file.load([(0, 100), (BLOCK + 5, 2 * BLOCK + 9)])
            file.seek(50)
            assert file.read(200) == expected[50:250]
            file.seek(-BLOCK, 2)
            assert file.read() == expected[-BLOCK:]
            file.seek(0)
            assert file.read() == expected and file.read(5) == b"" and file.tell() == length


@pytest.mark.parametrize("version", ["its checksum", ""])
@pytest.mark.parametrize("length", [len(CONTENT) - 10, 0])
@pytest.mark.parametrize("same_run", [True, False])
def test_the_cache_answers_without_the_store(
    server: S3Server,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    version: str,
    length: int,
    same_run: bool,
) -> None:
    options = StorageOptions(tmp_path / "cache", 2**30, patience=0)
    video = RemoteRange(URL, 10, length, options, version)
    assert video.read_ranges([(3, 9), (2 * BLOCK, 3 * BLOCK)])
    server.stop()
    try:
        if not same_run:
            options = StorageOptions(tmp_path / "cache", 2**30, patience=0)
        again = RemoteRange(URL, 10, length, options, version)
        assert again.size == len(CONTENT) - 10
        assert again.read_ranges([(3, 9), (2 * BLOCK, 3 * BLOCK)]) == [
            CONTENT[13:19],
            CONTENT[10 + 2 * BLOCK : 10 + 3 * BLOCK],
        ]
        warnings = [message for message in caplog.messages if "whether" in message]
        assert len(warnings) == (not same_run and not (version and length))
        with pytest.raises(StoreUnavailable):
            again.read_ranges([(4 * BLOCK, 4 * BLOCK + 1)])
    finally:
        server.start()
        _upload(tmp_path)


def test_an_object_that_is_replaced_by_one_of_the_same_size(server: S3Server, tmp_path: Path) -> None:
    """Neither its old blocks in the cache are read, nor blocks of both mixed."""
    store, url = server.store(), "s3://videos/replaced.tar"
    old, new = CONTENT, bytes(reversed(CONTENT))
    options = StorageOptions(tmp_path / "cache", 2**30)
    store.pipe_file(url, old)
    video = RemoteRange(url, 0, len(old), options)
    assert video.read_ranges([(0, 9)]) == [old[:9]]
    store.pipe_file(url, new)
    # In this process the version is known from before: it is asked for again over the first new block.
    assert video.read_ranges([(5, 3 * BLOCK)]) == [new[5 : 3 * BLOCK]]
    store.pipe_file(url, old)
    video = RemoteRange(url, 0, len(old), StorageOptions(tmp_path / "cache", 2**30))  # another run
    assert video.read_ranges([(0, 9), (2 * BLOCK, 2 * BLOCK + 9)]) == [
        old[:9],
        old[2 * BLOCK : 2 * BLOCK + 9],
    ]


def test_an_object_that_is_replaced_by_one_of_another_size(server: S3Server, tmp_path: Path) -> None:
    store, url = server.store(), "s3://videos/resized.tar"
    options = StorageOptions(tmp_path / "cache", 2**30)
    store.pipe_file(url, CONTENT)
    for version in ("", "its checksum"):
        assert RemoteRange(url, 0, 0, options, version).read_ranges([(0, 9)]) == [CONTENT[:9]]
    store.pipe_file(url, CONTENT[: 2 * BLOCK + 5])
    with pytest.raises(VideoError, match="another size"):
        RemoteRange(url, 0, 0, options, "its checksum").read_ranges([(BLOCK, BLOCK + 1)])
    video = RemoteRange(url, 0, 0, options)
    assert video.read_ranges([(2 * BLOCK, video.size)]) == [CONTENT[2 * BLOCK : 2 * BLOCK + 5]]
    with pytest.raises(VideoError, match="ends after"):
        video.read_ranges([(2 * BLOCK, 2 * BLOCK + 6)])


@pytest.mark.parametrize("writable", [True, False])
def test_the_store_is_asked_once_about_each_object(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writable: bool
) -> None:
    """Also where a cache keeps nothing, and for rows whose length is not in the manifest."""
    asked = []

    def counted(url: str, *, patience: float) -> ObjectInfo:
        asked.append(url)
        return object_info(url, patience=patience)

    monkeypatch.setattr(object_records, "object_info", counted)
    store, urls = server.store(), [f"s3://videos/many/{number}" for number in range(5)]
    for url in urls:
        store.pipe_file(url, CONTENT[:BLOCK])
    options = StorageOptions(tmp_path / "cache", 2**30)
    assert options.blocks is not None
    if writable:
        monkeypatch.setattr(object_records, "_IN_MEMORY", 1)  # the records in the cache do
    else:
        (tmp_path / "cache").rename(tmp_path / "gone")
        (tmp_path / "cache").write_text("a file")
    for length in (0, BLOCK, 0):
        for url in urls:
            video = RemoteRange(url, 0, length, options)
            assert video.size == BLOCK and video.read_ranges([(5, 9)]) == [CONTENT[5:9]]
    assert asked == urls


def test_a_warning_says_when_the_last_attempt_is(
    server: S3Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server.stop()
    try:
        for request in (
            lambda: read_ranges(URL, [(0, 9)], patience=0.2),
            lambda: object_size(URL, patience=0.2),
            lambda: upload(Path(__file__), URL, patience=0.2),
        ):
            caplog.clear()
            with pytest.raises(StoreUnavailable):
                request()
            assert re.search(r"next attempt in 0\.\d s, the last one in \d s", caplog.messages[0])
    finally:
        server.start()
        _upload(tmp_path)


@pytest.mark.parametrize(
    "url", ["s3://key:hunter22@bucket/x", "s3://bucket/x?X-Amz-Signature=hunter22", "s3://hunter22@bucket/x"]
)
def test_credentials_in_a_url_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(DataError, match="credentials") as error:
        check_url(url)
    assert "hunter22" not in str(error.value)


@pytest.mark.parametrize("url", ["http://host/x", "gs://bucket/x", "s3://bucket", "s3:///x", "s3://bucket/"])
def test_other_urls_are_refused(url: str) -> None:
    assert is_url(url)
    with pytest.raises(DataError, match="s3://BUCKET/KEY"):
        check_url(url)


def test_paths_are_no_urls() -> None:
    assert not any(map(is_url, ["a/b.mp4", "/a/b.mp4", "s3:/a", "a:b", "://x", ""]))
