"""Trainings on a real SLURM of two nodes: time limits, dead nodes, cancelled jobs, chains and sweeps.

`.ci/run` installs SLURM and sets REQUIRE_SLURM; elsewhere these tests are skipped where it is not installed.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file

from pipelines.dataset.kinetics710 import class_names
from pipelines.dataset.prepare.build import build_manifest
from pipelines.dataset.prepare.folder import read_folder
from tests.conftest import MotionSet
from tests.integration.processes import ROOT, events, settings, train
from tests.integration.slurm import Cluster, missing

pytestmark = pytest.mark.skipif(
    bool(missing()) and "REQUIRE_SLURM" not in os.environ,
    reason=f"NO SLURM HERE ({', '.join(missing())}): apt-get install slurm-wlm munge",
)

QUICKSTART = ROOT / "recipes" / "quickstart.yaml"
STEPS = 60
PATIENCE = 180.0  # seconds for an attempt of a job, which takes about 20 on an idle machine


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    assert not missing(), f"REQUIRE_SLURM is set, and {missing()} is missing"
    folder = Path(tempfile.mkdtemp(prefix="slurm-"))  # a socket's path has to be short
    try:
        with Cluster(folder / "c") as running:
            yield running
    finally:
        shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def end_jobs_after_test(cluster: Cluster) -> Iterator[None]:
    """End the jobs of a test, so that the next one finds both nodes free."""
    yield
    cluster.end_jobs()


@pytest.fixture
def both_nodes(cluster: Cluster) -> Iterator[Cluster]:
    """For tests that end a node: it is started again afterwards."""
    yield cluster
    for node in cluster.dead_nodes():
        cluster.start_node(node)
    cluster.wait_until(lambda: cluster.states() == ["idle", "idle"], "the nodes did not return")


def changes(motion_set: MotionSet, **more: Any) -> list[str]:
    """Settings that make the quickstart small."""
    return [
        *settings(
            data__train=motion_set.train, data__val=motion_set.val, data__workers=1, data__threads=1,
            optimisation__epochs="null", optimisation__steps=STEPS, optimisation__warmup_epochs="null",
            optimisation__warmup_steps=4, evaluation__every_epochs="null", engine__zero_stage=2,
            tracking__enabled="false", run__log_every_steps=1,
        ),
        *settings(**more),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(motion_set: MotionSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of two ranks on this machine, without SLURM."""
    run_dir = tmp_path_factory.mktemp("slurm") / "undisturbed"
    arguments = changes(motion_set)
    outcome = train(run_dir, *arguments, data=motion_set.root, ranks=2, recipe=QUICKSTART)
    assert outcome.code == 0, outcome.errors
    return run_dir


def submitted(
    cluster: Cluster, *arguments: str, time: str = "10", lead: int = 60, nodes: int = 2, **more: Any
) -> subprocess.CompletedProcess[str]:
    return cluster.typed(
        sys.executable, "launch/slurm/submit.py", "--nodes", str(nodes), "--gpus-per-node", "0",
        "--cpus-per-rank", "1", "--time", time, "--lead", str(lead), *arguments,
        folder=ROOT, **more,
    )  # fmt: skip


def begin(cluster: Cluster, run_dir: Path, *arguments: str, preflight: bool = False, **more: Any) -> str:
    """Submit a run of the quickstart; returns the number of the job."""
    arguments = arguments if preflight else ("--no-preflight", *arguments)
    result = submitted(cluster, "--recipe", str(QUICKSTART), "--run-dir", str(run_dir), *arguments, **more)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()[1].rstrip(",")


def wait_for(happened: Callable[[], bool], run_dir: Path, seconds: float = PATIENCE) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, all_logs(run_dir)
        time.sleep(0.1)


def all_logs(run_dir: Path) -> str:
    """The ends of all logs of a run, for the message of a failed test."""
    logs = sorted(
        [*run_dir.glob("slurm/*.log"), *run_dir.glob("slurm/*.jsonl"), *run_dir.glob("logs/*/*.log")]
    )
    return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-2500:]}" for path in logs)


def attempts(run_dir: Path, kind: str = "ended") -> list[dict[str, Any]]:
    path = run_dir / "slurm" / "turns.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [attempt for attempt in map(json.loads, lines) if attempt["turn"] == kind]


def wait_for_step(run_dir: Path, step: int) -> None:
    wait_for(lambda: any(event["step"] >= step for event in events(run_dir, "step")), run_dir)


