import hashlib
import multiprocessing
import os
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pipelines.dataset.manifest import Manifest
from pipelines.dataset.probe import probe_video
from pipelines.decode.pyav import decode_frames
from pipelines.errors import DataError
from pipelines.synthetic import motion
from pipelines.synthetic.drawing import SHAPES, ShapePath, draw_clip
from pipelines.synthetic.motion import CLASS_NAMES, MotionSettings, draw_motion_clip, render

SETTINGS = MotionSettings(seed=3)


def content(root: Path) -> dict[str, str]:
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("pair", range(4))
def test_a_clip_played_backwards_is_the_clip_of_its_pair(pair):
    first, second = (
        draw_motion_clip(SETTINGS, "train", 2 * pair),
        draw_motion_clip(SETTINGS, "train", 2 * pair + 1),
    )
    assert (first.label, second.label) == (2 * pair, 2 * pair + 1)
    assert first.fps == second.fps
    assert np.array_equal(first.frames[::-1], second.frames)
    assert not np.array_equal(first.frames, second.frames)


@pytest.fixture
def drawn_paths(monkeypatch):
    """The paths that shapes take in the first clips of each pair, by the name of its first class."""
    paths: dict[str, list[ShapePath]] = {name: [] for name in CLASS_NAMES[::2]}
    seen: list[ShapePath] = []

    def only_the_path(rng, path, height, width):
        seen.append(path)
        return np.zeros((len(path.x), 2, 2, 3), np.uint8)

    monkeypatch.setattr(motion, "draw_clip", only_the_path)
    for index in range(0, 800, 2):
        paths[CLASS_NAMES[draw_motion_clip(SETTINGS, "train", index).label]].append(seen[-1])
    return paths


def test_shapes_move_according_to_their_class(drawn_paths):
    moved = {
        name: [(p.x[-1] - p.x[0], p.y[-1] - p.y[0]) for p in paths] for name, paths in drawn_paths.items()
    }
    for along, across in moved["move_left"]:
        assert along < -0.35 and abs(across) < 0.1
    for across, along in moved["move_up"]:
        assert along < -0.35 and abs(across) < 0.1
    for path in drawn_paths["turn_clockwise"]:
        assert path.angle[-1] - path.angle[0] > np.pi / 2
    for path in drawn_paths["grow"]:
        assert path.radius[-1] > 2 * path.radius[0]
    for name in ("turn_clockwise", "grow"):
        assert np.abs(moved[name]).max() < 0.1


