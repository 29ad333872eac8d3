"""launch/evaluate.py compared with the run's own evaluation, interrupted, and with wrong inputs."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.dataset.manifest import Manifest, ManifestRow, write_manifest
from tests.conftest import MotionSet
from tests.integration.processes import PATIENCE, ROOT, events, settings, train

pytestmark = pytest.mark.soak  # all need a run

SCRIPT = ROOT / "launch/evaluate.py"
SLOW = ROOT / "tests/launch/slow_evaluation.py"
NUMBERS = ("top1", "top5", "loss", "ece", "videos", "bad")


@pytest.fixture(scope="module")
def run(motion_set: MotionSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks with batch norms and an average of its weights."""
    run_dir = tmp_path_factory.mktemp("evaluate") / "run"
    changes = settings(
        optimisation__ema_decay=0.9, optimisation__steps=8, evaluation__every_steps=4,
        run__checkpoint_every_steps=4,
    )  # fmt: skip
    outcome = train(run_dir, *changes, data=motion_set.root, ranks=2)
    assert outcome.code == 0, outcome.errors
    return run_dir


def start(*arguments: str | Path, ranks: int = 1, script: Path = SCRIPT) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            cwd=ROOT,
            env={
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_WAIT_POLICY": "passive",
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        for rank in range(ranks)
    ]


def wait(processes: Sequence[subprocess.Popen[str]]) -> tuple[int, str, str]:
    """Exit code, output and errors of rank 0, after all ranks have ended."""
    outputs = [process.communicate(timeout=PATIENCE) for process in processes]
    return processes[0].returncode, *outputs[0]


def evaluate(*arguments: str | Path, ranks: int = 1) -> tuple[int, str, str]:
    return wait(start(*arguments, ranks=ranks))