def start_requeued(cluster: Cluster, job: str, run_dir: Path) -> None:
    """Start a requeued job at once, without SLURM's wait of two minutes."""
    wait_for(lambda: cluster.state(job) == "PENDING", run_dir)
    time.sleep(4)  # within a second of the end, a node takes a new start for the old one and kills it

    def begins() -> bool:
        # More than once: SLURM sets the time again when it cleans up the attempt before.
        cluster.typed("scontrol", "update", f"JobId={job}", "StartTime=now")
        return cluster.state(job) == "RUNNING"

    wait_for(begins, run_dir)


def wait_for_attempt(run_dir: Path, verdict: str) -> dict[str, Any]:
    wait_for(lambda: any(attempt["verdict"] == verdict for attempt in attempts(run_dir)), run_dir)
    return next(attempt for attempt in attempts(run_dir) if attempt["verdict"] == verdict)


def steps_of(run_dir: Path) -> dict[int, float]:
    """The loss of each step, of its last execution."""
    return {event["step"]: event["loss"] for event in events(run_dir, "step")}


def assert_same(run_dir: Path, undisturbed: Path) -> None:
    """Equal losses mean equal clips, equal weights that nothing else differs."""
    assert steps_of(run_dir) == steps_of(undisturbed)
    assert len(steps_of(run_dir)) == STEPS
    weights, expected = (load_file(folder / "weights.safetensors") for folder in (run_dir, undisturbed))
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name


