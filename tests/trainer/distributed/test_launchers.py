"""A process's place by the variables of MPI launchers, SLURM's as clusters set them, and a shell's beside."""

import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trainer.distributed.environment import cores_per_rank, find_environment
from trainer.distributed.launchers import find_rank
from trainer.distributed.slurm_step import expand_hosts, find_job_end
from trainer.errors import RunError

OMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "MASTER_ADDR": "10.0.0.1",
}
FAMILIES = {
    "Open MPI": OMPI,
    "MVAPICH2": {name.replace("OMPI", "MV2"): value for name, value in OMPI.items()},
    "Hydra": HYDRA,
    "Cray": {"PMI_RANK": "1", "PMI_SIZE": "2", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "2"},
    "jsrun": {name.replace("OMPI_COMM_WORLD", "JSM_NAMESPACE"): value for name, value in OMPI.items()},
    "no local size": {name: value for name, value in OMPI.items() if "LOCAL_SIZE" not in name},
    "mpirun in a batch script": OMPI | {"SLURM_PROCID": "0", "SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"},
    "Hydra, started by srun once a node": HYDRA
    | {name: value for name, value in STEP.items() if name != "MASTER_ADDR"},
}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_mpi_launchers_on_one_node(family: str) -> None:
    variables = dict(FAMILIES[family])
    environment = find_environment("cpu", variables)
    assert (environment.rank, environment.local_rank, environment.world_size) == (1, 1, 2)
    assert (environment.local_world_size, environment.launcher) == (2, "mpi")
    assert variables["MASTER_ADDR"] == "127.0.0.1"
    other = {name: "0" if name.endswith(("RANK", "RANKID")) else value for name, value in variables.items()}
    port = variables["MASTER_PORT"]
    first = {name: value for name, value in other.items() if name in FAMILIES[family]}
    assert find_environment("cpu", first).rank == 0
    assert first["MASTER_PORT"] == port
    # What was found is found again: a second look in the same process.
    assert find_environment("cpu", variables).launcher == "mpi"


