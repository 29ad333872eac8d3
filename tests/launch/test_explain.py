"""The command `launch/explain.py`, on an untrained model."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from launch import explain as command
from pipelines.decode.frame_stream import FrameStream
from tests.conftest import MotionSet
from tests.launch.scripts import run_script
from tests.trainer.inference.weights import CLASSES, write_weights
from trainer.inference.model_source import open_model
from trainer.inference.predictor import Predictor
from trainer.inspection.explanation import Explainer, HeatMap


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "w.safetensors")


def test_a_sheet_and_a_video(weights: Path, motion_set: MotionSet, tmp_path: Path) -> None:
    video = next((motion_set.root / "val").rglob("*.mp4"))
    done = run_script(
        "explain.py", weights, video, "--json", "--class", CLASSES[1],
        "--out", tmp_path / "s.png", "--video", tmp_path / "s.mp4",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["class"] == CLASSES[1] and len(found["maps"]) == 3 and len(found["seconds"]) == 4
    with Image.open(tmp_path / "s.png") as sheet:
        assert sheet.width > 5 * 128 and sheet.height > 4 * 128
    written = FrameStream(tmp_path / "s.mp4")
    assert written.frames == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s.mp4", "s.png"]


def test_control_characters_in_names_are_escaped(
    weights: Path,
    motion_set: MotionSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    video = next((motion_set.root / "val").rglob("*.mp4"))
    out = tmp_path / "s\x1b[31m\udcff.png"
    monkeypatch.setattr(
        sys, "argv", ["explain.py", str(weights), str(video), "--class", CLASSES[3], "--out", str(out)]
    )
    assert command.main() == 0
    printed = capsys.readouterr().out
    assert out.exists() and "\x1b" not in printed
    assert "a\\x1b[31mred: probability" in printed and "s\\x1b[31m\\xff.png" in printed


def test_the_clip_is_the_one_of_a_prediction(weights: Path, motion_set: MotionSet) -> None:
    video = next((motion_set.root / "val").rglob("*.webm"))
    opened = open_model(weights)
    passes: list[int] = []
    hook = opened.model.register_forward_hook(lambda _, inputs, output: passes.append(len(output)))
    found = Explainer(opened, torch.device("cpu")).explain(video)
    hook.remove()
    assert passes == [1]  # one forward pass for the scores and all maps
    name, probability = Predictor(opened, torch.device("cpu")).predict(video).top[0]
    assert (found.name, found.probability) == (name, pytest.approx(probability, abs=1e-6))
    for each in found.maps:
        assert each.values.shape == found.frames.shape[:3]
        assert each.values.min() >= 0 and each.values.max() == pytest.approx(1)
    assert np.ptp(found.frames) > 50


def test_a_map_without_a_value_has_no_highest_one() -> None:
    maps = [HeatMap("class activation", np.zeros((1, 8, 8), np.float32), peak) for peak in (0.0, 2.5)]
    assert [each.strength for each in maps] == [
        "0 everywhere; no region contributes",
        "highest value 2.5 times the mean",
    ]


def test_wrong_arguments(
    weights: Path,
    motion_set: MotionSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    video = next((motion_set.root / "val").rglob("*.mp4"))
    page = tmp_path / "page.mp4"
    page.write_text("<html></html>")
    for arguments, token in (
        ((weights, video, "--class", "juggling"), "juggling"),
        ((weights, page, "--out", tmp_path / "s.png"), "page.mp4"),
        ((tmp_path, video), str(tmp_path)),
        ((weights, video, "--video", video), "input video"),
        ((weights, video, "--out", tmp_path / "s.jpg"), "s.jpg: the name must end with .png"),
        ((weights, video, "--out", tmp_path / "nowhere" / "s.png"), "nowhere"),
        ((weights, video, "--out", tmp_path / "s.png", "--video", tmp_path / "no" / "s.mp4"), "no/s.mp4"),
    ):
        monkeypatch.setattr(sys, "argv", ["explain.py", *map(str, arguments)])
        assert command.main() == 2
        assert token in capsys.readouterr().err
