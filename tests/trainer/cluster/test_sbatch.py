"""The script of a job: its request, its training, and that a shell accepts it."""

import subprocess
from pathlib import Path
from typing import Any

import pytest

from trainer.cluster.sbatch import TEMPLATE, JobRequest, format_script
from trainer.errors import RunError
from trainer.system.slurm import parse_time_limit

TASK = ["--recipe", "recipes/a b.yaml", "--set", "name=it's"]


def request(**changes: Any) -> JobRequest:
    asked = {"name": "x", "nodes": 2, "gpus_per_node": 8, "cpus_per_rank": 6, "time": "2:00:00", "lead": 300}
    return JobRequest(**{**asked, **changes})


def written(*tasks: list[str], **changes: Any) -> str:
    return format_script(
        request(**changes), tasks or [TASK], Path("runs/x/slurm/job-%j.log"), "python submit.py"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 5400), ("1:30", 90), ("1:30:00", 5400), ("24:00:00", 86400),
        ("2-12", 216000), ("2-12:30", 217800), ("0-00:00:05", 5),
    ],
)  # fmt: skip
def test_times_are_parsed_as_slurm_writes_them(text: str, expected: int) -> None:
    assert parse_time_limit(text) == expected


@pytest.mark.parametrize("text", ["", "1h", "1:2:3:4", "-3", "1.5", "1-"])
def test_another_format_of_a_time_is_refused(text: str) -> None:
    with pytest.raises(RunError, match="2-12:00:00"):
        parse_time_limit(text)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nodes": 0}, "--nodes 0: at least 1"),
        ({"gpus_per_node": -1}, "--gpus-per-node -1: at least 0"),
        ({"time": "5"}, "--time 5 is not longer than"),
        ({"container": Path("no.sif")}, "--container no.sif: there is no such image"),
        ({"at_once": 0}, "--array 0: at least 1"),
    ],
)
def test_a_value_that_no_cluster_accepts_is_refused_by_its_option(
    changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(RunError, match=words):
        request(**changes)


def options_of(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


def test_the_options_of_a_request() -> None:
    assert options_of(written(options=("--partition=gpu",))) == [
        "--job-name=x", "--nodes=2", "--ntasks-per-node=8", "--cpus-per-task=6", "--gpus-per-node=8",
        "--time=2:00:00", "--signal=B:USR1@300", "--requeue", "--open-mode=append",
        "--output=runs/x/slurm/job-%j.log", "--partition=gpu",
    ]  # fmt: skip
    on_cpus = options_of(written(gpus_per_node=0, requeues=False))
    assert "--ntasks-per-node=1" in on_cpus and "--no-requeue" in on_cpus
    assert not any("gpus" in option for option in on_cpus)


def arguments(text: str, variables: dict[str, str]) -> list[str]:
    """The arguments of the training that a shell finds in the head of a script."""
    head = text.partition("# ---- from here on")[0] + 'printf "%s\\n" "$@"\n'
    result = subprocess.run(["bash"], input=head, env=variables, capture_output=True, text=True, check=True)
    return result.stdout.splitlines()


def test_arguments_reach_the_training_with_blanks_and_quotes() -> None:
    assert arguments(written(), {}) == TASK


def test_each_task_of_an_array_has_its_own_arguments() -> None:
    text = written(TASK, ["--recipe", "b"], at_once=1)
    assert "--array=0-1%1" in options_of(text)
    assert arguments(text, {"SLURM_ARRAY_TASK_ID": "0"}) == TASK
    assert arguments(text, {"SLURM_ARRAY_TASK_ID": "1"}) == ["--recipe", "b"]


def test_a_shell_accepts_it_and_all_scripts_share_their_body() -> None:
    for text in (written(), TEMPLATE.read_text()):
        subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    bodies = {text.partition("# ---- from here on")[2] for text in (written(), TEMPLATE.read_text())}
    assert len(bodies) == 1 and "launch/train.py" in bodies.pop()


def test_the_preflight_gets_the_requirements() -> None:
    assert "demands=(--gpus-per-node 8)" in written()
    assert "demands=(--gpus-per-node 0 --min-bandwidth 50)" in written(gpus_per_node=0, min_bandwidth=50.0)
    assert '"${demands[@]}"' in written() and "demands=()" in TEMPLATE.read_text()


@pytest.mark.parametrize("what", ["folder", "argument", "option"])
def test_what_a_script_cannot_hold_is_refused(what: str) -> None:
    with pytest.raises(RunError, match=r"blanks|several lines"):
        if what == "folder":
            format_script(request(), [TASK], Path("my runs/x/slurm/job-%j.log"), "python submit.py")
        elif what == "argument":
            written(["--set", "name=a\nrm -r b"])
        else:
            request(options=("--comment=a b",))


def test_in_a_container_everything_runs_in_it(tmp_path: Path) -> None:
    image = tmp_path / "image.sif"
    image.touch()
    line = f"python=(apptainer exec --nv --bind {Path.cwd()} --pwd {Path.cwd()} {image} python)"
    assert line in written(container=image)
    assert "--nv" not in written(container=image, gpus_per_node=0).partition("# ---- from here on")[0]


def test_a_job_finds_the_commands_from_the_folder_it_starts_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TEMPLATE.parents[2])
    assert "\nlaunch=launch\n" in written() and "\nlaunch=launch\n" in TEMPLATE.read_text()
    monkeypatch.chdir(tmp_path)
    assert f"\nlaunch={TEMPLATE.parents[1]}\n" in written()
    image = tmp_path / "image.sif"
    image.touch()
    with pytest.raises(RunError, match=r"--container: .* project's folder"):
        written(container=image)
