"""The JSON interface of `launch/serve.py`: good, huge, broken and hostile uploads."""

import base64
import io
import signal
import socket
import time
from collections.abc import Iterator
from http.client import HTTPConnection

import pytest
from PIL import Image

from tests.conftest import MotionSet
from tests.trainer.inference.weights import CLASSES, write_weights
from tests.trainer.serving.serving import Serving, serving

LIMIT = 300_000  # bytes of an upload


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("served")
    weights = write_weights(folder / "w.safetensors")
    arguments = (weights, "--upload-limit", LIMIT / 1e6, "--timeout", 60, "--waiting", 1)
    with serving(*arguments, temporary=folder) as running:
        yield running


@pytest.fixture(scope="module")
def video(motion_set: MotionSet) -> bytes:
    return next((motion_set.root / "val").rglob("*.mp4")).read_bytes()


def test_a_video_is_answered(server: Serving, video: bytes) -> None:
    status, description = server.send("GET", "/about")
    assert status == 200 and description["classes"] == 4 and description["upload_limit"] == LIMIT
    status, found = server.send("POST", "/predict?top=3&attention=1", video)
    assert status == 200, found
    assert len(found["top"]) == 3 and {each["class"] for each in found["top"]} <= set(CLASSES)
    assert found["video"]["frames"] >= 16 and found["timeline"][0]["start"] == 0
    with Image.open(io.BytesIO(base64.b64decode(found["attention_png"]))) as sheet:
        assert sheet.height > 4 * 128
    status, found = server.send("POST", "/predict", video)
    assert status == 200 and len(found["top"]) == 4 and "attention_png" not in found
    assert server.uploads == []


HOSTILE = {
    "text": b"no video at all",
    "nothing": b"",
    "a playlist": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:%d/x.ts\n",
    "SDP": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video %d RTP/AVP 96\n",
    "concat": b"ffconcat version 1.0\nfile 'http://127.0.0.1:%d/x.mp4'\n",
    "a web page": b"<html><script>alert(1)</script></html>",
    "zeros": bytes(100_000),
}


@pytest.mark.parametrize("kind", [*HOSTILE, "a cut video"])
def test_an_upload_that_is_no_video_is_refused(server: Serving, video: bytes, kind: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as contacted:
        body = HOSTILE.get(kind, video[: len(video) // 3])
        if b"%d" in body:
            body %= contacted.getsockname()[1]
        status, found = server.send("POST", "/predict", body)
        assert status == 422 and "upload" in found["error"], found
        assert str(server.temporary) not in found["error"]
        contacted.settimeout(0.2)
        with pytest.raises(TimeoutError):
            contacted.accept()  # the server did not follow the URL in the upload
    assert server.uploads == []


def test_an_upload_that_is_too_large_is_refused(server: Serving) -> None:
    status, found = server.send("POST", "/predict", bytes(LIMIT + 1))
    assert status == 413 and "0 MB" in found["error"]
    parts = iter([bytes(2**16)] * 5)  # without a Content-Length
    status, _ = server.send("POST", "/predict", parts)
    assert status == 413
    server.wait_for_deleted_uploads()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:80"}, 403),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://["}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Content-Type": "multipart/form-data; boundary=x"}, 415),
        ({"Host": "localhost"}, 200),
    ],
)
def test_requests_from_other_web_pages_are_refused(
    server: Serving, video: bytes, headers: dict[str, str], status: int
) -> None:
    assert server.send("POST", "/predict", video, headers)[0] == status


@pytest.mark.parametrize("top", ["0", "101", "-1", "x", "9" * 5000, "0001" + "9" * 5000, "%D9%A3"])
def test_an_invalid_number_of_classes_is_refused(server: Serving, video: bytes, top: str) -> None:
    assert server.send("POST", f"/predict?top={top}", video)[0] == 400


def test_the_page_runs_only_its_own_script(server: Serving) -> None:
    connection = HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/")
    answer = connection.getresponse()
    policy = answer.headers["Content-Security-Policy"]
    assert answer.status == 200 and "default-src 'none'" in policy and "unsafe" not in policy
    assert "http" not in answer.read().decode()  # no external resources
    connection.close()


def test_waiting_and_interrupted_uploads_count_as_open_requests(server: Serving, video: bytes) -> None:
    halves = []
    for _ in range(2):
        half = socket.create_connection(("127.0.0.1", server.port))
        half.sendall(
            b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(video)
            + video[:1000]
        )
        halves.append(half)
    deadline = time.monotonic() + 20
    while len(server.uploads) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    status, found = server.send("POST", "/predict", video)
    assert status == 503 and "busy" in found["error"]
    for half in halves:
        half.close()
    server.wait_for_deleted_uploads()
    assert server.send("POST", "/predict", video)[0] == 200


def test_sigterm_removes_everything(server: Serving, video: bytes) -> None:
    """The last test of this file: it ends the server."""
    half = socket.create_connection(("127.0.0.1", server.port))
    half.sendall(b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n" + video[:100])
    while not server.uploads:
        time.sleep(0.02)
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(30) == 143
    assert not list(server.temporary.glob("uploads-*"))
    half.close()
