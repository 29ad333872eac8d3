"""launch/replay_batch.py on a real run: equal clips, and reasons for different ones."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from pipelines.dataset.manifest import Manifest, write_manifest
from tests.conftest import MotionSet
from tests.integration.processes import ROOT, events, settings, train, typed
from trainer.errors import RunError
from trainer.inspection.batch_replay import ReplayedStep, replay_step
from trainer.monitoring.run_dir import RunDir

STEPS = 6  # of 8 clips: one and a half epochs
COMMAND = (sys.executable, "launch/replay_batch.py")


@pytest.fixture(scope="module")
def run_dir(motion_set: MotionSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with repeated sampling, accumulation and flips."""
    run_dir = tmp_path_factory.mktemp("runs") / "run"
    chosen = settings(
        optimisation__steps=STEPS, sampling__repeats=2, engine__micro_batch=2, augmentation__flip=0.5,
        augmentation__flip_left_right="true",
    )  # fmt: skip
    outcome = train(run_dir, *chosen, data=motion_set.root, ranks=2)
    assert outcome.code == 0, outcome.errors
    return run_dir


def replayed(run_dir: Path, step: int, **more: object) -> ReplayedStep:
    options = {"device": torch.device("cpu"), "shown": 8, "columns": 3, **more}
    return replay_step(RunDir(run_dir), step, **options)  # type: ignore[arg-type]


@pytest.mark.soak
def test_a_step_of_two_ranks_is_replayed(run_dir: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sheet.png"
    done = typed(*COMMAND, str(run_dir), "--step", "5", "--json", "--out", str(sheet), folder=ROOT)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    recorded = {event["step"]: event["batch_hash"] for event in events(run_dir, "step")}
    assert found["equal"] is True
    assert found["batch_hash"] == found["recorded_hash"] == recorded[5]
    assert len(found["clips"]) == 8 and {clip["repeat"] for clip in found["clips"]} == {0, 1}
    assert all(Path(clip["path"]).exists() and clip["valid"] for clip in found["clips"])
    with Image.open(sheet) as picture:
        assert picture.width > 4 * 128 and picture.height > 8 * 60
    last = replayed(run_dir, STEPS)
    assert last.equal is True and last.batch_hash == recorded[STEPS] != recorded[5]
    assert {tuple(clip.frames.shape) for clip in last.clips} == {(3, 32, 32, 3)}
    assert len({clip.planned.slot.repeat for clip in last.clips}) == 2


@pytest.mark.soak
def test_different_pixels_are_reported_and_other_manifests_refused(
    run_dir: Path, motion_set: MotionSet, tmp_path: Path
) -> None:
    data, copy = tmp_path / "data", tmp_path / "run"
    shutil.copytree(motion_set.root, data)
    shutil.copytree(run_dir, copy)
    same = replayed(copy, 2, manifests=[data / "train.arrow"])
    assert same.equal is True
    broken = Path(same.clips[0].planned.path)
    broken.write_bytes(b"no video")
    done = typed(
        *COMMAND, str(copy), "--step", "2", "--train", str(data / "train.arrow"), "--out",
        str(tmp_path / "sheet.png"), folder=ROOT,
    )  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert str(broken) in done.stdout and same.batch_hash in done.stdout
    manifest = Manifest.open(data / "train.arrow")
    rows = [manifest.row(index) for index in range(len(manifest))][::-1]
    other = data / "other.arrow"
    write_manifest(other, rows, manifest.class_names)
    with pytest.raises(RunError, match=r"other\.arrow"):
        replayed(copy, 2, manifests=[other])
    copy.joinpath("events.jsonl").unlink()  # as in an old run: only the checkpoint has the fingerprint
    with pytest.raises(RunError, match=r"other\.arrow"):
        replayed(copy, 2, manifests=[other])


@pytest.mark.soak
@pytest.mark.parametrize("step", [0, STEPS + 1])
def test_a_step_that_the_run_does_not_have_is_refused(run_dir: Path, step: int) -> None:
    with pytest.raises(RunError, match="--step"):
        replayed(run_dir, step)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"recipe\.yaml"):
        replayed(tmp_path, 1)
