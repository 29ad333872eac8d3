"""From published annotations and local files to one training step and an evaluation, for each format."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.processes import ROOT, events
from tests.pipelines.published import FORMATS, make_local_files

NOT_FILES = ("ssv1", "activitynet")
"""Formats whose rows are folders of frames, and segments."""


@pytest.mark.parametrize(
    "names",
    [
        NOT_FILES,
        pytest.param(tuple(name for name in FORMATS if name not in NOT_FILES), marks=pytest.mark.soak),
    ],
    ids=["frames and segments", "all others"],
)
def test_every_published_format_trains_and_evaluates(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        make_local_files(FORMATS[name], tmp_path / name / "local")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/integration/train_formats.py"), str(tmp_path), *names],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    codes = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert codes == [{"format": name, "code": 0} for name in names], done.stderr[-3000:]
    for name in names:
        run = tmp_path / name / "run"
        (step,) = events(run, "step")
        assert step["step"] == 1 and step["loss"] > 0
        summary = json.loads((run / "summary.json").read_text())
        assert summary["bad_videos"] == 0 and summary["videos"] >= 1, (name, summary)
        assert not (run / "quarantine.jsonl").exists()