def test_mpi_on_several_nodes_needs_an_address() -> None:
    two = {**OMPI, "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    with pytest.raises(RunError, match=r"MASTER_ADDR is not set.*mpirun -x"):
        find_environment("cpu", dict(two))
    variables = two | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400"}
    environment = find_environment("cpu", variables)
    assert (environment.rank, environment.node_rank, environment.local_world_size) == (1, 1, 1)
    assert (variables["MASTER_ADDR"], variables["MASTER_PORT"]) == ("10.0.0.1", "29400")


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        (without(OMPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_RANK set but OMPI_COMM_WORLD_SIZE not"),
        (without(OMPI, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_SIZE set but OMPI_COMM_WORLD_RANK not"),
        (OMPI | {"OMPI_COMM_WORLD_RANK": "2"}, "RANK is 2 but WORLD_SIZE is 2"),
        (OMPI | {"OMPI_COMM_WORLD_SIZE": "zwei"}, "OMPI_COMM_WORLD_SIZE is 'zwei'"),
        (OMPI | {"OMPI_COMM_WORLD_RANK": "-1"}, "OMPI_COMM_WORLD_RANK is '-1'"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "none of MPI_LOCALRANKID"),
        ({"PMIX_RANK": "0"}, "PMIX_RANK is 0"),
        (OMPI | {"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but Open MPI's mpirun started 2 processes"),
        (OMPI | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        (OMPI | {"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
        (STEP | {"WORLD_SIZE": "8"}, "WORLD_SIZE is 8, but srun started 4 processes"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "2(x2"}, "SLURM_STEP_TASKS_PER_NODE is '2(x2'"),
        (STEP | {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, "8 in all, but the step has 4"),
        (STEP | {"SLURM_NODEID": "2"}, "SLURM_NODEID is 2"),
        (STEP | {"SLURM_STEP_NODELIST": ""}, "names no node"),
        (STEP | {"SLURM_STEP_NODELIST": "n[1-99999999999]"}, "more than"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "2", "SLURM_HET_SIZE": "2"}, "SLURM_HET_SIZE"),
        (
            without(STEP, "SLURM_STEP_TASKS_PER_NODE") | {"SLURM_STEP_NUM_TASKS": "5"},
            "SLURM_STEP_TASKS_PER_NODE is not set",
        ),
    ],
)
def test_what_contradicts_itself_is_refused(variables: dict[str, str], words: str) -> None:
    with pytest.raises(RunError) as caught:
        find_environment("cpu", dict(variables))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "shell",
    [
        {"WORLD_SIZE": "4", "MASTER_PORT": "12345"},
        {"RANK": "0"},
        {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_PORT": "12345"},
    ],
)
def test_a_shells_variables_do_not_number_the_tasks_of_a_step(shell: dict[str, str]) -> None:
    environment = find_environment("cpu", STEP | shell)
    assert (environment.rank, environment.local_rank, environment.world_size) == (2, 0, 4)
    assert (environment.node_rank, environment.launcher) == (1, "srun")
    assert any("RANK=0" in note for note in environment.notes) == ("RANK" in shell)


def test_a_launcher_below_srun_or_mpirun_numbers_its_own_processes() -> None:
    own = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_PORT": "1"}
    for beneath in (STEP, OMPI | {"MASTER_ADDR": "10.0.0.1"}):
        environment = find_environment("cpu", beneath | own | {"TORCHELASTIC_RUN_ID": "x"})
        assert (environment.rank, environment.world_size, environment.launcher) == (5, 8, "torchrun")
        assert find_environment("cpu", beneath | own).world_size == 8


def test_an_address_elsewhere_is_not_used_within_one_node() -> None:
    variables = OMPI | {"MASTER_ADDR": "192.0.2.1"}
    environment = find_environment("cpu", variables)
    assert variables["MASTER_ADDR"] == "127.0.0.1"
    assert any("MASTER_ADDR=192.0.2.1" in note for note in environment.notes)
    variables = OMPI | {"MASTER_ADDR": "localhost"}
    assert find_environment("cpu", variables).notes == ()
    assert variables["MASTER_ADDR"] == "localhost"


@pytest.mark.parametrize(
    ("changes", "size", "noted"),
    [
        ({}, 2, True),
        ({"SLURM_TASKS_PER_NODE": "3,1"}, 1, False),
        ({"SLURM_TASKS_PER_NODE": "8"}, 2, True),
        ({"SLURM_STEP_NODELIST": "n1", "SLURM_NODEID": "0"}, 4, False),
    ],
)
def test_tasks_per_node_without_slurms_list(changes: dict[str, str], size: int, noted: bool) -> None:
    environment = find_environment("cpu", without(STEP, "SLURM_STEP_TASKS_PER_NODE") | changes)
    assert environment.local_world_size == size
    assert any("SLURM_STEP_TASKS_PER_NODE is not set" in note for note in environment.notes) == noted


def test_components_of_a_heterogeneous_job_that_are_counted_together() -> None:
    """As SLURM 22.05 sets them for `srun --het-group=0,1` of 2 and 1 tasks."""
    environment = find_environment(
        "cpu",
        STEP
        | {
            "SLURM_HET_SIZE": "2",
            "SLURM_NTASKS": "3",
            "SLURM_STEP_NUM_TASKS": "3",
            "SLURM_STEP_TASKS_PER_NODE": "2,1",
            "SLURM_NTASKS_HET_GROUP_0": "2",
            "SLURM_JOB_NUM_NODES_HET_GROUP_0": "1",
        },
    )
    assert (environment.rank, environment.world_size, environment.local_world_size) == (2, 3, 1)
    assert environment.nodes == ("n1", "n1", "n2")


def test_a_process_alone_in_a_job_of_several_tasks_says_so() -> None:
    environment = find_environment("cpu", {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"})
    assert (environment.world_size, environment.launcher) == (1, "alone")
    assert any("4 tasks" in note and "srun" in note for note in environment.notes)
    assert find_environment("cpu", {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1"}).notes == ()


def test_more_processes_than_gpus_are_refused_on_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    one_node = {"SLURM_STEP_NODELIST": "n1", "SLURM_NODEID": "0", "SLURM_STEP_TASKS_PER_NODE": "4"}
    for task in range(4):
        with pytest.raises(RunError, match="2 GPU"):
            find_environment(
                "auto", STEP | one_node | {"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}
            )
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(RunError, match="1 GPU"):
        find_environment("auto", dict(OMPI))
    assert find_environment("auto", OMPI | {"CUDA_VISIBLE_DEVICES": "3"}).device == torch.device("cuda", 0)


@pytest.mark.parametrize("text", ["", "NONE", "Unknown", "UNLIMITED", "0"])
def test_a_job_without_an_end(text: str) -> None:
    assert find_job_end({"SLURM_JOB_END_TIME": text}) is None


@pytest.mark.parametrize("text", ["4,2", "8(x2)", "", "0", "two"])
def test_cores_of_a_task_that_slurm_does_not_say(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = find_environment("cpu", dict(STEP))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", text)
    assert cores_per_rank(environment) >= 1


NAMES = [
    *OMPI,
    *HYDRA,
    *STEP,
    "PMIX_RANK",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_PORT",
]
VALUES = ["", "0", "1", "2", "4", "-1", "x", "1.5", "2(x2)", "n[1-2]", "127.0.0.1", "9" * 30, "\u0661"]


def test_whatever_the_variables_are_they_are_understood_or_refused() -> None:
    draw = random.Random(0)
    found = 0
    for _ in range(2000):
        variables = {name: draw.choice(VALUES) for name in draw.sample(NAMES, draw.randint(1, len(NAMES)))}
        variables |= draw.choice([{}, OMPI, HYDRA, STEP])
        try:
            environment = find_environment("cpu", dict(variables))
        except RunError:
            continue
        found += 1
        assert 0 <= environment.rank < environment.world_size
        assert 0 <= environment.local_rank < environment.local_world_size <= environment.world_size
        assert find_rank(variables)[0] == environment.rank
    assert found > 50


def test_a_node_list_is_expanded_or_refused() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        try:
            assert expand_hosts("".join(draw.choices("n12[]-,.x", k=draw.randint(0, 12))))
        except RunError:
            continue


needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs Open MPI's mpirun")
PLACES = (
    "import os\n"
    "from trainer.distributed.launchers import find_placement\n"
    "place = find_placement(os.environ)\n"
    "words = place.launcher, place.rank, place.local_rank, place.world_size, place.one_node\n"
    # One write a rank: parts of several would mix.
    "os.write(1, (' '.join(map(str, words)) + '\\n').encode())\n"
)
MEETING = (
    "import torch, torch.distributed as dist\n"
    "from trainer.distributed.environment import find_environment\n"
    "place = find_environment('cpu')\n"
    "dist.init_process_group('gloo')\n"
    "ranks = torch.zeros(2)\n"
    "ranks[place.rank] = place.local_rank + 1\n"
    "dist.all_reduce(ranks)\n"
    "print(place.launcher, place.world_size, ranks.tolist(), flush=True)\n"
)


def under_mpirun(script: str) -> list[str]:
    """What two processes that mpirun starts print, sorted."""
    root = ["--allow-run-as-root"] if os.geteuid() == 0 else []
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "PMI"))}
    result = subprocess.run(
        ["mpirun", *root, "--oversubscribe", "-n", "2", sys.executable, "-c", script],
        capture_output=True, text=True, timeout=200,
        env=clean | {"PYTHONPATH": str(Path(__file__).parents[3])},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return sorted(result.stdout.splitlines())


@needs_mpirun
def test_places_under_real_mpirun() -> None:
    assert under_mpirun(PLACES) == ["mpi 0 0 2 True", "mpi 1 1 2 True"]


@needs_mpirun
@pytest.mark.soak
def test_ranks_meet_under_real_mpirun() -> None:
    assert under_mpirun(MEETING) == ["mpi 2 [1.0, 2.0]"] * 2
