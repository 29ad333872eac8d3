"""The body that all job scripts share, with stubs of SLURM's programs."""

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from trainer.cluster.sbatch import JobRequest, format_script

# A stub of srun, scontrol, squeue and Python: records its call and answers as in `answers.json`.
STUB = """#!{python}
import json, os, sys, time
name, folder = os.path.basename(sys.argv[0]), "{folder}"
key = " ".join([name, *sys.argv[1:]])
with open(folder + "/calls", "a") as file:
    file.write(key + "\\n")
for answer in json.load(open(folder + "/answers.json")):
    if answer["to"] in key and not os.path.exists(folder + "/used-" + str(answer.get("once"))):
        if "once" in answer:
            open(folder + "/used-" + str(answer["once"]), "w").close()
        time.sleep(answer.get("seconds", 0))
        print(answer.get("says", ""))
        if "signal" in answer:
            import signal
            signal.signal(getattr(signal, answer["signal"]), lambda *_: sys.exit(answer["then"]))
            open(folder + "/ready", "w").close()
            time.sleep(60)
        sys.exit(answer.get("code", 0))
sys.exit(0)
"""


class Script:
    """A job's script, started with the answers of its stubs."""

    def __init__(self, folder: Path, *answers: dict[str, Any], **variables: str) -> None:
        self.folder = folder
        (folder / "logs").mkdir()
        usual = [
            {"to": "turn.py begin", "says": str(folder / "logs")},
            {"to": "show hostnames", "says": "n1\nn2"},
            {"to": "show node", "says": "NodeName=n1 NodeAddr=10.0.0.7 NodeHostName=n1"},
            {"to": "show job", "says": "JobId=5\n   JobState=RUNNING Reason=None"},
        ]
        (folder / "answers.json").write_text(json.dumps([*answers, *usual]))
        for name in ("srun", "scontrol", "squeue", "fake-python", "sleep"):
            program = folder / name
            program.write_text(STUB.format(python=sys.executable, folder=folder))
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
        request = JobRequest(name="x", nodes=2, gpus_per_node=0, cpus_per_rank=1, time="60", lead=60)
        text = format_script(request, [["--recipe", "r.yaml"]], folder / "log", "a test")
        text = text.replace(f"python=({sys.executable})", "python=(fake-python)")
        assert "fake-python" in text
        (folder / "job.sh").write_text(text)
        named = {
            "SLURM_JOB_ID": "5",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "PATH": f"{folder}:{os.environ['PATH']}",
        }
        self.process = subprocess.Popen(
            ["bash", str(folder / "job.sh")], env={**named, **variables}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def end(self) -> int:
        try:
            self.output, _ = self.process.communicate(timeout=60)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.returncode

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + 30
        while not (self.folder / "ready").exists():
            assert time.monotonic() < deadline and self.process.poll() is None, self.calls()
            time.sleep(0.02)

    def calls(self, of: str = "") -> list[str]:
        return [line for line in (self.folder / "calls").read_text().splitlines() if of in line]


def test_a_run_that_is_done(tmp_path: Path) -> None:
    job = Script(tmp_path)
    assert job.end() == 0
    preflight, training = job.calls("srun")
    assert "launch/doctor.py --gpus-per-node 0 --recipe r.yaml" in preflight
    assert "launch/train.py --recipe r.yaml" in training and "--export=ALL" in training
    assert (
        job.calls("turn.py")[-1]
        == "fake-python launch/slurm/turn.py end --code 0 --state RUNNING --recipe r.yaml"
    )
    assert not job.calls("requeue")


@pytest.mark.parametrize("code", [85, 1, 130, 137])
def test_the_attempt_s_end_and_not_the_training_decides_about_a_requeue(tmp_path: Path, code: int) -> None:
    for number, (verdict, requeued) in enumerate([(85, 1), (2, 0), (0, 0)]):
        folder = tmp_path / str(number)
        folder.mkdir()
        job = Script(folder, {"to": "train.py", "code": code}, {"to": "turn.py end", "code": verdict})
        assert job.end() == verdict
        assert f"end --code {code} " in job.calls("turn.py end")[0]
        assert job.calls("requeue") == ["scontrol requeue 5"] * requeued


def test_nothing_is_started_where_there_is_nothing_to_do(tmp_path: Path) -> None:
    job = Script(tmp_path, {"to": "turn.py begin", "says": ""})
    assert job.end() == 0
    assert not job.calls("srun") and not job.calls("turn.py end")


def test_nothing_is_started_where_no_attempt_may_begin(tmp_path: Path) -> None:
    job = Script(tmp_path, {"to": "turn.py begin", "code": 2})
    assert job.end() == 2
    assert not job.calls("srun") and not job.calls("requeue")


@pytest.mark.parametrize(("found", "passed"), [(1, 3), (2, 2), (143, 143)])
def test_nothing_is_trained_after_a_failed_preflight(tmp_path: Path, found: int, passed: int) -> None:
    job = Script(tmp_path, {"to": "doctor.py", "code": found})
    job.end()
    assert not job.calls("train.py") and f"end --code {passed} " in job.calls("turn.py end")[0]


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_a_signal_reaches_the_training_and_its_own_code_comes_back(tmp_path: Path, name: str) -> None:
    job = Script(tmp_path, {"to": "train.py", "signal": name, "then": 85})
    job.wait_until_ready()
    job.process.send_signal(getattr(signal, name))
    job.end()
    assert "end --code 85 " in job.calls("turn.py end")[0]


def test_a_signal_during_the_preflight_leaves_without_training(tmp_path: Path) -> None:
    job = Script(tmp_path, {"to": "doctor.py", "signal": "SIGUSR1", "then": 138})
    job.wait_until_ready()
    job.process.send_signal(signal.SIGUSR1)
    job.end()
    assert not job.calls("train.py") and "end --code 85 " in job.calls("turn.py end")[0]


def test_a_task_of_an_array_requeues_itself_alone(tmp_path: Path) -> None:
    job = Script(
        tmp_path, {"to": "turn.py end", "code": 85}, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="1"
    )  # fmt: skip
    job.end()
    assert job.calls("requeue") == ["scontrol requeue 5_1"]
    assert set(job.calls("show job")) == {"scontrol show job 5_1"}
    assert "--jobs=5_1" in job.calls("squeue")[0]


def test_a_controller_that_is_busy_is_asked_again(tmp_path: Path) -> None:
    busy = [{"to": to, "code": 1, "once": to.split()[-1]} for to in ("show job", "scontrol requeue")]
    job = Script(tmp_path, *busy, {"to": "turn.py end", "code": 85})
    job.end()
    assert "--state RUNNING" in job.calls("turn.py end")[0]
    assert len(job.calls("requeue")) == 2 and "is not requeued" in job.output  # the stub's sleep ends


def test_an_scancel_at_the_last_moment_is_not_undone(tmp_path: Path) -> None:
    ended = {"to": "show job", "says": "JobState=COMPLETING"}
    running = {"to": "show job", "says": "JobState=RUNNING", "once": "first"}
    job = Script(tmp_path, running, ended, {"to": "turn.py end", "code": 85})
    assert job.end() == 85
    assert "--state RUNNING" in job.calls("turn.py end")[0] and not job.calls("requeue")


def test_without_a_controller_the_state_is_unknown(tmp_path: Path) -> None:
    job = Script(tmp_path, {"to": "show job", "code": 1})
    job.end()
    assert "--state UNKNOWN" in job.calls("turn.py end")[0]


PRINTED = """import os
print(os.environ["MASTER_ADDR"], os.environ.get("SLURM_JOB_END_TIME"), os.environ.get("RANK"))
"""


@pytest.mark.parametrize(
    ("says", "known"),
    [("2099-01-01T00:00:00", True), ("", False), ("N/A", False), ("2001-01-01T00:00:00", False)],
)
def test_ranks_get_the_address_of_rank_0_and_the_end_of_the_job(
    tmp_path: Path, says: str, known: bool
) -> None:
    job = Script(tmp_path, {"to": "squeue", "says": says}, MASTER_ADDR="localhost", RANK="3", TZ="UTC")
    (tmp_path / "srun").write_text(f"#!{sys.executable}\n{PRINTED}")
    assert job.end() == 0
    end = str(4070908800) if known else None
    assert f"10.0.0.7 {end} None" in job.output