def result(folder: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return values


def own(run: Path) -> dict[str, Any]:
    """The run's own last evaluation."""
    return events(run, "evaluation")[-1]


def scores(folder: Path) -> pa.Table:
    return pq.read_table(folder / "scores.parquet")


def assert_equals_run(folder: Path, run: Path) -> None:
    """Numbers and scores to the last digit."""
    assert {name: result(folder)[name] for name in NUMBERS} == {name: own(run)[name] for name in NUMBERS}
    assert scores(folder).equals(scores(run))
    assert scores(folder).schema.metadata == scores(run).schema.metadata


@pytest.mark.parametrize("ranks", [1, 2])
def test_it_equals_the_runs_own_evaluation(run: Path, tmp_path: Path, ranks: int) -> None:
    code, output, errors = evaluate(run, "--last", "--out", tmp_path, ranks=ranks)
    assert code == 0, errors
    assert_equals_run(tmp_path, run)
    assert f"{100 * own(run)['top1']:.2f} %" in output and "clips/s" in output
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "bad_videos.csv", "confusion.csv", "confusion.png", "evaluation.json", "identity.json",
        "per_class.csv", "scores.parquet",
    ]  # fmt: skip
    table = scores(tmp_path).to_pydict()
    right = [a == b for a, b in zip(table["label"], table["prediction"], strict=True)]
    assert sum(right) / len(right) == own(run)["top1"]
    assert sum(table["correct_top5"]) / len(right) == own(run)["top5"]
    assert all(abs(sum(each) - 1) < 1e-5 for each in table["scores"])


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_after_a_kill_it_continues_with_another_number_of_ranks(
    run: Path, tmp_path: Path, before: int, after: int
) -> None:
    processes = start(run, "--last", "--out", tmp_path, ranks=before, script=SLOW)
    deadline = time.monotonic() + PATIENCE
    while len(list((tmp_path / "parts").glob("*.parquet"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
    wait(processes)
    assert list((tmp_path / "parts").glob("*.parquet")) and not (tmp_path / "evaluation.json").exists()
    code, output, errors = evaluate(run, "--last", "--out", tmp_path, ranks=after)
    assert code == 0, errors
    assert "continuing after" in output
    assert result(tmp_path)["last_start"]["videos"] < 16
    assert_equals_run(tmp_path, run)


def test_ctrl_c_keeps_the_scores_so_far(run: Path, tmp_path: Path) -> None:
    processes = start(run, "--last", "--out", tmp_path, script=SLOW)
    deadline = time.monotonic() + PATIENCE
    while not list((tmp_path / "parts").glob("*.parquet")) and time.monotonic() < deadline:
        time.sleep(0.02)
    processes[0].send_signal(signal.SIGINT)
    code, output, _ = wait(processes)
    assert code == 130 and "SIGINT" in output
    code, _, errors = evaluate(run, "--last", "--out", tmp_path)
    assert code == 0, errors
    assert_equals_run(tmp_path, run)


def test_another_evaluation_in_the_same_folder_is_refused(run: Path, tmp_path: Path) -> None:
    assert evaluate(run, "--last", "--clips", "1", "--crops", "1", "--out", tmp_path)[0] == 0
    code, _, errors = evaluate(run, "--last", "--out", tmp_path)
    assert code == 2 and "clips: 1 there, 2 now" in errors and "--again" in errors
    code, output, _ = evaluate(run, "--last", "--clips", "1", "--crops", "1", "--out", tmp_path, "--json")
    assert code == 0 and json.loads(output) == result(tmp_path)
    code, _, errors = evaluate(run, "--last", "--again", "--out", tmp_path)
    assert code == 0, errors
    assert_equals_run(tmp_path, run)


def test_bad_videos_are_named_and_too_many_stop_it(run: Path, motion_set: MotionSet, tmp_path: Path) -> None:
    manifest = Manifest.open(motion_set.val)
    rows = [manifest.row(number) for number in range(len(manifest))]
    changed = [
        ManifestRow(
            **{
                **{name: getattr(row, name) for name in ManifestRow.__slots__},
                "path": str(manifest.path_at(number)),
            }
        )
        for number, row in enumerate(rows)
    ]
    for number in (3, 7):
        changed[number] = ManifestRow(
            **{
                **{name: getattr(rows[number], name) for name in ManifestRow.__slots__},
                "path": f"gone{number}.webm",
            }
        )
    write_manifest(tmp_path / "some.arrow", changed, manifest.class_names)
    arguments = (run, "--last", "--manifest", tmp_path / "some.arrow")
    code, output, errors = evaluate(*arguments, "--out", tmp_path / "out", ranks=2)
    assert code == 0, errors
    assert "gone3.webm" in output
    assert (result(tmp_path / "out")["videos"], result(tmp_path / "out")["bad"]) == (14, 2)
    read, whole = scores(tmp_path / "out").to_pylist(), scores(run).to_pylist()
    assert [row["row"] for row in read if row["prediction"] is None] == [3, 7]
    assert read[3]["scores"] == [None] * 8 and read[3]["correct_top5"] is None and read[3]["label"] == 3
    assert [row["scores"] for row in read if row["row"] not in (3, 7)] == [
        row["scores"] for row in whole if row["row"] not in (3, 7)
    ]
    code, _, errors = evaluate(*arguments, "--bad-share", "0", "--out", tmp_path / "strict")
    assert code == 2 and "gone3.webm" in errors and "--bad-share" in errors


def test_classes_are_found_by_name(run: Path, motion_set: MotionSet, tmp_path: Path) -> None:
    manifest = Manifest.open(motion_set.val)
    some = [manifest.row(number) for number in range(len(manifest)) if manifest.row(number).label in (2, 5)]
    moved = [
        ManifestRow(
            **{
                **{name: getattr(row, name) for name in ManifestRow.__slots__},
                "path": str(motion_set.root / row.path),
                "label": {5: 0, 2: 1}[row.label],
            }
        )
        for row in some
    ]
    names = (manifest.class_names[5], manifest.class_names[2])
    write_manifest(tmp_path / "two.arrow", moved, names)
    code, _, errors = evaluate(run, "--last", "--manifest", tmp_path / "two.arrow", "--out", tmp_path / "out")
    assert code == 0, errors
    found = scores(tmp_path / "out").to_pylist()
    whole = {row["path"]: row["scores"] for row in scores(run).to_pylist()}
    for row in found:
        assert sum(row["scores"]) == pytest.approx(1, abs=1e-5)
        # Less probability is spread over the classes that are left: for one view their ratio would stay.
        assert (row["scores"][0] > row["scores"][1]) == (whole[row["path"]][5] > whole[row["path"]][2])
    write_manifest(tmp_path / "other.arrow", moved, (names[0], "juggling"))
    code, _, errors = evaluate(run, "--last", "--manifest", tmp_path / "other.arrow", "--out", tmp_path / "o")
    assert code == 2 and "juggling" in errors and not (tmp_path / "o").exists()


def test_a_file_of_weights_and_missing_files(run: Path, tmp_path: Path) -> None:
    shutil.copy(run / "weights.safetensors", tmp_path / "w.safetensors")
    code, output, errors = evaluate(tmp_path / "w.safetensors", "--json")
    assert code == 0, errors
    values = json.loads(output)
    assert {name: values[name] for name in NUMBERS} == {name: own(run)[name] for name in NUMBERS}
    assert (tmp_path / "evaluations" / "w-val-2x3" / "scores.parquet").exists()
    code, _, errors = evaluate(tmp_path / "nothing")
    assert code == 2 and "nothing" in errors and "Traceback" not in errors
    code, _, errors = evaluate(run, "--manifest", tmp_path / "nothing.arrow")
    assert code == 2 and "nothing.arrow" in errors and "Traceback" not in errors


def test_the_deepspeed_launcher(run: Path, tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("deepspeed")
    command = [program, "--num_gpus", "2", SCRIPT, run, "--last", "--out", tmp_path]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert result(tmp_path)["ranks"] == 2
    assert_equals_run(tmp_path, run)
