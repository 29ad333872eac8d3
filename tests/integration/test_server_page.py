"""The page of `launch/serve.py` in a real browser: good, huge, broken and hostile uploads."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.browser import CHROMIUM, Browser
from tests.conftest import MotionSet
from tests.trainer.inference.weights import write_weights
from tests.trainer.serving.serving import Serving, serving

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here: apt-get install chromium"),
]

SCRIPT = "<img src=x onerror=document.title='ran'>"
NAMES = (SCRIPT, "<b>bold</b>", "跳ぶ", "a name that is so long " * 8)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("served")
    weights = write_weights(folder / "w.safetensors")
    (folder / "names.txt").write_text("\n".join(NAMES) + "\n")
    arguments = (weights, "--classes", folder / "names.txt", "--upload-limit", 0.3)
    with serving(*arguments, temporary=folder) as running:
        yield running


@pytest.fixture(scope="module")
def browser(server: Serving, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.open(f"http://127.0.0.1:{server.port}/")
        browser.wait_for("part('about').textContent.includes('4 classes')")
        yield browser


def dropped(browser: Browser, file: Path) -> str:
    """Drop a file, and wait for the final status text of the page."""
    browser.evaluate("say('')")
    x, y = browser.evaluate(
        "(({x, y, width, height}) => [x + width / 2, y + height / 2])(drop.getBoundingClientRect())"
    )
    browser.drop(file, round(x), round(y))
    browser.wait_for(
        "part('state').className === 'bad' || !part('found').hidden && part('state').textContent"
    )
    status: str = browser.evaluate("part('state').textContent")
    return status


def test_a_good_video_is_classified_and_names_are_text(
    browser: Browser, motion_set: MotionSet, tmp_path: Path
) -> None:
    video = tmp_path / "<img src=x onerror=document.title='file'>.mp4"
    shutil.copy(next((motion_set.root / "val").rglob("*.mp4")), video)
    assert dropped(browser, video) == video.name
    shown = browser.evaluate("[...document.querySelectorAll('td.name')].map((cell) => cell.textContent)")
    assert sorted(shown) == sorted(name.strip() for name in NAMES)
    assert browser.evaluate("part('timeline').children.length") == 1
    assert browser.wait_for("part('sheet').complete && part('sheet').naturalWidth") > 500
    assert browser.wait_for("part('video').readyState >= 1 && part('video').videoWidth") > 0
    assert browser.evaluate("document.title") == "Video classes"
    assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
        "it reaches beyond the window"
    )
    assert browser.errors == []


def test_bad_uploads_are_reported_and_a_good_one_still_works(
    browser: Browser, server: Serving, motion_set: MotionSet, tmp_path: Path
) -> None:
    good = next((motion_set.root / "val").rglob("*.mp4"))
    content = good.read_bytes()
    for name, data, token in (
        ("huge.mp4", bytes(400_000), "0 MB"),
        ("cut.mp4", content[: len(content) // 3], "upload"),
        ("text.mp4", b"no video", "upload"),
        ("list.mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "upload"),
        ("session.mp4", b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nm=video 5004 RTP/AVP 96\n", "upload"),
        ("empty.mp4", b"", "empty"),
    ):
        file = tmp_path / name
        file.write_bytes(data)
        status = dropped(browser, file)
        assert token in status, (name, status)
        assert browser.evaluate("part('state').className") == "bad"
        assert browser.evaluate("part('found').hidden && part('progress').hidden")
    assert dropped(browser, good) == good.name
    assert server.uploads == []


def test_another_page_cannot_send_or_embed(server: Serving, browser: Browser, tmp_path: Path) -> None:
    """A page of another origin: its request is refused, and its frame stays empty."""
    other = tmp_path / "other.html"
    address = f"http://127.0.0.1:{server.port}"
    other.write_text(f"<iframe src='{address}/'></iframe>")
    browser.open(other.as_uri())
    browser.evaluate(f"fetch('{address}/predict', {{method: 'POST', body: 'x', mode: 'no-cors'}})")
    browser.evaluate("new Promise((done) => setTimeout(done, 200))")
    assert browser.statuses[f"{address}/predict"] == 403
    assert any("frame-ancestors" in error or "X-Frame-Options" in error for error in browser.errors)
    assert browser.evaluate(f"fetch('{address}/about').then(() => 'read', () => 'hidden')") == "hidden"
