"""Finding one's place, from every launcher's variables."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch

from trainer.distributed.environment import describe_environment, find_environment
from trainer.distributed.slurm_step import expand_hosts, find_job_end
from trainer.errors import RunError

LAUNCHED = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SRUN = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3)",
    "SLURM_STEP_NODELIST": "localhost,other[1-2]",
}


def test_alone_on_a_free_loopback_port() -> None:
    variables: dict[str, str] = {}
    environment = find_environment("cpu", variables)
    assert (environment.rank, environment.local_rank) == (0, 0)
    assert (environment.world_size, environment.local_world_size) == (1, 1)
    assert environment.launcher == "alone"
    assert environment.is_main
    assert variables["MASTER_ADDR"] == "127.0.0.1"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", int(variables["MASTER_PORT"])))


@pytest.mark.parametrize(
    ("extra", "launcher"),
    [
        ({"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2"}, "torchrun"),
        ({"CROSS_SIZE": "2", "LOCAL_SIZE": "2"}, "deepspeed"),
        ({"LOCAL_WORLD_SIZE": "2"}, "variables"),
    ],
)
def test_a_launcher_s_variables(extra: dict[str, str], launcher: str) -> None:
    variables = LAUNCHED | extra
    environment = find_environment("cpu", variables)
    assert (environment.rank, environment.local_rank) == (3, 1)
    assert (environment.world_size, environment.local_world_size) == (4, 2)
    assert environment.launcher == launcher
    assert not environment.is_main
    assert variables["LOCAL_WORLD_SIZE"] == "2"
    assert variables["MASTER_ADDR"] == "10.0.0.1"


@pytest.mark.parametrize(
    ("variables", "one_node"),
    [
        ({}, True),
        (LAUNCHED | {"LOCAL_WORLD_SIZE": "4"}, True),
        (LAUNCHED | {"LOCAL_WORLD_SIZE": "2"}, False),
        (LAUNCHED, False),  # nobody says so: the others may be elsewhere
        (LAUNCHED | {"CROSS_SIZE": "1", "LOCAL_SIZE": "4"}, True),
        (SRUN, False),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "6", "SLURM_NODEID": "0", "SLURM_STEP_NODELIST": "a"}, True),
    ],
)
def test_what_is_known_to_be_on_one_node(variables: dict[str, str], one_node: bool) -> None:
    """There, ranks listen on loopback only."""
    assert find_environment("cpu", dict(variables)).one_node is one_node


def test_srun() -> None:
    variables = dict(SRUN)
    environment = find_environment("cpu", variables)
    assert (environment.rank, environment.local_rank) == (5, 1)
    assert (environment.world_size, environment.local_world_size) == (6, 2)
    assert environment.launcher == "srun"
    assert {name: variables[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")} == {
        "RANK": "5",
        "WORLD_SIZE": "6",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
    }
    assert variables["MASTER_ADDR"] == "localhost"


def test_all_tasks_of_a_step_agree_on_a_port_and_other_steps_take_another() -> None:
    def port(**changes: str) -> str:
        variables = SRUN | changes
        find_environment("cpu", variables)
        return variables["MASTER_PORT"]

    assert port() == port(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_NODEID="0")
    assert len({port(), port(SLURM_STEP_ID="3"), port(SLURM_JOB_ID="78")}) == 3


@pytest.mark.parametrize(
    ("nodes", "per_node", "node", "size"),
    [("a", "4", 0, 4), ("a,b,c", "4(x2),3", 1, 4), ("a,b,c", "4(x2),3", 2, 3)],
)
def test_tasks_per_node_may_differ(nodes: str, per_node: str, node: int, size: int) -> None:
    variables = SRUN | {
        "SLURM_STEP_NUM_TASKS": "11",
        "SLURM_STEP_TASKS_PER_NODE": per_node,
        "SLURM_NODEID": str(node),
        "MASTER_ADDR": "given",
    }
    environment = find_environment("cpu", variables)
    assert environment.local_world_size == size
    assert variables["MASTER_ADDR"] == "given"


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("localhost,x", "localhost"),
        ("local[host-z]", "localhost"),
        ("localho[st,u],x", "localhost"),
        ("loc[al-b]ho[st,u]", "localhost"),
        ("loc[al]host[]", "localhost"),
    ],
)
def test_the_first_host_of_a_node_list_listens(nodelist: str, host: str) -> None:
    variables = SRUN | {"SLURM_STEP_NODELIST": nodelist}
    find_environment("cpu", variables)
    assert variables["MASTER_ADDR"] == host


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("n1", ["n1"]),
        ("gpu[003-005,9],login1", ["gpu003", "gpu004", "gpu005", "gpu9", "login1"]),
        ("a,b[9-11]", ["a", "b9", "b10", "b11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("rack[1-2]-n[01-02],x", ["rack1-n01", "rack1-n02", "rack2-n01", "rack2-n02", "x"]),
        ("n[1,3].cluster,m", ["n1.cluster", "n3.cluster", "m"]),
    ],
)
def test_a_node_list_is_expanded(nodelist: str, hosts: list[str]) -> None:
    assert expand_hosts(nodelist) == hosts


def test_srun_tells_every_rank_s_node() -> None:
    variables = SRUN | {
        "SLURM_STEP_NODELIST": "localhost,gpu[02-03]",
        "SLURM_STEP_TASKS_PER_NODE": "1,3,2",
        "SLURMD_NODENAME": "gpu03",
        "MASTER_ADDR": "given",
    }
    environment = find_environment("cpu", dict(variables))
    assert (environment.node, environment.node_rank) == ("gpu03", 2)
    assert environment.nodes == ("localhost", "gpu02", "gpu02", "gpu02", "gpu03", "gpu03")
    # A list that contradicts the counts blames nobody.
    assert find_environment("cpu", variables | {"SLURM_STEP_NODELIST": "localhost,gpu[02-04]"}).nodes == ()


def test_other_launchers_tell_the_node_s_number_only() -> None:
    environment = find_environment("cpu", LAUNCHED | {"LOCAL_WORLD_SIZE": "2"})
    assert (environment.node, environment.node_rank, environment.nodes) == (socket.gethostname(), 1, ())
    assert find_environment("cpu", {}).node_rank == 0


def test_the_end_of_the_job() -> None:
    assert find_job_end({}) is None
    assert find_job_end({"SLURM_JOB_END_TIME": "1700000000"}) == 1.7e9
    with pytest.raises(RunError, match="SLURM_JOB_END_TIME is 'soon'"):
        find_job_end({"SLURM_JOB_END_TIME": "soon"})


def test_one_node_needs_no_name_that_resolves() -> None:
    variables = SRUN | {
        "SLURM_STEP_NODELIST": "no-such-host.invalid",
        "SLURM_STEP_TASKS_PER_NODE": "6",
        "SLURM_NODEID": "0",
    }
    find_environment("cpu", variables)
    assert variables["MASTER_ADDR"] == "127.0.0.1"


def test_a_first_node_without_address_is_named() -> None:
    with pytest.raises(RunError, match=r"no-such-host\.invalid.*set MASTER_ADDR"):
        find_environment("cpu", SRUN | {"SLURM_STEP_NODELIST": "no-such-host.invalid,b"})


def test_a_batch_script_without_srun_is_alone() -> None:
    batch = {name: SRUN[name] for name in ("SLURM_JOB_ID", "SLURM_NTASKS")}
    environment = find_environment("cpu", batch | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert environment.launcher == "alone"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "0"}, ["RANK set but WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT not"]),
        ({"WORLD_SIZE": "2", "MASTER_PORT": "1"}, ["WORLD_SIZE, MASTER_PORT set but RANK, LOCAL_RANK"]),
        (LAUNCHED | {"RANK": "4"}, ["RANK is 4 but WORLD_SIZE is 4"]),
        (LAUNCHED | {"RANK": "-1"}, ["RANK is '-1'"]),
        (LAUNCHED | {"WORLD_SIZE": "two"}, ["WORLD_SIZE is 'two'"]),
        (LAUNCHED | {"LOCAL_RANK": "2", "LOCAL_SIZE": "2"}, ["LOCAL_RANK is 2 but LOCAL_WORLD_SIZE is 2"]),
        (LAUNCHED | {"LOCAL_WORLD_SIZE": "8"}, ["LOCAL_WORLD_SIZE is 8 but WORLD_SIZE only 4"]),
        ({k: v for k, v in SRUN.items() if k != "SLURM_LOCALID"}, ["SLURM_PROCID set but SLURM_LOCALID not"]),
    ],
)
def test_contradictions_are_named(variables: dict[str, str], words: list[str]) -> None:
    with pytest.raises(RunError) as caught:
        find_environment("cpu", dict(variables))
    assert all(word in str(caught.value) for word in words)


def test_each_rank_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_environment("auto", dict(LAUNCHED)).device == torch.device("cuda", 1)
    assert find_environment("cpu", dict(LAUNCHED)).device == torch.device("cpu")
    with pytest.raises(RunError, match=r"LOCAL_RANK is 2, .* 2 GPU"):
        find_environment("auto", LAUNCHED | {"LOCAL_RANK": "2"})


def test_a_task_that_sees_one_gpu_only_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert find_environment("auto", dict(SRUN)).device == torch.device("cuda", 0)


def test_asking_for_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_environment("auto", {}).device == torch.device("cpu")
    with pytest.raises(RunError, match="no GPU"):
        find_environment("cuda", {})


def test_the_exported_variables_are_what_torch_distributed_reads() -> None:
    code = (
        "import torch.distributed as dist\n"
        "from trainer.distributed.environment import find_environment\n"
        "find_environment('cpu')\n"
        "dist.init_process_group('gloo')\n"
        "print(dist.get_rank(), dist.get_world_size())\n"
    )
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=True
    )
    assert result.stdout.split() == ["0", "1"]


def test_description_is_json_and_names_versions() -> None:
    description = json.loads(json.dumps(describe_environment()))
    assert description["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert description["hostname"] == socket.gethostname()
    assert description["cores"] >= 1
