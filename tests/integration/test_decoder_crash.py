"""DALI's decoder crashes a rank: the next start finds the video, leaves it out, and finishes."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest

from pipelines.dataset.manifest import ManifestRow, write_manifest
from tests.integration.processes import Outcome, events, settings, train
from tests.pipelines.decode.test_frame_sizes import FRAMES, HEIGHT, MJPEG, WIDTH, change_header
from tests.pipelines.videos import make_video, moving_picture

UNCHECKED = Path(__file__).parent / "unchecked"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A data set of Motion JPEG with a damaged training video, number 3."""
    for name, count in (("train", 16), ("val", 4)):
        rows = []
        for number in range(count):
            folder = tmp_path / name / str(number)
            folder.mkdir(parents=True)
            path = make_video(folder, MJPEG, np.roll(moving_picture(FRAMES, HEIGHT, WIDTH), number, axis=2))
            rows.append(
                ManifestRow(
                    f"{name}/{number}/{path.name}", 0, 0, number % 2, FRAMES, 25.0, WIDTH, HEIGHT, "mjpeg"
                )
            )
        write_manifest(tmp_path / f"{name}.arrow", rows, ["a", "b"])
    for frame in range(1, FRAMES):  # the decoder sizes its buffers by the first frame
        change_header(tmp_path / "train/3/clip.avi", frame=frame, width=456)
    return tmp_path


@pytest.mark.soak
def test_the_next_start_names_the_video_that_crashed_a_rank(damaged: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"

    def start() -> Outcome:
        changes = settings(data__decoder="dali", optimisation__steps=6, run__checkpoint_every_steps=1)
        path = os.pathsep.join([str(UNCHECKED), os.environ.get("PYTHONPATH", "")])
        return train(run_dir, *changes, data=damaged, variables={"PYTHONPATH": path})

    assert start().code in (-signal.SIGSEGV, -signal.SIGABRT)  # depends on the memory that it overwrites
    (left,) = (run_dir / "in-flight").glob("train-*.json")
    assert json.loads(left.read_text())["rank"] == 0
    second = start()
    assert second.code == 0, second.errors
    assert "train/3/clip.avi: they are left out" in second.output + second.errors
    (bad,) = events(run_dir, "quarantine")
    assert bad["path"].endswith("train/3/clip.avi")
    assert list((run_dir / "in-flight").iterdir()) == []
    (crashes,) = json.loads((run_dir / "decoder_crashes.json").read_text()).values()
    assert list(crashes) == ["3"]
