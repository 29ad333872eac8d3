"""A run inside a SLURM job with a known end time."""

import time
from pathlib import Path

import pytest

from tests.conftest import MotionSet
from tests.integration.processes import events, settings, train
from trainer.resilience.signals import REQUEUE

pytestmark = pytest.mark.soak


def test_a_run_stops_before_its_job_ends_and_resumes_in_the_next(
    motion_set: MotionSet, tmp_path: Path
) -> None:
    run_dir, node = tmp_path / "run", tmp_path / "node"
    long = settings(optimisation__steps=100_000, data__node_copy=node)
    # The margin alone is longer than the job: each start must still make progress.
    steps = []
    for _ in range(2):
        job = {"SLURM_JOB_END_TIME": str(round(time.time()) + 1)}
        outcome = train(run_dir, *long, data=motion_set.root, ranks=2, variables=job)
        assert outcome.code == REQUEUE, outcome.errors
        assert "the time limit: finishing the step, then saving" in outcome.errors
        steps.append(events(run_dir, "left")[-1]["step"])
    assert 0 < steps[0] < steps[1] < 1000
    saves = events(run_dir, "checkpoint")
    assert [save["step"] for save in saves] == steps
    assert all(0 < save["seconds"] < 60 for save in saves)
    assert len(list(node.rglob("*.arrow"))) == 2


def test_a_wrong_job_end_is_refused_by_name(motion_set: MotionSet, tmp_path: Path) -> None:
    job = {"SLURM_JOB_END_TIME": "tomorrow"}
    outcome = train(tmp_path / "run", data=motion_set.root, variables=job)
    assert outcome.code == 2
    assert "error: SLURM_JOB_END_TIME is 'tomorrow'" in outcome.errors
