"""A run of two ranks that is stopped and resumed equals an undisturbed run bit for bit.

It has repeated sampling, accumulation, an average of the weights, dropout, drop path and batch norm over all
ranks.
"""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import MotionSet
from tests.integration.processes import ROOT, Training, events, losses, settings
from trainer.resilience.signals import INTERRUPTED, REQUEUE

SCRIPT = Path(__file__).parent / "recorded_batches.py"
STEPS = 40
ACCUMULATION = 2
ALL_AT_ONCE = {
    "optimisation__steps": STEPS,
    "optimisation__ema_decay": 0.9,
    "sampling__repeats": 2,
    "engine__micro_batch": 8 // 2 // ACCUMULATION,
}
Start = Callable[[Path], Training]
pytestmark = pytest.mark.soak  # test_training.py stops a run once in the fast suite


def starts(motion_set: MotionSet, precision: str, stage: int) -> Start:
    """A function that starts or resumes the run in a folder."""
    changes = settings(**ALL_AT_ONCE, engine__precision=precision, engine__zero_stage=stage)

    def start(run_dir: Path) -> Training:
        variables = {"PYTHONPATH": str(ROOT), "BATCHES": str(batches_beside(run_dir))}
        return Training(run_dir, *changes, data=motion_set.root, ranks=2, script=SCRIPT, variables=variables)

    return start


def batches_beside(run_dir: Path) -> Path:
    return run_dir.with_name(f"{run_dir.name}-batches")


@pytest.fixture(scope="module")
def undisturbed(
    motion_set: MotionSet, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, int], Path]:
    """The folder of a finished run, for a precision and a ZeRO stage."""
    folder, done = tmp_path_factory.mktemp("undisturbed"), {}

    def run(precision: str, stage: int) -> Path:
        if (precision, stage) not in done:
            run_dir = folder / f"{precision}-{stage}"
            outcome = starts(motion_set, precision, stage)(run_dir).wait()
            assert outcome.code == 0, outcome.errors
            done[precision, stage] = run_dir
        return done[precision, stage]

    return run


def assert_stopped_run_equals(
    start: Start, run_dir: Path, expected: Path, stop: Callable[[Training], None], code: int
) -> None:
    training = start(run_dir)
    training.wait_for_step(5)
    stop(training)
    outcome = training.wait()
    assert outcome.code == code, outcome.errors
    assert "give the same command again" in outcome.output
    stopped_after = events(run_dir, "left")[0]["step"]
    assert 5 <= stopped_after < STEPS
    outcome = start(run_dir).wait()
    assert outcome.code == 0, outcome.errors
    assert f"resuming after step {stopped_after}" in outcome.output
    for rank in range(2):
        seen, planned = (
            (batches_beside(folder) / f"rank-{rank}.jsonl").read_text().splitlines()
            for folder in (run_dir, expected)
        )
        assert seen == planned and len(seen) == STEPS * ACCUMULATION
    assert losses(run_dir) == losses(expected) and len(losses(run_dir)) == STEPS
    weights, others = (load_file(folder / "weights.safetensors") for folder in (run_dir, expected))
    assert weights.keys() == others.keys()
    for name, tensor in weights.items():
        assert torch.equal(tensor, others[name]), name


def signal_all(training: Training, number: int) -> None:
    """Signal all ranks and their child processes, as a terminal or SLURM does."""
    for rank in range(2):
        training.signal(number, group=True, rank=rank)


@pytest.mark.parametrize(
    ("stop", "code"),
    [
        pytest.param(lambda run: run.signal(signal.SIGTERM, rank=1), REQUEUE, id="SIGTERM-to-one"),
        pytest.param(lambda run: signal_all(run, signal.SIGINT), INTERRUPTED, id="Ctrl-C"),
        pytest.param(lambda run: signal_all(run, signal.SIGTERM), REQUEUE, id="SIGTERM-to-all"),
        pytest.param(lambda run: run.signal(signal.SIGUSR1), REQUEUE, id="SIGUSR1-to-one"),
    ],
)
def test_a_stopped_run_equals_an_undisturbed_run(
    undisturbed: Callable[[str, int], Path],
    motion_set: MotionSet,
    tmp_path: Path,
    stop: Callable[[Training], None],
    code: int,
) -> None:
    start, expected = starts(motion_set, "fp32", 2), undisturbed("fp32", 2)
    assert_stopped_run_equals(start, tmp_path / "run", expected, stop, code)


@pytest.mark.parametrize(
    ("precision", "stage"),
    [("fp32", 0), ("fp32", 1), ("fp32", 3), *(("autocast", stage) for stage in range(4))],
)
def test_a_stopped_run_equals_an_undisturbed_run_in_every_precision_and_stage(
    undisturbed: Callable[[str, int], Path],
    motion_set: MotionSet,
    tmp_path: Path,
    precision: str,
    stage: int,
) -> None:
    assert_stopped_run_equals(
        starts(motion_set, precision, stage),
        tmp_path / "run",
        undisturbed(precision, stage),
        lambda run: run.signal(signal.SIGTERM, rank=1),
        REQUEUE,
    )


def test_the_decoder_share_of_the_first_start_is_kept(motion_set: MotionSet, tmp_path: Path) -> None:
    """DALI's colours differ from PyAV's, and the fastest share differs from start to start."""

    def start(run_dir: Path) -> Training:
        return Training(run_dir, *settings(data__decoder="hybrid"), data=motion_set.root, ranks=2)

    outcome = start(tmp_path / "undisturbed").wait()
    assert outcome.code == 0, outcome.errors
    share = tmp_path / "undisturbed" / "decoding.json"
    assert 0 < json.loads(share.read_text())["graph_share"] < 1
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    shutil.copy(share, run_dir)
    run = start(run_dir)
    run.wait_for_step(8)
    run.signal(signal.SIGTERM)
    assert run.wait().code == REQUEUE
    (run_dir / "decoding.json").unlink()  # each checkpoint has a copy
    outcome = start(run_dir).wait()
    assert outcome.code == 0, outcome.errors
    assert losses(run_dir) == losses(tmp_path / "undisturbed")
    weights, expected = (
        load_file(folder / "weights.safetensors") for folder in (run_dir, tmp_path / "undisturbed")
    )
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