def test_no_clip_is_ambiguous(drawn_paths):
    for path in (path for paths in drawn_paths.values() for path in paths):
        reach = np.maximum(np.abs(path.x), np.abs(path.y)) + path.radius
        assert reach.max() < 0.5, "the shape leaves the frame"
    for path in drawn_paths["turn_clockwise"]:
        # Eight frames, wherever in its eighth each is: two frames are two eighths apart at most.
        ahead = -(-2 * len(path.angle) // 8)
        assert np.abs(path.angle[ahead:] - path.angle[:-ahead]).max() < np.deg2rad(110)
        sampled = path.angle[((np.arange(8) + 0.5) * len(path.angle) / 8).astype(int)]
        assert np.abs(np.diff(sampled)).max() < np.deg2rad(60)


def mask(seed: int, **place: float) -> np.ndarray:
    """Where the shape is: H W. The same random numbers with the shape outside the frame give the
    background."""

    def picture(**place: float) -> np.ndarray:
        path = ShapePath(**{name: np.full(2, value) for name, value in place.items()})
        return draw_clip(np.random.default_rng(seed), path, 64, 80)[0].astype(int)

    return (picture(**place) != picture(**{**place, "x": 9.0})).any(axis=-1)


def centre(shape: np.ndarray) -> np.ndarray:
    y, x = np.nonzero(shape)
    return np.array([x.mean() + 0.5 - shape.shape[1] / 2, y.mean() + 0.5 - shape.shape[0] / 2]) / 64


@pytest.mark.parametrize("seed", range(6))
def test_directions_on_the_screen_match_the_class_names(seed):
    here = mask(seed, x=0.0, y=0.0, radius=0.25, angle=0.0)
    right = mask(seed, x=0.125, y=0.0, radius=0.25, angle=0.0)
    down = mask(seed, x=0.0, y=0.125, radius=0.25, angle=0.0)
    assert np.allclose(centre(right) - centre(here), [0.125, 0], atol=0.01)
    assert np.allclose(centre(down) - centre(here), [0, 0.125], atol=0.01)
    assert mask(seed, x=0.0, y=0.0, radius=0.4, angle=0.0).sum() > 2 * here.sum()
    # A quarter turn clockwise takes what is right to below: (x, y) to (-y, x).
    x, y = centre(here)
    quarter = mask(seed, x=0.0, y=0.0, radius=0.25, angle=np.pi / 2)
    assert np.allclose(centre(quarter), [-y, x], atol=0.02)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_every_angle_of_a_shape_gives_a_different_picture(name):
    u, v = np.meshgrid(np.linspace(-1.2, 1.2, 97), np.linspace(-1.2, 1.2, 97))
    upright = SHAPES[name](u, v) < 0
    assert not (upright & (u * u + v * v > 1)).any(), "it does not fit its disc"
    for turn in np.deg2rad(np.arange(30, 331, 30)):
        cos, sin = np.cos(turn), np.sin(turn)
        turned = SHAPES[name](cos * u + sin * v, cos * v - sin * u) < 0
        assert (upright ^ turned).sum() > 0.2 * upright.sum()


def test_motion_below_a_pixel_is_visible_and_smooth():
    clip = [
        draw_clip(np.random.default_rng(0), ShapePath(*(np.full(1, v) for v in (x, 0.0, 0.2, 0.3))), 64, 64)
        for x in np.arange(0, 1, 0.1) / 64
    ]
    for before, after in pairwise(clip):
        # A pixel that flips at once from background to shape changes by their whole contrast, 77 or more.
        assert 0 < np.abs(after.astype(int) - before).max() < 40


def test_bytes_do_not_depend_on_the_number_of_workers(motion_set, tmp_path):
    calls = []
    render(
        tmp_path, train_clips=32, val_clips=16, seed=0, workers=2, progress=lambda *call: calls.append(call)
    )
    assert content(tmp_path) == content(motion_set.root)
    assert calls == [(done, 48) for done in range(1, 49)]


def test_seeds_splits_and_twins_are_different_clips():
    clips = [
        draw_motion_clip(settings, split, index).frames
        for settings in (SETTINGS, MotionSettings(seed=4))
        for split in ("train", "val")
        for index in (0, 8, 16)
    ]
    assert len({clip.tobytes() for clip in clips}) == len(clips)


def test_lengths_and_sizes_vary():
    clips = [draw_motion_clip(SETTINGS, "train", index) for index in range(0, 96, 2)]
    assert {len(clip.frames) for clip in clips} == set(range(16, 25))
    assert {clip.frames.shape[1:3] for clip in clips} == {(72, 72), (72, 96), (96, 72), (72, 108)}


def test_the_manifests_describe_the_videos(motion_set):
    train, val = Manifest.open(motion_set.train), Manifest.open(motion_set.val)
    assert (len(train), len(val)) == (32, 16)
    assert train.class_names == val.class_names == CLASS_NAMES
    rows = [(m, m.row(index)) for m in (train, val) for index in range(len(m))]
    assert set(Counter(train.row(i).label for i in range(32)).values()) == {4}
    assert set(Counter(val.row(i).label for i in range(16)).values()) == {2}
    of_class = [Counter(row.codec for _, row in rows if row.label == label) for label in range(8)]
    assert of_class == [{"vp9": 3, "h264": 2, "mjpeg": 1}] * 8
    for manifest, row in rows:
        info = probe_video(manifest.absolute_path(row))
        assert (info.frames, info.width, info.height, info.codec) == (
            row.frames,
            row.width,
            row.height,
            row.codec,
        )
        assert info.fps == pytest.approx(row.fps, rel=1e-3)
        assert manifest.absolute_path(row).parent.name == CLASS_NAMES[row.label]


def test_videos_show_the_drawn_frames_with_even_quality(motion_set):
    errors = []
    manifest = Manifest.open(motion_set.train)
    for index in range(0, 32, 2):
        row = manifest.row(index)
        drawn = draw_motion_clip(MotionSettings(seed=0), "train", index).frames.mean(axis=-1)
        decoded = decode_frames(manifest.absolute_path(row), np.arange(row.frames)).mean(axis=-1)
        assert np.abs(decoded - drawn).mean() < 4
        errors.append([np.abs(decoded[t] - drawn[t]).mean() for t in (0, 5, -1)])
    first, middle, last = np.mean(errors, axis=0)
    assert max(first, middle, last) - min(first, middle, last) < 0.5


def interrupt(root: Path, **settings: int) -> None:
    """Render until ten of 48 clips are written."""

    def stop(done: int, total: int) -> None:
        if done == 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        render(root, train_clips=32, val_clips=16, progress=stop, **settings)


def test_an_interrupted_rendering_leaves_no_manifest_and_is_continued(motion_set, tmp_path):
    for name in ("train.arrow", "val.arrow"):
        (tmp_path / name).write_text("of other videos, which are about to be overwritten")
    interrupt(tmp_path, seed=0)
    assert not list(tmp_path.glob("*.arrow*"))
    videos = sorted(path for path in tmp_path.rglob("*.*") if path.suffix in (".webm", ".mp4", ".avi"))
    assert len(videos) == 10
    left = videos[0].with_name(f".{videos[0].name}.1.partial")  # by a process that was killed
    videos[0].rename(left)
    os.utime(left, (0, 0))
    other = left.with_name(f".{videos[1].name}.2.partial")  # by a process that is writing it
    other.touch()
    os.utime(other, (now := time.time() - 600, now))
    foreign = [left.with_name(".notes.mp4.1.partial"), left.with_name(f".{videos[1].name}.part.2.partial")]
    foreign += [tmp_path / split / "other" / left.name for split in ("train", "test")]
    for file in foreign:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        os.utime(file, (0, 0))
    videos[1].write_bytes(videos[1].read_bytes()[:100])
    videos[2].write_bytes(bytes(videos[2].stat().st_size))
    log = tmp_path / "rendering.log"
    lines = log.read_bytes().splitlines(keepends=True)
    swapped = next(i for i, line in enumerate(lines) if videos[3].name.encode() in line)
    lines[swapped] = lines[swapped].replace(b'"width": ', b'"width": 1')  # a flipped bit of a row
    log.write_bytes(b"".join(lines)[:-20] + b"\xff")  # the last line is cut
    kept = {path: path.stat().st_mtime_ns for path in videos[4:]}
    calls, notes = [], []
    render(
        tmp_path,
        train_clips=32,
        val_clips=16,
        seed=0,
        progress=lambda *call: calls.append(call),
        note=notes.append,
    )
    unchanged = [path for path, changed in kept.items() if path.stat().st_mtime_ns == changed]
    assert len(unchanged) >= 5 and calls[-1] == (48, 48)
    assert notes == ["9 of 48 videos are of an interrupted rendering; those that are whole stay"]
    assert not left.exists()
    for file in (other, *foreign):
        file.unlink()
    assert content(tmp_path) == content(motion_set.root)


def test_two_processes_may_render_the_same_at_once(motion_set, tmp_path):
    spawn = multiprocessing.get_context("spawn")
    settings = {"train_clips": 32, "val_clips": 16, "seed": 0}
    processes = [spawn.Process(target=render, args=(tmp_path,), kwargs=settings) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert content(tmp_path) == content(motion_set.root)


@pytest.mark.parametrize("change", ["seed", "renderer"])
def test_videos_of_other_settings_or_another_renderer_are_not_kept(
    motion_set, tmp_path, monkeypatch, change
) -> None:
    if change == "renderer":
        with monkeypatch.context() as patch:
            patch.setattr(motion.av, "__version__", "0.0.0")
            interrupt(tmp_path, seed=0)
    else:
        interrupt(tmp_path, seed=1)
    notes: list[str] = []
    render(tmp_path, train_clips=32, val_clips=16, seed=0, note=notes.append)
    assert not notes and content(tmp_path) == content(motion_set.root)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_clips": 0}, "0 training"),
        ({"seed": -1}, "seed -1"),
        ({"size": 71}, "71 pixels"),
        ({"size": 16}, "16 pixels"),
        ({"frames": (20, 16)}, "20 to 16 frames"),
    ],
)
def test_values_out_of_range_are_refused(tmp_path, wrong, message):
    with pytest.raises(DataError, match=message):
        render(tmp_path, **{"train_clips": 8, "val_clips": 8, "seed": 0, **wrong})
    assert not list(tmp_path.iterdir())
