"""Messages for files that are no videos, or only a part of one."""

from pathlib import Path

import av
import pytest

from pipelines.dataset.probe import probe_video
from pipelines.errors import VideoError
from tests.pipelines.videos import Kind, make_video

WHOLE = ": the copy or download is incomplete"


def defect(source: Path | bytes) -> str:
    with pytest.raises(VideoError) as caught:
        probe_video(source)
    return str(caught.value)


@pytest.fixture(scope="module")
def index_at_the_end(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make_video(tmp_path_factory.mktemp("end"), Kind("libx264", "mp4", frames=20)).read_bytes()


@pytest.fixture(scope="module")
def index_first(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    kind = Kind("libx264", "mp4", frames=20, muxer={"movflags": "faststart"})
    return make_video(tmp_path_factory.mktemp("first"), kind).read_bytes()


@pytest.mark.parametrize("content", [bytes(5000), b"\0"], ids=["many", "one"])
def test_zeros(content: bytes) -> None:
    assert defect(content) == f"holds only zeros{WHOLE}"


def test_zeros_before_something_else() -> None:
    assert defect(bytes(5000) + b"x").startswith("begins with zeros")


@pytest.mark.parametrize(
    "content",
    [
        b"<!DOCTYPE html>\n<html><title>404</title></html>",
        b"\xef\xbb\xbf\r\n  <html lang=en>" + "é".encode() * 100,
        b'<?xml version="1.0"?>\n<!-- 404 --><html xmlns="http://www.w3.org/1999/xhtml">',
    ],
)
def test_web_pages(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "page.mp4"
    path.write_bytes(content)
    assert defect(path) == defect(content)
    assert defect(path).startswith("is a web page, not a video: it begins with '<")


def test_an_error_in_xml() -> None:
    content = b'<?xml version="1.0"?>\n<Error><Code>AccessDenied</Code></Error>'
    assert defect(content) == """is not a video, but text that begins with '<?xml version="1.0"?>'"""


def test_pointers_of_git_lfs() -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    assert "Git LFS pointer" in defect(pointer) and "git lfs pull" in defect(pointer)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_an_mp4_that_ends_before_its_index(index_at_the_end: bytes, share: float, tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    path.write_bytes(index_at_the_end[: int(share * index_at_the_end.index(b"moov"))])
    assert defect(path) == f"ends before its index (moov), after {path.stat().st_size} bytes{WHOLE}"


def test_an_mp4_that_ends_inside_its_index(index_at_the_end: bytes) -> None:
    whole = len(index_at_the_end)
    words = f"ends inside its index (moov), after {whole - 200} of {whole} bytes{WHOLE}"
    assert defect(index_at_the_end[: whole - 200]) == words


def test_an_mp4_without_an_index(index_at_the_end: bytes) -> None:
    before = index_at_the_end.index(b"moov") - 4
    assert defect(index_at_the_end[:before]).startswith("has no index (moov): its recording was not finished")
    zeros = bytes(len(index_at_the_end) - before)
    assert defect(index_at_the_end[:before] + zeros) == f"has zeros instead of its index (moov){WHOLE}"


@pytest.mark.parametrize("share", [0.3, 0.6, 0.99])
def test_an_mp4_that_ends_inside_its_video_data(index_first: bytes, share: float, tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    begin = index_first.index(b"mdat")
    path.write_bytes(index_first[: begin + int(share * (len(index_first) - begin))])
    with av.open(str(path)) as container:  # FFmpeg itself says nothing
        assert 0 < sum(bool(packet.size) for packet in container.demux(video=0)) <= 20
    size, whole = path.stat().st_size, len(index_first)
    assert defect(path) == f"ends inside its video data (mdat), after {size} of {whole} bytes{WHOLE}"


def test_what_lacks_no_frame_is_taken(index_first: bytes, index_at_the_end: bytes) -> None:
    after = (100).to_bytes(4, "big") + b"free" + bytes(20)  # a box of which a part is missing
    for content in (index_first, index_at_the_end, index_first + after):
        assert probe_video(content).frames == 20