@pytest.mark.soak
def test_two_nodes_train_as_two_ranks_of_one_machine(
    cluster: Cluster, motion_set: MotionSet, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = begin(cluster, run_dir, *changes(motion_set), preflight=True)
    wait_for_attempt(run_dir, "done")
    assert_same(run_dir, undisturbed)
    job_log = (run_dir / "slurm" / f"job-{job}.log").read_text()
    assert "preflight of 2 nodes, 2 ranks" in job_log and "0 failures" in job_log
    starts = attempts(run_dir, "begun")
    assert [attempt["nodes"] for attempt in starts] == ["n[1-2]"]
    assert {path.name for path in Path(starts[0]["logs"]).glob("rank-*.log")} == {"rank-0.log", "rank-1.log"}
    assert "top-1" in (Path(starts[0]["logs"]) / "rank-0.log").read_text()


@pytest.mark.soak
def test_a_requeued_job_ends_with_the_same_weights(
    cluster: Cluster, motion_set: MotionSet, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = begin(cluster, run_dir, *changes(motion_set))
    wait_for_step(run_dir, 5)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # as SLURM does before the time limit
    left = wait_for_attempt(run_dir, "requeued")
    assert 5 <= left["step"] < STEPS and f"step {left['step']} is saved" in left["words"]
    start_requeued(cluster, job, run_dir)
    wait_for_attempt(run_dir, "done")
    assert [attempt["restart"] for attempt in attempts(run_dir, "begun")] == [0, 1]
    done_once = [event["step"] for event in events(run_dir, "step")]
    assert done_once == list(range(1, STEPS + 1)), "no step is lost or done twice"
    assert_same(run_dir, undisturbed)


@pytest.mark.soak
def test_the_time_limit_itself(cluster: Cluster, motion_set: MotionSet, tmp_path: Path) -> None:
    """SLURM may send its signal up to a minute early; the job ends, and the next attempt resumes."""
    run_dir = tmp_path / "run"
    job = begin(cluster, run_dir, *changes(motion_set, optimisation__steps=100000), time="3", lead=60)
    wait_for_attempt(run_dir, "requeued")
    saved = attempts(run_dir)[0]["step"]
    assert saved > 0
    start_requeued(cluster, job, run_dir)
    wait_for_step(run_dir, saved + 1)
    cluster.run("scancel", job)
    assert wait_for_attempt(run_dir, "stopped")["step"] > saved


@pytest.mark.soak
def test_a_node_dies(both_nodes: Cluster, motion_set: MotionSet, undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    cluster = both_nodes
    job = begin(cluster, run_dir, *changes(motion_set, run__checkpoint_every_steps=5))
    wait_for_step(run_dir, 12)
    cluster.kill_node("n2")
    for process in ranks_of(run_dir, rank=1):  # as its processes do when a node dies
        os.kill(process, signal.SIGKILL)
    wait_for(lambda: cluster.state(job) == "PENDING", run_dir)
    cluster.start_node("n2")
    cluster.wait_until(lambda: cluster.states() == ["idle", "idle"], "the node did not come back")
    start_requeued(cluster, job, run_dir)
    wait_for_attempt(run_dir, "done")
    assert [attempt["restart"] for attempt in attempts(run_dir, "begun")] == [0, 1]
    assert 10 <= attempts(run_dir, "begun")[1]["step"] < STEPS
    assert_same(run_dir, undisturbed)


def ranks_of(run_dir: Path, rank: int) -> list[int]:
    """Processes of one rank of a run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_bytes()
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue  # it ended meanwhile
        if (
            b"launch/train.py" in command
            and str(run_dir).encode() in command
            and b"SLURM_PROCID=%d" % rank in variables
        ):
            found.append(int(process.name))
    return found


@pytest.mark.soak
def test_a_run_that_fails_three_times_without_progress_is_not_requeued(
    cluster: Cluster, motion_set: MotionSet, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    job = begin(cluster, run_dir, *changes(motion_set, run__checkpoint_every_minutes="null"))
    for number in range(1, 4):
        if number > 1:
            start_requeued(cluster, job, run_dir)
        wait_for(lambda: len(events(run_dir, "start")) == number and len(ranks_of(run_dir, 1)) > 0, run_dir)  # noqa: B023
        for process in ranks_of(run_dir, rank=1):
            os.kill(process, signal.SIGKILL)
        wait_for(lambda: len(attempts(run_dir)) == number, run_dir)  # noqa: B023
    first, second, last = attempts(run_dir)
    assert [first["verdict"], second["verdict"], last["verdict"]] == ["requeued", "requeued", "given up"]
    assert "rank 1 on n2 ended first: Killed" in last["words"]
    assert "no progress in 3 attempts in a row" in last["words"]
    wait_for(lambda: cluster.state(job) == "FAILED", run_dir)


@pytest.mark.soak
def test_a_cancelled_job_saves_and_is_not_requeued(
    cluster: Cluster, motion_set: MotionSet, undisturbed: Path, tmp_path: Path
) -> None:
    """Submitted again, the run resumes on another number of nodes."""
    run_dir = tmp_path / "run"
    job = begin(cluster, run_dir, *changes(motion_set))
    wait_for_step(run_dir, 4)
    cluster.run("scancel", job)
    stopped = wait_for_attempt(run_dir, "stopped")
    assert 4 <= stopped["step"] < STEPS
    wait_for(lambda: not cluster.run("squeue", "--noheader"), run_dir)
    assert cluster.state(job) == "CANCELLED"
    begin(cluster, run_dir, *changes(motion_set), nodes=1)
    wait_for_attempt(run_dir, "done")
    losses, expected = steps_of(run_dir), steps_of(undisturbed)
    assert list(losses) == list(expected) == list(range(1, STEPS + 1))
    torch.testing.assert_close(list(losses.values()), list(expected.values()), atol=1e-5, rtol=0)


def test_a_submission_that_cannot_work_is_refused(
    cluster: Cluster, motion_set: MotionSet, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    recipe = ["--recipe", str(QUICKSTART), "--run-dir", str(run_dir)]
    refused = {
        "main": [*recipe, "--partition", "gpu"],
        "did you mean": ["--recipe", "recipes/quickstar.yaml"],
        "cannot be divided evenly over 2": [*recipe, "--set", "optimisation.global_batch=33"],
        "refuses": [*recipe, "--sbatch=--nodelist=n7"],
        "not longer than": [*recipe, "--lead", "6000"],
        "will never start": [*recipe, "--time", "90000"],
        "No node there has 8 GPUs": [*recipe, "--gpus-per-node", "8"],
        "no manifest at": [*recipe, "--set", "data.embedded=null", "--set", "data.val=none.arrow"],
    }
    for words, arguments in refused.items():
        result = submitted(cluster, *arguments)
        assert result.returncode == 2, (words, result.stdout)
        assert words in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert cluster.run("squeue", "--noheader") == ""
    shown = submitted(cluster, *recipe, "--dry-run", *changes(motion_set))
    assert shown.returncode == 0 and shown.stdout.startswith("#!/bin/bash")
    assert cluster.run("squeue", "--noheader") == ""


@pytest.mark.soak  # test_rendezvous.py has ranks that do not connect, without SLURM
def test_a_node_that_does_not_connect_is_named(
    cluster: Cluster, motion_set: MotionSet, tmp_path: Path
) -> None:
    """Its process hangs before it connects."""
    training = [
        sys.executable,
        "launch/train.py",
        "--recipe",
        str(QUICKSTART),
        "--run-dir",
        str(tmp_path / "run"),
    ]
    training += changes(motion_set, run__rendezvous_minutes=0.15)
    absent = 'if [ "$SLURMD_NODENAME" = n2 ]; then sleep 120; else exec "$@"; fi'
    result = cluster.typed(
        "srun", "--nodes=2", "--kill-on-bad-exit=1", "bash", "-c", absent, "bash", *training,
        folder=ROOT, variables={"MASTER_ADDR": "127.0.0.1"},
    )  # fmt: skip
    assert result.returncode != 0
    assert "Exited with exit code 85" in result.stderr, result.stderr
    assert "node n2" in result.stderr and "Traceback" not in result.stderr, result.stderr


@pytest.mark.soak
def test_a_submission_that_must_wait_for_a_node_has_a_note(
    both_nodes: Cluster, motion_set: MotionSet, tmp_path: Path
) -> None:
    cluster = both_nodes
    cluster.kill_node("n2")
    cluster.wait_until(lambda: "down*" in cluster.states(), "SLURM did not notice the end of the node")
    result = submitted(
        cluster, "--recipe", str(QUICKSTART), "--run-dir", str(tmp_path / "run"), *changes(motion_set)
    )
    assert result.returncode == 0, result.stderr
    assert "2 nodes are asked for, and 1 are up (not: n2)" in result.stderr
    shown = cluster.typed(sys.executable, "launch/status.py", str(tmp_path / "run"), folder=ROOT)
    assert "waiting" in shown.stdout, shown.stdout
    cluster.run("scancel", result.stdout.split()[1])


@pytest.mark.soak
def test_a_chain_resumes_after_its_last_job_and_ends_with_the_run(
    cluster: Cluster, motion_set: MotionSet, undisturbed: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    first = begin(cluster, run_dir, *changes(motion_set), "--chain", "3")
    again = submitted(cluster, "--recipe", str(QUICKSTART), "--run-dir", str(run_dir), *changes(motion_set))
    assert again.returncode == 2 and "has a job already" in again.stderr
    wait_for_step(run_dir, 5)
    cluster.run("scancel", "--batch", "--signal=USR1", first)
    assert wait_for_attempt(run_dir, "left to the next job")["job"] == first
    wait_for_attempt(run_dir, "done")
    assert_same(run_dir, undisturbed)
    wait_for(lambda: not cluster.run("squeue", "--noheader"), run_dir)
    assert len(attempts(run_dir, "begun")) == 2, "the third job had nothing to do"


@pytest.mark.soak
def test_each_run_of_a_sweep_is_requeued_by_itself(
    cluster: Cluster, motion_set: MotionSet, tmp_path: Path
) -> None:
    home = tmp_path / "sweep"
    result = submitted(
        cluster, "--recipe", str(QUICKSTART), "--run-dir", str(home), "--no-preflight",
        "--vary", "seed=1,2", *changes(motion_set, optimisation__steps=1000), nodes=1,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    array, runs = result.stdout.split()[1], [home / "quickstart-seed-1", home / "quickstart-seed-2"]
    for run_dir in runs:
        wait_for_step(run_dir, 3)
    for number, run_dir in enumerate(runs):
        cluster.run("scancel", "--batch", "--signal=USR1", f"{array}_{number}")
        wait_for_attempt(run_dir, "requeued")
        assert len(attempts(runs[1], "begun")) == 1, "the other run continues, or received the signal too"
    for number, run_dir in enumerate(runs):
        start_requeued(cluster, f"{array}_{number}", run_dir)
        wait_for(lambda: len(attempts(run_dir, "begun")) == 2, run_dir)  # noqa: B023
    cluster.run("scancel", array)


@pytest.mark.soak
def test_a_sweep_is_one_array_under_one_mlflow_run(
    cluster: Cluster, motion_set: MotionSet, tmp_path: Path
) -> None:
    home, store = tmp_path / "sweep", f"sqlite:///{tmp_path}/mlflow.db"
    result = submitted(
        cluster, "--recipe", str(QUICKSTART), "--run-dir", str(home), "--array", "1", "--no-preflight",
        "--vary", "optimisation.learning_rate=1e-3,2e-3", *changes(motion_set, optimisation__steps=6),
        "--set", "tracking.enabled=true", "--set", f"tracking.uri={store}", nodes=1,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    runs = [home / f"quickstart-learning_rate-{rate}" for rate in ("0.001", "0.002")]
    for run_dir in runs:
        wait_for_attempt(run_dir, "done")
    client = MlflowClient(store)
    found = client.search_runs([client.get_experiment_by_name("quickstart").experiment_id])
    parent = next(run for run in found if run.info.run_name == "sweep")
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert {run.info.run_name for run in children} == {run_dir.name for run_dir in runs}
    assert parent.data.params["optimisation.learning_rate"] == "0.001, 0.002"
    assert {run.data.params["optimisation.learning_rate"] for run in children} == {"0.001", "0.002"}


@pytest.mark.soak
def test_the_designs_of_an_ablation_are_one_array(
    cluster: Cluster, motion_set: MotionSet, tmp_path: Path
) -> None:
    rows = [
        {"name": module, "set": [f"model.overrides.temporal_module={module}"], "paper": {"motion": 50.0}}
        for module in ("st_adapter", "temporal_shift")
    ]
    column = {"name": "motion", "recipe": str(QUICKSTART), "set": ["model.overrides.local_mhra=0"]}
    grid = {"name": "grid", "title": "Two designs", "columns": [column], "rows": rows}
    (tmp_path / "grid.yaml").write_text(json.dumps(grid))
    command = [
        sys.executable, "launch/ablate.py", str(tmp_path / "grid.yaml"), "--run-dir", str(tmp_path / "grid"),
        *changes(motion_set, optimisation__steps=6), "--set", "evaluation.at_end=true",
    ]  # fmt: skip
    job = ["--slurm", "--array", "1", "--gpus-per-node", "0", "--cpus-per-rank", "1", "--time", "10"]
    result = cluster.typed(*command, *job, "--lead", "60", "--no-preflight", folder=ROOT)
    assert result.returncode == 0, result.stderr
    for run_dir in (tmp_path / "grid" / f"grid-{name}-seed0" for name in ("st_adapter", "temporal_shift")):
        wait_for_attempt(run_dir, "done")
    table = cluster.typed(*command, "--table", folder=ROOT)
    assert table.returncode == 0 and "not started" not in table.stdout, table.stdout
    values = json.loads((tmp_path / "grid" / "table.json").read_text())
    assert [len(cell["top1"]) for cell in values] == [1, 1]
    again = cluster.typed(*command, *job, folder=ROOT)
    assert "submitted" not in again.stdout


@pytest.mark.soak
def test_a_chain_from_k710_to_k400_waits_for_a_requeued_stage(
    cluster: Cluster, motion_set: MotionSet, tmp_path: Path
) -> None:
    videos = sorted(motion_set.root.rglob("*.mp4"))[:16]
    for table, count in (("k710", 710), ("k400", 400)):
        (tmp_path / f"{table}.txt").write_text("\n".join(class_names(table)) + "\n")
        lines = [f"{path},{count - 1 - number}" for number, path in enumerate(videos)]
        (tmp_path / f"{table}.csv").write_text("\n".join(lines) + "\n")
        command = ["launch/prepare.py", "table", str(tmp_path / f"{table}.csv"), "--workers", "1"]
        command += ["--classes", str(tmp_path / f"{table}.txt"), "--out", str(tmp_path / f"{table}.arrow")]
        subprocess.run([sys.executable, *command], check=True, cwd=ROOT, capture_output=True)
    stages = [
        {
            "recipe": str(QUICKSTART),
            "set": [f"name={table}", *_data(tmp_path / f"{table}.arrow"), f"model.frames={frames}"],
        }
        for table, frames in (("k710", 4), ("k400", 8))
    ]
    (tmp_path / "chain.yaml").write_text(json.dumps({"name": "tiny", "stages": stages}))
    small = changes(
        motion_set, optimisation__steps=60, optimisation__global_batch=4, evaluation__at_end="false"
    )
    result = cluster.typed(
        sys.executable, "launch/chain.py", str(tmp_path / "chain.yaml"), "--run-dir", str(tmp_path),
        "--slurm", "--nodes", "1", "--gpus-per-node", "0", "--cpus-per-rank", "1", "--time", "10", "--lead",
        "60", "--no-preflight", *small, folder=ROOT,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    first, second = re.findall(r"^job (\d+)", result.stdout, re.MULTILINE)
    k710, k400 = tmp_path / "k710", tmp_path / "k400"
    wait_for_step(k710, 3)
    cluster.run("scancel", "--batch", "--signal=USR1", first)
    wait_for_attempt(k710, "requeued")
    assert "Dependency" in cluster.run("squeue", "--noheader", "--format=%r", f"--job={second}")
    start_requeued(cluster, first, k710)
    wait_for_attempt(k710, "done")
    wait_for_attempt(k400, "done")
    (log,) = k400.glob("logs/*/rank-0.log")
    assert "400 of 400 rows copied by class name, of the file's 710" in log.read_text()


@pytest.mark.soak
def test_a_chain_submitted_again_keeps_the_jobs_of_its_stages(
    cluster: Cluster, motion_set: MotionSet, tmp_path: Path
) -> None:
    """A queued job of a later stage waits for the new one of the stage before."""
    stages = [{"recipe": str(QUICKSTART), "set": [f"name={name}"]} for name in ("first", "second")]
    (tmp_path / "chain.yaml").write_text(json.dumps({"name": "tiny", "stages": stages}))
    held = cluster.run("sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap=true")
    jobs = tmp_path / "second" / "slurm" / "jobs.jsonl"
    jobs.parent.mkdir(parents=True)
    jobs.write_text(json.dumps({"job": held, "time": 1.0, "nodes": 1}) + "\n")

    def typed() -> subprocess.CompletedProcess[str]:
        return cluster.typed(
            sys.executable, "launch/chain.py", str(tmp_path / "chain.yaml"), "--run-dir", str(tmp_path),
            "--slurm", "--gpus-per-node", "0", "--cpus-per-rank", "1", "--time", "10", "--lead", "60",
            "--no-preflight", "--sbatch=--hold", *changes(motion_set), folder=ROOT,
        )  # fmt: skip

    result = typed()
    assert result.returncode == 0, result.stderr
    (first,) = re.findall(r"^job (\d+)", result.stdout, re.MULTILINE)
    assert f"job {held} is in the queue already" in result.stdout
    assert f"afterok:{first}(" in cluster.run("squeue", "--noheader", "--format=%E", f"--job={held}")
    result = typed()
    assert result.returncode == 0 and " submitted: " not in result.stdout, result
    assert all(f"job {job} is in the queue already" in result.stdout for job in (first, held))
    cluster.run("scancel", first, held)
    begun = cluster.run("sbatch", "--parsable", "--output=/dev/null", "--wrap=sleep 100")
    jobs.write_text(json.dumps({"job": begun, "time": 1.0, "nodes": 1}) + "\n")
    cluster.wait_until(lambda: cluster.state(begun) == "RUNNING", "the job does not start")
    result = typed()
    assert result.returncode == 2 and f"second has job {begun}, RUNNING, but" in result.stderr
    assert cluster.run("squeue", "--noheader", "--format=%A") == begun


def _data(manifest: Path) -> list[str]:
    return [f"data.train={manifest}", f"data.val={manifest}", "data.embedded=null"]


@pytest.mark.soak
def test_a_manifest_is_made_by_an_array_and_merged(
    cluster: Cluster, motion_set: MotionSet, tmp_path: Path
) -> None:
    """By two nodes, with the same bytes as in one call."""
    videos, out, whole = tmp_path / "videos", tmp_path / "m.arrow", tmp_path / "whole.arrow"
    for copy in range(5):  # a part takes 64 consecutive videos at a time
        for path in (motion_set.root / "train").rglob("*.*"):
            (folder := videos / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, folder / f"{copy}-{path.name}")
    result = submitted(cluster, "--parts", "3", "--", "folder", str(videos), "--out", str(out), nodes=1)
    assert result.returncode == 0, result.stderr
    deadline = time.monotonic() + PATIENCE
    while cluster.run("squeue", "--noheader"):
        assert time.monotonic() < deadline, "the jobs do not end"
        time.sleep(0.5)
    logs = {path.name.split("-")[0]: path.read_text() for path in (tmp_path / "m.arrow.slurm").glob("*.log")}
    assert out.is_file(), logs
    assert "160 videos had been probed by an earlier call" in " ".join(logs["merge"].split())
    build_manifest(whole, read_folder(videos), workers=1)
    assert out.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "m.arrow.parts").exists()
