import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.prepare import parse
from pipelines.dataset.manifest import Manifest
from pipelines.synthetic.motion import CLASS_NAMES

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "launch" / "prepare.py")]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


def prepare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def test_folder_table_and_check_agree_on_the_same_videos(motion_set, tmp_path):
    videos = Path(shutil.copytree(motion_set.root / "train", tmp_path / "videos"))
    (videos / "grow" / "empty.mp4").touch()
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(CLASS_NAMES) + "\n")
    out = tmp_path / "folder.arrow"
    done = prepare("folder", videos, "--out", out, "--classes", classes, "--workers", 1)
    assert (done.returncode, done.stderr) == (0, "")
    progress, summary, *said = done.stdout.splitlines()
    assert progress.startswith("probing: 33 of 33, ")
    assert summary == f"{out}: 32 videos of 8 classes"
    assert ", ".join(f"{name} 4" for name in CLASS_NAMES) in " ".join(line.strip() for line in said)
    start = said.index("1 bad video is left out, listed in")
    assert said[start + 1 :] == [
        f"  {out}.bad.txt:",
        "  is empty (0 bytes): 1",
        f"    {videos}/grow/empty.mp4",
        "No packet index was made; with one, a clip needs a part of its video file only:",
        f"  uniformerv2 prepare index {out}",
    ]

    manifest = Manifest.open(out)
    rows = [manifest.row(index) for index in range(32)]
    listed = tmp_path / "list.csv"
    listed.write_text("".join(f"{row.path},{CLASS_NAMES[row.label]}\n" for row in rows))
    table = tmp_path / "table.arrow"
    done = prepare(
        "table", listed, "--root", tmp_path, "--out", table, "--classes", classes, "--deep", "--workers", 2
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert Manifest.open(table).fingerprint == manifest.fingerprint

    assert prepare("check", table, "--workers", 1).returncode == 0
    manifest.absolute_path(rows[0]).unlink()
    done = prepare("check", table, "--workers", 1)
    assert done.returncode == 1
    assert "1 bad video is still in the manifest" in done.stdout


def test_published_annotations_and_transcoded_videos_become_manifests(motion_set, tmp_path):
    """Real videos under the names that each format expects; the transcoded ones have their labels."""
    sources = sorted((motion_set.root / "train").rglob("*.*"))[:4]
    videos = tmp_path / "videos"
    (videos / "clapping").mkdir(parents=True)
    for number, source in enumerate(sources):
        shutil.copy(source, videos / f"{number:011d}_000003_000013{source.suffix}")
        shutil.copy(source, videos / f"{number}{source.suffix}")
        shutil.copy(source, videos / "clapping" / f"{number}.mp4")

    kinetics = tmp_path / "train.csv"
    rows = [f"archery,{number:011d},3,13,train" for number in range(3)] + ["abseiling,00000000003,3,13,train"]
    kinetics.write_text("label,youtube_id,time_start,time_end,split\n" + "\n".join(rows) + "\n")
    held_out = tmp_path / "val.csv"
    held_out.write_text("youtube_id,time_start,time_end,split\n00000000001,50,60,test\n")
    moments = tmp_path / "trainingSet.csv"
    moments.write_text("clapping/0.mp4,clapping,4,0\n1.mp4,clapping,3,1\n")
    categories = tmp_path / "categories.txt"
    categories.write_text("clapping,0\npraying,1\n")
    something = tmp_path / "train.json"
    something.write_text('[{"id": "2", "template": "Holding [something]"}]')
    labels = tmp_path / "labels.json"
    labels.write_text('{"Holding something": "0"}')
    for job, expected in (
        (("kinetics", kinetics, "--videos", videos, "--version", 400), (4, 400)),
        (("kinetics710", "--train", kinetics, "--held-out", held_out, "--videos", videos), (3, 710)),
        (("mit", moments, "--videos", videos, "--categories", categories), (2, 2)),
        (("ssv2", something, "--videos", videos, "--labels", labels), (1, 1)),
    ):
        out = tmp_path / f"{job[0]}.arrow"
        done = prepare(*job, "--out", out, "--workers", 1)
        assert (done.returncode, done.stderr) == (0, "")
        manifest = Manifest.open(out)
        assert (len(manifest), len(manifest.class_names)) == expected
        assert ("1 of held-out videos" in " ".join(done.stdout.split())) == (job[0] == "kinetics710")

    small = tmp_path / "small.arrow"
    job = ("transcode", tmp_path / "kinetics.arrow", "--to", tmp_path / "small", "--short-side", 32)
    done = prepare(*job, "--part", "1/2", "--out", small, "--workers", 1)
    assert done.returncode == 0 and not small.exists()  # a part is no manifest
    assert "part 1 of 2 is done: 2 videos" in done.stdout
    assert prepare(*job, "--part", "2/2", "--out", small, "--workers", 1).returncode == 0
    done = prepare("merge", small)
    assert (done.returncode, done.stderr) == (0, "")
    assert "4 videos had been probed by an earlier call" in " ".join(done.stdout.split())
    transcoded, original = Manifest.open(small), Manifest.open(tmp_path / "kinetics.arrow")
    assert [transcoded.row(n).label for n in range(4)] == [original.row(n).label for n in range(4)]
    assert {transcoded.row(n).codec for n in range(4)} == {"h264"}
    assert {transcoded.row(n).height % 16 for n in range(4)} == {0}
    source = tmp_path / "kinetics.arrow"
    for wrong, token in (
        (("--to", tmp_path / "other", "--out", source), "--out"),
        (("--to", videos, "--out", small), "--to"),
    ):
        done = prepare("transcode", source, *wrong, "--workers", 1)
        assert done.returncode == 2 and token in done.stderr
    assert Manifest.open(source).fingerprint == original.fingerprint
    for part in ("0/2", "3/2", "x"):
        done = prepare(*job, "--part", part, "--out", small)
        assert done.returncode == 2 and "--part" in done.stderr and "Traceback" not in done.stderr


def test_user_errors_are_one_message_and_exit_code_2(tmp_path):
    done = prepare("table", tmp_path / "none.csv", "--out", tmp_path / "m.arrow")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/none.csv: cannot be read as a table of videos: No such")
    assert done.stderr.count("\n") == 1
    occupied = tmp_path / "file"
    occupied.touch()
    done = prepare("motion", occupied / "motion")
    assert done.returncode == 2
    wrong = f"{occupied}/motion/train.arrow: Not a directory; check the path and the permissions"
    assert done.stderr == f"error: {wrong}\n"


def test_rendering_can_be_interrupted(tmp_path):
    root = tmp_path / "motion"
    # A shell starts what it puts in the background deaf to Ctrl-C, tests included; a terminal does not.
    heard = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    heard += "os.execv(sys.argv[1], sys.argv[1:])"
    command = [sys.executable, "-c", heard, *COMMAND, "motion", str(root), "--workers", "2"]
    process = subprocess.Popen(
        command,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not any(root.rglob("*.webm")) and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends for Ctrl-C: to all processes
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.startswith("interrupted; ") and errors.count("\n") == 1
    assert not list(root.glob("*.arrow*"))
    done = prepare("motion", root, "--train-clips", 8, "--val-clips", 8, "--seed", 5)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(Manifest.open(root / "train.arrow")) == len(Manifest.open(root / "val.arrow")) == 8


def test_sigterm_leaves_what_was_probed_and_no_part_of_a_manifest(motion_set, tmp_path):
    video = next(path for path in motion_set.root.rglob("*") if path.suffix == ".mp4")
    folder = tmp_path / "videos" / "class"
    folder.mkdir(parents=True)
    for number in range(3000):  # some seconds of work
        (folder / f"{number}.mp4").symlink_to(video)
    command = [*COMMAND, "folder", str(folder.parent), "--out", str(tmp_path / "out.arrow")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not any(log.stat().st_size for log in tmp_path.glob("out.arrow.parts/*.log")):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    _, words = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "ended by SIGTERM" in words and "Traceback" not in words
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.arrow.parts", "videos"]


@pytest.mark.parametrize(
    ("arguments", "wrong"),
    [
        (["folder", "v", "--out", "a.arrow", "--workers", "0"], "--workers: '0'"),
        (["index", "a.arrow", "--workers", "two"], "--workers: 'two'"),
        (["motion", "v", "--train-clips", "-1"], "--train-clips: '-1'"),
        (["report", "a.arrow", "--out", "a.html", "--sample", "0"], "--sample: '0'"),
        (["report", "a.arrow", "--out", "a.html", "--seconds", "nan"], "--seconds: 'nan'"),
    ],
)
def test_numbers_that_are_out_of_range(
    arguments: list[str], wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(arguments)
    assert ended.value.code == 2 and f"argument {wrong} is no" in capsys.readouterr().err
