"""Predictions of videos and windows by a tiny model."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import trainer
from models import create_model
from models.weights.released import to_released
from pipelines.decode.jpeg_frames import JpegFrames
from pipelines.errors import DataError
from pipelines.sampling.temporal import view_indices
from tests.conftest import MotionSet
from tests.pipelines.jpegs import write_frames
from tests.pipelines.videos import Kind, make_video, moving_picture
from tests.trainer.inference.weights import CLASSES, SIZES, write_weights
from trainer.errors import RunError
from trainer.inference import sliding_windows as timeline_module
from trainer.inference.model_source import open_model
from trainer.inference.prediction import Timeline, WindowPrediction, top_of
from trainer.inference.predictor import Predictor
from trainer.inference.preprocessing import Preprocessing
from trainer.inference.video_list import list_videos
from trainer.inspection.explanation import Explainer


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "w.safetensors")


@pytest.fixture(scope="module")
def predictor(weights: Path) -> Predictor:
    return trainer.load(weights, "cpu")


def video(folder: Path, name: str = "", **kind: object) -> Path:
    folder.mkdir(exist_ok=True)
    path = make_video(folder, Kind("libx264", "mp4", **kind))  # type: ignore[arg-type]
    return path.rename(folder / name) if name else path


def test_importing_trainer_is_cheap() -> None:
    check = "import sys, trainer; sys.exit('torch' in sys.modules or 'av' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_a_prediction_in_two_lines(weights: Path, motion_set: MotionSet) -> None:
    path = next((motion_set.root / "val").rglob("*.mp4"))
    found = trainer.load(weights).predict(str(path), top=2)
    assert len(found.top) == 2 and found.path == path
    assert found.scores.shape == (4,) and found.scores.sum() == pytest.approx(1)
    assert found.top[0] == (CLASSES[int(found.scores.argmax())], pytest.approx(float(found.scores.max())))


def test_a_folder_of_frames_is_a_video(predictor: Predictor, weights: Path, tmp_path: Path) -> None:
    frames = write_frames(tmp_path / "videos" / "100218", moving_picture(20, 48, 64))
    file = video(tmp_path / "videos" / "files")
    photos = tmp_path / "videos" / "photos"
    photos.mkdir()
    shutil.copy(frames / "00001.jpg", photos / "IMG_0042.jpg")  # no sequence
    assert list_videos([tmp_path / "videos"]) == [frames, file]
    found = predictor.predict([frames, file])
    assert [each.error for each in found] == ["", ""]
    # The same pixels in a file without loss.
    read = JpegFrames.read(frames, np.arange(20), 20).decode(np.arange(20), size=(48, 64))
    same = make_video(tmp_path, Kind("ffv1", "mkv", pixels="bgr0"), read)
    np.testing.assert_allclose(predictor.predict([same])[0].scores, found[0].scores, atol=1e-6)
    explained = Explainer(open_model(weights), torch.device("cpu")).explain(frames)
    expected = view_indices(20, len(explained.seconds), 1)[0]
    assert explained.seconds == tuple(expected)  # frame numbers, as the folder states no rate
    assert "is a folder" in predictor.timeline(frames, window=1.0).error
    (frames / "00007.jpg").unlink()
    assert "lacks frame 7" in predictor.predict([frames])[0].error


def test_odd_videos_are_predicted_and_bad_ones_are_named(predictor: Predictor, tmp_path: Path) -> None:
    corrupt = tmp_path / "corrupt.mp4"
    corrupt.write_bytes(b"\0\0\0\x18ftypmp42" + bytes(1000))
    paths = [
        video(tmp_path / "odd", size=(81, 113), pixels="yuv444p"),
        video(tmp_path / "one", frames=1),
        corrupt,
        video(tmp_path / "long", name=f"{'x' * 251}.mp4"),
        tmp_path / "gone.mp4",
    ]
    found = predictor.predict(paths)
    assert [each.path for each in found] == paths
    assert [bool(each.error) for each in found] == [False, False, True, False, True]
    assert "No such file" in found[4].error and found[4].top == ()
    by_workers = list(predictor.stream(paths, workers=1))
    assert [each.error for each in by_workers] == [each.error for each in found]
    for one, other in zip(by_workers, found, strict=True):
        assert one.scores == pytest.approx(other.scores, abs=1e-6)  # a larger batch rounds differently
    with pytest.raises(DataError, match=r"corrupt\.mp4 has zeros"):
        predictor.predict(corrupt)


def test_the_rotation_of_a_video_is_applied(predictor: Predictor, tmp_path: Path) -> None:
    lossless = {"options": {"qp": "0"}, "pixels": "yuv444p", "size": (80, 112)}
    upright, turned = video(tmp_path / "a", **lossless), video(tmp_path / "b", degrees=90, **lossless)
    first, other = predictor.predict([upright, turned])
    assert np.abs(first.scores - other.scores).max() > 1e-4


def test_one_window_over_all_equals_the_whole_video(predictor: Predictor, tmp_path: Path) -> None:
    path = video(tmp_path / "v", frames=40)
    whole = predictor.predict(path, top=4, clips=2, crops=3)
    (window,) = predictor.timeline(path, window=100, top=4, clips=2, crops=3).windows
    assert (window.start, window.end) == (0, pytest.approx(1.6))
    assert [name for name, _ in window.top] == [name for name, _ in whole.top]
    assert [share for _, share in window.top] == pytest.approx([share for _, share in whole.top], abs=1e-6)


def test_a_window_equals_a_video_of_its_frames(predictor: Predictor, tmp_path: Path) -> None:
    """Lossless, so that a video of the window's frames alone has the same pixels."""
    from tests.pipelines.videos import moving_picture

    pictures = moving_picture(40, 80, 112)
    lossless = Kind("ffv1", "mkv", pixels="bgr0")
    for name in ("whole", "part"):
        (tmp_path / name).mkdir()
    whole = make_video(tmp_path / "whole", lossless, pictures)
    part = make_video(tmp_path / "part", lossless, pictures[10:20])
    seen: list[tuple[int, int]] = []
    found = predictor.timeline(whole, window=0.4, stride=0.2, top=4, progress=lambda *now: seen.append(now))
    assert [each.start for each in found.windows] == pytest.approx([0.2 * k for k in range(7)])
    assert seen[-1] == (7, 7)
    alone = predictor.predict(part, top=4)
    assert dict(found.windows[2].top) == pytest.approx(dict(alone.top), abs=1e-6)


