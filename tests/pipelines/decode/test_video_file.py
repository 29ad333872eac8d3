"""Only regular files are opened, their own bytes are read, and no file that they name."""

import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest

from pipelines.dali.sample_reader import Decoding, SampleReader, SampleRequest
from pipelines.dataset.concat import Dataset
from pipelines.dataset.content_key import content_key
from pipelines.dataset.manifest import ManifestRow, write_manifest
from pipelines.dataset.probe import probe_video
from pipelines.decode.pyav import decode_frames
from pipelines.decode.video_file import VideoFile
from pipelines.errors import VideoError
from tests.conftest import MotionSet

AT_ONCE = 5.0  # seconds; FFmpeg waited 21 for a session that never came

SDP = (
    "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n"
)
HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{other}\n#EXT-X-ENDLIST\n"
CONCAT = "ffconcat version 1.0\nfile '{other}'\n"
DASH = (
    '<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static"><Period><AdaptationSet '
    'mimeType="video/mp4"><Representation id="1"><BaseURL>{other}</BaseURL></Representation></AdaptationSet>'
    "</Period></MPD>\n"
)


class TooLate(BaseException):
    """An error that no code here treats as one of the file."""


@contextmanager
def at_once() -> Iterator[None]:
    """Raise TooLate if the body takes longer."""

    def late(*_: object) -> None:
        raise TooLate

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, AT_ONCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refusals(path: Path) -> list[str]:
    """The message of each way to read the video at `path`."""
    said = []
    for read in (probe_video, lambda path: decode_frames(path, np.zeros(1, np.int32)), VideoFile):
        with pytest.raises(VideoError) as caught:
            read(path)
        said.append(str(caught.value))
    row = ManifestRow(str(path.absolute()), 0, 0, 0, 8, 25.0, 64, 64, "h264")
    manifest = write_manifest(path.with_name(f"{path.name}.arrow"), [row], ["a"])
    reader = SampleReader(Dataset([manifest]), Decoding("pyav"))
    said.append(reader.load(SampleRequest(0, row, np.zeros(1, np.int32), None, False)).reason)
    return said


@pytest.mark.parametrize(
    ("kind", "linked"),
    [(kind, linked) for kind in ("pipe", "folder", "socket") for linked in (False, True)]
    + [("/dev/zero", True), ("/dev/tty", True)],
)
def test_anything_but_a_regular_file_is_refused_at_once(tmp_path: Path, kind: str, linked: bool) -> None:
    path = tmp_path / "clip.mp4"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    if linked:
        link = tmp_path / "link.mp4"
        link.symlink_to(kind if kind.startswith("/dev") else path)
        path = link
    with at_once():
        words = (
            "cannot be read: No such device or address"
            if kind in ("socket", "/dev/tty")
            else "is no regular file"
        )
        assert refusals(path) == [words] * 4
        assert content_key(path) == 0


def test_nothing_is_read_beyond_the_size_at_opening(tmp_path: Path) -> None:
    path = tmp_path / "growing.mp4"
    path.write_bytes(b"0123456789")
    with VideoFile(path) as file:
        with path.open("ab") as more:
            more.write(b"abc")
        assert file.read(4) + file.read() == b"0123456789"
        assert file.read() == file.read(5) == b""
        assert (file.seek(-3, os.SEEK_END), file.read()) == (7, b"789")
        assert (file.seek(-1, os.SEEK_CUR), file.read(9)) == (9, b"9")
        with pytest.raises(OSError, match="Invalid"):
            file.seek(-1)
        path.write_bytes(b"01")  # and after a truncation, the remaining bytes
        file.seek(0)
        assert file.read() == b"01"
    with pytest.raises(OSError, match="Bad file"):
        file.read()


class Trap:
    """A pipe and a host that another file names, and whether they were opened."""

    def __init__(self, folder: Path) -> None:
        self.pipe = folder / "other.mp4"
        os.mkfifo(self.pipe)
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.visits: list[str] = []
        self._watch = threading.Thread(target=self._open, daemon=True)
        self._watch.start()

    def _open(self) -> None:
        os.close(os.open(self.pipe, os.O_WRONLY))  # waits for a reader
        self.visits.append("file")

    def close(self) -> list[str]:
        """Which of them were opened."""
        visits = list(self.visits)
        self.server.setblocking(False)
        with suppress(BlockingIOError):
            self.server.accept()[0].close()
            visits.append("host")
        self.server.close()
        reader = os.open(self.pipe, os.O_RDONLY | os.O_NONBLOCK)
        self._watch.join(AT_ONCE)
        os.close(reader)
        return visits


@pytest.mark.parametrize("as_bytes", [True, False], ids=["bytes", "path"])
@pytest.mark.parametrize(
    ("text", "other"),
    [
        (SDP, ""),
        (HLS, "http://127.0.0.1:{port}/a.ts"),
        (HLS, "{pipe}"),
        (HLS, "file:{pipe}"),
        (CONCAT, "{pipe}"),
        (CONCAT, "other.mp4"),  # the pipe, by its name alone
        (CONCAT, "tcp://127.0.0.1:{port}"),
        (DASH, "http://127.0.0.1:{port}/a.mp4"),
        (DASH, "{pipe}"),
    ],
)
def test_files_that_name_other_files_or_hosts_open_none(
    tmp_path: Path, text: str, other: str, as_bytes: bool
) -> None:
    trap = Trap(tmp_path)
    path = tmp_path / "clip.mp4"
    path.write_text(text.format(port=trap.port, other=other.format(port=trap.port, pipe=trap.pipe)))
    try:
        with at_once(), pytest.raises(VideoError, match=r"is (not a video|a list of other files)"):
            probe_video(path.read_bytes() if as_bytes else path, deep=True)
    finally:
        assert trap.close() == []


def test_file_names_have_no_special_meaning(motion_set: MotionSet, tmp_path: Path) -> None:
    """FFmpeg would read a colon as a protocol, and `%d` as the numbers of an image sequence."""
    clip = next(path for path in sorted(motion_set.root.rglob("*.mp4")))
    known = probe_video(clip)
    for name in ("http:clip.mp4", "concat:a|b.mp4", "clip%d.png", "clip.sdp", "clip", "clip.dv"):
        (tmp_path / name).write_bytes(clip.read_bytes())
        assert probe_video(tmp_path / name) == known
