"""Probing that is interrupted and continued, or divided into parts, gives the same bytes as one call."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipelines.dataset.prepare.build import build_manifest
from pipelines.dataset.prepare.folder import read_folder
from pipelines.dataset.prepare.parts import PLAN, begin_part, end_part, parse_part, read_command
from pipelines.dataset.prepare.probe_listing import parts_folder, probe_part
from pipelines.errors import DataError
from tests.conftest import MotionSet
from tests.fuzzing.damage import damaged

ROOT = Path(__file__).parents[4]


@pytest.fixture(scope="module")
def videos(motion_set: MotionSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 96 videos, 4 of them bad, and most of them under several names."""
    folder = tmp_path_factory.mktemp("listed") / "videos"
    sources = sorted(path for path in motion_set.root.rglob("*.*") if path.suffix != ".arrow")[:16]
    for name in ("fall", "rise"):
        (folder / name).mkdir(parents=True)
        for number in range(96):
            source = sources[number % len(sources)]
            shutil.copy(source, folder / name / f"{number:03d}{source.suffix}")
    for number, content in enumerate((b"", b"no video", b"<html>", b"\0" * 900)):
        sorted((folder / "rise").iterdir())[20 * number].write_bytes(content)
    return folder


def results(out: Path) -> dict[str, bytes]:
    """The manifest and the lists beside it, by the end of their names."""
    return {
        path.name.removeprefix(out.name): path.read_bytes()
        for path in out.parent.glob(f"{out.name}*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(videos: Path) -> dict[str, bytes]:
    """What one call writes."""
    out = videos.parent / "whole.arrow"
    build_manifest(out, read_folder(videos), workers=1)
    assert not parts_folder(out).exists()
    assert results(out).keys() == {"", ".bad.txt", ".report.txt"}
    return results(out)


def test_parts_in_any_order_give_the_same_bytes(videos: Path, whole: dict[str, bytes]) -> None:
    out = videos.parent / "parts.arrow"
    parts_folder(out).mkdir()
    (parts_folder(out) / ".parts.arrow.1.body").touch()  # of a call that was killed later
    counts = [probe_part(out, read_folder(videos), (part, 3), workers=1) for part in (2, 0, 1)]
    assert sum(counts) == 192 and min(counts) >= 64
    probed: list[tuple[int, int]] = []
    report = build_manifest(
        out, read_folder(videos), workers=1, progress=lambda *numbers: probed.append(numbers)
    )
    assert results(out) == whole
    assert probed[-1] == (4, 4)  # only the bad ones again
    assert "188 videos had been probed by an earlier call" in report.summary()
    assert not parts_folder(out).exists()


def test_what_changed_or_is_damaged_is_probed_again(videos: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(videos, tmp_path / "videos"))
    first, second = sorted((copied / "fall").iterdir())[:2]
    out, other = tmp_path / "out.arrow", tmp_path / "other.arrow"
    probe_part(out, read_folder(copied), (0, 1), workers=1)
    second.write_bytes(b"no video any more")
    os.utime(first, ns=(0, 0))
    (log,) = parts_folder(out).glob("probe-*.log")
    lines = log.read_bytes().splitlines(keepends=True)
    chance = random.Random(3)
    for number in range(60, 120):
        lines[number] = damaged([lines[number]], chance)
    log.write_bytes(b"".join(lines)[:-5])
    (parts_folder(out) / "probe-1.log").write_bytes(b"\xff" * 1000 + b"\n00000000 \n\n" + b"0" * 50)
    probed: list[tuple[int, int]] = []
    build_manifest(out, read_folder(copied), workers=1, progress=lambda *numbers: probed.append(numbers))
    build_manifest(other, read_folder(copied), workers=1)
    assert results(out) == results(other)
    assert 30 < len(probed) < 100  # changed, damaged, cut and bad ones


PROGRAM = """
import sys
from pathlib import Path
from pipelines.dataset.prepare.build import build_manifest
from pipelines.dataset.prepare.folder import read_folder

if __name__ == "__main__":
    build_manifest(Path(sys.argv[1]), read_folder(Path(sys.argv[2])), workers=2)
"""


def lines_of(out: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in parts_folder(out).glob("probe-*.log"))


def kill_and_continue(videos: Path, out: Path, kills: int, chance: random.Random) -> None:
    """Start the program `kills` times and kill it with SIGKILL when it has probed a few more videos; then let
    it end. On a busy machine it may end by itself before the last kills.
    """
    (script := out.with_suffix(".py")).write_text(PROGRAM)
    command = [sys.executable, str(script), str(out), str(videos)]
    environment = {"PYTHONPATH": str(ROOT)}
    killed = 0
    for _ in range(kills):
        end = lines_of(out) + chance.randrange(180 // kills)
        process = subprocess.Popen(command, env=environment, start_new_session=True)
        deadline = time.monotonic() + 120
        while lines_of(out) <= end and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        if process.poll() is None:
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            process.kill()
            killed += process.wait() == -signal.SIGKILL
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        while any(Path(f"/proc/{child}/cwd").exists() for child in children):
            assert time.monotonic() < deadline, "its workers outlive it"
            time.sleep(0.01)
    assert killed
    subprocess.run(command, env=environment, check=True, timeout=120)


def test_killed_at_random_moments_and_continued_it_gives_the_same_bytes(
    videos: Path, whole: dict[str, bytes]
) -> None:
    out = videos.parent / "killed.arrow"
    kill_and_continue(videos, out, kills=2, chance=random.Random(1))
    assert results(out) == whole
    assert not parts_folder(out).exists()


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
def test_killed_many_times_it_gives_the_same_bytes(videos: Path, whole: dict[str, bytes], seed: int) -> None:
    out = videos.parent / f"killed-{seed}.arrow"
    kill_and_continue(videos, out, kills=10, chance=random.Random(seed))
    assert results(out) == whole


def prepare(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "launch" / "prepare.py"), *map(str, arguments)],
        env={"PYTHONPATH": str(ROOT)},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_merge_writes_the_manifest_when_all_parts_are_done(videos: Path, whole: dict[str, bytes]) -> None:
    folder = videos.parent
    job = ("folder", "videos", "--out", "merged.arrow", "--workers", 1)
    done = prepare(folder, *job, "--part", "2/2")
    assert (done.returncode, done.stderr) == (0, "")
    assert "part 2 of 2 is done: 64 videos" in done.stdout and "prepare merge merged.arrow" in done.stdout
    done = prepare(folder, "merge", "merged.arrow")
    assert done.returncode == 2 and "--part 1/2" in done.stderr and done.stderr.count("\n") == 1
    assert prepare(folder, *job, "--part", "1/2").returncode == 0
    done = prepare(folder, "merge", "merged.arrow")
    assert (done.returncode, done.stderr) == (0, "")
    merged = results(folder / "merged.arrow")
    assert merged[""] == whole[""]
    assert merged[".bad.txt"] == whole[".bad.txt"].replace(f"{folder}/".encode(), b"")
    assert not parts_folder(folder / "merged.arrow").exists()


def test_a_damaged_or_foreign_plan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    out = Path("out.arrow")
    with pytest.raises(DataError, match="no part of"):
        read_command(out)
    begin_part(out, (0, 1), ["folder", "videos"])
    with pytest.raises(DataError, match="1/1"):
        read_command(out)
    with pytest.raises(DataError, match="begun with 1 parts"):
        begin_part(out, (0, 2), ["folder", "videos"])
    begin_part(out, (0, 1), ["folder", "--part=1/1", "--work", "3", "videos", "--part", "1/1"])
    for other in (["folder", "others"], ["folder", "videos", "--deep"], ["folder", "--part", "videos"]):
        with pytest.raises(DataError, match="another command: folder videos"):
            begin_part(out, (0, 1), other)
    end_part(out, (0, 1))
    assert read_command(out) == ["folder", "videos"]
    plan, chance = parts_folder(out) / PLAN, random.Random(0)
    good = plan.read_bytes()
    values = json.loads(good)
    for content in (
        b"", b"[" * 100_000, b"null", *(damaged([good], chance) for _ in range(100)),
        *(json.dumps({**values, name: 0}).encode() for name in values),
        json.dumps({**values, "folder": "/elsewhere"}).encode(),
    ):  # fmt: skip
        plan.write_bytes(content)
        try:
            command = read_command(out)
        except DataError as error:
            str(error).encode()
        else:
            assert all(isinstance(argument, str) for argument in command)


@pytest.mark.parametrize("text", ["0/2", "3/2", "x", "1", "1/", "/2", "-1/2", "1/1000000", "²/2", "1/2/3"])
def test_a_part_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="--part"):
        parse_part(text)