def test_a_damaged_long_video_keeps_what_is_before_the_damage(predictor: Predictor, tmp_path: Path) -> None:
    path = video(tmp_path / "v", frames=80, options={"g": "10", "crf": "30"})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = bytes(3000)
    path.write_bytes(data)
    found = predictor.timeline(path, window=0.4)
    assert 0 < len(found.windows) < 8 and "damaged" in found.error
    assert (
        predictor.timeline(tmp_path / "gone", window=1).error == "cannot be read: No such file or directory"
    )


def test_segments_join_windows_of_one_class() -> None:
    def window(start: float, name: str, share: float) -> WindowPrediction:
        return WindowPrediction(start, start + 2, ((name, share), ("other", 0.0)))

    windows = (window(0, "a", 0.5), window(1, "a", 0.7), window(2, "b", 0.9), window(3, "a", 0.4))
    timeline = Timeline(Path("x"), windows)
    segments = [(each.start, each.end, each.name) for each in timeline.segments]
    assert segments == [(0, 2.5, "a"), (2.5, 3.5, "b"), (3.5, 5, "a")]
    assert timeline.segments[0].probability == pytest.approx(0.6)
    assert [timeline.at(t) for t in (0, 1.6, 2.4, 2.6, 99)] == [windows[k] for k in (0, 1, 1, 2, 3)]
    assert Timeline(Path("x"), ()).segments == [] and Timeline(Path("x"), ()).at(1) is None


def test_of_equal_classes_the_first_is_first() -> None:
    assert top_of(np.array([0.2, 0.4, 0.4], np.float32), "abc", 9)[0][0] == "b"


@pytest.mark.parametrize(
    ("wrong", "token"),
    [({"clips": 0}, "0 clips"), ({"crops": 2}, "2 crops"), ({"top": 0}, "top 0")],
)
def test_invalid_views_are_refused(predictor: Predictor, wrong: dict[str, int], token: str) -> None:
    with pytest.raises(RunError, match=token):
        predictor.predict("x.mp4", **wrong)  # type: ignore[arg-type]
    with pytest.raises(RunError, match="above 0"):
        predictor.timeline(Path("x.mp4"), window=float("nan"))


def test_windows_that_overlap_too_much_are_refused(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = video(tmp_path / "v", frames=40)
    frame = 3 * 16 * 16 * 4  # bytes
    monkeypatch.setattr(timeline_module, "MOST_BYTES", 4 * frame)
    assert len(predictor.timeline(path, window=0.4).windows) == 4
    with pytest.raises(RunError, match="larger stride"):
        predictor.timeline(path, window=0.4, stride=0.04)


def test_nonfinite_scores_are_refused(tmp_path: Path) -> None:
    preprocessing = Preprocessing(4, 16, (0.45,) * 3, (1e-39,) * 3).as_metadata()
    overflowing = write_weights(tmp_path / "w.safetensors", preprocessing)
    path = video(tmp_path / "v")
    with pytest.raises(RunError, match="NaN"):
        trainer.load(overflowing, "cpu").predict(path)
    with pytest.raises(RunError, match="NaN"):
        Explainer(open_model(overflowing), torch.device("cpu")).explain(path)


def test_devices(weights: Path) -> None:
    with pytest.raises(RunError, match="'tpu'"):
        trainer.load(weights, "tpu")
    with pytest.raises(RunError, match="cuda:7"):
        trainer.load(weights, "cuda:7")


def test_released_weights_may_lie_beside_another_program_s_state(tmp_path: Path) -> None:
    (tmp_path / "state.json").touch()
    model = create_model("tiny", form="temporal", **{**SIZES, "width": 64, "heads": 1})
    save_file(to_released(model), tmp_path / "released.safetensors")
    assert open_model(tmp_path / "released.safetensors", frames=4).model.config.num_classes == 4


def test_class_names_of_a_file_keep_their_order(weights: Path) -> None:
    """Otherwise each prediction would have the label of another class."""
    names = open_model(weights).class_names
    with pytest.raises(RunError, match="order"):
        open_model(weights, class_names=names[::-1])
    assert open_model(weights, class_names=names).class_names == names
    translated = tuple(f"klasse {name}" for name in names)
    assert open_model(weights, class_names=translated).class_names == translated
