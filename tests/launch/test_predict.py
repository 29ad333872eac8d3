"""The command `launch/predict.py`."""

import csv
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from launch import predict as command
from pipelines.decode.frame_stream import FrameStream
from tests.conftest import MotionSet
from tests.launch.scripts import run_script, script_command
from tests.pipelines.videos import Kind, make_video
from tests.trainer.inference.weights import CLASSES, write_weights
from trainer.inference.predict_videos import _Names
from trainer.inference.prediction import Prediction
from trainer.inference.prediction_output import choose_writer


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "w.safetensors")


@pytest.mark.soak
def test_a_folder_as_json_with_workers_names_bad_videos(
    weights: Path, motion_set: MotionSet, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(motion_set.root / "val", tmp_path / "videos"))
    bad = folder / "grow" / "bad\x1b[31m\udcff.mp4"
    bad.write_bytes(b"<html>not found</html>")
    (folder / ".hidden.mp4").touch()
    done = run_script("predict.py", "--weights", weights, folder, "--json", "--top", 2)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 2 and len(lines) == 17
    (wrong,) = [line for line in lines if "error" in line]
    assert wrong["path"].endswith("bad\\x1b[31m\\xff.mp4") and "is a web page" in wrong["error"]
    assert [line["path"] for line in lines if line != wrong] == sorted(
        str(path) for path in folder.rglob("0*.*")
    )
    assert all(
        len(line["top"]) == 2 and line["top"][0]["class"] in CLASSES for line in lines if "top" in line
    )
    assert "predicting: 17 of 17" in done.stderr and "1 of 17 videos could not be used" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr


def test_a_closed_pipe_raises_broken_pipe_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError), open(writing, "w") as file:
        choose_writer("table", file).write(Prediction(Path("x.mp4"), (("jump", 0.5),)))


def test_names_of_annotated_videos_are_unique() -> None:
    videos = [
        Path(path) for path in ("a.mp4", "a-2.mp4", "b/a.mp4", "c/a.mp4", "out/b-predicted.mp4", "b.mp4")
    ]
    names = _Names(Path("out"), videos)
    given = [names.of(path).name.removesuffix("-predicted.mp4") for path in videos]
    assert given == ["a", "a-2", "a-3", "a-4", "b-predicted", "b-2"]


def test_windows_and_annotated_videos(weights: Path, tmp_path: Path) -> None:
    video = make_video(tmp_path, Kind("libx264", "mp4", size=(161, 241), pixels="yuv444p", degrees=90))
    out = tmp_path / "out"
    done = run_script(
        "predict.py",
        "--weights",
        weights,
        video,
        "--window",
        0.8,
        "--stride",
        0.4,
        "--annotate",
        out,
        "--csv",
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert [row["start"] for row in rows] == [start for start in ("0.0", "0.4", "0.8") for _ in range(4)]
    assert [row["rank"] for row in rows[:4]] == ["1", "2", "3", "4"]
    assert "lacks characters of 1 class names" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    (written,) = out.iterdir()
    stream = FrameStream(written)
    assert written.name == "clip-predicted.mp4" and stream.frames == 40
    assert next(stream.pictures())[1].shape == (242, 162, 3)


def test_sigterm_leaves_no_part_of_an_annotated_video(weights: Path, tmp_path: Path) -> None:
    kind = Kind("libx264", "mp4", {"preset": "ultrafast"})
    video = make_video(tmp_path, kind, np.zeros((60, 720, 1280, 3), np.uint8))  # over a second of work
    out = tmp_path / "out"
    command = script_command("predict.py", "--weights", weights, video, "--annotate", out, "--device", "cpu")
    process = subprocess.Popen(**command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    while not (out.is_dir() and any(out.iterdir())):
        assert process.poll() is None
        time.sleep(0.02)
    (partial,) = out.iterdir()
    assert partial.suffix == ".partial"
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "ended by SIGTERM; run the same command again" in errors and "Traceback" not in errors
    assert not any(out.iterdir())


def test_a_table_and_wrong_arguments(
    weights: Path,
    motion_set: MotionSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["predict.py", "--weights", *map(str, arguments)])
        return command.main(), *capsys.readouterr()

    video = next((motion_set.root / "val").rglob("*.mp4"))
    code, output, errors = call(weights, video)
    assert (code, errors) == (0, "")
    assert output.splitlines()[0] == str(video) and "a\\x1b[31mred" in output
    assert output.count(" %") == 4
    Image.new("RGB", (16, 16)).save(tmp_path / "still.png")
    code, output, errors = call(weights, tmp_path / "still.png")
    assert code in (0, 2) and "still image" in caplog.text
    (tmp_path / "empty").mkdir()
    short = tmp_path / "names.txt"
    short.write_text("one\ntwo\n")
    for arguments, token in (
        ((weights, tmp_path / "gone.mp4"), "gone.mp4"),
        ((weights, tmp_path / "empty"), "empty contains no video"),
        ((tmp_path, video), str(tmp_path)),
        ((weights, video, "--stride", 1), "--window"),
        ((weights, video, "--frames", 8), "4 frames"),
        ((weights, video, "--classes", short), "2 class names"),
        ((weights, video, "--device", "tpu"), "tpu"),
        ((weights, video, "--workers", -1), "-1 workers"),
    ):
        code, output, errors = call(*arguments)
        assert code == 2 and errors.startswith("error: ") and token in errors, (code, errors)
        assert output == ""
