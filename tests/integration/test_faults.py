"""Faults in a run of two ranks, with real processes.

Each run ends bit for bit as an undisturbed run, or with a message that names the remedy.
"""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import MotionSet
from tests.integration.processes import ROOT, Ended, Outcome, Training, events, settings, train
from trainer.resilience.signals import REQUEUE

pytestmark = pytest.mark.soak
HERE = Path(__file__).parent
STEPS = 20
OFTEN = settings(engine__zero_stage=2, run__checkpoint_every_steps=2, optimisation__steps=STEPS)


@pytest.fixture(scope="module")
def undisturbed(motion_set: MotionSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("faults") / "undisturbed"
    outcome = train(run_dir, *OFTEN, data=motion_set.root, ranks=2)
    assert outcome.code == 0, outcome.errors
    return run_dir


def last_losses(run_dir: Path) -> dict[int, float]:
    """The loss of each step, from its last execution."""
    return {event["step"]: event["loss"] for event in events(run_dir, "step")}


def assert_same(run_dir: Path, undisturbed: Path) -> None:
    assert last_losses(run_dir) == last_losses(undisturbed)
    assert_same_weights(run_dir, undisturbed)


def assert_same_weights(run_dir: Path, undisturbed: Path) -> None:
    weights, expected = (load_file(folder / "weights.safetensors") for folder in (run_dir, undisturbed))
    assert set(weights) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


def begin(run_dir: Path, motion_set: MotionSet, *arguments: str, **more: object) -> Training:
    return Training(run_dir, *OFTEN, *arguments, data=motion_set.root, ranks=2, **more)  # type: ignore[arg-type]


def finish(run_dir: Path, motion_set: MotionSet, *arguments: str) -> Outcome:
    outcome = begin(run_dir, motion_set, *arguments).wait()
    assert outcome.code == 0, outcome.errors
    return outcome


def is_whole(checkpoint: Path) -> bool:
    result = subprocess.run("sha256sum -c *.sha256", shell=True, cwd=checkpoint, capture_output=True)
    shards = len(list(checkpoint.glob("shard-*.safetensors")))
    return (
        result.returncode == 0 and shards == json.loads((checkpoint / "state.json").read_text())["world_size"]
    )


def kill_at(training: Training, moment: str, chance: random.Random) -> None:
    """Kill one of the ranks at this kind of moment."""
    known = training.checkpoints()
    done = max(last_losses(training.run_dir), default=0)
    if moment == "starting":
        time.sleep(chance.uniform(0, 8))
    elif moment == "computing":
        training.wait_for_step(min(done + chance.randint(1, 3), STEPS - 1))
        time.sleep(chance.uniform(0, 0.2))
    elif moment == "writing":
        training.wait_until(training.is_saving, pause=0.0005)
        time.sleep(chance.uniform(0, 0.02))
    else:  # renaming
        training.wait_until(lambda: training.checkpoints() != known, pause=0.0005)
    training.kill(chance.randrange(2))


@pytest.mark.parametrize(
    "moments",
    [
        pytest.param(["writing"], id="1"),
        pytest.param(["computing", "writing", "renaming", "starting"] * 5, id="20"),
    ],
)
def test_killed_ranks(undisturbed: Path, motion_set: MotionSet, tmp_path: Path, moments: list[str]) -> None:
    run_dir, chance = tmp_path / "run", random.Random(5)
    kills = 0
    for moment in moments:
        for _ in range(4):
            training = begin(run_dir, motion_set)
            try:
                kill_at(training, moment, chance)
            except Ended:  # the run finished before that moment: start again
                # No rank failed: the other ranks were sent SIGTERM, and killed if they did not end.
                codes = {process.wait(30) for process in training.processes}
                assert codes <= {0, REQUEUE, -signal.SIGTERM, -signal.SIGKILL}, training.wait()
                shutil.rmtree(run_dir)
            else:
                kills += 1
                break
        for checkpoint in training.checkpoints():
            assert is_whole(checkpoint), (moment, checkpoint)
    assert kills == len(moments)
    finish(run_dir, motion_set)
    assert_same(run_dir, undisturbed)


def test_a_rank_that_is_late_in_saving(undisturbed: Path, motion_set: MotionSet, tmp_path: Path) -> None:
    """Rank 1 hangs before it writes its shard of the first checkpoint."""
    run_dir = tmp_path / "run"
    variables = {"PYTHONPATH": str(ROOT), "HELD_FOR": str(tmp_path / "release")}
    training = begin(run_dir, motion_set, script=HERE / "late_writer.py", variables=variables)
    training.wait_until(training.is_saving)
    (partial,) = (run_dir / "checkpoints").glob(".step-*.partial")
    training.wait_until(lambda: (partial / "shard-00000.safetensors.sha256").exists())
    training.signal(signal.SIGSTOP, rank=1)
    for _ in range(20):
        assert not (partial / "shard-00001.safetensors").exists()
        assert partial.is_dir() and training.checkpoints() == []
        time.sleep(0.5)
    training.signal(signal.SIGCONT, rank=1)
    (tmp_path / "release").touch()
    training.wait_until(lambda: bool(training.checkpoints()))
    assert not partial.exists() and is_whole(training.checkpoints()[0])
    outcome = training.wait()
    assert outcome.code == 0, outcome.errors
    assert_same(run_dir, undisturbed)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_shard(undisturbed: Path, motion_set: MotionSet, tmp_path: Path, damage: str) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed, run_dir)
    newest, before = sorted((run_dir / "checkpoints").glob("step-*"))[-1:-3:-1]
    shard = newest / "shard-00001.safetensors"
    data = bytearray(shard.read_bytes())
    if damage == "truncated":
        shard.write_bytes(data[:-1])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    else:
        shard.unlink()
    outcome = finish(run_dir, motion_set)
    assert f"{newest} is passed over: {shard.name} is " in outcome.errors + outcome.output
    assert f"({before})" in outcome.output
    assert_same(run_dir, undisturbed)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A separate file system with space for one checkpoint of the small run, not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=66m", "tmpfs", disk], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"NOT TESTED: a full disk; mounting is not allowed here: {mounted.stderr.decode()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk(undisturbed: Path, motion_set: MotionSet, small_disk: Path, tmp_path: Path) -> None:
    run_dir = small_disk / "run"
    training = begin(run_dir, motion_set)
    training.wait_until(lambda: bool(training.checkpoints()))
    with kept_full(small_disk / "others"):
        outcome = training.wait()
    assert outcome.code == 2, outcome.errors
    assert "GiB are free" in outcome.errors + outcome.output
    assert f"the checkpoint of step {STEPS} could not be written" in outcome.errors
    assert "Traceback" not in outcome.errors
    assert training.checkpoints() and all(is_whole(checkpoint) for checkpoint in training.checkpoints())
    (small_disk / "others").unlink()
    subprocess.run(["mount", "-o", "remount,size=300m", small_disk], check=True)
    finish(run_dir, motion_set)
    # Events that could not be written are missing; all others are the same.
    found, expected = last_losses(run_dir), last_losses(undisturbed)
    assert found == {step: expected[step] for step in found} and STEPS in found
    assert_same_weights(run_dir, undisturbed)


@contextmanager
def kept_full(file: Path) -> Iterator[None]:
    """Inside, no byte of the file's disk is free, whatever the run deletes."""
    over, filled = threading.Event(), threading.Event()

    def fill() -> None:
        with open(file, "wb", buffering=0) as others:
            while not over.wait(0.002):
                for size in (2**20, 2**12):
                    with suppress(OSError):
                        while others.write(bytes(size)) == size:
                            pass
                filled.set()

    filler = threading.Thread(target=fill)
    filler.start()
    try:
        assert filled.wait(60)
        yield
    finally:
        over.set()
        filler.join()


def test_the_mlflow_server_is_killed(undisturbed: Path, motion_set: MotionSet, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = f"sqlite:///{tmp_path}/mlflow.db"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
        "--workers", "1", "--backend-store-uri", store,
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    ) as server:
        try:
            _wait_for_port(port)
            tracked = settings(tracking__enabled="true", tracking__uri=f"http://127.0.0.1:{port}")
            training = begin(tmp_path / "run", motion_set, *tracked)
            training.wait_for_step(5)
        finally:
            os.killpg(server.pid, signal.SIGKILL)
    outcome = training.wait()
    assert outcome.code == 0, outcome.errors
    assert "uniformerv2 deliver" in outcome.output
    assert_same(tmp_path / "run", undisturbed)


def _wait_for_port(port: int) -> None:
    for _ in range(600):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the MLflow server did not start")


def test_a_video_is_deleted_during_the_run(motion_set: MotionSet, tmp_path: Path) -> None:
    data, run_dir = tmp_path / "set", tmp_path / "run"
    shutil.copytree(motion_set.root, data)
    lenient, steps = settings(data__bad_share=0.2, optimisation__steps=60), 60
    training = Training(run_dir, *OFTEN, *lenient, data=data, ranks=2)
    training.wait_for_step(3)
    gone = sorted((data / "train").rglob("*.*"))[0]
    gone.unlink()
    outcome = training.wait()
    assert outcome.code == 0, outcome.errors
    quarantined = [json.loads(line) for line in (run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert [entry["path"] for entry in quarantined] == [str(gone)]
    assert str(gone) in outcome.output
    bad = [event["bad_clips"] for event in events(run_dir, "step")]
    assert len(bad) == steps and set(bad) == {0, 1}
    # 8 of 32 videos a step: from a whole epoch on, each is read once in every 4 steps.
    assert sum(bad[-4:]) == 1 and 3 <= sum(bad) <= steps // 4


def test_a_nan_in_one_ranks_clips(undisturbed: Path, motion_set: MotionSet, tmp_path: Path) -> None:
    script = HERE / "planted_nan.py"
    path = {"PYTHONPATH": str(ROOT)}
    run_dir = tmp_path / "run"
    training = begin(run_dir, motion_set, script=script, variables={**path, "PLANTED": "6"})
    outcome = training.wait()
    assert outcome.code == 0, outcome.errors
    (skipped,) = events(run_dir, "skipped")
    assert skipped["step"] == 7
    assert "the clips themselves" in skipped["words"] and "rank 1" in skipped["words"]
    losses, expected = last_losses(run_dir), last_losses(undisturbed)
    assert losses[7] is None
    assert [losses[step] for step in range(1, 7)] == [expected[step] for step in range(1, 7)]
    # All later steps equal a run that skips this step with good clips: the NaN has no other effect.
    without = tmp_path / "without"
    outcome = begin(without, motion_set, script=script, variables={**path, "LEFT_OUT": "6"}).wait()
    assert outcome.code == 0, outcome.errors
    assert last_losses(without)[7] == expected[7] and last_losses(without)[8] != expected[8]
    assert [losses[step] for step in range(8, STEPS + 1)] == [
        last_losses(without)[step] for step in range(8, STEPS + 1)
    ]
    weights, others = (load_file(folder / "weights.safetensors") for folder in (run_dir, without))
    for name, tensor in weights.items():
        assert tensor.isfinite().all() and torch.equal(tensor, others[name]), name

    replayed = subprocess.run(
        [sys.executable, "launch/train.py", "--replay", skipped["file"]],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert replayed.returncode == 0, replayed.stderr
    assert "the clips themselves" in replayed.stdout

    run_dir = tmp_path / "strict"
    few = settings(optimisation__skipped_steps=1)
    strict = begin(run_dir, motion_set, *few, script=script, variables={**path, "PLANTED": "6,9"}).wait()
    assert strict.code == 2, strict.errors
    assert "optimisation.skipped_steps" in strict.errors
    assert "Traceback" not in strict.errors


def test_the_clock_jumps(undisturbed: Path, motion_set: MotionSet, tmp_path: Path) -> None:
    library, jump = tmp_path / "jump.so", tmp_path / "jump"
    if shutil.which("gcc") is None:
        pytest.skip("NOT TESTED: a clock that jumps; there is no gcc here")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, HERE / "jumping_clock.c", "-ldl"], check=True)
    variables = {"LD_PRELOAD": str(library), "JUMP": str(jump)}
    limits = settings(run__hang_minutes=1, run__time_limit_minutes=60, run__checkpoint_every_minutes=0.02)
    training = begin(tmp_path / "run", motion_set, *limits, variables=variables)
    training.wait_for_step(4)
    jump.write_text("86400")
    training.wait_for_step(9)
    jump.write_text("-86400")
    outcome = training.wait()
    assert outcome.code == 0, outcome.errors
    times = [event["time"] for event in events(tmp_path / "run", "step")]
    assert max(times) - min(times) > 80_000  # it did jump
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["seconds"] < 600
    assert_same(tmp_path / "run", undisturbed)


def test_a_rank_that_hangs(undisturbed: Path, motion_set: MotionSet, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    hasty = settings(run__hang_minutes=0.5)  # a busy machine may take a while for a step
    training = begin(run_dir, motion_set, *hasty)
    training.wait_for_step(4)
    training.signal(signal.SIGSTOP, rank=1)
    outcome_code = training.processes[0].wait(timeout=120)
    training.signal(signal.SIGKILL, rank=1)
    outcome = training.wait()
    assert outcome_code == REQUEUE, outcome.errors
    assert "rank 1 has written nothing" in outcome.errors
    finish(run_dir, motion_set)
    assert_same(run_dir, undisturbed)


def test_the_file_stop(undisturbed: Path, motion_set: MotionSet, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    slow = settings(optimisation__steps=2000)
    training = Training(run_dir, *OFTEN, *slow, data=motion_set.root, ranks=2)
    training.wait_for_step(3)
    (run_dir / "STOP").touch()
    outcome = training.wait()
    assert outcome.code == 130, outcome.errors
    assert "the file STOP" in outcome.output
    assert not (run_dir / "STOP").exists()
    left = events(run_dir, "left")[0]["step"]
    assert left < 2000 and training.checkpoints()[-1].name == f"step-{left:07d}"


def test_the_time_limit(motion_set: MotionSet, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    started = time.monotonic()
    limited = settings(optimisation__steps=100000, run__time_limit_minutes=2)
    outcome = train(run_dir, *OFTEN, *limited, data=motion_set.root, ranks=2)
    assert outcome.code == REQUEUE, outcome.errors
    assert "the time limit" in outcome.output
    assert time.monotonic() - started < 120
